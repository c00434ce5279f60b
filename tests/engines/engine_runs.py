"""One small training per engine, in one process and in groups of several; run as a script by test_engines.py.

Groups are forked from one process that has imported everything, or made by launchers of torchrun (`nodes`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import socket
import sys
import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import torch
import torch._dynamo  # once, before the processes are forked
import torch.distributed as dist
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler

import camtrain as ct
from camtrain.callbacks._regions import Cases
from camtrain.data import ManifestDataModule

HERE = Path(__file__).parent
# Divisible neither by two processes nor by three, but for the last, which leaves one case to the third of three.
BATCHES = (range(5), range(5, 12), range(12, 16))
# No sample of a process has organs in the first step of two or three processes, nor in the last one.
BARE = (2, 3, 4, 5, 15)


def load_kit():
    spec = importlib.util.spec_from_file_location("kit", HERE.parent / "callbacks" / "conftest.py")
    kit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kit)
    return kit


kit = load_kit()


# Data and modules --------------------------------------------------------------------------------------------------


def cases_for_training():
    """16 cases, for global batches of 5, 7 and 4."""
    cases = kit.make_cases(16)
    for row in BARE:
        cases[row]["organs"] = torch.zeros_like(cases[row]["organs"])
    cases[7]["label"][1] = torch.nan
    return cases


def share_of(batches, rank, world):
    """The part of every global batch that a process gets: uneven where it does not divide."""
    return [[int(i) for i in np.array_split(np.asarray(batch), world)[rank]] for batch in batches]


def loaders(rank, world):
    cases, held_out = cases_for_training(), kit.make_cases(7, seed=5)
    held_out[3]["organs"] = torch.zeros_like(held_out[3]["organs"])
    train = DataLoader(cases, batch_sampler=share_of(BATCHES, rank, world))
    sampler = DistributedSampler(held_out, world, rank, shuffle=False)
    return train, DataLoader(held_out, batch_size=2, sampler=sampler)


def even_loss(self, batch, batch_idx):
    """A task loss that is the mean over the global batch, as an exact comparison needs."""
    logits, label = self(batch["image"]), batch["label"]
    known = ~label.isnan()
    count, world = known.sum(), 1
    if dist.is_initialized():
        dist.all_reduce(count)
        world = dist.get_world_size()
    each = nn.functional.binary_cross_entropy_with_logits(logits[known], label[known], reduction="sum")
    return each * world / count


class Checkpointed(nn.Module):
    """Its activations are computed again in the backward pass."""

    def __init__(self, net):
        super().__init__()
        self.features, self.head = net.features, net.head

    def forward(self, image):
        return checkpoint(lambda i: self.head(self.features(i)), image, use_reentrant=False)


def compiled(net):
    return ct.compile_backbone(net, torch.rand(1, 1, *kit.SIZE), kit.LAYER, backend="aot_eager")


class KnownSwap(ct.OutsideSwap):
    """Leaves truths out by case, so that the same ones are left out however the cases are spread."""

    def _composite(self, trainer, words):
        numbers = torch.tensor([int(case[4:]) for case in words.ids])
        left_out = (numbers[:, None] + torch.arange(3)) % 5 < torch.where(numbers % 3 == 0, 3, 1)[:, None]
        own = Cases(words.image, words.organs, words.label, words.has_organs)
        return SimpleNamespace(cases=own, left_out=left_out, swapped=left_out.any(dim=1))


def pairs(logits, label):
    return nn.functional.binary_cross_entropy_with_logits(logits, label, reduction="none")


def half():
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}


# fmt: off
# Arm -> head, what is done to the net, options of the mask loss (None: without it), of the Trainer, of OutsideSwap.
ARMS = {
    "plain": ("mlp", None, None, {}, None),
    "mask": ("mlp", None, {}, {}, None),
    # The energy form divides by small sums, and float32 shows in which order they were added.
    "accumulated": (
        "pool", None, {"form": "energy", "labels": "present"},
        {"accumulate_grad_batches": 2, "precision": "64-true"}, None,
    ),
    "bf16": ("mlp", None, {}, {"precision": "bf16-mixed"}, None),
    "fp16": ("mlp", None, {}, {"gradient_clip_val": 1.0}, None),
    "fp32_clipped": ("mlp", None, {}, {"gradient_clip_val": 1.0}, None),
    "checkpointed": ("mlp", Checkpointed, {}, {}, None),
    "compiled": ("mlp", compiled, {}, {}, None),
    "swap": ("mlp", None, {}, {}, {}),
    "swap_own_loss": ("flatten", None, None, {}, {"loss": pairs}),
}
# fmt: on


def run_arm(arm, rank, world, folder, strategy):
    head, change, mask, trainer_options, swap = ARMS[arm]
    net = kit.make_net(head)
    net = net if change is None else change(net)
    # SGD with every step: what an optimizer like Adam divides out must not hide a wrong factor.
    module = kit.make_lit(net, training_step=even_loss)
    callbacks = [] if mask is None else [ct.MaskLossCallback(kit.LAYER, kit.TABLE, weight=3.0, **mask)]
    callbacks += [] if swap is None else [KnownSwap(kit.TABLE, **swap)]
    monitor = ct.AttentionMonitor(kit.LAYER, kit.TABLE, every_n_epochs=1 if arm == "mask" else 0, alarms=[])
    options = {**trainer_options, **strategy(), **(half() if arm == "fp16" else {})}
    trainer = kit.make_trainer(
        folder / arm, *callbacks, monitor, max_epochs=2, use_distributed_sampler=False, **options
    )
    train, val = loaders(rank, world)
    trainer.fit(module, train, val)
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return {
        "weights": {k: v.detach().float().clone() for k, v in net.state_dict().items()},
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items() if k != "val/loss"},
        "steps": trainer.global_step,
        "hooks": kit.hooks_of(module),
        "scale": None if scaler is None else scaler.get_scale(),
        "run_dir": monitor.publisher.run_dir is not None,
    }


# A study of NIfTI files, some of them broken -----------------------------------------------------------------------

CACHES = {"none": False, "memory": True, "lazy": "lazy", "disk": "disk"}
FITTED = ("memory", "disk")
BROKEN = (
    1,
    8,
)  # 9 cases on 2 processes: the first batch of the second, and the last of the first; the sampler adds one


def write_study(folder):
    """Manifests `broken.csv` and `clean.csv` (without the rows of the broken files), 9 cases in each split."""
    rng = np.random.default_rng(0)
    (folder / "table.yaml").write_text("organs: {heart: 1, lung: 2}\nlabels: {stent: [heart], nodule: [lung]}\n")
    rows = []
    for number in range(18):
        split, place = ("train", number) if number < 9 else ("test", number - 9)
        scan, organs = folder / f"scan{number}.nii.gz", folder / f"organs{number}.nii.gz"
        values = rng.integers(-1000, 800, (8, 8, 8)).astype(np.int16)
        nib.save(nib.Nifti1Image(values, np.eye(4)), scan)
        nib.save(nib.Nifti1Image(rng.integers(0, 3, (8, 8, 8)).astype(np.uint8), np.eye(4)), organs)
        if place in BROKEN:
            scan.write_bytes(scan.read_bytes()[:120])
        truths = (number * 7 // 3) % 2, (number * 5 // 2) % 2
        rows.append((place, f"c{number},{scan.name},{organs.name},{split},{truths[0]},{truths[1]}"))
    header = "id,image,organs,split,stent,nodule"
    (folder / "broken.csv").write_text("\n".join([header, *(row for _, row in rows)]) + "\n")
    clean = [row for place, row in rows if place not in BROKEN]
    (folder / "clean.csv").write_text("\n".join([header, *clean]) + "\n")


def study_module():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 512, 2))
    return kit.make_lit(net)


def run_study(folder, manifest, cache, strategy, on_error="skip", fit=False):
    data = ManifestDataModule(
        folder / manifest, folder / "table.yaml", batch_size=1, size=(8, 8, 8), cache=cache, on_error=on_error,
        cache_dir=folder / "cache", val_split=None, window="zscore",
    )  # fmt: skip
    module = study_module()
    callbacks = [ct.MaskLossCallback("net.1")] if fit else [ct.AttentionMonitor("net.1", every_n_epochs=0, alarms=[])]
    trainer = kit.make_trainer(folder / "runs", *callbacks, **strategy())
    (trainer.fit if fit else trainer.test)(module, datamodule=data, **({} if fit else {"verbose": False}))
    found = {k: float(v) for k, v in trainer.callback_metrics.items()}
    return {"metrics": found, "steps": trainer.global_step, "weights": module.net.state_dict()}


def run_data(folder, world, strategy):
    study = folder / "study"
    if world == 1:
        return {"clean": run_study(study, "clean.csv", False, strategy)}
    found = {}
    for name, cache in CACHES.items():
        found[name] = run_study(study, "broken.csv", cache, strategy)
        if name in FITTED:
            found[f"fit {name}"] = run_study(study, "broken.csv", cache, strategy, fit=True)
    return found


def run_broken(folder, strategy):
    """A file that one process of two cannot read, and `on_error="raise"`: what every process ends with."""
    try:
        run_study(folder / "study", "broken.csv", False, strategy, on_error="raise", fit=True)
    except Exception as error:
        return {"broken": {"error": type(error).__name__, "text": str(error)[:300]}}
    return {"broken": {"error": None}}


# Groups of processes -----------------------------------------------------------------------------------------------


def strategy_of(world):
    """Options of a Trainer; a strategy serves one Trainer only."""
    if world == 1:
        return {}
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    ddp = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
    return {"devices": world // nodes, "num_nodes": nodes, "strategy": ddp}


def run_all(what, rank, world, folder):
    torch.set_num_threads(1)
    strategy = partial(strategy_of, world)
    if what == "data":
        found = run_data(folder, world, strategy)
    elif what == "broken":
        found = run_broken(folder, strategy)
    else:
        # The twin of fp16 in full precision is there to compare one process with.
        arms = [arm for arm in ARMS if world == 1 or arm != "fp32_clipped"] if what == "arms" else ["mask"]
        found = {arm: run_arm(arm, rank, world, folder / f"{what}{world}", strategy) for arm in arms}
    torch.save(found, folder / f"{what}-{world}-{rank}.pt")


def forked(what, world, folder):
    """A group of `world` processes, as torchrun would set it up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        if child := os.fork():
            children.append(child)
            continue
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "GROUP_RANK": 0, "MASTER_PORT": port}
        group |= {"LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": what}
        os.environ.update({k: str(v) for k, v in group.items()} if world > 1 else {})
        code = 1
        with contextlib.suppress(BaseException):
            try:
                run_all(what, rank, world, folder)
                code = 0
            except BaseException:
                traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main():
    folder = Path(sys.argv[1])
    if "RANK" in os.environ:  # started by torchrun
        return run_all("nodes", int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), folder)
    (folder / "study").mkdir()
    write_study(folder / "study")
    groups = [("arms", 1), ("arms", 2), ("arms", 3), ("data", 1), ("data", 2), ("broken", 2)]
    failed = [(what, world) for what, world in groups if any(forked(what, world, folder))]
    sys.exit(f"failed: {failed}" if failed else 0)


if __name__ == "__main__":
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    main()
