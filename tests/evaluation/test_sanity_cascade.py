"""Randomised copies: which modules, in which order, with which weights; and the user's model as it was."""

from __future__ import annotations

import itertools

import pytest
import pytorch_lightning as pl
import torch
from monai.networks.nets import DenseNet121, EfficientNetBN, SEResNet50, resnet18
from torch import nn

from camtrain._errors import InputError
from camtrain.evaluation.randomising import Cascade, cascade
from camtrain.models import AxialNet, FlattenNet, LitClassifier, PoolNet


class Odd(nn.Module):
    """What order by name would get wrong: weights of the model itself, used through functions, tied, unused, frozen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.unused = nn.Linear(5, 3), nn.Linear(5, 3)
        self.first = nn.Conv1d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)
        self.again = nn.Conv1d(4, 4, 3, padding=1)
        self.tied = nn.Conv1d(4, 4, 3, padding=1)
        self.tied.weight = self.again.weight
        self.only_tied = nn.Conv1d(4, 4, 3, padding=1, bias=False)
        self.only_tied.weight = self.again.weight
        self.mix = nn.Linear(4, 5)
        self.position = nn.Parameter(torch.randn(1, 4, 6))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.weight, 2, 3)
        self.first.weight.requires_grad_(False)

    def forward(self, image):
        with torch.no_grad():
            features = self.norm(self.first(image))
        features = self.tied(self.only_tied(self.again((features + self.position).relu()).relu()))
        tokens = features.transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        mixed = nn.functional.linear(tokens.mean(dim=1), self.mix.weight, self.mix.bias)
        return self.head(mixed.relu())


def image(*size, channels=1, cases=2):
    return torch.rand(cases, channels, *size, generator=torch.Generator().manual_seed(1))


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(model, stage):
    before = weights(model)
    return {name for name, value in stage.model.state_dict().items() if not torch.equal(value, before[name])}


def test_order_is_that_of_use_from_the_head_to_the_first_layer():
    model = Odd()
    stages = list(cascade(model, image(6)))
    assert [s.module for s in stages] == [
        *("head", "mix", "attention.out_proj", "attention"),
        *("only_tied", "tied", "again", "", "norm", "first"),
    ]
    assert [s.number for s in stages] == list(range(1, 11))
    total = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.unused.parameters())
    assert stages[0].share == pytest.approx(18 / total)
    assert stages[-1].share == 1
    assert all(a.share < b.share for a, b in itertools.pairwise(stages))


def test_a_stage_differs_by_one_module():
    model = Odd()
    stages = list(cascade(model, image(6)))
    lost = [changed(model, s) for s in stages]
    assert lost[0] == {"head.weight", "head.bias"}
    # One draw for the three, then what each has of its own.
    assert lost[4] - lost[3] == {"tied.weight", "again.weight", "only_tied.weight"}
    assert lost[5] - lost[4] == {"tied.bias"}
    assert lost[6] - lost[5] == {"again.bias"}
    assert lost[7] - lost[6] == {"position"}
    # Statistics are no weights; the shift of BatchNorm was 0 before.
    assert lost[8] - lost[7] == {"norm.weight"}
    assert lost[9] - lost[8] == {"first.weight", "first.bias"}
    assert not any(name.startswith("unused") for name in lost[-1])
    last = stages[-1].model
    assert last.tied.weight is last.again.weight
    assert torch.equal(last.norm.weight, torch.ones(4))
    for before, after in itertools.pairwise(stages):
        a, b = weights(before.model), weights(after.model)
        assert {n for n in a if not torch.equal(a[n], b[n])} == lost[after.number - 1] - lost[before.number - 1]


def test_one_module_at_a_time_has_the_same_weights():
    model = Odd()
    together, alone = (list(cascade(model, image(6), independent=i)) for i in (False, True))
    assert sum(s.share for s in alone) == pytest.approx(1)
    for one in alone:
        for name in (fresh := changed(model, one)):
            assert torch.equal(weights(one.model)[name], weights(together[one.number - 1].model)[name])
        assert fresh


def test_weights_come_from_the_seed_alone():
    model = Odd()
    torch.manual_seed(5)
    first = weights(Cascade(model, image(6), seed=3).stage(10).model)
    torch.manual_seed(6)
    again = Cascade(model, image(6, cases=5), seed=3)
    again.stage(4)
    assert all(torch.equal(first[n], v) for n, v in weights(again.stage(10).model).items())
    assert not torch.equal(first["first.weight"], Cascade(model, image(6), seed=4).stage(10).model.first.weight)


def test_modules_of_one_kind_get_different_weights():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Flatten())
    last = list(cascade(model, image(6)))[-1].model
    assert not torch.equal(last[0].weight, last[1].weight)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(3 + 0.5 * torch.randn(40, 500, generator=torch.Generator().manual_seed(0)))
        self.one = nn.Parameter(torch.full((), 2.0))

    def forward(self, image):
        return self.one * (image.flatten(1) @ self.scale.t())


def test_without_reset_parameters_mean_and_deviation_are_kept():
    model = Own()
    (stage,) = cascade(model, image(500))
    drawn = stage.model.scale
    assert drawn.mean().item() == pytest.approx(3, abs=0.02)
    assert drawn.std().item() == pytest.approx(0.5, abs=0.02)
    assert abs(torch.corrcoef(torch.stack([drawn.flatten(), model.scale.flatten()]))[0, 1].item()) < 0.03
    assert stage.model.one.item() == 2


def test_a_reset_that_needs_arguments_is_not_called():
    class Strict(Own):
        def reset_parameters(self, gain):
            raise ValueError("called without gain")

    (stage,) = cascade(Strict(), image(500))
    assert stage.model.scale.mean().item() == pytest.approx(3, abs=0.02)


@pytest.mark.slow
def test_a_compiled_model():
    model = torch.compile(nn.Sequential(nn.Conv1d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)))
    stages = list(cascade(model, image(6)))
    assert [s.module for s in stages] == ["3", "0"]
    assert not torch.equal(stages[1].model._orig_mod[0].weight, model._orig_mod[0].weight)


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_parametrised_weights_are_reached(wrap):
    model = nn.Sequential(wrap(nn.Conv1d(1, 3, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).eval()
    last = list(cascade(model, image(6)))[-1]
    assert last.share == 1
    assert not torch.allclose(last.model[0].weight, model[0].weight)


def full_state(model):
    hooks = [len(getattr(m, n)) for m in model.modules() for n in sorted(vars(m)) if "hook" in n and getattr(m, n)]
    return {
        "values": weights(model),
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "plain": (
            [m.training for m in model.modules()], [id(p) for p in model.parameters()], hooks,
            [p.requires_grad for p in model.parameters()], [sorted(vars(m)) for m in model.modules()],
            torch.get_rng_state().tolist(), torch.is_grad_enabled(),
        ),
    }  # fmt: skip


def assert_untouched(before, model):
    after = full_state(model)
    assert after["plain"] == before["plain"]
    assert all(torch.equal(v, after["values"][n]) for n, v in before["values"].items())
    assert all((a is None) == (b is None) and (a is None or torch.equal(a, b))
               for a, b in zip(before["grads"], after["grads"], strict=True))  # fmt: skip


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_users_model_is_left_as_it_was(mode):
    model = Odd().train()
    model.norm.eval()
    model.head.register_forward_hook(lambda *_: None)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    with mode():
        before = full_state(model)
        stages = list(cascade(model, image(6)))
        assert_untouched(before, model)
        for p in stages[-1].model.parameters():
            p.data.zero_()
        assert_untouched(before, model)
    assert not any(p.is_inference() for s in stages for p in s.model.parameters())
    assert not {id(p) for p in model.parameters()} & {id(p) for s in stages for p in s.model.parameters()}


def test_an_exception_in_the_middle_leaves_no_trace():
    class Fails(Odd):
        def forward(self, image):
            super().forward(image)
            raise ValueError("the user's own error")

    model = Fails().train()
    before = full_state(model)
    with pytest.raises(ValueError, match="own error"):
        Cascade(model, image(6))
    assert_untouched(before, model)


class Asks(pl.Callback):
    found = None

    def on_train_epoch_end(self, trainer, module):
        before = full_state(module)
        self.found = list(cascade(module, image(12, 12, 12)))
        assert_untouched(before, module)
        assert module.trainer is trainer


def test_a_lightning_module_in_the_middle_of_a_fit(tmp_path):
    model = LitClassifier(FlattenNet(2, size=12, widths=(2, 2, 2, 2)), labels=["a", "b"])
    batch = {"image": torch.rand(1, 12, 12, 12), "label": torch.tensor([1.0, 0.0])}
    asks = Asks()
    trainer = pl.Trainer(max_epochs=1, callbacks=[asks], accelerator="cpu", logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader([batch] * 4, batch_size=2))
    assert [s.module for s in asks.found][:2] == ["net.head", "net.features.7.1"]
    assert asks.found[-1].share == 1
    assert asks.found[0].model.__dict__.get("_trainer") in (None, trainer)


def test_refused():
    class Keeps(Odd):
        def forward(self, image):
            self.kept = super().forward(image)
            return self.kept

    model = Keeps()
    model(image(6))
    with pytest.raises(InputError, match=r"Keeps cannot be copied.*pass the network alone"):
        Cascade(model, image(6))
    with pytest.raises(InputError, match="no weights that its output depends on"):
        Cascade(nn.Sequential(nn.Flatten()), image(6))
    with pytest.raises(InputError, match="seed= expects a whole number"):
        Cascade(Odd(), image(6), seed=-1)
    with pytest.raises(InputError, match="expected a stage from 0 to 10, got 11"):
        Cascade(Odd(), image(6)).stage(11)
    with pytest.raises(InputError, match="expected a model"):
        Cascade("net", image(6))


SMALL = {
    "FlattenNet": (lambda: FlattenNet(2, size=12, widths=(2, 2, 2, 2)), (12, 12, 12), "head", "features.0.0"),
    "PoolNet": (lambda: PoolNet(2, size=24, widths=(2, 2, 2)), (24, 24, 24), "head", "features.0.0"),
}
MONAI = {
    "ResNet18": (lambda: resnet18(spatial_dims=3, n_input_channels=1, num_classes=3), "fc", "conv1"),
    "DenseNet121": (lambda: DenseNet121(spatial_dims=3, in_channels=1, out_channels=3), "class_layers.out",
                    "features.conv0"),
    "SEResNet50": (lambda: SEResNet50(spatial_dims=3, in_channels=1, num_classes=3), "last_linear", "layer0.conv1"),
    "EfficientNet-B0": (lambda: EfficientNetBN("efficientnet-b0", spatial_dims=3, in_channels=1, num_classes=3,
                                               pretrained=False), "_fc", "_conv_stem"),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_camtrains_nets(name):
    make, size, head, first = SMALL[name]
    model = make().eval()
    found = Cascade(model, image(*size))
    assert (found.parts[0].name, found.parts[-1].name) == (head, first)
    assert sum(sum(p.weights.values()) for p in found.parts) == sum(p.numel() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", MONAI)
def test_monais_nets(name):
    make, head, first = MONAI[name]
    model = make().eval()
    before = weights(model)
    found = Cascade(model, image(32, 32, 32, cases=1))
    assert (found.parts[0].name, found.parts[-1].name) == (head, first)
    last = found.stage(len(found))
    assert last.share == 1
    assert sum(sum(p.weights.values()) for p in found.parts) == sum(p.numel() for p in model.parameters())
    after = weights(last.model)
    assert all(torch.equal(v, after[n]) for n, v in before.items() if "running" in n)
    # Factors and shifts of a fresh BatchNorm are 1 and 0 already, biases drawn at 0 stay there.
    same = [n for n, p in model.named_parameters() if p.ndim > 1 and torch.equal(p, after[n])]
    assert same == []
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in before.items())


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_axial_net_whose_head_runs_as_a_function(pool):
    model = AxialNet(labels=2, variant="small", image_size=32, pool=pool).eval()
    found = Cascade(model, image(6, 32, 32))
    assert found.parts[0].name == "fc"
    assert found.stage(len(found)).share == 1
    assert sum(sum(p.weights.values()) for p in found.parts) == sum(p.numel() for p in model.parameters())
