"""Tiny cases, nets and LightningModules that know nothing of camtrain, and real Trainers."""

from __future__ import annotations

import importlib
import logging
import warnings
from types import SimpleNamespace

import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import camtrain as ct
from camtrain.callbacks import _map_budget

SIZE = (12, 16, 20)
LABELS = ["nodule", "stent", "effusion"]
TABLE = {
    "organs": {"lung_left": 1, "lung_right": 2, "heart": 3},
    "groups": {"lungs": ["lung_left", "lung_right"]},
    "labels": {"nodule": ["lungs"], "stent": ["heart"], "effusion": ["lung_right"]},
}
LAYER = "features.3"

logging.getLogger("pytorch_lightning").setLevel(logging.INFO)


def make_cases(count=8, seed=0, labels=3, size=SIZE):
    """Dicts as a dataset gives them; all labels known, every label in some case, all organs in every case."""
    rng = torch.Generator().manual_seed(seed)
    truth = (torch.rand(count, labels, generator=rng) < 0.4).float()
    for label in range(labels):
        truth[label % count, label] = 1
        truth[(label + 1) % count, label] = 0
    cases = []
    for row in range(count):
        organs = torch.zeros(1, *size, dtype=torch.int16)
        organs[:, 1 + row % 2 : 5, 2:9] = 1
        organs[:, 7:11, 2 : 9 - row % 3] = 2
        organs[:, 3:9, 10:15] = 3
        image = torch.rand(1, *size, generator=rng) + 0.3 * (organs == 2)
        cases.append({"image": image, "label": truth[row], "organs": organs, "id": f"case{row:02d}"})
    return cases


def loader(cases, batch_size=3):
    return DataLoader(cases, batch_size=batch_size, shuffle=False)


def make_net(head="flatten", outputs=3, size=SIZE, seed=0, inplace=False):
    """Two convolutions and a head: `flatten` is affine in the last feature map, `mlp` is not, `pool` is affine too."""
    torch.manual_seed(seed)
    conv, pool = (nn.Conv2d, nn.AdaptiveAvgPool2d) if len(size) == 2 else (nn.Conv3d, nn.AdaptiveAvgPool3d)
    cells = 6 * torch.Size((s + 3) // 4 for s in size).numel()
    heads = {
        "flatten": [nn.Flatten(), nn.Linear(cells, outputs)],
        "mlp": [nn.Flatten(), nn.Linear(cells, 8), nn.Softplus(), nn.Linear(8, outputs)],
        "pool": [pool(1), nn.Flatten(), nn.Linear(6, outputs)],
    }
    features = [conv(1, 4, 3, 2, 1), nn.ReLU(inplace), conv(4, 6, 3, 2, 1), nn.ReLU(inplace)]
    return Net(nn.Sequential(*features), nn.Sequential(*heads[head]))


class Net(nn.Module):
    def __init__(self, features, head):
        super().__init__()
        self.features, self.head = features, head
        self.calls = 0

    def forward(self, image):
        self.calls += 1
        return self.head(self.features(image))


def bce(logits, label):
    known = ~label.isnan()
    return F.binary_cross_entropy_with_logits(logits[known], label[known])


def make_lit(net, namespace="pytorch_lightning", **methods):
    """A module with the usual steps; `methods` replace or add some, `lr` is 0.05."""

    def training_step(self, batch, batch_idx):
        return bce(self(batch["image"]), batch["label"])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        loss = bce(self(batch["image"]), batch["label"])
        self.log("val/loss", loss)
        return loss

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        return self(batch["image"])

    base = importlib.import_module(namespace).LightningModule

    def init(self, net):
        base.__init__(self)
        self.net = net

    def forward(self, image):
        return self.net(image)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05)

    usual = {f.__name__: f for f in (training_step, validation_step, test_step, forward, configure_optimizers)}
    return type("Lit", (base,), {"__init__": init, **usual, **methods})(net)


def make_trainer(folder, *callbacks, namespace="pytorch_lightning", **options):
    quiet = dict.fromkeys(["enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"], False)
    usual = {"default_root_dir": folder, "accelerator": "cpu", "max_epochs": 1, "num_sanity_val_steps": 0}
    given = {**quiet, **usual, "log_every_n_steps": 1, **options}
    return importlib.import_module(namespace).Trainer(callbacks=list(callbacks), **given)


def by_hand(net, batches, loss_fn=None, table=None, epochs=1, factors=None, method="hirescam"):
    """The training that the callback should amount to, as a plain loop with LayerTap; gives the losses too."""
    table = table or ct.OrganTable.load(TABLE)
    optimizer, losses = torch.optim.SGD(net.parameters(), 0.05), []
    for batch in list(batches) * epochs:
        with ct.LayerTap(net, LAYER) as tap:
            logits = net(batch["image"])
            loss = bce(logits, batch["label"])
            factor = 1.0 if factors is None else factors[len(losses)]
            if loss_fn is not None and factor:
                maps = tap.maps(logits, method=method)
                allowed = table.allowed(batch["organs"], size=maps.shape[2:])
                mask = loss_fn(maps, allowed, batch["label"], batch["organs"].flatten(1).any(1))
                losses.append((loss.item(), mask.item() / max(loss_fn.weight, 1e-9)))
                loss = loss + factor * mask
            else:
                losses.append((loss.item(), None))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def same_weights(a, b, **tolerance):
    for (name, p), (_, q) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda text, n=name: f"{n}: {text}", **tolerance)


def hooks_of(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
    return {(n, k): len(getattr(m, k)) for n, m in model.named_modules() for k in kinds if getattr(m, k)}


@pytest.fixture(scope="session")
def kit():
    """Everything above; test folders are no packages, so helpers come as a fixture."""
    warnings.filterwarnings("ignore", category=pytorch_lightning.utilities.warnings.PossibleUserWarning)
    return SimpleNamespace(**{k: v for k, v in globals().items() if not k.startswith("_")})


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def table():
    return ct.OrganTable.load(TABLE)


@pytest.fixture
def no_second(monkeypatch):
    """Nothing for short passes: what is spent is the share alone."""
    monkeypatch.setattr(_map_budget, "SECOND", 1e-9)
    monkeypatch.setattr(_map_budget, "_EACH", 0.0)
