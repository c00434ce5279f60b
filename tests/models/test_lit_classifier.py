from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import yaml
from monai.data import MetaTensor
from monai.networks.nets import DenseNet121, ResNet
from pytorch_lightning.cli import LightningCLI
from torch import Tensor, nn

from camtrain import InputError
from camtrain.models import AxialNet, FlattenNet, LitClassifier, PoolNet
from camtrain.models.lit_classifier import masked_bce

NAMES = ["nodule", "effusion", "stent"]
SIZE = (12, 18, 6)


class Cases(torch.utils.data.Dataset):
    """Cases of three labels; a bright block says which label is present, and one label in five is unknown."""

    def __init__(self, cases: int = 12, labels: int = 3, size: tuple[int, ...] = SIZE) -> None:
        generator = torch.Generator().manual_seed(0)
        known = torch.rand(cases, labels, generator=generator) > 0.2
        self.label = torch.randint(0, 2, (cases, labels), generator=generator).float()
        self.image = 0.1 * torch.randn(cases, 1, *size, generator=generator)
        self.image[:, 0, :4, :4, :4] += self.label[:, 0, None, None, None]
        self.label[~known] = torch.nan

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> dict[str, object]:
        return {"image": self.image[index], "label": self.label[index], "id": f"case{index}"}


class Data(pl.LightningDataModule):
    def __init__(self, cases: int = 12, size: tuple[int, int, int] = SIZE) -> None:
        super().__init__()
        self.labels = tuple(NAMES)
        self.cases = Cases(cases, size=size)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.cases, batch_size=5)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.cases, batch_size=5)

    def test_dataloader(self):
        return [self.val_dataloader(), self.val_dataloader()]


def flatten_net(**changes) -> FlattenNet:
    torch.manual_seed(0)
    return FlattenNet(**{"size": SIZE, "widths": (3, 4, 4, 4), **changes})


def trainer(tmp_path: Path, **changes) -> pl.Trainer:
    arguments = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": tmp_path,
    }
    return pl.Trainer(**{**arguments, **changes})


@pytest.fixture(autouse=True)
def few_words():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*logging interval.*")
        # Steps are also called by hand here.
        warnings.filterwarnings("ignore", message=".*`self.log\\(\\)`.*")
        yield


def fitted_checkpoint(model: LitClassifier, tmp_path: Path) -> Path:
    run = trainer(tmp_path, max_steps=2, max_epochs=-1, limit_val_batches=0)
    run.fit(model, Data())
    run.save_checkpoint(tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt"


def same_outputs(one: nn.Module, two: nn.Module, image: Tensor | None = None) -> None:
    image = torch.randn(2, 1, *SIZE) if image is None else image
    torch.testing.assert_close(one.eval()(image), two.eval()(image))


# ------------------------------------------------------------------------------------------------ the loss


def test_masked_bce_is_the_mean_over_known_labels():
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    label = torch.tensor([[0, 1, torch.nan, 1], [torch.nan] * 4, [1, 0, 0, torch.nan]])
    total, known = 0.0, 0
    for row, truth in zip(logits.tolist(), label.tolist(), strict=True):
        for value, target in zip(row, truth, strict=True):
            if target == target:
                p = 1 / (1 + torch.exp(torch.tensor(-value, dtype=torch.float64)))
                total -= float(torch.log(p if target else 1 - p))
                known += 1
    loss = masked_bce(logits, label)
    assert loss.item() == pytest.approx(total / known)
    assert known == 6
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[label.isnan()] == 0).all()
    assert (gradient[~label.isnan()] != 0).all()


def test_masked_bce_without_any_known_label_is_zero_with_a_graph():
    logits = torch.randn(2, 3, requires_grad=True)
    loss = masked_bce(logits, torch.full((2, 3), torch.nan))
    assert loss.item() == 0.0
    loss.backward()
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masked_bce_of_half_precision_is_float32(dtype):
    logits, label = torch.randn(2, 3).to(dtype), torch.tensor([[0.0, 1, torch.nan]] * 2)
    assert masked_bce(logits, label).dtype == torch.float32
    torch.testing.assert_close(masked_bce(logits, label), masked_bce(logits.float(), label))


def test_own_loss_module_is_used_and_refused_on_unknown_labels():
    label = torch.tensor([[0.0, 1, 0], [1, 1, 0]])
    batch = {"image": torch.randn(2, 1, *SIZE), "label": label}
    model = LitClassifier(flatten_net(), NAMES, loss=nn.MultiLabelSoftMarginLoss()).eval()
    expected = F.multilabel_soft_margin_loss(model(batch["image"]), label)
    torch.testing.assert_close(model.training_step(batch, 0), expected)
    with pytest.raises(InputError, match="loss=MultiLabelSoftMarginLoss"):
        model.training_step({**batch, "label": torch.tensor([[0.0, torch.nan, 0], [1, 1, 0]])}, 0)


# ------------------------------------------------------------------------------------------------ under a Trainer


@pytest.mark.parametrize(("optimizer", "schedule"), [("adamw", "one_cycle"), ("sgd", "constant")])
def test_fit_validate_test_log_losses_only(tmp_path, optimizer, schedule):
    model = LitClassifier(flatten_net(labels=8), NAMES, lr=0.01, optimizer=optimizer, schedule=schedule)
    assert model.labels == NAMES
    run = trainer(tmp_path, max_epochs=6)
    before = run.validate(model, Data(), verbose=False)[0]["val/loss"]
    run.fit(model, Data())
    assert set(run.callback_metrics) == {"train/loss", "val/loss"}
    assert run.callback_metrics["val/loss"] < before
    (one, two) = run.test(model, Data(), verbose=False)
    assert set(one) | set(two) == {"test/loss/dataloader_idx_0", "test/loss/dataloader_idx_1"}
    assert one["test/loss/dataloader_idx_0"] == pytest.approx(two["test/loss/dataloader_idx_1"])
    logits = torch.cat(run.predict(model, Data().val_dataloader()))
    assert logits.shape == (12, 3)


def test_logged_value_is_the_loss_of_the_steps(tmp_path):
    model = LitClassifier(flatten_net(), NAMES)
    (logged,) = trainer(tmp_path).validate(model, Data(), verbose=False)
    model.eval()
    expected = sum(len(b["image"]) * masked_bce(model(b["image"]), b["label"]) for b in Data().val_dataloader()) / 12
    assert logged["val/loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_bf16_and_frozen_parameters(tmp_path):
    net = flatten_net()
    net.features.requires_grad_(False)
    frozen = {n: p.clone() for n, p in net.features.named_parameters()}
    run = trainer(tmp_path, precision="bf16-mixed", max_epochs=1)
    run.fit(LitClassifier(net, NAMES), Data())
    assert torch.isfinite(run.callback_metrics["train/loss"])
    for name, parameter in net.features.named_parameters():
        assert torch.equal(parameter, frozen[name])


def test_one_cycle_needs_an_end(tmp_path):
    with pytest.raises(InputError, match="max_epochs or max_steps"):
        trainer(tmp_path, max_epochs=-1, limit_val_batches=0).fit(
            LitClassifier(flatten_net(), NAMES, schedule="one_cycle"), Data()
        )


def test_meta_tensors_end_at_the_network():
    seen = []
    net = flatten_net(labels=3)
    net.register_forward_pre_hook(lambda _m, args: seen.append(type(args[0])))
    image = MetaTensor(torch.randn(2, 1, *SIZE))
    LitClassifier(net, NAMES).training_step({"image": image, "label": torch.zeros(2, 3)}, 0)
    assert seen == [Tensor]


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("build", ["flatten", "pool", "axial"])
def test_python_made_checkpoint_of_our_nets_rebuilds_alone(build, tmp_path):
    nets = {
        "flatten": flatten_net(labels=8),
        "pool": PoolNet(labels=3, size=SIZE, widths=(2, 3, 4)),
        "axial": AxialNet(labels=2, variant="small", image_size=SIZE[:2], slice_axis=2, activation_checkpointing=True),
    }
    model = LitClassifier(nets[build], NAMES, lr=0.02)
    path = fitted_checkpoint(model, tmp_path)
    stored = torch.load(path, weights_only=True)
    assert stored["hyper_parameters"]["net"]["class_path"].startswith("camtrain.models.")
    again = LitClassifier.load_from_checkpoint(path)
    assert (again.labels, again.lr, type(again.net)) == (NAMES, 0.02, type(model.net))
    same_outputs(model, again)
    # A reloaded model must write a checkpoint that is as complete.
    third = LitClassifier.load_from_checkpoint(fitted_checkpoint(again, tmp_path))
    same_outputs(again, third)


def test_foreign_net_made_in_python_is_passed_again(tmp_path):
    def build() -> ResNet:
        return ResNet("basic", [1, 1, 1, 1], [2, 2, 2, 2], n_input_channels=1, num_classes=3)

    model = LitClassifier(build(), NAMES, lr=0.02)
    path = fitted_checkpoint(model, tmp_path)
    assert "net" not in torch.load(path, weights_only=True)["hyper_parameters"]
    again = LitClassifier.load_from_checkpoint(path, net=build())
    assert again.lr == 0.02
    same_outputs(model, again)
    with pytest.raises(InputError, match=r"load_from_checkpoint\(path, net=\.\.\.\)"):
        LitClassifier.load_from_checkpoint(path)
    with pytest.raises(InputError, match=r"holds a monai\.networks\.nets\.resnet\.ResNet"):
        LitClassifier.load_from_checkpoint(path, net=flatten_net())


def test_forgotten_loss_is_told(tmp_path):
    class Half(nn.Module):
        def forward(self, logits: Tensor, label: Tensor) -> Tensor:
            return masked_bce(logits, label) / 2

    path = fitted_checkpoint(LitClassifier(flatten_net(), NAMES, loss=Half()), tmp_path)
    with pytest.warns(UserWarning, match="trained with .*Half, but this model has the masked cross-entropy"):
        LitClassifier.load_from_checkpoint(path, net=flatten_net())


def test_checkpoint_of_another_model_is_refused(tmp_path):
    path = fitted_checkpoint(LitClassifier(flatten_net(), NAMES), tmp_path)
    with pytest.raises(InputError, match=r"net\.features\.0\.0\.weight has shape \(3, 1, 2, 2, 2\), expected \(5, 1"):
        LitClassifier.load_from_checkpoint(path, net=flatten_net(widths=(5, 4, 4, 4)))
    resumed = LitClassifier(flatten_net(), NAMES[:2])
    with pytest.raises(InputError, match=r"net\.head\.weight .* expected \(2, "):
        trainer(tmp_path).fit(resumed, Data(), ckpt_path=path, weights_only=True)


def test_surplus_and_missing_weights_follow_strict():
    model = LitClassifier(flatten_net(), NAMES)
    state = model.state_dict()
    missing = {k: v for k, v in state.items() if k != "net.head.bias"}
    with pytest.raises(InputError, match=r"lacks net\.head\.bias \(1 missing, 0 surplus\)"):
        model.load_state_dict(missing)
    assert model.load_state_dict(missing, strict=False).missing_keys == ["net.head.bias"]
    with pytest.raises(InputError, match="holds other"):
        model.load_state_dict({**state, "other": torch.zeros(1)})


def test_resume_continues(tmp_path):
    model = LitClassifier(flatten_net(), NAMES, optimizer="sgd")
    path = fitted_checkpoint(model, tmp_path)
    run = trainer(tmp_path, max_steps=4, max_epochs=-1, limit_val_batches=0)
    resumed = LitClassifier(flatten_net(), NAMES, optimizer="sgd")
    run.fit(resumed, Data(), ckpt_path=path, weights_only=True)
    assert run.global_step == 4


# ------------------------------------------------------------------------------------------------ the command line

NETS = {
    "FlattenNet": {
        "class_path": "camtrain.models.FlattenNet",
        "init_args": {"size": [32, 36, 32], "widths": [2, 2, 2, 2]},
    },
    "ResNet": {
        "class_path": "monai.networks.nets.ResNet",
        "init_args": {
            "block": "basic",
            "layers": [1, 1, 1, 1],
            "block_inplanes": [2, 2, 2, 2],
            "n_input_channels": 1,
            "num_classes": 3,
        },
    },
    "DenseNet121": {
        "class_path": "monai.networks.nets.DenseNet121",
        "init_args": {"spatial_dims": 3, "in_channels": 1, "out_channels": 3, "growth_rate": 2, "init_features": 4},
    },
}


class LinkedCLI(LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.link_arguments("data.labels", "model.labels", apply_on="instantiate")


def run_cli(tmp_path: Path, model: dict, command: str = "fit", **extra) -> LightningCLI:
    root = str(tmp_path)
    config = {
        "model": model,
        "data": {"size": [32, 36, 32]},
        "trainer": {
            "max_steps": 2,
            "limit_val_batches": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "default_root_dir": root,
        },
        **extra,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return LinkedCLI(
        LitClassifier,
        Data,
        args=[command, "--config", str(path)],
        save_config_callback=None,
        parser_kwargs={"exit_on_error": False},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["FlattenNet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ResNet", "DenseNet121"))]
)
def test_cli_checkpoint_rebuilds_any_net_alone(name, tmp_path):
    cli = run_cli(tmp_path, {"net": NETS[name], "lr": 0.005})
    assert cli.model.labels == NAMES
    (path,) = tmp_path.rglob("*.ckpt")
    stored = torch.load(path, weights_only=True)["hyper_parameters"]
    assert stored["net"]["class_path"].endswith(name)
    assert stored["labels"] == NAMES
    image = torch.randn(2, 1, 32, 36, 32)
    again = LitClassifier.load_from_checkpoint(path)
    assert again.lr == 0.005
    same_outputs(cli.model, again, image)
    # Trained on from a plain Python script: the new checkpoint still tells how to rebuild the network.
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.strategy.connect(again)
    run.save_checkpoint(tmp_path / "second.ckpt")
    same_outputs(again, LitClassifier.load_from_checkpoint(tmp_path / "second.ckpt"), image)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "argument"), [("ResNet", "num_classes=3"), ("DenseNet121", "out_channels=3")])
def test_cli_names_the_argument_of_a_wrong_number_of_outputs(name, argument, tmp_path):
    wrong = {**NETS[name]["init_args"], argument.split("=")[0]: 7}
    with pytest.raises(InputError, match=rf"{name} gives 7 outputs for 3 labels: set {argument} of {name}"):
        run_cli(tmp_path, {"net": {**NETS[name], "init_args": wrong}})


@pytest.mark.slow
@pytest.mark.parametrize("made_by", ["cli", "python"])
@pytest.mark.parametrize("command", ["validate", "test"])
def test_cli_takes_checkpoints_of_both_makes(made_by, command, tmp_path):
    net = NETS["FlattenNet"]
    if made_by == "cli":
        run_cli(tmp_path, {"net": net})
    else:
        run = trainer(tmp_path, max_steps=1, max_epochs=-1, limit_val_batches=0)
        run.fit(LitClassifier(FlattenNet(**net["init_args"]), NAMES), Data(size=(32, 36, 32)))
        run.save_checkpoint(tmp_path / "model.ckpt")
    (path,) = tmp_path.rglob("*.ckpt")
    stored = torch.load(path, weights_only=True)["state_dict"]
    cli = run_cli(tmp_path, {"net": net}, command, ckpt_path=str(path))
    for name, weight in cli.model.state_dict().items():
        assert torch.equal(weight, stored[name])


# ------------------------------------------------------------------------------------------------ bad input


class Outputs(nn.Module):
    def __init__(self, give) -> None:
        super().__init__()
        self.give = give

    def forward(self, image: Tensor) -> object:
        return self.give(image)


def batch_of(**changes) -> dict[str, object]:
    return {"image": torch.randn(2, 1, *SIZE), "label": torch.zeros(2, 3), "id": ["anna", "ben"], **changes}


def with_value(value: float) -> Tensor:
    image = torch.randn(2, 1, *SIZE)
    image[1, 0, 2, 3, 4] = value
    return image


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("step", ["training_step", "validation_step", "test_step", "predict_step"])
def test_nan_in_an_image_names_the_case(value, step):
    model = LitClassifier(flatten_net(), NAMES)
    with pytest.raises(InputError, match=r"case ben has NaN or infinite"):
        getattr(model, step)(batch_of(image=with_value(value)), 0)
    batch = batch_of(image=with_value(value))
    del batch["id"]
    with pytest.raises(InputError, match="row 1 of the batch"):
        getattr(model, step)(batch, 0)


def test_huge_but_finite_images_pass():
    image = torch.full((2, 1, *SIZE), 3e38)
    assert not image.sum().isfinite()
    net = Outputs(lambda image: image.flatten(1)[:, :3].clamp(-1, 1))
    LitClassifier(net, NAMES).training_step(batch_of(image=image), 0)


@pytest.mark.parametrize(
    ("give", "words"),
    [
        (lambda image: (image.flatten(1)[:, :3],), "got tuple"),
        (lambda image: image, r"got \(2, 1, 12, 18, 6\)"),
        (lambda image: image.flatten(1)[:1, :3], r"got \(1, 3\)"),
        (
            lambda image: image.flatten(1)[:, :4],
            "Outputs gives 4 outputs for 3 labels: give the last layer of Outputs 3",
        ),
    ],
)
@pytest.mark.parametrize("labels", [NAMES, None])
def test_wrong_outputs_are_refused(give, words, labels):
    with pytest.raises(InputError, match=words):
        LitClassifier(Outputs(give), labels).training_step(batch_of(), 0)


def test_own_nets_without_labels_are_told_to_take_them():
    with pytest.raises(InputError, match="8 outputs for 3 labels: pass labels= to LitClassifier"):
        LitClassifier(flatten_net(labels=8)).training_step(batch_of(), 0)
    model = LitClassifier(flatten_net(labels=3))
    assert model.labels is None
    assert model.training_step(batch_of(), 0).item() > 0


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ([torch.zeros(2, 1, *SIZE)], "dict batches .* got list"),
        ({"picture": torch.zeros(2, 1, *SIZE)}, "key 'image' in the batch, got picture"),
        ({"image": torch.zeros(2, 1, *SIZE)}, "key 'label' .* no such key"),
        (batch_of(label=torch.zeros(1, 3)), "got 1 rows"),
        (batch_of(label=torch.full((2, 3), 0.5)), "0, 1 or NaN"),
        (batch_of(label=torch.zeros(2, 4)), "3 outputs but the batch has 4 label columns"),
    ],
)
def test_wrong_batches_are_refused(batch, words):
    with pytest.raises(InputError, match=words):
        LitClassifier(flatten_net(), NAMES).training_step(batch, 0)


def test_class_indices_are_encoded():
    batch = batch_of(label=torch.tensor([2, 0]))
    model = LitClassifier(flatten_net(), NAMES).eval()
    one_hot = batch_of(image=batch["image"], label=torch.tensor([[0.0, 0, 1], [1, 0, 0]]))
    torch.testing.assert_close(model.training_step(batch, 0), model.training_step(one_hot, 0))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"net": None}, "net="),
        ({"labels": []}, "labels="),
        ({"labels": ["a", "a"]}, "labels="),
        ({"labels": "nodule"}, "labels="),
        ({"optimizer": "adam"}, "optimizer= .* nearest: adamw"),
        ({"schedule": "cosine"}, "schedule="),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        LitClassifier(**{"net": flatten_net(), "labels": NAMES, **arguments})


def test_a_net_of_monai_is_left_as_it_is():
    net = DenseNet121(3, 1, 3, growth_rate=2, init_features=4)
    head = net.class_layers.out
    assert LitClassifier(net, NAMES).net.class_layers.out is head
