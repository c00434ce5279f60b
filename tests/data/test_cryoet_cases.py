"""Particles: their solids, how they lie, and that a case follows from seed, split and index alone."""

from __future__ import annotations

import numpy as np
import pytest

from camtrain import InputError
from camtrain.data.cryoet import CLASSES, CryoET
from camtrain.data.cryoet_optics import Optics
from camtrain.data.cryoet_shapes import REACH, SHAPES, density_of, placed, rotation

STEP = np.hypot(2 * 3.5 * np.sin(np.pi / 16), 5 / 16)  # between the 33 balls of the helix, nm
VOLUMES = {
    "globule": 4 / 3 * np.pi * 4.5**3,
    "shell": 4 / 3 * np.pi * (6**3 - 4**3),
    "rod": np.pi * 1.8**2 * 12 + 4 / 3 * np.pi * 1.8**3,
    "torus": 2 * np.pi**2 * 4.5 * 1.7**2,
    "tetramer": 4 * 4 / 3 * np.pi * 2.4**3,
    "barrel": np.pi * (4.6**2 - 2.2**2) * 11,
    "disc": np.pi * 5.5**2 * 2.6,
    "helix": 33 * 4 / 3 * np.pi * 1.3**3 - 32 * np.pi * (4 * 1.3 + STEP) * (2 * 1.3 - STEP) ** 2 / 12,
}


def distance(name, size=(70, 66, 68), voxel=0.25, seed=0, shift=(0.3, -0.2, 0.1)):
    return SHAPES[name](placed(size, voxel, rotation(np.random.default_rng(seed)), shift))


@pytest.mark.parametrize("name", VOLUMES)
def test_solids_have_the_volume_that_geometry_gives_them(name):
    found = (distance(name) < 0).sum() * 0.25**3
    assert found == pytest.approx(VOLUMES[name], rel=0.02)


@pytest.mark.parametrize("name", CLASSES)
def test_no_particle_reaches_farther_than_stated(name):
    size = (70, 70, 70)
    inside = distance(name, size, shift=(0, 0, 0)) < 0
    radius = np.sqrt(sum(c**2 for c in placed(size, 0.25, np.eye(3), (0, 0, 0))))
    assert 4 < radius[inside].max() <= REACH


@pytest.mark.parametrize("name", CLASSES)
def test_no_particle_touches_the_border_of_the_smallest_volume(name):
    data = CryoET(size=(20, 22, 20), classes=(name,))
    for index in range(6):
        inside = data.case("train", index).particle
        assert inside.any()
        for axis in range(3):
            assert not inside.take([0, -1], axis=axis).any()


def test_density_is_a_sigmoid_of_the_distance():
    d = np.linspace(-8, 8, 33)
    np.testing.assert_allclose(density_of(d), 1 / (1 + np.exp(d / 0.6)), atol=1e-6)


def test_only_the_helix_is_not_its_mirror_image():
    p = placed((41, 41, 41), 0.4, np.eye(3), (0, 0, 0))
    mirrors = [(p[1], p[0], p[2]), (p[0], -p[1], p[2])]
    same = {name for name, shape in SHAPES.items() if any(np.allclose(shape(m), shape(p)) for m in mirrors)}
    assert same == set(CLASSES) - {"helix"}


def test_rotations_are_uniform():
    rng = np.random.default_rng(0)
    turns = np.stack([rotation(rng) for _ in range(6000)])
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.broadcast_to(np.eye(3), turns.shape), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(turns), 1)
    # Of the uniform distribution: every entry has mean 0 and mean square 1/3, the trace mean 0 and mean square 1.
    np.testing.assert_allclose(turns.mean(0), 0, atol=0.035)
    np.testing.assert_allclose((turns**2).mean(0), 1 / 3, atol=0.02)
    trace = np.trace(turns, axis1=1, axis2=2)
    assert abs(trace.mean()) < 0.05
    assert (trace**2).mean() == pytest.approx(1, abs=0.06)


def test_a_rod_points_where_it_is_turned_and_lies_where_it_is_shifted():
    turn, shift, voxel = rotation(np.random.default_rng(3)), np.array([1.0, -2.0, 0.5]), 0.5
    inside = np.argwhere(SHAPES["rod"](placed((50, 46, 48), voxel, turn, shift)) < 0) * voxel
    middle = (np.array([50, 46, 48]) - 1) / 2 * voxel
    np.testing.assert_allclose(inside.mean(0) - middle, shift, atol=0.05)
    axis = np.linalg.eigh(np.cov(inside.T))[1][:, -1]
    assert abs(axis @ turn[:, 2]) == pytest.approx(1, abs=1e-3)


def test_a_case_follows_from_seed_split_and_index_alone():
    data = CryoET(size=(20, 24, 22), optics=Optics(snr=0.1))
    first = data.case("val", 7)
    data.case("train", 3)
    np.random.default_rng(0).random(9)
    again = CryoET(size=(20, 24, 22), optics=Optics(snr=0.1)).case("val", 7)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.distance, again.distance)
    others = [data.case("val", 17), data.case("train", 7), data.case("test", 7)]
    others.append(CryoET(size=(20, 24, 22), optics=Optics(snr=0.1), seed=1).case("val", 7))
    for other in others:
        assert other.label == first.label
        assert not np.array_equal(other.distance, first.distance)
        assert not np.array_equal(other.image, first.image)


def test_images_are_scaled_and_what_is_asked_for():
    case = CryoET(size=(20, 24, 22), optics=Optics(snr=0.3)).case("train", 12)
    assert case.image.shape == case.distance.shape == case.particle.shape == (20, 24, 22)
    assert case.image.dtype == np.float32
    assert abs(case.image.mean()) < 1e-5
    assert case.image.std() == pytest.approx(1, abs=1e-5)
    assert (case.id, case.label) == ("train-00012", CLASSES[2])


def test_an_exposure_changes_the_noise_and_a_class_the_particle():
    data = CryoET(optics=Optics(snr=0.1))
    case, other = data.case("test", 4), data.case("test", 4, exposure=1)
    np.testing.assert_array_equal(case.distance, other.distance)
    assert not np.array_equal(case.image, other.image)
    named = data.case("test", 4, label="barrel")
    assert named.label == "barrel"
    # Turned and shifted likewise, so that the middles are one.
    p, q = (np.argwhere(c.particle).mean(0) for c in (named, data.case("test", 4, label="globule")))
    np.testing.assert_allclose(p, q, atol=0.3)


def test_noise_free_split_holds_the_particles_of_test():
    data = CryoET(optics=Optics(snr=0.1))
    noisy, clean = data.case("test", 5), data.case("noise_free", 5)
    np.testing.assert_array_equal(noisy.distance, clean.distance)
    expected = CryoET(optics=Optics(snr=None)).case("test", 5)
    np.testing.assert_array_equal(clean.image, expected.image)
    assert 0.1 < np.corrcoef(noisy.image.ravel(), clean.image.ravel())[0, 1] < 0.6


def test_classes_take_turns_in_the_order_given():
    data = CryoET(classes=("torus", "rod", "shell"))
    assert [data.case("train", i).label for i in range(5)] == ["torus", "rod", "shell", "torus", "rod"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"classes": ()}, "different names"),
        ({"classes": ("rod", "rod")}, "different names"),
        ({"classes": ("rodd",)}, "rod"),
        ({"size": (24, 24)}, "three positive"),
        ({"size": (24, 19, 24)}, "at least 20 nm .* got 19 voxels of 1 nm"),
        ({"optics": Optics(voxel=0.5)}, "raise size= or voxel="),
        ({"seed": -1}, "seed expects"),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        CryoET(**arguments)


def test_unknown_splits_and_classes_are_refused():
    with pytest.raises(InputError, match=r"split does not know 'tset'.*test"):
        CryoET().case("tset", 0)
    with pytest.raises(InputError, match="label does not know"):
        CryoET().case("test", 0, label="ribosome")
