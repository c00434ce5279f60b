"""fit, validate, test: scores, places, resume, links, and every kind of wrong input that can reach them."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from camtrain.cli import lightning_cli


def monitor(**arguments) -> dict:
    return {"class_path": "camtrain.callbacks.AttentionMonitor", "init_args": {"every_n_epochs": 0, **arguments}}


def mask_loss(**arguments) -> dict:
    return {"class_path": "camtrain.callbacks.MaskLossCallback", "init_args": arguments}


@pytest.mark.slow
def test_fit_shows_the_scores_of_the_best_epoch_and_every_place(write, run, tmp_path):
    result = run("fit", "--config", write(), "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs")
    assert result.code == 0, result.err
    (checkpoint,) = tmp_path.rglob("best.ckpt")
    (scores,) = tmp_path.rglob("scores.csv")
    (config,) = tmp_path.rglob("version_0/config.yaml")
    pictures = list(scores.parent.glob("epochs/*/*.png"))
    assert pictures
    for path in (checkpoint, scores, config, scores.parent, scores.parent / "epochs", config.parent):
        assert str(path.relative_to(tmp_path)) in result.out
    epoch = torch.load(checkpoint, weights_only=True)["epoch"]
    assert f"val, scores of epoch {epoch} (best val/loss), alarms of epoch 1 (the last)" in result.out
    rows = [r for r in csv.DictReader(scores.open()) if (int(r["epoch"]), r["measure"]) == (epoch, "pointing_game")]
    assert {r["label"] for r in rows} == {"effusion", "nodule", "mean"}
    for row in rows:
        line = next(line for line in result.out.splitlines() if f" {row['label']} " in line)
        assert f"{float(row['value']):.3f}" in line
    # A logger saw the hyper-parameters of model and data without a clash.
    assert (config.parent / "hparams.yaml").exists()


def test_labels_are_linked_and_the_seed_is_set(trained):
    assert trained.code == 0
    content = torch.load(trained.checkpoint, weights_only=True)
    assert content["hyper_parameters"]["labels"] == ["effusion", "nodule"]
    assert content["state_dict"]["net.head.bias"].shape == (2,)
    (config,) = trained.folder.rglob("run/config.yaml")
    saved = yaml.safe_load(config.read_text())
    assert saved["seed_everything"] == 0
    (facts,) = trained.folder.rglob("run.json")
    told = json.loads(facts.read_text())
    assert Path(told["saved_config"]).samefile(config)
    assert told["cli_config"] == saved
    assert told["config"]["callbacks"]["AttentionMonitor"]["layer"] == "net.relu"
    assert str(config) in (facts.parent / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["validate", "test"])
def test_saved_config_scores_the_checkpoint(trained, run, command):
    (config,) = trained.folder.rglob("run/config.yaml")
    result = run(command, "--config", config, "--ckpt_path", trained.checkpoint)
    assert result.code == 0, result.err
    titles = {"validate": ["val, maps by"], "test": ["test, maps by", "shift_free, maps by"]}[command]
    assert all(title in result.out for title in titles)
    assert "run folder: " in result.out
    assert len(list(trained.folder.rglob("config*.yaml"))) == 1


@pytest.mark.slow
def test_second_fit_in_the_same_folder_keeps_the_first_config(write, run, tmp_path):
    config = write(trainer__callbacks=[])
    for rate in ("0.5", "0.25"):
        result = run("fit", "--config", config, "--model.lr", rate, "--trainer.limit_train_batches=1")
        assert result.code == 0, result.err
        assert "No AttentionMonitor" in result.out
    rates = [yaml.safe_load((tmp_path / "run" / name).read_text()) for name in ("config.yaml", "config_2.yaml")]
    assert [saved["model"]["init_args"]["lr"] for saved in rates] == [0.5, 0.25]


@pytest.mark.slow
def test_resume_goes_on_with_the_rate_of_the_command_line(trained, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(
        *("fit", "--config", trained.config, "--ckpt_path", trained.checkpoint, "--trainer.max_epochs=3"),
        *("--trainer.default_root_dir=again", "--model.weight_decay=0.125"),
    )
    assert result.code == 0, result.err
    (checkpoint,) = tmp_path.rglob("best*.ckpt")
    before, after = (torch.load(p, weights_only=True) for p in (trained.checkpoint, checkpoint))
    assert after["hyper_parameters"]["weight_decay"] == 0.125
    assert after["global_step"] >= before["global_step"]


@pytest.mark.slow
def test_a_resumed_fit_goes_on_in_the_same_wandb_run(write, run, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = {"class_path": "pytorch_lightning.loggers.WandbLogger", "init_args": {"save_dir": str(tmp_path)}}
    config = write(trainer__logger=logger)
    for resumed in (False, True, False):
        words = ["--ckpt_path", next(tmp_path.rglob("best.ckpt")), "--trainer.max_epochs=3"] if resumed else []
        result = run("fit", "--config", config, *words)
        assert result.code == 0, result.err
        wandb.finish()
    ids = [path.name.rpartition("-")[2] for path in sorted(tmp_path.glob("wandb/offline-run-*"))]
    assert len(ids) == 3
    assert ids[0] == ids[1] != ids[2]


def test_configs_stack_and_callbacks_append(write, tmp_path):
    first = write()
    (tmp_path / "second.yaml").write_text(
        yaml.safe_dump(
            {
                "trainer": {
                    "max_epochs": 7,
                    "callbacks+": [{"class_path": "pytorch_lightning.callbacks.LearningRateMonitor"}],
                }
            }
        )
    )
    cli = lightning_cli.CamtrainCLI("fit", ["--config", str(first), "--config", "second.yaml"], until="parsed")
    config = cli.config["fit"]
    assert config["trainer"]["max_epochs"] == 7
    names = [entry["class_path"].rsplit(".", 1)[-1] for entry in config["trainer"]["callbacks"]]
    assert names == ["MaskLossCallback", "AttentionMonitor", "ModelCheckpoint", "LearningRateMonitor"]


def test_module_without_labels_and_without_data(write, run):
    boring = {"class_path": "pytorch_lightning.demos.boring_classes.BoringModel"}
    config = write(model=boring, data=None, trainer__callbacks=[])
    result = run("fit", "--config", config, "--trainer.fast_dev_run=true")
    assert result.code == 0, result.err


@pytest.mark.slow
def test_two_tables_of_two_monitors(write, run):
    callbacks = [monitor(name="first", layer="net.relu"), monitor(name="second", layer="net.relu", methods=["gradcam"])]
    result = run("fit", "--config", write(trainer__callbacks=callbacks), "--trainer.max_epochs=1")
    assert result.code == 0, result.err
    assert "first: val" in result.out
    assert "second: val, scores and alarms of epoch 0 (the last), maps by gradcam" in result.out


# --------------------------------------------------------------------------------------------------------- wrong input


def test_other_labels_than_the_data(write, refused):
    line = refused("fit", "--config", write(), "--model.labels", "[nodule, effusion]")
    assert "model.labels states 2 labels (nodule, effusion), but the data has 2 labels (effusion, nodule)" in line


def test_the_same_labels_may_be_stated(write, run):
    config = write(model__init_args__labels=["effusion", "nodule"], trainer__callbacks=[])
    assert run("fit", "--config", config, "--trainer.fast_dev_run=true").code == 0


@pytest.mark.parametrize("callback", [mask_loss, monitor])
def test_wrong_layer(write, refused, callback, tmp_path):
    line = refused("fit", "--config", write(trainer__callbacks=[callback(layer="net.rellu")]))
    assert "net.relu" in line
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
def test_layer_without_spatial_axes(write, refused):
    line = refused("fit", "--config", write(trainer__callbacks=[mask_loss(layer="net.head")]))
    assert "(B, K, *S) with spatial axes" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data.shortcut_at=skinn"], "'skinn'; nearest: skin"),
        (["--data.labels=[nodle]"], "'nodle'; nearest: nodule"),
        (["--data.cases=many"], "data.cases: Expected a int"),
        (["--model.net.pool=0"], "pool= expects"),
        (["--model.optimizer=adam"], "optimizer"),
        (["--model.net.class_path=camtrain.models.FlatNet"], "FlatNet"),
        (
            ["--trainer.callbacks+=camtrain.callbacks.AttentionMonitor", "--trainer.callbacks.methods=[hires]"],
            "'hires'",
        ),
        (["--trainer.max_epochz=3"], "max_epochz"),
        (["--trainer.max_epochs=three"], "trainer.max_epochs"),
        (["--config=absent.yaml"], "absent.yaml"),
    ],
)
def test_wrong_option(write, refused, words, expected):
    assert expected in refused("fit", "--config", write(), *words)


def test_broken_yaml(write, refused, tmp_path):
    (tmp_path / "broken.yaml").write_text("data: [1, 2\nmodel: {")
    line = refused("fit", "--config", "broken.yaml")
    assert "broken.yaml" in line
    assert "line 2" in line


def test_no_network(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "net= expects a torch.nn.Module" in refused("fit")


def test_network_of_another_make_with_a_wrong_number_of_outputs(write, refused):
    net = {
        "class_path": "monai.networks.nets.DenseNet",
        "init_args": {
            "spatial_dims": 3,
            "in_channels": 1,
            "out_channels": 5,
            "block_config": [1, 1],
            "init_features": 4,
        },
    }
    line = refused("fit", "--config", write(model__init_args__net=net, trainer__callbacks=[]))
    assert "set out_channels=2 of DenseNet" in line


def test_image_of_another_size_than_the_net(write, refused):
    line = refused("fit", "--config", write(), "--data.size", "[24, 18, 36]")
    assert "24, 18, 36)" in line


def manifest_config(write, file, **arguments) -> Path:
    data = {
        "class_path": "camtrain.data.ManifestDataModule",
        "init_args": {"manifest": str(file), "table": "phantom", "batch_size": 1, **arguments},
    }
    return write(data=data)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_nan_in_an_image_also_in_a_worker(trained, write, refused, tmp_path, workers):
    rows = trained.manifest.read_text().replace("train-00001_ct", str(tmp_path / "nan")).splitlines()
    good = nib.load(trained.manifest.parent / "train-00001_ct.nii.gz")
    data = good.get_fdata().astype(np.float32)
    data[3, 4, 5] = np.nan
    nib.save(nib.Nifti1Image(data, good.affine), tmp_path / "nan.nii.gz")
    text = (
        "\n".join(rows)
        .replace(",train-", f",{trained.manifest.parent}/train-")
        .replace(",val-", f",{trained.manifest.parent}/val-")
    )
    text = text.replace(",test-", f",{trained.manifest.parent}/test-")
    (tmp_path / "m.csv").write_text(text + "\n")
    config = manifest_config(write, tmp_path / "m.csv", cache=False, num_workers=workers)
    line = refused("fit", "--config", config)
    assert "nan.nii.gz" in line
    assert "row 3" in line
    assert "NaN" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "arguments", "expected"),
    [
        (lambda t: t, {"manifest": "absent.csv"}, "absent.csv"),
        (lambda t: t, {"labels": ["nodle"]}, "'nodle'"),
        (lambda t: t, {"table": "phantm"}, "phantm"),
        (lambda t: t, {"train_split": "trane"}, "train"),
        (lambda t: t.splitlines()[0] + "\n", {}, "no rows"),
        (lambda t: t.replace("train-00000_ct", "gone"), {}, "gone.nii.gz"),
        (lambda t: t.replace("val-00000,", "train-00000,", 1), {}, "every id once"),
        (lambda t: t.rstrip()[:-1] + "7\n", {}, "'7'"),
        (lambda t: t.replace("train-00000_organs", "train-00000_ct"), {}, "train-00000_ct.nii.gz"),
    ],
)
def test_wrong_manifest(trained, write, refused, tmp_path, change, arguments, expected):
    copy = trained.manifest.parent / f"{tmp_path.name}.csv"
    copy.write_text(change(trained.manifest.read_text()))
    line = refused("fit", "--config", manifest_config(write, copy, **arguments))
    assert expected in line
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
def test_checkpoint_of_another_model(trained, write, refused):
    config = write()
    words = ("test", "--config", config, "--ckpt_path", trained.checkpoint)
    assert "net.features" in refused(*words, "--model.net.widths=[4,4,4,4]")
    pool = {"class_path": "camtrain.models.PoolNet"}
    line = refused("test", "--config", write(model__init_args__net=pool), "--ckpt_path", trained.checkpoint)
    assert "FlattenNet" in line
    assert "PoolNet" in line


@pytest.mark.slow
def test_checkpoint_of_other_labels(trained, write, refused):
    line = refused(
        "test", "--config", write(data__init_args__labels=["nodule", "effusion"]), "--ckpt_path", trained.checkpoint
    )
    assert "trained on 2 labels (effusion, nodule)" in line


@pytest.mark.slow
def test_missing_and_damaged_checkpoints(trained, write, refused, tmp_path):
    config = write()
    near = trained.checkpoint.with_name("bets.ckpt")
    assert f"nearest: {trained.checkpoint}" in refused("test", "--config", config, "--ckpt_path", near)
    assert "is a folder" in refused("test", "--config", config, "--ckpt_path", trained.checkpoint.parent)
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(trained.checkpoint.read_bytes()[:2000])
    assert "cut.ckpt cannot be read as a checkpoint" in refused("test", "--config", config, "--ckpt_path", cut)
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.ckpt")
    assert "state_dict" in refused("test", "--config", config, "--ckpt_path", tmp_path / "other.ckpt")
    torch.save({"state_dict": {}, "path": Path("x")}, tmp_path / "pickled.ckpt")
    assert "pickled Python objects" in refused("test", "--config", config, "--ckpt_path", tmp_path / "pickled.ckpt")


def test_a_defect_keeps_its_traceback(write, run, monkeypatch):
    from camtrain.models import LitClassifier

    def broken(self, batch, batch_idx):
        raise ZeroDivisionError("defect")

    monkeypatch.setattr(LitClassifier, "training_step", broken)
    with pytest.raises(ZeroDivisionError, match="defect"):
        run("fit", "--config", write(trainer__callbacks=[]))


def test_interrupt_in_the_middle_of_a_fit(write, run, monkeypatch):
    import signal

    from camtrain.models import LitClassifier

    def interrupted(self, batch, batch_idx):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(LitClassifier, "training_step", interrupted)
    try:
        assert run("fit", "--config", write(trainer__callbacks=[])).code == 130
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_as_a_process(tmp_path):
    words = [sys.executable, "-m", "camtrain.cli.main", "fit", "--data.cases", "0"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.rstrip().splitlines()[-1].startswith("error: ")
    assert list(tmp_path.iterdir()) == []
