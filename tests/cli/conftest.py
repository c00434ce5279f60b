"""A small run through the command line, made once, and helpers that every test of the command line uses."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from camtrain.cli.main import main
from camtrain.data.phantom_export import export_phantom

SIZE = (24, 18, 30)
LABELS = ["effusion", "nodule"]


def small_config(**changes) -> dict:
    """A fit of seconds; `changes` are dotted keys with `__` for the dots."""
    config = {
        "data": {
            "class_path": "camtrain.data.PhantomDataModule",
            "init_args": {
                "labels": LABELS,
                "cases": 6,
                "val_cases": 4,
                "test_cases": 3,
                "size": list(SIZE),
                "batch_size": 3,
                "test_splits": ["test", "shift_free"],
            },
        },
        "model": {
            "class_path": "camtrain.models.LitClassifier",
            "init_args": {
                "net": {
                    "class_path": "camtrain.models.FlattenNet",
                    "init_args": {"size": list(SIZE), "widths": [4, 8, 8, 6]},
                }
            },
        },
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": False,
            "default_root_dir": "run",
            "callbacks": [
                {"class_path": "camtrain.callbacks.MaskLossCallback", "init_args": {"layer": "net.relu"}},
                {"class_path": "camtrain.callbacks.AttentionMonitor", "init_args": {"layer": "net.relu"}},
                {
                    "class_path": "pytorch_lightning.callbacks.ModelCheckpoint",
                    "init_args": {"monitor": "val/loss", "mode": "min", "filename": "best"},
                },
            ],
        },
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        place = config
        for word in path:
            place = place[word]
        place[last] = value
    return config


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """One fit: its folder, config, checkpoint and what it printed; and two phantom cases as files."""
    folder = tmp_path_factory.mktemp("trained")
    config = folder / "small.yaml"
    config.write_text(yaml.safe_dump(small_config(trainer__default_root_dir=str(folder / "run"))))
    code = main(["fit", "--config", str(config)])
    manifest = export_phantom(folder / "files", {"train": 2, "val": 2, "test": 2}, size=SIZE, labels=LABELS)
    (checkpoint,) = folder.rglob("best.ckpt")
    return SimpleNamespace(folder=folder, config=config, code=code, checkpoint=checkpoint, manifest=manifest)


@pytest.fixture(autouse=True)
def quiet_loggers(monkeypatch):
    """Lightning's log handlers keep the stderr of the test in which they were made, which is closed by now."""
    monkeypatch.setattr(logging, "raiseExceptions", False)


@pytest.fixture
def run(capsys):
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def _run(*words: str | Path) -> SimpleNamespace:
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return _run


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a changed small config into an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def _write(name: str = "config.yaml", **changes) -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(small_config(**changes)))
        return path

    return _write


@pytest.fixture
def refused(run):
    """Runs the command line and expects exit code 2 with one sentence, which is returned."""

    def _refused(*words: str | Path) -> str:
        result = run(*words)
        assert result.code == 2, result.err
        assert "Traceback" not in result.err
        (line,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
        assert result.err.rstrip().splitlines()[-1] == line
        return line

    return _refused
