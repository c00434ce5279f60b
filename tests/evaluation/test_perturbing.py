"""Masked images and perturbation curves against nets whose answers are known, and slow references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from perturbing_tools import Counting, make_case
from torch import nn
from torch.nn import functional

from camtrain.anatomy.baselines import make_baseline
from camtrain.cam.enlarge import enlarge
from camtrain.evaluation.perturbing import Curves, masked_probabilities, perturbation_curves
from camtrain.metrics import AverageDrop, DeletionAUC, deletion_auc, insertion_auc

SIZES = [(13,), (6, 9), (4, 3, 7)]


def _unit(volume):
    return (volume - volume.min()) / (volume.max() - volume.min())


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _slow_curves(net, image, ranks, baseline, steps):
    """One voxel after the other in a full sort; voxels of equal rank go together."""
    weight, x, b = (
        t.numpy().reshape(*t.shape[: -len(ranks.shape)], -1) for t in (net.weight.detach(), image, baseline)
    )
    flat = ranks.reshape(-1)
    order = sorted(flat, reverse=True)
    rows = []
    for t in range(steps + 1):
        count = round(len(order) * t / steps)
        chosen = flat >= order[max(count, 1) - 1] if t else np.zeros(len(flat), bool)
        gone, shown = np.where(chosen, b, x), np.where(chosen, x, b)
        rows.append((*(_sigmoid((weight * image).sum((1, 2))) for image in (gone, shown)), chosen.mean()))
    return rows


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["air", "mean", "blur", 0.4])
@pytest.mark.parametrize("ties", [False, True])
def test_curves_equal_a_full_sort(size, kind, ties):
    image, maps, pairs = make_case(size)
    maps = maps.round() if ties else maps
    net, steps = Counting(size), 5
    curves = perturbation_curves(net, image, maps, pairs, kind, steps)
    baseline = make_baseline(image, kind)
    for b, k in np.ndindex(2, 3):
        if not pairs[b, k]:
            assert all(c[b, k].isnan().all() for c in (curves.insertion, curves.deletion, curves.share))
            continue
        rows = _slow_curves(net, image[b], maps[b, k].numpy(), baseline[b], steps)
        for t, (gone, shown, share) in enumerate(rows):
            assert curves.deletion[b, k, t].item() == pytest.approx(gone[k], abs=1e-12)
            assert curves.insertion[b, k, t].item() == pytest.approx(shown[k], abs=1e-12)
            assert curves.share[b, k, t].item() == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("size", [(12,), (9, 6), (4, 6, 10)])
def test_coarse_maps_rank_voxels_by_their_linear_enlargement(size):
    grid = tuple(n // 2 for n in size)
    image, maps, pairs = make_case(size, grid=grid)
    large = functional.interpolate(maps, size, mode={1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)])
    coarse = perturbation_curves(Counting(size), image, maps, pairs, "mean", 4)
    fine = perturbation_curves(Counting(size), image, large, pairs, "mean", 4)
    for one, other in zip(vars(coarse).values(), vars(fine).values(), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_curves_of_a_net_known_in_closed_form():
    """Every voxel adds 1, so a share s of the voxels gives sigmoid(n s), whatever the map."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 1, bias=False)).double()
    nn.init.ones_(net[1].weight)
    maps = torch.randn(1, 1, 2, 4).double()
    curves = perturbation_curves(net, torch.ones(1, 1, 2, 4).double(), maps, maps[:, :, 0, 0] < 99, "air", 8)
    share = torch.linspace(0, 1, 9).double()
    torch.testing.assert_close(curves.share[0, 0], share)
    torch.testing.assert_close(curves.insertion[0, 0], torch.sigmoid(8 * share))
    torch.testing.assert_close(curves.deletion[0, 0], torch.sigmoid(8 * (1 - share)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("kind", ["air", "mean"])
def test_masked_images_equal_the_formula(size, positive, kind):
    image, maps, pairs = make_case(size, grid=tuple(max(n // 2, 2) for n in size))
    net = Counting(size)
    found = masked_probabilities(net, image, maps, pairs, kind, positive=positive)
    b = make_baseline(image, kind)
    for i, k in np.ndindex(2, 3):
        if not pairs[i, k]:
            assert found[i, k].isnan()
            continue
        cells = maps[i, k].clamp(min=0) if positive else maps[i, k]
        m = _unit(enlarge(cells[None, None], size)[0, 0])
        logit = (net.weight[k] * (b[i] + m * (image[i] - b[i]))).sum()
        assert found[i, k].item() == pytest.approx(torch.sigmoid(logit).item(), abs=1e-12)


def test_signed_maps_show_no_evidence_only_where_asked():
    """A cell without evidence is hidden by default; stretched signed, the strong negative cell lights it up."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False)).double()
    net[1].weight.data = torch.tensor([[0.0, 0.0, 3.0, 0.0]]).double()
    maps = torch.tensor([[[1.0, -9.0, 0.0, 0.0]]]).double()
    image, ask = torch.ones(1, 1, 4).double(), torch.ones(1, 1, dtype=torch.bool)
    hidden, lit = (masked_probabilities(net, image, maps, ask, "air", positive=p).logit() for p in (True, False))
    assert hidden.item() == pytest.approx(0, abs=1e-12)
    assert lit.item() == pytest.approx(3 * 0.9)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("labels", [1, 3])
def test_chunks_change_nothing_but_the_size_of_a_forward(batch, labels):
    size = (4, 3, 7)
    image, maps, pairs = make_case(size, batch, labels)
    maps[0, 0, 0] = 0.5
    expected = None
    for chunk in (1, 3, 4, 100):
        net = Counting(size, labels)
        after = masked_probabilities(net, image, maps, pairs, "blur", chunk=chunk)
        curves = perturbation_curves(net, image, maps, pairs, "blur", 6, chunk=chunk)
        assert max(net.batches) <= chunk
        found = (after, *vars(curves).values())
        for one, other in zip(found, expected or found, strict=True):
            torch.testing.assert_close(one, other, equal_nan=True, atol=1e-12, rtol=0)
        expected = found
        assert sum(net.batches) <= pairs.sum() * (1 + 2 * 5) + 2 * batch


def test_ties_cost_no_forward():
    image, maps, _ = make_case((6, 9), 1, 1)
    maps = (maps > 1).double()
    net = Counting((6, 9), 1)
    curves = perturbation_curves(net, image, maps, torch.ones(1, 1, dtype=torch.bool), "air", 20, chunk=1)
    assert len(net.batches) == 2 + 2
    high = maps.mean().item()
    assert sorted(set(curves.share[0, 0].tolist())) == pytest.approx([0, high, 1])


def test_equal_cells_give_equal_voxels_once_enlarged():
    """A plateau is one rank, not a ranking of the rounding noise of interpolation."""
    maps, size = torch.full((1, 1, 5, 6), 0.07820749282836914), (23, 29)
    maps[..., 0, :] = 1.1
    plateau = enlarge(maps, size)[0, 0, 10:]
    assert len(plateau.unique()) > 1  # what float32 would rank
    image, ask = torch.rand(1, 2, *size), torch.ones(1, 1, dtype=torch.bool)
    curves = perturbation_curves(Counting(size, 1).float(), image, maps, ask, "air", 23)
    # Rows are ranked: two at the border tie, then one by one down to the plateau.
    rows = [0, 2, *range(2, 8), *[23] * 16]
    assert (enlarge(maps.double(), size)[0, 0, :, 0].float() == maps[0, 0, 1, 0]).sum() == 23 - 7
    assert curves.share[0, 0].tolist() == pytest.approx([n / 23 for n in rows])


@pytest.mark.parametrize("fill", [0.0, 3.25, torch.nan, torch.inf, "some NaN", "one rounding step"])
def test_maps_that_rank_nothing_are_undefined_and_counted(fill):
    image, maps, _ = make_case((6, 9))
    if fill == "some NaN":
        maps[0, 0, 1, 1] = torch.nan
    elif fill == "one rounding step":
        maps[0, 0] = 0.1
        maps[0, 0, 0, 0] = np.nextafter(0.1, 1)
    else:
        maps[0, 0] = fill
    pairs = torch.ones(2, 3, dtype=torch.bool)
    net = Counting((6, 9))
    after = masked_probabilities(net, image, maps, pairs, "mean")
    assert after.isnan().nonzero().tolist() == [[0, 0]]
    curves = perturbation_curves(net, image, maps, pairs, "mean", 4)
    for curve in (curves.insertion, curves.deletion):
        assert curve.isnan().any(2).nonzero().tolist() == [[0, 0]]
        assert curve[0, 0].isnan().tolist() == [False, True, True, True, False]
    before = torch.full((2, 3), 0.9)
    drop, area = AverageDrop(3, "none"), DeletionAUC(3, "none")
    drop.update(before, after, pairs.float(), asked=pairs)
    area.update(curves.deletion, curves.share, pairs.float())
    for metric in (drop, area):
        assert metric.pairs.tolist() == [2, 2, 2]
        assert metric.undefined_rate().tolist() == [0.5, 0, 0]


def test_maps_without_positive_cells():
    image, maps, _ = make_case((6, 9), 1, 1)
    maps, ask = -maps.abs() - 1, torch.ones(1, 1, dtype=torch.bool)
    net = Counting((6, 9), 1)
    assert masked_probabilities(net, image, maps, ask, "mean").isnan()
    assert masked_probabilities(net, image, maps, ask, "mean", positive=False).isfinite()
    # Negative cells still rank.
    assert perturbation_curves(net, image, maps, ask, "mean").deletion.isfinite().all()


def test_nothing_asked_costs_nothing():
    image, maps, pairs = make_case((6, 9))
    net = Counting((6, 9))
    assert masked_probabilities(net, image, maps, torch.zeros_like(pairs), "air").isnan().all()
    curves = perturbation_curves(net, image, maps, torch.zeros_like(pairs), "air", 4)
    assert curves.insertion.shape == (2, 3, 5)
    assert curves.share.isnan().all()
    assert not net.batches


def test_columns_name_the_output_of_each_map():
    image, maps, _ = make_case((6, 9))
    net, every = Counting((6, 9)), torch.ones(2, 3, dtype=torch.bool)
    chosen = [2, 0]
    part = every[:, :2]
    for ask in (masked_probabilities, perturbation_curves):
        whole, some = ask(net, image, maps, every, "air"), ask(net, image, maps[:, chosen], part, "air", columns=chosen)
        pairs = zip(*(vars(x).values() if isinstance(x, Curves) else (x,) for x in (whole, some)), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one[:, chosen], other)


class Planted(nn.Module):
    """Reads the mean of one corner alone."""

    def forward(self, image):
        return 12 * image[:, :, 1:4, 2:4].mean((1, 2, 3))[:, None] - 4


def test_a_perfect_map_beats_random_and_inverted_ones():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 1, 10, 8, generator=generator) * 0.2 + 0.7
    perfect = torch.zeros(1, 1, 10, 8)
    perfect[..., 1:4, 2:4] = 1 + torch.rand(3, 2, generator=generator)
    ask = torch.ones(1, 1, dtype=torch.bool)
    areas, drops = [], []
    others = [torch.rand(1, 1, 10, 8, generator=generator) for _ in range(8)]
    for maps in (perfect, *others, perfect.max() - perfect):
        curves = perturbation_curves(Planted(), image, maps, ask, "air")
        inserted, deleted = (
            twin(curve, curves.share, ask.float()).item()
            for twin, curve in ((insertion_auc, curves.insertion), (deletion_auc, curves.deletion))
        )
        areas.append((inserted, deleted))
        drops.append(masked_probabilities(Planted(), image, maps, ask, "air").item())
    assert all(areas[0][0] > ins + 0.2 and areas[0][1] < gone - 0.2 for ins, gone in areas[1:])
    assert all(drops[0] > other for other in drops[1:])


def test_flips_commute_and_cases_do_not_meet():
    image, maps, pairs = make_case((6, 9))
    net, flipped = Counting((6, 9)), Counting((6, 9))
    flipped.weight.data = net.weight.data.flip(2, 3)
    for ask in (masked_probabilities, perturbation_curves):
        plain = ask(net, image, maps, pairs, "blur")
        mirror = ask(flipped, image.flip(2, 3), maps.flip(2, 3), pairs, "blur")
        alone = ask(net, image[1:], maps[1:], pairs[1:], "blur")
        for a, b, c in zip(*(vars(x).values() if isinstance(x, Curves) else (x,) for x in (plain, mirror, alone))):  # noqa: B905
            torch.testing.assert_close(a, b, equal_nan=True)
            torch.testing.assert_close(a[1:], c, equal_nan=True)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), steps=st.integers(2, 60), levels=st.sampled_from([2, 5, 1000]))
def test_shares_rise_from_nothing_to_everything(seed, steps, levels):
    image, maps, pairs = make_case((4, 5), 2, 2, seed=seed)
    maps = (maps * levels / 3).round()
    curves = perturbation_curves(Counting((4, 5), 2), image, maps, pairs, 0.5, steps)
    share = curves.share[pairs]
    assert ((share[:, 0] == 0) & (share[:, -1] == 1)).all()
    assert (share.diff(dim=1) >= 0).all()
    # At least what the step asks for is gone, ties more.
    wanted = torch.tensor([max(round(20 * t / steps), 1) / 20 for t in range(1, steps)]).double()
    usable = maps[pairs].flatten(1).amax(1) > maps[pairs].flatten(1).amin(1)
    assert (share[usable, 1:-1] >= wanted - 1e-6).all()
    torch.testing.assert_close(curves.insertion[..., 0], curves.deletion[..., -1], equal_nan=True)
