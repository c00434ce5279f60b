"""Volumes and maps as files: what is read is what was written, and broken files are named, never guessed at."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from camtrain._errors import InputError
from camtrain.reporting.panel_files import (
    LAYOUT,
    UNDEFINED,
    CaseMap,
    PanelVolume,
    averaged,
    fitting_size,
    quantised,
    read_maps,
    read_volume,
    write_maps,
    write_volume,
)

IMAGE = np.random.default_rng(0).normal(0, 1, (1, 9, 7, 5)).astype(np.float32)


def volume(**options):
    allowed = {"a": IMAGE[0] > 0, "b": IMAGE[0] > 1, "c": IMAGE[0] > 0}
    return PanelVolume.make("case <1>", IMAGE, allowed=allowed, **options)


def test_a_volume_comes_back(tmp_path):
    made = volume(spacing=(1, 2, 3), axes="LPS", split="test")
    write_volume(tmp_path / "a.npz", made)
    back = read_volume(tmp_path / "a.npz")
    assert (back.case, back.split, back.axes, back.spacing) == ("case <1>", "test", "LPS", (1, 2, 3))
    assert back.shape == (9, 7, 5)
    np.testing.assert_array_equal(back.image, made.image)
    np.testing.assert_array_equal(back.regions, [IMAGE[0] > 0, IMAGE[0] > 1])
    assert back.region_of == {"a": 0, "b": 1, "c": 0}
    # Grey values can be turned back into the image's, within the window and half a step.
    low, high = back.window
    again = low + back.image * (high - low) / 255
    assert np.abs(again - IMAGE[0].clip(low, high)).max() <= 0.51 * (high - low) / 255


def test_a_large_volume_is_averaged_down_and_keeps_its_extent():
    made = volume(budget=60, spacing=(1, 1, 1))
    assert made.image.size <= 60
    assert made.regions.shape[1:] == made.image.shape
    assert made.voxel == pytest.approx([n / k for n, k in zip((9, 7, 5), made.image.shape, strict=True)])
    whole = volume()
    np.testing.assert_allclose(made.image.mean(), whole.image.mean(), atol=3)
    smaller = whole.smaller(60)
    np.testing.assert_array_equal(smaller.regions, made.regions)
    assert np.abs(smaller.image.astype(int) - made.image.astype(int)).max() <= 1
    assert whole.smaller(10_000) is whole


def test_averages_against_sums_over_fine_parts():
    values = np.random.default_rng(1).random((7, 5))
    fine = values.repeat(3, axis=0).repeat(2, axis=1)  # 21 x 10: both sizes divide it
    expected = fine.reshape(3, 7, 2, 5).mean(axis=(1, 3))
    np.testing.assert_allclose(averaged(values, (3, 2)), expected, rtol=1e-5)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 5000))
def test_sizes_fit(shape, budget):
    size = fitting_size(shape, budget)
    assert math.prod(size) <= budget
    assert all(1 <= small <= full for small, full in zip(size, shape, strict=True))


@settings(max_examples=60)
@example(np.full((3, 4), 3.71e-43, np.float32))
@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(width=32)))
def test_quantising_is_within_half_a_step(values):
    cells, scale = quantised(values)
    finite = np.isfinite(values)
    assert (cells[~finite] == UNDEFINED).all()
    assert (cells[finite] != UNDEFINED).all()
    wrong = np.abs(cells[finite].astype(np.float64) * scale - values[finite].astype(np.float64))
    # Below the smallest normal number nothing is promised.
    assert (wrong <= 0.501 * scale + 1e-300).all()
    assert not scale or np.abs(cells[finite].astype(int)).max() == 127


def test_maps_come_back(tmp_path):
    rng = np.random.default_rng(0)
    values = [rng.normal(0, 10.0**k, (4, 3, 2)).astype(np.float32) for k in (-6, 0, 6)]
    values.append(np.full((2, 2, 2), np.nan, np.float32))
    maps = [CaseMap(f"é<{i}>", "l", float(i % 2), 0.5, "cam", "x" * i, v, 0.1 * i) for i, v in enumerate(values)]
    maps.append(CaseMap("z", "l", math.nan, math.nan, "cam", "", np.zeros((2, 2, 2)), math.nan))
    write_maps(tmp_path / "maps.npz", maps, epoch=3, step=70, split="test")
    about, back = read_maps(tmp_path / "maps.npz")
    assert about == {"epoch": 3, "step": 70, "split": "test"}
    for one, two in zip(maps, back, strict=True):
        assert (one.case, one.label, one.method, one.layer) == (two.case, two.label, two.method, two.layer)
        finite = one.values[np.isfinite(one.values)]
        np.testing.assert_allclose(two.values(), one.values, atol=np.abs(finite).max(initial=0) / 250)
    assert [m.inside for m in back] == [0.0, 0.1, 0.2, 0.3, None]
    assert (back[-1].truth, back[-1].probability) == (None, None)


def test_the_files_are_plain_arrays(tmp_path):
    write_maps(tmp_path / "maps.npz", [CaseMap("c", "l", 1.0, 0.5, "cam", "", np.ones((2, 2)))], epoch=0, step=1)
    with np.load(tmp_path / "maps.npz", allow_pickle=False) as file:
        assert {name: file[name].dtype for name in file.files} == {"header": np.uint8, "cells": np.int8}
        assert json.loads(file["header"].tobytes())["layout"] == LAYOUT


def damaged(path, how):
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not an archive")
    elif how == "flipped":
        middle = len(content) // 3
        path.write_bytes(
            content[:middle] + bytes(255 - b for b in content[middle : middle + 40]) + content[middle + 40 :]
        )
    elif how == "pickled":
        with path.open("wb") as file:
            np.savez(file, header=np.array([{"layout": LAYOUT}], dtype=object))
    else:
        header = np.frombuffer(json.dumps({"layout": 99 if how == "foreign" else LAYOUT}).encode(), np.uint8)
        with path.open("wb") as file:
            np.savez(file, header=header)


WAYS = ["cut", "empty", "text", "flipped", "pickled", "foreign", "hollow"]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("kind", ["maps", "volume"])
def test_damaged_files_are_named(tmp_path, how, kind):
    path = tmp_path / f"{kind}.npz"
    if kind == "maps":
        write_maps(path, [CaseMap("c", "l", 1.0, 0.5, "cam", "", IMAGE[0])], epoch=0, step=1)
    else:
        write_volume(path, volume())
    damaged(path, how)
    with pytest.raises(InputError, match=f"{kind}.npz: .*({'layout 99' if how == 'foreign' else ''})"):
        read_maps(path) if kind == "maps" else read_volume(path)


def test_more_axes_than_can_be_shown():
    with pytest.raises(InputError, match="1, 2 or 3 spatial axes"):
        PanelVolume.make("c", np.zeros((1, 2, 2, 2, 2)))


def test_a_photograph_becomes_grey():
    made = PanelVolume.make("c", np.stack([np.eye(4), np.zeros((4, 4)), np.zeros((4, 4))]))
    assert made.image.shape == (4, 4)
    assert (made.image[0, 0] > made.image[0, 1]).all()
