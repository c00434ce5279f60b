"""CTF, wedge and noise against loops and formulas written anew."""

from __future__ import annotations

import math

import numpy as np
import pytest

from camtrain import InputError
from camtrain.data.cryoet import CryoET
from camtrain.data.cryoet_optics import Optics, contrast_transfer, frequencies, passed, tilt_wedge, wavelength

SIZE = (6, 5, 8)


def cycles(index, n, voxel):
    """Signed frequency of one entry of a spectrum, in cycles per nm."""
    return (index if index < n / 2 else index - n) / (n * voxel)


def each_frequency(size, voxel):
    for at in np.ndindex(*size):
        yield at, [cycles(i, n, voxel) for i, n in zip(at, size, strict=True)]


@pytest.mark.parametrize("kilovolt", [100.0, 200.0, 300.0])
def test_wavelength_is_de_broglies(kilovolt):
    h, m, e, c = 6.62607015e-34, 9.1093837e-31, 1.602176634e-19, 299792458.0
    energy = e * kilovolt * 1e3
    expected = h / math.sqrt(2 * m * energy * (1 + energy / (2 * m * c * c)))
    assert wavelength(kilovolt) == pytest.approx(1e9 * expected, rel=2e-4)


@pytest.mark.parametrize(("defocus", "voxel"), [(-5.0, 1.0), (2.5, 0.6)])
def test_contrast_transfer_against_a_loop(defocus, voxel):
    transfer, _ = Optics(defocus=defocus, voxel=voxel, kilovolt=200.0, cs=2.7, envelope=0.5).filters(SIZE)
    wave, nyquist = wavelength(200.0) * 1e-9, 1 / (2 * voxel * 1e-9)
    for at, f in each_frequency(SIZE, voxel):
        q = 1e9 * math.sqrt(sum(part**2 for part in f))  # in SI units, unlike the code
        phase = math.pi / 2 * (2.7e-3 * wave**3 * q**4 - 2 * defocus * 1e-6 * wave * q**2)
        assert transfer[at] == pytest.approx(math.sin(phase) * math.exp(-((q / (0.5 * nyquist)) ** 2)), abs=1e-12)


def test_contrast_transfer_starts_at_nothing_and_turns_where_it_should():
    q = np.linspace(0, 0.4, 4000)
    bright = contrast_transfer(q, -5.0, 0.5, cs=0.0, envelope=10.0)
    np.testing.assert_allclose(contrast_transfer(q, 5.0, 0.5, cs=0.0, envelope=10.0), -bright)
    assert bright[0] == 0
    turn = q[1:][np.diff(np.sign(bright)) < 0][0]
    assert turn == pytest.approx(1 / math.sqrt(5000 * wavelength(300.0)), rel=2e-3)


@pytest.mark.parametrize("tilt", [30.0, 60.0, 80.0])
def test_wedge_against_angles(tilt):
    voxel = 1.3
    wedge = tilt_wedge(frequencies(SIZE, voxel), tilt)
    for at, (x, _, z) in each_frequency(SIZE, voxel):
        # A projection at an angle t measures the plane of direction (cos t, sin t) in x and z.
        assert wedge[at] == (x == z == 0 or math.degrees(math.atan2(abs(z), abs(x))) <= tilt + 1e-6), at


def test_complete_tilt_misses_nothing_and_corners_are_cut():
    assert tilt_wedge(frequencies(SIZE, 1.0), 90.0).all()
    _, kept = Optics(tilt=90.0, voxel=2.0).filters(SIZE)
    for at, f in each_frequency(SIZE, 2.0):
        assert kept[at] == (math.sqrt(sum(part**2 for part in f)) <= 0.25)


def test_spectrum_is_cut_to_what_is_measured():
    optics = Optics(snr=0.5, tilt=50.0)
    image = optics.expose(np.random.default_rng(0).random((7, 8, 9)), np.random.default_rng(1))
    _, kept = optics.filters(image.shape)
    power = np.abs(np.fft.fftn(image)) ** 2
    assert power[~kept].max() < 1e-20 * power.max()
    assert power[kept].min() >= 0
    assert (power[kept] > 1e-6 * power.max()).mean() > 0.9


def test_without_noise_and_filters_a_smooth_volume_comes_back():
    x, y, z = np.ogrid[:12, :10, :14]
    smooth = np.cos(2 * np.pi * x / 12) + np.cos(2 * np.pi * y / 10) * np.sin(2 * np.pi * z / 14)
    image = Optics(tilt=90.0, defocus=None).expose(smooth, np.random.default_rng(0))
    np.testing.assert_allclose(image, smooth, atol=1e-12)


def test_passed_is_the_variance_that_noise_keeps():
    optics, size = Optics(defocus=-3.0), (14, 10, 12)
    transfer, kept = optics.filters(size)
    factor, rng = transfer * kept, np.random.default_rng(0)
    found = [np.fft.ifftn(np.fft.fftn(rng.standard_normal(size)) * factor).real.var() for _ in range(300)]
    assert passed(factor) == pytest.approx(np.mean(found), rel=0.03)


@pytest.mark.parametrize(
    "optics",
    [Optics(snr=0.1), Optics(snr=0.5, tilt=40.0, voxel=1.2), Optics(snr=2.0, tilt=90.0, defocus=None)],
    ids=repr,
)
def test_stated_snr_from_two_independent_repeats(optics):
    """What two exposures of a particle share is signal: SNR = rho / (1 - rho)."""
    data = CryoET(size=(24, 20, 22), optics=optics)
    found = []
    for index in range(30):
        one, two = (data.case("train", index, exposure=n).image.ravel() for n in (0, 1))
        found.append(np.corrcoef(one, two)[0, 1])
    rho = float(np.mean(found))
    assert rho / (1 - rho) == pytest.approx(optics.snr, rel=0.08)


def test_half_of_the_noise_comes_through_the_contrast_transfer_function():
    optics, size = Optics(snr=0.2), (20, 18, 16)
    density = np.random.default_rng(0).random(size)
    signal = Optics().expose(density, np.random.default_rng(0))
    power = np.zeros(size)
    for seed in range(60):
        power += np.abs(np.fft.fftn(optics.expose(density, np.random.default_rng(seed)) - signal)) ** 2 / 60
    transfer, kept = optics.filters(size)
    kept = kept.copy()
    kept[0, 0, 0] = False
    columns = np.stack([transfer[kept] ** 2, np.ones(kept.sum())], axis=1)
    (around, camera), *_ = np.linalg.lstsq(columns, power[kept] / density.size**2, rcond=None)
    half = signal.var() / 0.2 / 2
    assert around * columns[:, 0].sum() == pytest.approx(half, rel=0.1)
    assert camera * columns[:, 1].sum() == pytest.approx(half, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"snr": 0.0}, "snr expects"),
        ({"snr": math.inf}, "None is a volume without noise"),
        ({"tilt": 0.0}, "tilt expects"),
        ({"tilt": 91.0}, "tilt expects"),
        ({"defocus": 0.0}, "None = no contrast"),
        ({"voxel": -1.0}, "voxel expects"),
        ({"envelope": math.nan}, "envelope expects"),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        Optics(**arguments)
