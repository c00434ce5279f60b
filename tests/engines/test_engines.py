"""Engines: the weights after several steps are those of one process on the same global batches, whatever runs them."""

from __future__ import annotations

import importlib.util
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

import camtrain as ct
from camtrain import InputError
from camtrain.callbacks._engines import refuse_engine

RUNS = Path(__file__).with_name("engine_runs.py")
ROOT = Path(__file__).parents[2]
GROUPS = [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
# Largest difference of a weight, and of a score. Half precision rounds each sample, and sums in another order.
FULL = (1e-6, 1e-5)
# OrganIoU counts cells: one that the rounding of bf16 moves over the threshold is a thirtieth of the smallest union.
LIMITS = {"bf16": (5e-4, 4e-2), "fp16": (5e-5, 1e-3)}


def load_kit():
    """Helpers of the callbacks' tests; test folders are no packages."""
    spec = importlib.util.spec_from_file_location("kit", ROOT / "tests" / "callbacks" / "conftest.py")
    kit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kit)
    return kit


def environment():
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("engines")
    done = subprocess.run(
        [sys.executable, str(RUNS), str(made)], env=environment(), capture_output=True, text=True, timeout=420
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return made


@pytest.fixture(scope="module")
def arms(folder):
    return {key: read(folder, "arms", *key) for key in [(1, 0), *GROUPS]}


def read(folder, what, world, rank):
    return torch.load(folder / f"{what}-{world}-{rank}.pt", weights_only=False)


def apart(weights, others):
    assert weights.keys() == others.keys()
    return max(float((weights[name] - others[name]).abs().max()) for name in weights)


ARMS = ["plain", "mask", "accumulated", "bf16", "fp16", "checkpointed", "compiled", "swap"]


@pytest.mark.slow
@pytest.mark.parametrize("arm", [*ARMS, "swap_own_loss"])
def test_groups_of_processes_train_what_one_process_trains(arms, arm):
    one = arms[1, 0][arm]
    weights, scores = LIMITS.get(arm, FULL)
    for key in GROUPS:
        run = arms[key][arm]
        assert run["steps"] == one["steps"] == (4 if arm == "accumulated" else 6)
        assert apart(run["weights"], one["weights"]) <= weights, key
        assert run["hooks"] == {}
        assert run["run_dir"] is (key[1] == 0)
        for name, value in one["metrics"].items():
            assert run["metrics"][name] == pytest.approx(value, abs=scores, nan_ok=True), (key, name)


@pytest.mark.slow
def test_what_must_not_change_the_weights_does_not(arms):
    """Checkpointing and compiling are exact; half precision and the scaler are as near as their rounding."""
    one = arms[1, 0]
    assert apart(one["checkpointed"]["weights"], one["mask"]["weights"]) <= 1e-7
    assert apart(one["compiled"]["weights"], one["mask"]["weights"]) <= 1e-6
    assert apart(one["bf16"]["weights"], one["mask"]["weights"]) <= 1e-3
    assert apart(one["fp16"]["weights"], one["fp32_clipped"]["weights"]) <= 2e-4
    # The mask loss moves them by a hundred times more, so the limits above would see it missing or scaled.
    assert apart(one["plain"]["weights"], one["mask"]["weights"]) >= 1e-2
    assert apart(one["swap"]["weights"], one["mask"]["weights"]) >= 5e-3


@pytest.mark.slow
def test_half_precision_never_gives_nan_and_the_scaler_keeps_its_scale(arms):
    for key in [(1, 0), *GROUPS]:
        run = arms[key]["fp16"]
        assert run["scale"] == 2.0**16  # an overflow in the maps would have halved it
        assert all(bool(w.isfinite().all()) for w in run["weights"].values())
        assert math.isfinite(run["metrics"]["train/mask_loss"])


@pytest.mark.slow
def test_two_launchers_stand_in_for_two_machines(folder, arms):
    """`torchrun --nnodes 2` twice, one process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    words += ["--rdzv-backend", "static", "--master-addr", "127.0.0.1", "--master-port", port]
    nodes = [
        subprocess.Popen(
            [*words, "--node-rank", str(rank), str(RUNS), str(folder)],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    told = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told[0][-3000:]
    for rank in (0, 1):
        run = read(folder, "nodes", 2, rank)["mask"]
        assert apart(run["weights"], arms[1, 0]["mask"]["weights"]) <= 1e-6
        assert run["run_dir"] is (rank == 0)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["none", "memory", "lazy", "disk"])
def test_broken_files_on_two_processes_count_nobody_twice(folder, cache):
    """9 cases of which 2 are broken: scores are those of the 7 whole ones in one process, from every cache."""
    clean = read(folder, "data", 1, 0)["clean"]["metrics"]
    first, second = (read(folder, "data", 2, rank) for rank in (0, 1))
    assert first[cache]["metrics"].keys() == clean.keys()
    for name, value in clean.items():
        assert first[cache]["metrics"][name] == pytest.approx(value, abs=1e-6, nan_ok=True), name
    # Training goes on beside a broken file, both processes in step.
    if cache in ("memory", "disk"):
        fit = f"fit {cache}"
        assert first[fit]["steps"] == second[fit]["steps"] == 5
        assert apart(first[fit]["weights"], second[fit]["weights"]) == 0


@pytest.mark.slow
def test_a_file_that_one_process_cannot_read_ends_both(folder):
    """`on_error="raise"`: the one says which file it is, the other does not wait for ever."""
    ends = [read(folder, "broken", 2, rank)["broken"] for rank in (0, 1)]
    assert all(end["error"] for end in ends)
    assert any("scan" in end["text"] and "row" in end["text"] for end in ends)


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
@pytest.mark.parametrize("callback", [ct.MaskLossCallback, ct.OutsideSwap, ct.AttentionMonitor])
def test_sharded_training_is_refused_before_it_starts(callback, strategy, tmp_path):
    made = callback(table="phantom") if callback is ct.OutsideSwap else callback(layer="net", table="phantom")
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    trainer._accelerator_connector.strategy = strategy()  # the real one wants a GPU before it lets a Trainer be
    with pytest.raises(InputError, match=rf"{callback.__name__} does not work with {strategy.__name__}.*'ddp'"):
        made.setup(trainer, pl.LightningModule(), "fit")


def test_deepspeed_is_refused_by_its_name():
    """Its class cannot be made without its library."""
    trainer = type("T", (), {"strategy": DeepSpeedStrategy.__new__(DeepSpeedStrategy)})()
    with pytest.raises(InputError, match="MaskLossCallback does not work with DeepSpeedStrategy"):
        refuse_engine(trainer, "MaskLossCallback")


@pytest.mark.slow
@pytest.mark.parametrize("whole", ["net", "module"])
def test_a_whole_model_compiled_is_refused_with_what_to_do(whole, tmp_path):
    torch._dynamo.reset()
    kit = load_kit()
    net = kit.make_net("mlp")
    module = kit.make_lit(torch.compile(net, backend="aot_eager") if whole == "net" else net)
    fitted = torch.compile(module, backend="aot_eager") if whole == "module" else module
    trainer = kit.make_trainer(tmp_path, ct.MaskLossCallback(kit.LAYER, kit.TABLE))
    with pytest.raises(InputError, match=r"leave the head eager \(ct\.compile_backbone does so\)"):
        trainer.fit(fitted, kit.loader(kit.make_cases(2)))
    torch._dynamo.reset()
