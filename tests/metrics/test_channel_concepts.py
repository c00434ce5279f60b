"""ChannelConcepts against Network Dissection written out voxel by voxel, and what a name must not depend on."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed, multiprocessing

from camtrain._errors import InputError
from camtrain._grid import occupancy
from camtrain.metrics.channel_concepts import ChannelConcepts, channel_concepts

# The public function bears the name of its file.
module = importlib.import_module("camtrain.metrics.channel_concepts")

GRID, FACTOR = (3, 4, 2), 2
SIZE = tuple(n * FACTOR for n in GRID)
BIN = 2 ** (1 / module.PER_OCTAVE)


def data(cases=6, channels=5, concepts=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    responses = torch.randn(cases, channels, *GRID, generator=generator).exp() - 0.7
    responses[:, 1] = -responses[:, 1].abs()  # never responds
    responses[:, 2] = responses[:, 2].clamp(min=0)
    ids = torch.randint(0, concepts + 1, (cases, 1, *SIZE), generator=generator)
    masks = torch.cat([ids == i for i in range(1, concepts + 1)], dim=1)
    return responses.to(dtype), masks


def by_voxel(responses, masks, table):
    """IoU of upsampled units and masks, counted over voxels at the thresholds of the table."""
    up = responses.double().numpy()
    for axis in range(2, up.ndim):
        up = up.repeat(FACTOR, axis=axis)
    found = np.zeros(table.iou.shape)
    for k in range(up.shape[1]):
        lit = up[:, k] >= float(table.threshold[k])  # NaN: nothing is lit
        for o in range(masks.shape[1]):
            concept = masks[:, o].numpy()
            union = (lit | concept).sum()
            found[k, o] = (lit & concept).sum() / union if union and lit.any() else 0.0
    return found


@pytest.mark.parametrize("top", [0.005, 0.05, 0.3, 0.9])
def test_overlaps_are_those_of_upsampled_units(top):
    responses, masks = data()
    table = channel_concepts(responses, occupancy(masks, GRID), top=top)
    np.testing.assert_allclose(table.iou.numpy(), by_voxel(responses, masks, table), rtol=0, atol=1e-7)
    assert table.iou[1].tolist() == [0, 0, 0]
    assert table.threshold[1].isnan()
    assert table.coverage[1] == 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), top=st.floats(0.01, 0.95), cases=st.integers(1, 4))
def test_the_threshold_is_the_quantile_up_to_one_bin(seed, top, cases):
    responses, masks = data(cases, seed=seed)
    table = channel_concepts(responses, occupancy(masks, GRID), top=top)
    cells = cases * math.prod(GRID)
    for k, values in enumerate(responses.transpose(0, 1).flatten(1)):
        positive = int((values > 0).sum())
        if not positive:
            assert table.coverage[k] == 0
            continue
        wanted = min(positive, max(1, math.ceil(top * cells)))
        exact = float(values.sort(descending=True).values[wanted - 1])
        assert exact / BIN <= float(table.threshold[k]) * (1 + 1e-6)
        assert float(table.threshold[k]) <= exact * (1 + 1e-6)
        lit = int((values.double() >= table.threshold[k]).sum())
        assert lit >= wanted
        assert table.coverage[k].item() == pytest.approx(lit / cells)


def test_a_response_on_the_edge_of_a_bin_is_lit_at_that_edge():
    table = channel_concepts(torch.tensor([[[0.25, 1.0, 1.0, 4.0]]]), torch.ones(1, 1, 4), top=0.5)
    assert table.threshold.tolist() == [1.0]
    assert table.coverage.tolist() == [0.75]


def planted(seed=3, cases=4):
    """Channel 2 copies the share of concept 1, channel 0 that of concept 0; the others are noise."""
    responses, masks = data(cases, seed=seed)
    masks = torch.zeros_like(masks)
    masks[..., :2, :2, :2] = torch.tensor([True, False, False]).reshape(1, 3, 1, 1, 1)
    masks[..., 4:6, 2:4, :] |= torch.tensor([False, True, False]).reshape(1, 3, 1, 1, 1)
    shares = occupancy(masks, GRID)
    responses[:, 0], responses[:, 2] = 7 * shares[:, 0], 0.01 * shares[:, 1]
    return responses, shares


def test_a_channel_that_copies_an_organ_gets_its_name():
    responses, shares = planted()
    table = channel_concepts(responses, shares)
    names = table.names(["heart", "aorta", "spine"])
    assert (names[0], names[2]) == ("heart", "aorta")
    assert table.iou[0, 0] == 1
    assert table.iou[2, 1] == 1
    assert names[1] is None
    assert table.names(["heart", "aorta", "spine"], least=1.0) == [None] * 5


@given(order=st.permutations(range(5)))
@settings(max_examples=10, deadline=None)
def test_names_move_with_their_channels(order):
    responses, shares = planted()
    table, moved = channel_concepts(responses, shares), channel_concepts(responses[:, order], shares)
    for word in ("iou", "threshold", "coverage"):
        torch.testing.assert_close(getattr(moved, word), getattr(table, word)[order], equal_nan=True)
    names = table.names(["a", "b", "c"])
    assert moved.names(["a", "b", "c"]) == [names[k] for k in order]


def test_names_do_not_depend_on_the_scale_of_a_channel_in_octaves():
    responses, masks = data()
    shares = occupancy(masks, GRID)
    scaled = channel_concepts(responses * 2**5, shares)
    torch.testing.assert_close(scaled.iou, channel_concepts(responses, shares).iou)


def test_batches_and_chunks_make_no_difference(monkeypatch):
    responses, masks = data(7)
    shares = occupancy(masks, GRID)
    whole = channel_concepts(responses, shares, top=0.1)
    metric = ChannelConcepts(5, 3, top=0.1)
    monkeypatch.setattr(module, "AT_ONCE", 100)
    for part in torch.arange(7).split(3):
        metric.update(responses[part], shares[part])
    for one, other in zip(metric.compute(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, equal_nan=True)
    metric.reset()
    assert metric.table().coverage.tolist() == [0] * 5


def test_cases_without_organs_are_left_out():
    responses, masks = data(6)
    shares = occupancy(masks, GRID)
    known = torch.tensor([True, False, True, True, False, False])
    found, expected = channel_concepts(responses, shares, known), channel_concepts(responses[known], shares[known])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
    nobody = channel_concepts(responses, shares, torch.zeros(6, dtype=torch.bool))
    assert nobody.iou.eq(0).all()
    assert nobody.names(["a", "b", "c"]) == [None] * 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_counted_exactly(dtype):
    responses, masks = data(6, dtype=dtype)
    responses[0, 0, 0, 0, 0], responses[0, 0, 0, 0, 1] = 6e-8, 60000
    shares = occupancy(masks, GRID)
    for one, other in zip(
        channel_concepts(responses, shares.to(dtype)), channel_concepts(responses.float(), shares), strict=True
    ):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_the_outermost_bins_hold_what_lies_beyond():
    responses = torch.tensor([[[1e-30, 1e30, torch.inf, 0.0, -1.0, torch.nan]]])
    metric = ChannelConcepts(1, 1)
    metric.update(responses, torch.ones(1, 1, 6))
    assert metric.lit[0, 0] == 1
    assert metric.lit[0, -1] == 2
    assert metric.lit.sum() == 3
    assert metric.table().iou.shape == (1, 1)


def test_one_channel_and_one_concept_keep_their_names_in_compute():
    metric = ChannelConcepts(1, 1)
    metric.update(torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[0.0, 1.0]]]))
    assert metric.compute().names(["heart"]) == ["heart"]


def test_bad_input_is_told():
    responses, masks = data(2)
    shares = occupancy(masks, GRID)
    for arguments in ((0, 3), (5, True), (5, 2.0)):
        with pytest.raises(InputError, match="whole number of at least 1"):
            ChannelConcepts(*arguments)
    with pytest.raises(InputError, match="share between 0 and 1"):
        ChannelConcepts(5, 3, top=0)
    metric = ChannelConcepts(5, 3)
    with pytest.raises(InputError, match="on the same grid"):
        metric.update(responses, shares[..., :1])
    with pytest.raises(InputError, match="on the same grid"):
        channel_concepts(responses[0, 0, 0], shares)
    with pytest.raises(InputError, match="5 channels and 3 concepts, got 4 and 3"):
        metric.update(responses[:, :4], shares)
    with pytest.raises(InputError, match=r"known= expects bool \(2,\)"):
        metric.update(responses, shares, torch.ones(2))
    with pytest.raises(InputError, match="expected 3 concept names, got 2"):
        metric.table().names(["a", "b"])


def _worker(rank, store, results):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        responses, masks = data(7)
        metric, rows = ChannelConcepts(5, 3, top=0.05), (slice(0, 5), slice(5, 7))[rank]
        metric.update(responses[rows], occupancy(masks, GRID)[rows])
        torch.save([tuple(metric.table()), tuple(metric.compute())], f"{results}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    multiprocessing.spawn(_worker, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    responses, masks = data(7)
    expected = channel_concepts(responses, occupancy(masks, GRID), top=0.05)
    for rank in range(2):
        for found in torch.load(tmp_path / f"{rank}.pt", weights_only=True):
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, equal_nan=True)
