"""A training of many epochs holds no more after one than after the other: no hook, tensor, graph node, file, thread."""

from __future__ import annotations

import gc
import importlib
import warnings
from collections import Counter
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

import camtrain as ct

# Asked in every epoch, and nothing kept of earlier ones: so each epoch can be held against the one before.
ALARMS = [{"name": "reliance", "every_n_epochs": 1, "window": 1}, {"name": "depth", "every_n_epochs": 1}, "empty_maps"]
PAID = ["relevancecam", {"name": "scorecam", "channels": 2}, "guided_gradcam"]
SETTINGS = {
    "last layer": {"layer": "features.3"},
    "mid layer": {"layer": ["features.1", "features.3"]},
    "all of it": {"methods": ["hirescam", "gradcam", *PAID], "nifti_cases": 1},
}


def held(model):
    """What the process holds that a leak would add to."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at strangers' deprecated attributes
        tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    waiting, nodes = [each.grad_fn for each in tensors if each.grad_fn is not None], set()
    while waiting:
        if (node := waiting.pop()) not in nodes:
            nodes.add(node)
            waiting += [behind for behind, _ in node.next_functions if behind is not None]
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "hooks": sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds),
        "hooks of tensors": sum(len(tensor._backward_hooks or {}) for tensor in tensors if tensor.is_leaf),
        "wrapped": sorted(name for name, each in vars(model).items() if hasattr(each, "camtrain")),
        "graph": len(nodes),
        "files": sorted(Counter(map(_open_file, Path("/proc/self/fd").iterdir())).items()),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "tensors": sorted(Counter(f"{each.dtype} {tuple(each.shape)}" for each in tensors).items()),
    }


def differences(first, now):
    """Kind -> what there was and what there is, of what differs."""
    entries = {key: (_entries(first[key]), _entries(now[key])) for key in first if first[key] != now[key]}
    return {key: (before - after, after - before) for key, (before, after) in entries.items()}


def _entries(value):
    return set(value) if isinstance(value, list) else {value}


def _open_file(link):
    try:
        return str(link.readlink())
    except OSError:  # the listing itself
        return "-"


def _still(module):
    return torch.optim.SGD(module.parameters(), 0.0)


class Watch(pl.Callback):
    """Looks when an epoch is over altogether: its validation, its checkpoint, and what the loggers were sent."""

    def __init__(self):
        self.after = []

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch:
            self.after.append(held(pl_module))


@pytest.fixture(autouse=True)
def only_what_is_new():
    """What was there before is not looked at: half a million objects of libraries."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize("setting", ["last layer", "mid layer", pytest.param("all of it", marks=pytest.mark.slow)])
def test_nothing_is_left_of_an_epoch(kit, tmp_path, setting):
    torch.manual_seed(0)
    options = {"layer": "features.3", "methods": ["hirescam", "gradcam"], **SETTINGS[setting]}
    drawn = setting == "all of it"
    more = {"report": drawn, "every_n_epochs": int(drawn), "panel_cases": 2, "alarms": ALARMS}
    added = [
        ct.MaskLossCallback(options["layer"], kit.TABLE, names=kit.LABELS),
        ct.AttentionMonitor(table=kit.TABLE, names=kit.LABELS, **more, **options),
        ct.OutsideSwap(kit.TABLE, names=kit.LABELS, p=0.5),
        watch := Watch(),
    ]
    loggers = importlib.import_module("pytorch_lightning.loggers")
    logger = [loggers.CSVLogger(tmp_path), loggers.TensorBoardLogger(tmp_path)] if drawn else False
    # Lightning keeps scalars of every key, and which scores are defined would change with the weights.
    module = kit.make_lit(kit.make_net("mlp" if setting == "mid layer" else "flatten"), configure_optimizers=_still)
    data = kit.loader([{**case, "affine": torch.eye(4)} for case in kit.make_cases(8)])
    trainer = kit.make_trainer(tmp_path, *added, max_epochs=4, logger=logger, enable_checkpointing=drawn)
    trainer.fit(module, data, data)
    first, *later = watch.after[1:]  # the panel and the cases of the alarms are chosen in the first epoch
    for epoch, now in enumerate(later, 3):
        assert differences(first, now) == {}, f"after epoch {epoch}"
    assert first["hooks"] == first["graph"] == 0
    del trainer, added, watch, logger
    after = held(module)
    assert [after[key] for key in ("hooks", "hooks of tensors", "wrapped", "graph")] == [0, 0, [], 0]
    assert not any("/camtrain/" in name for name, _ in after["files"])
