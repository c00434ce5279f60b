"""OutsideSwap under DDP: one network on all processes, other draws on each; and as an entry of a YAML file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from pytorch_lightning.cli import LightningCLI

import camtrain as ct
from camtrain.data import PhantomDataModule
from camtrain.models import LitClassifier

SCRIPT = """
import importlib.util, os, sys
import torch
import camtrain as ct

spec = importlib.util.spec_from_file_location("kit", sys.argv[1])
kit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kit)
torch.set_num_threads(1)
seen = []

def training_step(self, batch, batch_idx):
    seen.append(batch["image"].clone())
    return kit.bce(self(batch["image"]), batch["label"])

cases = kit.make_cases(9)
bare = sys.argv[3] == "bare" and int(os.environ.get("LOCAL_RANK", 0)) == 1
for row, case in enumerate(cases):
    if row % 2 or bare:  # the second process may never see an organ
        case["organs"] = torch.zeros_like(case["organs"])
module = kit.make_lit(kit.make_net("mlp"), training_step=training_step)
swap = ct.OutsideSwap(kit.TABLE, p=1.0, seed=4, without_organs=sys.argv[4])
mask = ct.MaskLossCallback(kit.LAYER, kit.TABLE)
two = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
trainer = kit.make_trainer(sys.argv[2], mask, swap, max_epochs=2, **two)
# The same cases on both: their composites differ by the draws of the process alone.
trainer.fit(module, kit.loader(cases, 2))
rank = trainer.global_rank
torch.save({"seen": torch.cat(seen), "weights": module.net.state_dict(), "metrics": dict(trainer.callback_metrics)},
           f"{sys.argv[2]}/{rank}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "way"), [("same", "stay"), ("bare", "stay"), ("bare", "lend"), ("bare", "atlas"), ("same", "atlas")]
)
def test_two_processes_train_one_network_with_draws_of_their_own(tmp_path, which, way):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(Path(__file__).with_name("conftest.py")), str(tmp_path), which, way]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, weight in first["weights"].items():
        torch.testing.assert_close(second["weights"][name], weight, atol=0, rtol=0)
        assert bool(weight.isfinite().all())
    assert first["metrics"] == second["metrics"]
    # Five of nine cases have organs; the second process has all of them, or none.
    share = {"stay": 5 / 9, "lend": 1.0, "atlas": 1.0}[way] * {"same": 1, "bare": 0.5}[which]
    assert first["metrics"]["train/swapped_cases"] == pytest.approx(share)
    assert not torch.equal(first["seen"], second["seen"])


def test_from_yaml(tmp_path):
    entries = [
        {
            "class_path": "camtrain.callbacks.OutsideSwap",
            "init_args": {"p": 1.0, "keep": "organs", "targets": "follow"},
        },
        {"class_path": "camtrain.callbacks.MaskLossCallback"},
    ]
    config = {
        "model": {
            "net": {"class_path": "camtrain.models.FlattenNet", "init_args": {"size": 16, "widths": [2, 2, 2, 2]}},
            "labels": ["nodule", "aneurysm"],
        },
        "data": {"labels": ["nodule", "aneurysm"], "cases": 4, "size": 16, "batch_size": 4, "val_cases": 2},
        "trainer": {"callbacks": entries, "logger": False, "enable_progress_bar": False, "max_epochs": 1,
                    "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": str(tmp_path)},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", str(tmp_path / "config.yaml")]
    found = LightningCLI(LitClassifier, PhantomDataModule, args=arguments, save_config_callback=None, run=False)
    found.trainer.fit(found.model, datamodule=found.datamodule)
    (swap,) = (c for c in found.trainer.callbacks if isinstance(c, ct.OutsideSwap))
    assert (swap.p, swap.keep, swap.targets) == (1.0, "organs", "follow")
    assert found.trainer.callback_metrics["train/swapped_cases"] > 0
