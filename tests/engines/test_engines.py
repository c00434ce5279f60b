"""Groups of 2 and 3 processes, precisions, checkpointing and compiled code train what one plain process trains."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning import strategies
from torch import nn

import camtrain as ct

SCRIPT = Path(__file__).with_name("engine_runs.py")
# bf16 rounds gradients of other batches otherwise; its effect of the mask loss is over 100 times as large.
LOOSE = {"bf16": 5e-4, "fp16": 5e-5}


def environment():
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything but torchrun, in groups that are forked from one process."""
    folder = tmp_path_factory.mktemp("engines")
    done = subprocess.run([sys.executable, str(SCRIPT), str(folder)], env=environment(), text=True,
                          capture_output=True, timeout=400, cwd=folder)  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def read(folder, what, world):
    return [torch.load(folder / f"{what}-{world}-{rank}.pt", weights_only=True) for rank in range(world)]


def furthest(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_train_what_one_trains(folder, world):
    (one,) = read(folder, "arms", 1)
    for rank, found in enumerate(read(folder, "arms", world)):
        for arm, result in found.items():
            assert furthest(one[arm]["weights"], result["weights"]) < LOOSE.get(arm, 5e-6), (arm, rank)
            near = pytest.approx(one[arm]["metrics"], abs=5e-3 if arm == "bf16" else 2e-4)
            assert result["metrics"] == near, (arm, rank)
            assert result["steps"] == one[arm]["steps"], arm
            assert result["hooks"] == {}, arm
            assert result["run_dir"] == (rank == 0), arm


@pytest.mark.slow
def test_engines_of_one_process(folder):
    (one,) = read(folder, "arms", 1)
    weights = {arm: result["weights"] for arm, result in one.items()}
    for arm in ("mask", "swap"):  # what is compared here is felt by the weights
        assert furthest(weights["plain"], weights[arm]) > 0.01
    assert [one[arm]["steps"] for arm in ("mask", "accumulated")] == [6, 4]
    for arm in ("checkpointed", "compiled"):
        assert furthest(weights["mask"], weights[arm]) < 5e-6
    assert furthest(weights["mask"], weights["bf16"]) < 2e-3
    assert furthest(weights["fp32_clipped"], weights["fp16"]) < 2e-4
    assert one["fp16"]["scale"] == 65536  # no step was skipped
    assert one["fp16"]["metrics"]["train/mask_loss"] == pytest.approx(
        one["fp32_clipped"]["metrics"]["train/mask_loss"], rel=1e-3
    )


@pytest.mark.slow
def test_no_case_of_an_uneven_test_set_counts_twice_and_broken_files_hang_nobody(folder):
    (one,) = read(folder, "data", 1)
    first, second = pair = read(folder, "data", 2)
    for found in pair:
        for cache in ("none", "memory", "lazy", "disk"):
            assert found[cache]["metrics"] == pytest.approx(one["clean"]["metrics"], abs=1e-5), cache
    for cache in ("memory", "disk"):
        assert first[f"fit {cache}"]["steps"] == second[f"fit {cache}"]["steps"] == 5
        assert furthest(first[f"fit {cache}"]["weights"], second[f"fit {cache}"]["weights"]) == 0
    ends = [found["broken"] for found in read(folder, "broken", 2)]
    assert sorted(end["error"] in ("CaseError", "InputError") for end in ends)[1]
    assert all(end["error"] is not None for end in ends)
    assert any("expected a readable NIfTI file" in end["text"] for end in ends)


@pytest.mark.slow
def test_two_launchers_of_torchrun_stand_in_for_two_machines(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
              "--rdzv-backend", "c10d", "--rdzv-id", "camtrain", "--rdzv-endpoint", f"127.0.0.1:{port}"]  # fmt: skip
    machines = [
        subprocess.Popen(
            [*launch, str(SCRIPT), str(folder)],
            env=environment(),
            text=True,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        for _ in range(2)
    ]
    try:
        said = [machine.communicate(timeout=200)[1] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(said)[-6000:]
    (one,) = read(folder, "arms", 1)
    for found in read(folder, "nodes", 2):
        assert furthest(one["mask"]["weights"], found["mask"]["weights"]) < 5e-6
        assert found["mask"]["metrics"] == pytest.approx(one["mask"]["metrics"], abs=2e-4)
    assert len(list((folder / "nodes2" / "mask" / "camtrain").iterdir())) == 1  # one run, written by one process


# What is refused ---------------------------------------------------------------------------------------------------

TABLE = {"organs": {"heart": 1}, "labels": {"stent": ["heart"]}}


@pytest.mark.parametrize("make", [ct.MaskLossCallback, ct.OutsideSwap, ct.AttentionMonitor])
def test_sharded_training_is_refused(make, tmp_path):
    callback = make(table=TABLE)
    module = pl.LightningModule()
    for kind in ("FSDPStrategy", "DeepSpeedStrategy"):  # need a GPU, or a package; the class is the real one
        strategy = object.__new__(getattr(strategies, kind))
        trainer = SimpleNamespace(strategy=strategy, callbacks=[callback], datamodule=None)
        with pytest.raises(ct.InputError, match=rf"{make.__name__} does not work with {kind}: .*strategy='ddp'"):
            callback.setup(trainer, module, "fit")
    trainer = pl.Trainer(strategy=strategies.ModelParallelStrategy(process_group_backend="gloo"), callbacks=[callback],
                         accelerator="cpu", logger=False, default_root_dir=tmp_path)  # fmt: skip
    with pytest.raises(ct.InputError, match=f"{make.__name__} does not work with ModelParallelStrategy"):
        callback.setup(trainer, module, "fit")


@pytest.mark.parametrize("mlp", [False, True])
def test_maps_of_many_cells_in_float16(mlp):
    """The slope behind a mean over 64^3 cells lies under float16's least normal number."""
    torch.manual_seed(0)
    head = [nn.Linear(4, 8), nn.Softplus(), nn.Linear(8, 3)] if mlp else [nn.Linear(4, 3)]
    net = nn.Sequential(nn.Conv3d(1, 4, 1), nn.AdaptiveAvgPool3d(1), nn.Flatten(), *head)
    image = torch.rand(1, 1, 64, 64, 64)
    expected = ct.explain(net, image, layer="0")
    with ct.LayerTap(net, "0") as tap, torch.autocast("cpu", torch.float16):
        maps = tap.maps(net(image))
    assert maps.dtype == torch.float32
    assert float((maps - expected).norm() / expected.norm()) < 2e-3


def test_slopes_too_large_for_the_start_in_float16_are_not_lost():
    """Where the start itself would overflow, the plain pass is taken."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(1, 2, 1), nn.Flatten(), nn.Linear(8192, 2), nn.Softplus(), nn.Linear(2, 1))
    with torch.no_grad():
        net[2].weight.mul_(2000.0)
    image = torch.rand(1, 1, 4096)
    expected = ct.explain(net, image, layer="0")
    with ct.LayerTap(net, "0") as tap, torch.autocast("cpu", torch.float16):
        maps = tap.maps(net(image))
    assert bool(maps.isfinite().all())
    assert float((maps - expected).norm() / expected.norm()) < 5e-3
