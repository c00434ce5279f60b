"""Every file in configs/ runs, in a small form; a new one is tested by lying there."""

from __future__ import annotations

from pathlib import Path

import pytest
import wandb
import yaml

from camtrain.data import make_ct_rate_tree, make_rad_chestct_tree, make_voc_tree
from camtrain.data.phantom_export import export_phantom

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def small(config: dict, folder: Path) -> list[str]:
    """Options that make any config a matter of seconds, by the kind of its data module."""
    words = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.accelerator=cpu"]
    words += ["--trainer.enable_progress_bar=false", "--data.batch_size=2", "--data.num_workers=0"]
    if config["data"]["class_path"].endswith("PhantomDataModule"):
        return [*words, "--data.cases=6", "--data.val_cases=6", "--data.test_cases=2"]
    if config["data"]["class_path"].endswith("RadChestCTDataModule"):
        root = make_rad_chestct_tree(folder / "rad", train=2, val=6, test=2, size=(24, 48, 48))
        words += [f"--data.root={root}", f"--data.organs={folder / 'lungs'}", "--data.size=[24, 48, 48]"]
        words += ["--data.lung_borders=null", "--data.least_voxels=40"]  # far below the size of a patient
        return [*words, "--model.net.variant=small", "--model.net.image_size=[48, 48]"]
    if config["data"]["class_path"].endswith("CTRateDataModule"):
        root = make_ct_rate_tree(folder / "ct_rate", train=5, valid=1, size=(24, 24, 20))
        words += [f"--data.root={root}", f"--data.organs={root / 'ts_seg/ts_total'}", "--data.val_share=0.4"]
        words += ["--data.size=[32, 32, 32]", "--data.spacing=12", "--trainer.precision=32"]
        return [*words, "--model.net.layers=[1, 1, 1, 1]", "--model.net.block_inplanes=[4, 8, 8, 8]"]
    if config["data"]["class_path"].endswith("PascalVOCDataModule"):
        root = make_voc_tree(folder / "voc", train=4, val=8, size=48)
        words += [f"--data.root={root}", "--data.size=48", "--data.labels=[cat, car]", "--model.net.classes=2"]
        return [*words, "--model.net.in_shape=[3, 48, 48]", "--model.net.channels=[4, 4, 4, 4]"]
    manifest = export_phantom(folder / "files", {"train": 2, "val": 6, "test": 2}, size=(24, 18, 24))
    size = [24, 18, 24]
    words += [f"--data.manifest={manifest}", "--data.table=phantom", "--data.spacing=13.3", f"--data.size={size}"]
    return [*words, f"--model.net.size={size}"]


def test_there_are_configs():
    names = {"phantom", "phantom_plain", "phantom_densenet", "phantom_axialnet", "real_ct", "rad_chestct_axialnet"}
    names |= {"ct_rate_resnet50", "voc_flatten"}
    assert names <= {p.stem for p in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_says_what_how_and_how_long(path):
    text = path.read_text()
    header = text[: text.index("\nseed_everything")]
    assert all(line.startswith("#") for line in header.splitlines())
    for word in (f"--config configs/{path.name}", "# Takes:", "# Override:"):
        assert word in header
    assert all(len(line) <= 140 for line in text.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_runs(path, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # its service resolves relative folders against the folder in which it was started
    config = yaml.safe_load(path.read_text())
    result = run("fit", "--config", path, *small(config, tmp_path))
    assert result.code == 0, result.err
    (checkpoint,) = (file for file in tmp_path.rglob("*.ckpt") if file.name != "last.ckpt")
    assert (checkpoint.parent / "last.ckpt").exists()  # what --ckpt_path last goes on from
    for place in ("checkpoint: ", "config: ", "run folder: ", "scores: ", "pictures: ", "CSV: ", "W&B (offline): "):
        assert place in result.out
    assert list(tmp_path.rglob("camtrain/*/epochs/*/*.png"))
    assert list(tmp_path.rglob("metrics.csv"))
    assert list(tmp_path.rglob("offline-run-*/*.wandb"))
    (saved,) = tmp_path.rglob("version_0/config.yaml")
    tested = run("test", "--config", saved, "--ckpt_path", checkpoint)
    assert tested.code == 0, tested.err


def test_the_twins_differ_in_the_mask_loss_only():
    masked, plain = (
        yaml.safe_load((CONFIGS[0].parent / f"{n}.yaml").read_text()) for n in ("phantom", "phantom_plain")
    )
    masked["trainer"]["callbacks"] = [
        c for c in masked["trainer"]["callbacks"] if not c["class_path"].endswith("MaskLossCallback")
    ]
    for config in (masked, plain):
        del config["trainer"]["logger"], config["trainer"]["default_root_dir"]
    assert masked == plain
