"""What a tilted electron microscope does to a volume: contrast transfer, missing wedge, noise of a stated strength.

Lengths are in nm, spatial frequencies in cycles per nm. Spectra are those of `numpy.fft.fftn`, the zero frequency
first. The specimen is tilted around y, the second axis; the beam runs along z, the third.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camtrain._errors import InputError

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]


def wavelength(kilovolt: float) -> float:
    """Wavelength of electrons in nm, relativistic.

    Example:
        >>> round(1000 * wavelength(300.0), 3)  # picometres
        1.969
    """
    volt = 1000 * kilovolt
    return 0.1 * math.sqrt(150.4 / (volt * (1 + volt / 1_022_000)))


def frequencies(size: Sequence[int], voxel: float) -> list[Floats]:
    """Frequency along each axis in cycles per nm, as thin arrays that broadcast to the spectrum.

    Args:
        size: Voxels per axis.
        voxel: Edge of a voxel in nm.

    Example:
        >>> [f.shape for f in frequencies((4, 6), 1.0)], frequencies((4, 6), 2.0)[0].ravel().tolist()
        ([(4, 1), (1, 6)], [0.0, 0.125, -0.25, -0.125])
    """
    return list(np.meshgrid(*(np.fft.fftfreq(n, voxel) for n in size), indexing="ij", sparse=True))


def contrast_transfer(
    q: Floats, defocus: float, nyquist: float, kilovolt: float = 300.0, cs: float = 2.0, envelope: float = 0.4
) -> Floats:
    """Contrast transfer function with an envelope, as cryo-ET simulators use it.

    sin(pi/2 (Cs lambda^3 q^4 - 2 Dz lambda q^2)) exp(-(q / (envelope nyquist))^2): 0 at the zero frequency, so that the
    mean density is lost, and of changing sign, so that a particle gets a halo.

    Args:
        q: Magnitude of the spatial frequency, cycles per nm.
        defocus: Dz in micrometres. Negative: dense matter is bright; positive: dark.
        nyquist: Highest frequency along an axis, 1 / (2 voxel).
        kilovolt: Voltage.
        cs: Spherical aberration in mm.
        envelope: Frequency at which the envelope has fallen to 1/e, as a share of `nyquist`.

    Returns:
        The factor of each frequency, of the shape of `q`.

    Example:
        >>> contrast_transfer(np.array([0.0, 0.1, 0.2]), -5.0, nyquist=0.5).round(3).tolist()
        [0.0, 0.237, 0.348]
    """
    wave = wavelength(kilovolt)
    phase = np.pi / 2 * (1e6 * cs * wave**3 * q**4 - 2 * 1e3 * defocus * wave * q**2)
    factor: Floats = np.sin(phase) * np.exp(-((q / (envelope * nyquist)) ** 2))
    return factor


def tilt_wedge(freq: Sequence[Floats], tilt: float) -> Bools:
    """Frequencies that a tilt series from -tilt to +tilt degrees around y measures: |z| <= tan(tilt) |x|.

    Args:
        freq: Frequencies along x, y and z that broadcast to the spectrum.
        tilt: Largest tilt in degrees; 90 = nothing is missing.

    Example:
        >>> wedge = tilt_wedge(frequencies((32, 8, 32), 1.0), 60.0)
        >>> wedge.shape, round(float(wedge.mean()), 2)
        ((32, 8, 32), 0.71)
    """
    x, y, z = freq
    if tilt >= 90:
        return np.ones(np.broadcast_shapes(x.shape, y.shape, z.shape), bool)
    # A little more than nothing, or rounding would decide on the planes at exactly the largest tilt.
    measured = np.abs(z) <= math.tan(math.radians(tilt)) * np.abs(x) * (1 + 1e-9)
    return np.broadcast_to(measured, np.broadcast_shapes(measured.shape, y.shape))


@dataclass(frozen=True)
class Optics:
    """How a volume is imaged.

    Args:
        snr: Variance of the signal over that of the noise, both after the missing wedge; None = no noise.
        tilt: Largest tilt in degrees, 0 to 90; 90 = no missing wedge.
        defocus: In micrometres, negative as in `contrast_transfer`; None = no contrast transfer function.
        voxel: Edge of a voxel in nm.
        kilovolt: Voltage.
        cs: Spherical aberration in mm.
        envelope: As in `contrast_transfer`.

    Raises:
        InputError: An argument is out of range.

    Example:
        >>> ball = np.zeros((8, 8, 8)); ball[3:5, 3:5, 3:5] = 1
        >>> Optics(snr=0.1).expose(ball, np.random.default_rng(0)).shape
        (8, 8, 8)
    """

    snr: float | None = None
    tilt: float = 60.0
    defocus: float | None = -5.0
    voxel: float = 1.0
    kilovolt: float = 300.0
    cs: float = 2.0
    envelope: float = 0.4

    def __post_init__(self) -> None:
        if self.snr is not None and not (math.isfinite(self.snr) and self.snr > 0):
            raise InputError(f"snr expects a positive number or None, got {self.snr}: None is a volume without noise")
        if not 0 < self.tilt <= 90:
            raise InputError(f"tilt expects degrees above 0 and up to 90, got {self.tilt}: 60 is usual, 90 = complete")
        if self.defocus is not None and not (math.isfinite(self.defocus) and self.defocus != 0):
            raise InputError(f"defocus expects micrometres, not 0, got {self.defocus}: None = no contrast transfer")
        for word in ("voxel", "kilovolt", "envelope"):
            if not (math.isfinite(getattr(self, word)) and getattr(self, word) > 0):
                raise InputError(f"{word} expects a positive number, got {getattr(self, word)}")

    def filters(self, size: Sequence[int]) -> tuple[Floats, Bools]:
        """The contrast transfer function, and which frequencies are kept (wedge, and no corners beyond Nyquist).

        Args:
            size: Voxels per axis, three numbers.

        Returns:
            Both of the shape of the spectrum.
        """
        freq, nyquist = frequencies(size, self.voxel), 0.5 / self.voxel
        q = np.sqrt(np.add.reduce([np.broadcast_to(f**2, size) for f in freq]))
        kept = tilt_wedge(freq, self.tilt) & (q <= nyquist)
        if self.defocus is None:
            return np.ones(tuple(size)), kept
        return contrast_transfer(q, self.defocus, nyquist, self.kilovolt, self.cs, self.envelope), kept

    def expose(self, density: Floats, rng: np.random.Generator) -> Floats:
        """Image a density.

        Half of the noise's variance comes from before the contrast transfer function (what surrounds the particle),
        half from behind it (the camera). Both are scaled by the variance that white noise is expected to keep behind
        its filters, so that the stated SNR holds on average over draws and is not forced on each.

        Args:
            density: (X, Y, Z).
            rng: Where the noise comes from.

        Returns:
            (X, Y, Z), not normalised.
        """
        transfer, kept = self.filters(density.shape)
        signal = _filtered(density, transfer * kept)
        if self.snr is None:
            return signal
        share = float(signal.var()) / self.snr / 2
        around, camera = (
            rng.standard_normal(density.shape) * math.sqrt(share / passed(filters))
            for filters in (transfer * kept, kept)
        )
        return signal + _filtered(around, transfer * kept) + _filtered(camera, kept)


def passed(factor: NDArray[Any]) -> float:
    """Variance that white noise of variance 1 is expected to keep behind a filter; its mean does not count.

    Args:
        factor: Real factor of each frequency, the zero frequency first.

    Example:
        >>> passed(np.ones((4, 5)))  # all but the mean
        0.95
    """
    power = np.square(factor, dtype=np.float64)
    return float((power.sum() - power.flat[0]) / power.size)


def _filtered(volume: Floats, factor: NDArray[Any]) -> Floats:
    found: Floats = np.fft.ifftn(np.fft.fftn(volume) * factor).real
    return found
