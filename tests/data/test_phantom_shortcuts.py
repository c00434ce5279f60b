"""Markers: outside the organs or inside the right one, as often as asked, and each unlike the others."""

import numpy as np
import pytest

from camtrain.data.phantom import LABELS, Phantom, unpack
from camtrain.data.phantom_findings import FINDINGS
from camtrain.data.phantom_shortcuts import MARKERS, METAL

SIZE = (32, 26, 34)
NONE = dict.fromkeys(LABELS, False)


def marked(name, place, index=0, size=SIZE, label=NONE):
    return Phantom(size=size, shortcut_at=place).case("train", index, label=label, marker=NONE | {name: True})


@pytest.mark.parametrize("name", LABELS)
class TestPlaces:
    @pytest.mark.parametrize("size", [SIZE, (16, 16, 16), (48, 36, 48)])
    def test_skin_means_outside_all_organs(self, name, size):
        for index in range(4):
            case = marked(name, "skin", index, size, label=dict.fromkeys(LABELS, index % 2 == 0))
            marker = unpack(case.marker_bits, [name])[0]
            assert marker.sum() >= 3
            assert (case.organs[marker] == 0).all()

    def test_other_organ_belongs_to_another_label_only(self, name):
        for index in range(4):
            case = marked(name, "other_organ", index, label=dict.fromkeys(LABELS, index % 2 == 0))
            marker = unpack(case.marker_bits, [name])[0]
            assert marker.any()
            (organ,) = np.unique(case.organs[marker])
            assert organ not in FINDINGS[name].organs
            assert any(organ in f.organs for f in FINDINGS.values())

    def test_own_organ(self, name):
        for index in range(4):
            case = marked(name, "own_organ", index)
            marker = unpack(case.marker_bits, [name])[0]
            assert marker.any()
            assert set(np.unique(case.organs[marker])) <= set(FINDINGS[name].organs)

    @pytest.mark.parametrize("place", ["skin", "other_organ", "own_organ"])
    def test_changes_its_voxels_only_and_shines(self, name, place):
        case = marked(name, place)
        plain = Phantom(size=SIZE).case("train", 0, label=NONE, marker=NONE)
        marker = unpack(case.marker_bits, [name])[0]
        assert (case.hu[marker] == METAL).all()
        assert np.array_equal(case.hu[~marker], plain.hu[~marker])
        assert np.array_equal(case.organs, plain.organs)


@pytest.mark.parametrize("place", ["skin", "other_organ", "own_organ"])
def test_every_label_has_its_own_marker(place):
    regions = [unpack(marked(name, place).marker_bits, [name])[0] for name in LABELS]
    assert list(MARKERS) == list(LABELS)
    for i, one in enumerate(regions):
        for other in regions[:i]:
            assert (one & other).sum() <= 0.3 * min(one.sum(), other.sum())


def agreement(split, cases=1500, **kwargs):
    """Share of cases in which a marker says what its label says, per label."""
    phantom = Phantom(**kwargs)
    truths = [phantom._draw_label("test" if "shift" in split else split, i) for i in range(cases)]
    marks = [phantom._draw_marker(split, i, t) for i, t in enumerate(truths)]
    return np.mean([[t[n] == m[n] for n in phantom.labels] for t, m in zip(truths, marks, strict=True)], axis=0)


@pytest.mark.parametrize(
    ("split", "shortcut", "expected"),
    [
        *(("train", 0.95, 0.95), ("val", 0.95, 0.95), ("test", 0.95, 0.95), ("train", 0.5, 0.5), ("train", 1.0, 1.0)),
        *(("shift_random", 0.95, 0.5), ("shift_reversed", 0.95, 0.05), ("shift_reversed", 0.7, 0.3)),
    ],
)
def test_markers_agree_as_often_as_asked(split, shortcut, expected):
    assert agreement(split, shortcut=shortcut) == pytest.approx([expected] * 8, abs=0.05)


def test_a_reversed_marker_is_present_without_the_finding():
    phantom = Phantom(shortcut=1.0)
    for i in range(20):
        truth = phantom._draw_label("test", i)
        assert phantom._draw_marker("shift_reversed", i, truth) == {n: not v for n, v in truth.items()}
        assert phantom._draw_marker("test", i, truth) == truth


@pytest.mark.parametrize(("split", "shortcut"), [("train", None), ("shift_random", None), ("shift_free", 0.95)])
def test_no_markers(split, shortcut):
    for i in range(4):
        case = Phantom(size=(20, 18, 20), shortcut=shortcut).case(split, i)
        assert not case.marker.any()
        assert not case.marker_bits.any()


def test_drawn_markers_are_painted():
    for i in range(10):
        case = Phantom(size=(24, 20, 24), shortcut=0.5).case("train", i)
        assert unpack(case.marker_bits, LABELS).any((1, 2, 3)).tolist() == case.marker.tolist()
