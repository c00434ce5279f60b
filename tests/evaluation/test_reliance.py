"""Three nets whose reading is known by construction, and the plumbing that replaces one side of the organs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import camtrain as ct
from camtrain import InputError
from camtrain.anatomy import OrganTable
from camtrain.anatomy.baselines import make_baseline
from camtrain.anatomy.donors import DonorPool
from camtrain.anatomy.replacing import replace_inside, replace_outside
from camtrain.data import PhantomDataModule
from camtrain.data.phantom import unpack
from camtrain.evaluation.predicting import logits_of
from camtrain.evaluation.reliance import REPLACEMENTS, reliance_probabilities
from camtrain.metrics import EnergyInside, ShortcutReliance, shortcut_reliance

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NAMES = ["ground_glass", "coronary_calcification", "effusion"]


def marker_net(size, stride, markers, homes, gain=8.0):
    """Reads nothing but each label's marker, through a kernel as large as the scan, and shows it at an organ's cell.

    Args: markers = bool (*S) per label, homes = the cell (*S') where the label's channel lights up.
    """
    labels, cells = len(markers), tuple(-(-n // s) for n, s in zip(size, stride, strict=True))
    wide = {"kernel_size": tuple(2 * n - 1 for n in size), "padding": tuple(n - 1 for n in size)}
    look = CONV[len(size)](1, labels, stride=stride, bias=False, **wide)
    head = nn.Linear(labels * math.prod(cells), labels)
    with torch.no_grad():
        look.weight.zero_(), head.weight.zero_(), head.bias.fill_(-gain / 2)
        for label, (marker, home) in enumerate(zip(markers, homes, strict=True)):
            voxels = marker.nonzero()
            offset = voxels - torch.tensor(home) * torch.tensor(stride) + torch.tensor(size) - 1
            look.weight[(label, 0, *offset.T)] = 1 / len(voxels)
            head.weight.view(labels, labels, *cells)[(label, label, *home)] = gain
    return nn.Sequential(look, nn.ReLU(), nn.Flatten(), head)


def organ_net(size, cores, above, gain, bias):
    """Reads how bright the core of each label's organ is, a little of the voxels around included."""
    labels = len(cores)
    look, head = CONV[len(size)](1, labels, 5, padding=2), nn.Linear(labels * math.prod(size), labels)
    with torch.no_grad():
        look.weight.fill_(0.1 / 5 ** len(size)), look.bias.copy_(-torch.tensor(above))
        look.weight[(slice(None), 0) + (2,) * len(size)] += 0.9
        head.weight.zero_(), head.bias.copy_(torch.tensor(bias))
        for label, core in enumerate(cores):
            head.weight.view(labels, labels, *size)[label, label][core] = gain[label] / int(core.sum())
    return nn.Sequential(look, nn.ReLU(), nn.Flatten(), head)


def constant_net(size, labels):
    head = nn.Linear(2 * math.prod(n - 2 for n in size), labels)
    nn.init.zeros_(head.weight)
    return nn.Sequential(CONV[len(size)](1, 2, 3), nn.ReLU(), nn.Flatten(), head)


class Data:
    """A set of cases with what the three nets need to know of it."""

    def __init__(self, image, organs, label, table, ids, markers, homes, cores, stride):
        self.image, self.organs, self.label, self.table, self.ids = image, organs, label, table, ids
        self.donors = DonorPool()
        self.donors.offer(ids, image, label)
        size = tuple(image.shape[2:])
        self.marker = marker_net(size, stride, markers, homes)
        self.constant = constant_net(size, label.shape[1])
        self.size, self.cores = size, cores

    def reliance(self, net, replacement, **options):
        before = logits_of(net, self.image).sigmoid()
        changed = self.changed(net, replacement, **options)
        metric = ShortcutReliance(self.label.shape[1])
        metric.update(before, *changed, self.label)
        return metric

    def changed(self, net, replacement, **options):
        words = {"organs": self.organs, "table": self.table, "label": self.label} | options
        return reliance_probabilities(
            net, self.image, replacement=replacement, donors=self.donors, ids=self.ids, **words
        )

    def energy(self, net):
        maps = ct.explain(net, self.image, "hirescam", layer="1")
        metric = EnergyInside(self.label.shape[1], "none")
        metric.update(maps, self.table.allowed(self.organs, size=maps.shape[2:]), self.label)
        return metric.averaged("none")


def _eroded(region):
    outside = (~region).float()[None, None]
    return functional.max_pool3d(outside, 3, 1, 1)[0, 0] == 0


@pytest.fixture(scope="module")
def phantom():
    data = PhantomDataModule(labels=NAMES, cases=4, val_cases=16, size=24, batch_size=16, shortcut=0.95)
    batch = next(iter(data.val_dataloader()))
    image, organs, label = batch["image"], batch["organs"], batch["label"]
    bits = [torch.from_numpy(unpack(data.phantom.case("val", i).marker_bits, NAMES)) for i in range(16)]
    seen = torch.stack(bits)
    # Where a marker lies in more than half of the scans that have it; the lead moves with the body.
    there = [seen[seen[:, k].flatten(1).any(1), k].float().mean(0) > 0.5 for k in range(3)]
    cells = data.table.allowed(organs, size=(3, 3, 3)).all(0)
    homes = [tuple(cells[k].nonzero()[0].tolist()) for k in range(3)]
    cores = [_eroded(region) for region in data.table.allowed(organs).all(0)]
    found = Data(image, organs, label, data.table, batch["id"], there, homes, cores, (8, 8, 8))
    found.organ = organ_net(found.size, cores, [0.2, 0.45, 0.2], [60.0, 60.0, 60.0], [-3.0, -13.5, -3.0])
    return found


@pytest.fixture(scope="module")
def blocks():
    """Noise, two organs and two markers in a volume of three different sizes; half of the cases have each finding."""
    generator, size = torch.Generator().manual_seed(3), (16, 12, 20)
    image = 0.1 * torch.rand(8, 1, *size, generator=generator)
    organs = torch.zeros(8, 1, *size, dtype=torch.uint8)
    organs[:, :, 1:8, 1:9, 1:9], organs[:, :, 9:15, 1:9, 1:9] = 4, 7
    label = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]).repeat(2, 1)
    lesion, marker = torch.zeros(2, 2, *size, dtype=torch.bool)
    lesion[0, 3:5, 3:6, 3:7], lesion[1, 11:13, 3:6, 3:7] = True, True
    marker[0, 2:4, 10:12, 14:16], marker[1, 12:14, 10:12, 17:19] = True, True
    for case in range(8):
        for k in range(2):
            if label[case, k]:
                image[case, 0][lesion[k] | marker[k]] += 0.8
    table = OrganTable(organs={"left": 4, "right": 7}, labels={"one": ["left"], "two": ["right"]})
    homes = [(1, 1, 1), (3, 1, 1)]
    found = Data(image, organs, label, table, list("abcdefgh"), marker, homes, lesion, (4, 4, 4))
    found.organ = organ_net(size, lesion, [0.3, 0.3], [20.0, 20.0], [-4.0, -4.0])
    return found


@pytest.fixture(params=["phantom", "blocks"])
def data(request):
    return request.getfixturevalue(request.param)


every_replacement = pytest.mark.parametrize("replacement", REPLACEMENTS)


@pytest.mark.slow
@every_replacement
def test_a_net_that_reads_the_marker_and_shows_the_organ_is_flagged(data, replacement):
    assert (data.energy(data.marker) > 0.9).all()  # its maps look right
    metric = data.reliance(data.marker, replacement)
    assert (metric.averaged("none") > 0.9).all()
    assert metric.compute()["outside_effect"] > 0.2
    assert metric.undefined_rate() == 0
    assert metric.unmeasured_rate() == 0


@every_replacement
def test_a_net_that_reads_the_organ_is_not_flagged(data, replacement):
    assert (data.energy(data.organ) > 0.9).all()
    metric = data.reliance(data.organ, replacement)
    assert (metric.averaged("none") < 0.1).all()
    assert metric.compute()["inside_effect"] > 0.1
    assert metric.undefined_rate() == 0


@every_replacement
def test_a_net_that_says_nothing_is_undefined_for_all_labels(data, replacement):
    metric = data.reliance(data.constant, replacement)
    assert metric.averaged("none").isnan().all()
    assert metric.compute()["share"].isnan()
    assert metric.undefined_rate() == 1
    assert metric.unmeasured_rate() == 0


def _by_hand(net, data, case, column, other, seam=1):
    """Both sides of one pair, without any sharing."""
    part = slice(case, case + 1)
    region = data.table.select([data.table.labels[column]]).allowed(data.organs[part])
    sides = [r(data.image[part], other, region, seam) for r in (replace_outside, replace_inside)]
    return [net(side).sigmoid()[0, column] for side in sides]


class Mixed(nn.Module):
    """Every output depends on every voxel."""

    def __init__(self, size, labels):
        super().__init__()
        self.forwards, self.largest = 0, 0
        self.body = nn.Linear(math.prod(size), labels)

    def forward(self, image):
        self.forwards, self.largest = self.forwards + 1, max(self.largest, len(image))
        return 3 * self.body(image.flatten(1)).sin()


@every_replacement
@pytest.mark.parametrize("chunk", [1, 3])
def test_shared_images_equal_one_pair_after_the_other(blocks, replacement, chunk):
    torch.manual_seed(0)
    net = Mixed(blocks.size, 2)
    found = torch.stack(blocks.changed(net, replacement, chunk=chunk, seam=2))
    for case in range(8):
        for column in range(2):
            part = slice(case, case + 1)
            if replacement == "case":
                donor = blocks.donors.donor(blocks.ids[case], column, blocks.label[case, column], (1, *blocks.size))
                other = donor.image.float()[None]
                assert donor.label[column] == 1 - blocks.label[case, column]
            else:
                other = make_baseline(blocks.image[part], replacement)
            expected = _by_hand(net, blocks, case, column, other, 2)
            torch.testing.assert_close(found[:, case, column], torch.stack(expected).detach())


def test_labels_of_one_rule_share_their_forwards(phantom):
    # Two of the three labels are read from the lungs: two rules, two sides, sixteen cases.
    net = Mixed(phantom.size, 3)
    for replacement in ("air", "blur"):
        net.forwards = net.largest = 0
        phantom.changed(net, replacement, chunk=1)
        assert (net.forwards, net.largest) == (64, 1)
    net.forwards = 0
    phantom.changed(net, "air", chunk=7)
    assert (net.forwards, net.largest) == (10, 7)
    net.forwards = 0
    phantom.changed(net, "air", columns=[0, 2])
    assert net.forwards == 8


def test_donors_are_grouped_by_rule_and_case(phantom):
    """Labels of one rule that get the same donor cost no forward more."""
    net, shape = Mixed(phantom.size, 3), (1, *phantom.size)
    groups = {
        (case, k == 1, phantom.donors.donor(case, k, float(phantom.label[i, k]), shape).id)
        for i, case in enumerate(phantom.ids)
        for k in range(3)
    }
    phantom.changed(net, "case", chunk=1)
    assert net.forwards == 2 * len(groups)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_memory_is_bounded_at_eighty_labels(chunk):
    """Never (L, *S): the largest tensor that anything makes is a chunk of images."""
    size, labels = (20, 12, 16), 80
    table = OrganTable(organs={"a": 1, "b": 2}, labels={f"label {i}": ["ab"[i % 2]] for i in range(labels)})
    organs, largest = torch.randint(0, 3, (1, 1, *size)), []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.extend(t.numel() for t in [result] if isinstance(t, torch.Tensor))
            return result

    net = nn.Sequential(nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(8, labels))
    label = (torch.rand(1, labels) < 0.3).float()
    with Watch():
        found = reliance_probabilities(net, torch.rand(1, 1, *size), organs, table, label, "blur", chunk=chunk)
    assert not torch.stack(found).isnan().any()
    assert max(largest) <= min(chunk, 4) * math.prod(size)


def test_large_images_go_one_by_one(blocks, monkeypatch):
    monkeypatch.setattr("camtrain.anatomy.sides.AT_ONCE", 2 * blocks.image[0].nbytes)
    net = Mixed(blocks.size, 2)
    blocks.changed(net, "air", chunk=4)
    assert (net.forwards, net.largest) == (16, 2)
    monkeypatch.setattr("camtrain.anatomy.sides.AT_ONCE", 1)
    net.largest = 0
    blocks.changed(net, "air", chunk=4)
    assert net.largest == 1


@every_replacement
def test_what_cannot_be_measured_is_nan_and_the_rest_is_as_before(blocks, replacement):
    net = Mixed(blocks.size, 2)
    whole = torch.stack(blocks.changed(net, replacement))
    assert not whole.isnan().any()
    organs, label = blocks.organs.clone(), blocks.label.clone()
    organs[0] = 0  # not segmented
    organs[1][organs[1] == 4] = 0  # an organ is missing
    organs[2] = 4  # one covers everything, the other is missing
    label[3, 1] = torch.nan
    changed = blocks.changed(net, replacement, organs=organs, label=label)
    found, expected = torch.stack(changed), torch.ones(8, 2, dtype=torch.bool)
    for case, column in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (3, 1)):
        expected[case, column] = False
    assert torch.equal(found[0].isnan(), ~expected)
    assert torch.equal(found[1].isnan(), ~expected)
    kept = torch.cat([expected[:1] & False, expected[1:]])
    torch.testing.assert_close(found[:, kept], whole[:, kept])
    metric = ShortcutReliance(2)
    metric.update(logits_of(net, blocks.image).sigmoid(), *changed, label)
    assert metric.pairs.tolist() == [5, 5]
    assert metric.unmeasured_rate("micro").item() == pytest.approx(5 / 15)


def test_cases_and_labels_that_are_left_out(blocks):
    net = Mixed(blocks.size, 2)
    assert torch.stack(blocks.changed(net, "air", organs=None)).isnan().all()
    assert net.forwards == 0
    some = torch.tensor([True] * 3 + [False] * 5)
    assert torch.stack(blocks.changed(net, "air", has_organs=some))[0].isnan().all(1).tolist() == (~some).tolist()
    one = blocks.changed(net, "air", columns=[1]).inside
    assert one.isnan().all(0).tolist() == [True, False]
    anywhere = OrganTable(organs={"left": 4}, labels={"one": ["left"], "two": "anywhere"})
    assert blocks.changed(net, "air", table=anywhere).outside.isnan().all(0).tolist() == [False, True]


def test_labels_without_positives_stand_on_absent_cases_alone(blocks):
    label = blocks.label.clone()
    label[:, 0] = 0
    before = logits_of(blocks.marker, blocks.image).sigmoid()
    changed = blocks.changed(blocks.marker, "air", label=label)
    found = shortcut_reliance(before, *changed, label)
    assert found.outside_effect[0].item() == pytest.approx((changed.outside - before)[:, 0].abs().mean().item())


@pytest.mark.parametrize("size", [(9,), (7, 5), (6, 4, 5)])
def test_any_rank_one_case_one_label(size):
    net = nn.Sequential(nn.Flatten(), nn.Linear(2 * math.prod(size), 1)).double()
    organs = torch.zeros(1, 1, *size, dtype=torch.int16)
    organs[:, :, 2:4] = 3
    table = OrganTable(organs={"heart": 3}, labels={"stent": ["heart"]})
    image, label = torch.rand(1, 2, *size, dtype=torch.float64), torch.ones(1, 1)
    pool = DonorPool()
    pool.offer(["other"], torch.rand(1, 2, *size), torch.zeros(1, 1))
    for replacement in REPLACEMENTS:
        found = reliance_probabilities(net, image, organs, table, label, replacement, pool, ["me"])
        assert found.outside.dtype == torch.float64
        assert not torch.stack(found).isnan().any()
    shared = reliance_probabilities(net, image, organs, table, label, "case", pool, ["other"])
    assert torch.stack(shared).isnan().all()  # alone with itself


def test_rules_with_lengths_take_each_case_s_spacing():
    table = OrganTable(organs={"heart": 3}, labels={"rim": {"organs": ["heart"], "dilate_mm": 2.0}})
    organs = torch.zeros(2, 1, 9, dtype=torch.uint8)
    organs[..., 4] = 3
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 1, bias=False))
    nn.init.ones_(net[1].weight)
    args = (net, torch.ones(2, 1, 9), organs, table, torch.ones(2, 1), "air")
    found = reliance_probabilities(*args, spacing=torch.tensor([[1.0], [2.0]]), seam=0)
    torch.testing.assert_close(found.outside.logit(), torch.tensor([[5.0], [3.0]]))
    torch.testing.assert_close(found.inside.logit(), torch.tensor([[4.0], [6.0]]))
    same = reliance_probabilities(*args, spacing=[2.0], seam=0)
    torch.testing.assert_close(same.outside.logit(), torch.full((2, 1), 3.0))
    with pytest.raises(InputError, match="mm options need an affine"):
        reliance_probabilities(*args)


def test_the_model_and_the_inputs_are_left_as_they_were(blocks):
    net = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.BatchNorm3d(2), nn.ReLU(inplace=True), nn.Flatten())
    net.append(nn.Linear(2 * math.prod(blocks.size), 2)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    image, rng = blocks.image.clone(), torch.get_rng_state()
    with torch.inference_mode():
        blocks.changed(net, "case")
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(image, blocks.image)
    assert torch.equal(rng, torch.get_rng_state())


def test_wrong_input_is_refused(blocks):
    net = Mixed(blocks.size, 2)
    for change, says in (
        ({"replacement": "aire"}, "case, air, blur, mean, got 'aire'; nearest: air"),
        ({"label": torch.ones(8, 3)}, r"label \(B, L\) = \(8, 2\)"),
        ({"organs": blocks.organs[..., :-1]}, "organs .* same spatial transforms"),
        ({"chunk": 0}, "at least 1 image"),
        ({"columns": [2]}, r"columns= must lie in 0..1"),
    ):
        with pytest.raises(InputError, match=says):
            blocks.changed(net, **({"replacement": "air"} | change))
    args = (net, blocks.image, blocks.organs, blocks.table, blocks.label, "case")
    for donors, ids in ((None, blocks.ids), (blocks.donors, None), (blocks.donors, ["a"])):
        with pytest.raises(InputError, match=r"needs donors= .* and ids="):
            reliance_probabilities(*args, donors, ids)
    with pytest.raises(InputError, match="3 outputs but there are 2 labels"):
        blocks.changed(Mixed(blocks.size, 3), "air")


def test_air_in_the_units_of_the_image(blocks):
    net = Mixed(blocks.size, 2)
    hounsfield = blocks.image * 1800 - 1000
    args = (hounsfield, blocks.organs, blocks.table, blocks.label, "air")
    with pytest.raises(InputError, match="air"):
        reliance_probabilities(net, *args)
    scaled = nn.Sequential(nn.Conv3d(1, 1, 1), net)
    with torch.no_grad():
        scaled[0].weight.fill_(1 / 1800), scaled[0].bias.fill_(1000 / 1800)
    found = reliance_probabilities(scaled, *args, air=-1000.0)
    torch.testing.assert_close(torch.stack(found), torch.stack(blocks.changed(net, "air")), atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="belongs to the replacement 'air'"):
        blocks.changed(net, "blur", air=0.0)
