"""`sanity_check`: rows by hand, verdicts, controls that must fail, and what is refused."""

from __future__ import annotations

import csv
import io
import math

import pytest
import torch
from torch import nn

import camtrain as ct
from camtrain._errors import InputError
from camtrain.evaluation.randomising import Cascade
from camtrain.evaluation.sanity import sanity_check, spread_stages
from camtrain.evaluation.similarity import spearman, ssim

L = 3


class Net(nn.Module):
    """A pool head behind three convolutions, in 2D."""

    def __init__(self, activation=nn.ReLU):
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), activation(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 12, 3, padding=1), activation()),
            nn.Conv2d(12, 16, 3, padding=1),
        )
        self.act = activation()
        self.head = nn.Linear(16, L)

    def forward(self, image):
        return self.head(self.act(self.trunk(image)).mean(dim=(2, 3)))


def scenes(cases, seed):
    """Noise with up to three patterns in it, each at a place of its own: stripes, stripes across, a bright blob."""
    generator = torch.Generator().manual_seed(seed)
    image = 0.3 * torch.rand(cases, 1, 24, 20, generator=generator)
    label = (torch.rand(cases, L, generator=generator) < 0.5).float()
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    patterns = [(rows % 2).float(), (columns % 2).float(), torch.ones(6, 6)]
    for case in range(cases):
        for kind, pattern in enumerate(patterns):
            y, x = (int(torch.randint(n - 6, (), generator=generator)) for n in (24, 20))
            if label[case, kind]:
                image[case, 0, y : y + 6, x : x + 6] += pattern
    return image, label


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = Net()
    image, label = scenes(256, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        pick = torch.randint(256, (64,))
        loss = nn.functional.binary_cross_entropy_with_logits(model(image[pick]), label[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    image, label = scenes(12, seed=1)
    right = ((model(image) > 0) == (label == 1)).float().mean()
    assert right > 0.8, "the network did not learn: the test below would say nothing"
    return model.eval(), image, label


BLIND = {"name": "relevancecam", "contrast": "none"}


def edges(model, image):
    """What a filter shows that never heard of the network."""
    steps = image.diff(dim=2, prepend=image[:, :, :1]).abs() + image.diff(dim=3, prepend=image[..., :1]).abs()
    return steps.expand(-1, L, -1, -1)


@pytest.fixture(scope="module")
def table(trained):
    model, image, label = trained
    return sanity_check(
        model, image, ["hirescam", "gradcam", "respondcam", "relevancecam"], label=label, draws=2,
        controls=["guided_backprop", BLIND], own={"edges": edges},
    )  # fmt: skip


@pytest.mark.slow
def test_gradient_methods_pass_and_controls_fail_on_a_trained_net(table):
    verdicts = {v.method: v for v in table.verdicts()}
    for method in ("hirescam", "gradcam", "respondcam", "relevancecam"):
        assert verdicts[method].passed is True, verdicts[method]
    for method in ("guided_backprop", "relevancecam(contrast=none)"):
        assert verdicts[method].control
        assert verdicts[method].passed is False, verdicts[method]
        assert verdicts[method].head > 0.6
    assert table.powerless() == ()


def test_what_ignores_the_weights_fails_with_a_likeness_of_one(table):
    (verdict,) = (v for v in table.verdicts() if v.method == "edges")
    assert verdict.passed is False
    assert (verdict.head, verdict.all, verdict.layer) == (pytest.approx(1), pytest.approx(1), "own")
    rows = [r for r in table.rows if r.method == "edges"]
    assert all(r.ssim == pytest.approx(1, abs=1e-4) and r.undefined == 0 for r in rows)


def test_a_map_with_the_other_sign_is_no_other_map(trained):
    """The mean of a sign that flips by chance is near 0: only the strength sees it."""
    model, image, _ = trained
    flip = torch.tensor([1.0, -1.0]).repeat(6)[:, None, None, None]
    own = {"flipped": lambda m, x: edges(m, x) * (1 if m is model else flip)}
    found = sanity_check(model, image, [], controls=[], own=own, stages=2, chunk=12)
    assert abs(found.means()[0].spearman) < 0.1
    assert found.means()[0].strength == pytest.approx(1)
    assert found.verdicts()[0].passed is False


def test_rows_are_those_by_hand(trained, table):
    model, image, label = trained
    present = label == 1
    cascades = [Cascade(model, image, seed=seed) for seed in (0, 1)]
    for method, layer in (("hirescam", "act"), ("guided_backprop", "input")):
        before = ct.explain(model, image, method, layer)
        each = []
        for cascade in cascades:
            after = ct.explain(cascade.stage(2).model, image, method, layer)
            each.append(torch.stack([spearman(before, after), spearman(before, after, True), ssim(before, after)]))
        for column in range(L):
            (row,) = (
                r for r in table.rows if (r.method, r.stage, r.label) == (method, 2, f"label {column}")
            )  # fmt: skip
            values = torch.cat([e[:, present[:, column], column] for e in each], dim=1)
            assert (row.layer, row.module, row.n, row.undefined) == (layer, "trunk.5", values.shape[1], 0)
            mean, std = values.mean(dim=1), values.std(dim=1, correction=0)
            assert [row.spearman, row.spearman_abs, row.ssim] == pytest.approx(mean.tolist(), abs=1e-5)
            assert [row.spearman_std, row.spearman_abs_std, row.ssim_std] == pytest.approx(std.tolist(), abs=1e-5)
            assert row.strength == pytest.approx(values[0].abs().mean().item(), abs=1e-5)


def test_means_weigh_every_pair_alike(trained):
    model, image, label = trained
    found = sanity_check(model, image, ["gradcam"], label=label, controls=[], stages=1)
    before = ct.explain(model, image, "gradcam", "act")
    after = ct.explain(Cascade(model, image).stage(4).model, image, "gradcam", "act")
    values = spearman(before, after)[label == 1]
    (row,) = found.means()
    assert (row.stage, row.share, row.label, row.n) == (4, 1.0, "all", int(label.sum()))
    assert row.spearman == pytest.approx(values.mean().item(), abs=1e-5)
    assert row.spearman_std == pytest.approx(values.std(correction=0).item(), abs=1e-5)


def test_constant_maps_are_a_rate_and_no_number(trained):
    model, image, label = trained

    def fades(m, x):
        maps = edges(m, x).clone()
        if m is not model:
            maps[:, 0] = 0  # constant for one label
        return maps

    found = sanity_check(model, image, [], label=label, controls=[], own={"fades": fades}, stages=2)
    rows = {row.label: row for row in found.rows if row.stage == 1}
    assert rows["label 0"].undefined == 1
    assert all(math.isnan(getattr(rows["label 0"], name)) for name in ("spearman", "strength", "ssim", "ssim_std"))
    assert rows["label 1"].undefined == 0
    joined = found.means()[0]
    assert joined.spearman == pytest.approx(1)
    assert joined.undefined == pytest.approx(label[:, 0].sum().item() / label.sum().item())
    alone = sanity_check(model, image, [], labels=[0], controls=[], own={"fades": fades}, stages=2)
    (verdict,) = alone.verdicts()
    assert verdict.passed is None
    assert "constant" in verdict.why
    assert "not known" in str(alone)
    parsed = list(csv.DictReader(io.StringIO(alone.as_csv())))
    assert (parsed[0]["spearman"], parsed[0]["undefined"]) == ("", "1.0")


def test_a_control_that_passes_is_told(trained):
    model, image, _ = trained
    found = sanity_check(model, image, ["gradcam"], controls=["hirescam"], stages=2, draws=3)
    assert found.powerless() == ("hirescam",)
    assert "hirescam did not fail here" in str(found)
    none = sanity_check(model, image, ["gradcam"], controls=[], stages=2)
    assert "No control" in str(none)


def test_the_text(table):
    text = str(table)
    for phrase in ("1 head", "4 trunk.0 (100%)", "guided_backprop*", "passes", "fails", "the test has power here"):
        assert phrase in text
    assert max(map(len, text.splitlines())) <= 100
    lines = table.as_csv().splitlines()
    assert len(lines) == 1 + len(table.rows)
    assert lines[0].startswith("stage,module,share,method,control,layer,label,n,undefined,spearman,")


def test_seeds_layers_and_chunks(trained):
    model, image, label = trained

    def rows(**arguments):
        table = sanity_check(model, image, ["hirescam"], label=label, controls=[], stages=2, **arguments)
        return [(r.stage, r.layer, r.label, r.n, round(r.spearman, 5)) for r in table.rows]

    assert rows() == rows(seed=0, layer="act", chunk=5)
    assert rows() != rows(seed=1)
    by_module = rows(layer=model.act)
    assert by_module == rows()
    several = rows(layer=["act", "trunk.4"])
    assert {layer for _, layer, *_ in several} == {"act", "trunk.4"}
    assert [r for r in several if r[1] == "act"] == rows()


def test_labels_by_name_and_truth_with_unknowns(trained):
    model, image, label = trained
    unknown = label.clone()
    unknown[label[:, 1] == 1, 1] = torch.nan
    unknown[0, 1] = 1
    arguments = {"methods": ["hirescam"], "controls": [], "stages": 1, "names": ["a", "b", "c"]}
    found = sanity_check(model, image, label=unknown, labels=["c", "b"], **arguments)
    assert {row.label: row.n for row in found.rows} == {"b": 1, "c": int(label[:, 2].sum())}
    assert {row.n for row in sanity_check(model, image, labels="a", **arguments).rows} == {12}


def test_one_module_at_a_time_has_no_verdicts(trained):
    model, image, _ = trained
    found = sanity_check(model, image, ["hirescam"], controls=[], independent=True)
    assert [row.module for row in found.means()] == ["head", "trunk.5", "trunk.3", "trunk.0"]
    assert sum(row.share for row in found.means()) == pytest.approx(1)
    assert "verdict" not in str(found)
    with pytest.raises(InputError, match="verdicts need the cascade"):
        found.verdicts()


def test_the_model_is_left_as_it_was_and_nothing_is_printed(trained, capsys):
    model = trained[0].train()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    rng, hooks = torch.get_rng_state(), [len(m._forward_hooks) for m in model.modules()]
    sanity_check(model, trained[1], ["hirescam", "relevancecam"])
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in before.items())
    assert torch.equal(rng, torch.get_rng_state())
    assert all(m.training for m in model.modules())
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    said = capsys.readouterr()
    assert said.out == said.err == ""
    model.eval()


@pytest.mark.parametrize("grid", [(16,), (8, 10, 9)])
def test_other_ranks(grid):
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[len(grid)]
    model = nn.Sequential(conv(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    image = torch.rand(2, 1, *grid)
    model(image)
    found = sanity_check(model, image, ["hirescam"], stages=2)
    assert len(found.rows) == 2 * 2 * 2


def test_spread_stages():
    assert [len(spread_stages(41, n)) for n in (1, 2, 7, 41, 60)] == [1, 2, 7, 41, 41]
    for wanted in range(2, 12):
        numbers = spread_stages(9, wanted)
        assert (numbers[0], numbers[-1]) == (1, 9)
        assert sorted(set(numbers)) == numbers


def test_refused(trained):
    model, image, label = trained
    check = lambda *a, **k: sanity_check(model, image, *a, stages=2, **k)  # noqa: E731
    with pytest.raises(InputError, match="unknown method 'hirescan'; nearest: hirescam"):
        check(["hirescan"])
    with pytest.raises(InputError, match="options= names 'lrp', which is not among the methods"):
        check(["hirescam"], options={"lrp": {"rules": "zplus"}})
    with pytest.raises(InputError, match=r"no layer 'trunk\.44'"):
        check(["hirescam"], layer="trunk.44")
    with pytest.raises(InputError, match="none of the labels= is present"):
        check(["hirescam"], label=torch.zeros_like(label))
    with pytest.raises(InputError, match="one row for each of the 12 images"):
        check(["hirescam"], label=label[:5])
    with pytest.raises(InputError, match="names= has 2 labels but the network gives 3"):
        check(["hirescam"], names=["a", "b"])
    with pytest.raises(InputError, match="draws= expects a whole number from 1"):
        check(["hirescam"], draws=0)
    with pytest.raises(InputError, match=r"edges: expected maps of shape \(8, 3, \*S\) from an own method"):
        check([], own={"edges": lambda m, x: x})
    smooth = Net(nn.SiLU)
    with pytest.raises(InputError, match=r"guided_backprop: .*ReLU networks only.*controls= names other methods"):
        sanity_check(smooth, image, ["hirescam"], stages=2)
    approximate = {"guided_backprop": {"approximate": True}}
    found = sanity_check(smooth, image, ["hirescam"], stages=2, options=approximate)
    assert {r.method for r in found.rows if r.control} == {"guided_backprop(approximate=True)"}
