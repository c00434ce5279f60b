from __future__ import annotations

import warnings

import numpy as np
import pytest
from PIL import Image
from wandb_files import OfflineRun, offline_logger

from camtrain._errors import InputError
from camtrain.reporting import RunDir, describe_loggers, sinks_for

PICTURES = [np.full((20, 30, 3), 40, np.uint8), np.full((24, 26, 3), 90, np.uint8)]
CAPTIONS = ["case 1 · p 0.9", "case 2 · p 0.2"]
NAMES = ["case_1_nodule", "case_2_nodule"]


def log(sinks, step=7, epoch=2):
    for sink in sinks:
        sink.images("val/attention/nodule", PICTURES, CAPTIONS, step=step, epoch=epoch, names=NAMES)
        sink.table("val/scores", ["label", "auroc"], [["nodule", 0.5], ["effusion", None]], step=step)
        if hasattr(sink, "flush"):
            sink.flush(step)


def pictures_of(run):
    return sorted(p.relative_to(run.path).as_posix() for p in run.path.rglob("*.png"))


FILES = [f"epochs/0002/{name}.png" for name in NAMES]


@pytest.mark.slow
@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
def test_wandb_offline_is_read_back(tmp_path, monkeypatch, namespace):
    logger, run = offline_logger(tmp_path, monkeypatch, namespace), RunDir(tmp_path)
    sinks = sinks_for([logger], run)
    # The user's own step of W&B lies far ahead of the Trainer's; ours must not be dropped for coming too late.
    logger.experiment.log({"mine": 1.0}, step=100)
    log(sinks, step=7)
    log(sinks, step=9, epoch=3)
    logger.experiment.log({"mine": 2.0}, step=200)
    lines = describe_loggers([logger])
    logger.experiment.finish()

    (read,) = OfflineRun.in_folder(tmp_path)
    assert f"wandb sync {read.media.parents[1]}" in lines[0]
    ours = [e for e in read.history if "val/attention/nodule" in e]
    assert [e["trainer/global_step"] for e in ours] == [7, 9]
    tables = [e for e in read.history if "val/scores" in e]  # of each pass one entry, which may have to wait
    assert [e["trainer/global_step"] for e in tables] == [7, 9]
    picture = ours[0]["val/attention/nodule"]
    assert picture["_type"] == "images/separated"
    assert picture["captions"] == CAPTIONS
    assert (picture["height"], picture["width"], picture["count"]) == (24, 30, 2)
    assert [e["mine"] for e in read.history if "mine" in e] == [1.0, 2.0]
    stored = sorted((read.media / "images").rglob("*.jpg"))
    assert len(stored) == 4
    assert {Image.open(p).size for p in stored} == {(30, 24)}
    assert read.table(tables[0]["val/scores"])["data"] == [["nodule", 0.5], ["effusion", None]]
    assert pictures_of(run) == sorted(FILES + [f.replace("0002", "0003") for f in FILES])


@pytest.mark.slow
def test_tensorboard_events_are_read_back(tmp_path):
    loggers = pytest.importorskip("pytorch_lightning.loggers")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger, run = loggers.TensorBoardLogger(tmp_path), RunDir(tmp_path)
    log(sinks_for([logger], run))
    logger.experiment.flush()
    events = accumulator.EventAccumulator(logger.log_dir, size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    assert events.Tags()["images"] == [f"val/attention/nodule/{name}" for name in NAMES]
    image = events.Images("val/attention/nodule/case_1_nodule")[0]
    assert (image.step, image.height, image.width) == (7, 20, 30)
    text = events.Tensors("val/scores/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| nodule | 0.500 |" in text
    assert "tensorboard --logdir" in describe_loggers([logger])[0]
    assert pictures_of(run) == FILES


@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
def test_csv_logger_and_no_logger_leave_files(tmp_path, namespace):
    loggers = pytest.importorskip(f"{namespace}.loggers")
    for i, given in enumerate(([loggers.CSVLogger(tmp_path)], [])):
        run = RunDir(tmp_path / str(i))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sinks = sinks_for(given, run)
        log(sinks)
        assert pictures_of(run) == FILES
        np.testing.assert_array_equal(np.asarray(Image.open(run.path / FILES[0])), PICTURES[0])
        assert (run.path / "tables" / "val_scores.csv").read_text() == "label,auroc\nnodule,0.5\neffusion,\n"


def test_fast_dev_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loggers = pytest.importorskip("pytorch_lightning.loggers.logger")
    assert sinks_for([loggers.DummyLogger()], None) == []
    assert list(tmp_path.iterdir()) == []


class Recorder:
    """Stands for a client: keeps what it was called with."""

    def __init__(self):
        self.calls = []

    def log_text(self, run_id, text, artifact_file):
        self.calls.append(("text", run_id, text, artifact_file))


class NewClient(Recorder):
    def log_image(self, run_id, image, artifact_file=None, key=None, step=None):
        self.calls.append(("image", run_id, image.size, key, step))


class OldClient(Recorder):
    def log_image(self, run_id, image, artifact_file):
        self.calls.append(("image", run_id, image.size, artifact_file))


class MLFlowLogger:
    run_id = "r1"

    def __init__(self, client):
        self.experiment = client


class MyWandbLogger:
    """Not Lightning's class: unknown."""


def test_mlflow_as_far_as_it_can(tmp_path):
    new, old = MLFlowLogger(NewClient()), MLFlowLogger(OldClient())
    log(sinks_for([new, old], None))
    assert new.experiment.calls[0] == ("image", "r1", (30, 20), "val/attention/nodule/case_1_nodule", 7)
    assert old.experiment.calls[1] == ("image", "r1", (26, 24), "val/attention/nodule/0002/case_2_nodule.png")
    assert old.experiment.calls[2][3] == "val/scores/step_7.md"
    with pytest.warns(UserWarning, match="MLFlowLogger gets scores but no pictures"):
        assert sinks_for([MLFlowLogger(Recorder())], None) == []


def test_unknown_loggers_get_one_notice(tmp_path):
    run = RunDir(tmp_path)
    with pytest.warns(UserWarning, match="MyWandbLogger gets scores but no pictures and no tables") as seen:
        sinks = sinks_for([MyWandbLogger(), MyWandbLogger()], run)
    assert len(seen) == 1
    assert str(run.path) in str(seen[0].message)
    assert len(sinks) == 1


def test_a_subclass_of_a_known_logger_is_known():
    tensorboard = pytest.importorskip("pytorch_lightning.loggers").TensorBoardLogger

    class Mine(tensorboard):
        pass

    assert [type(s).__name__ for s in sinks_for([Mine("unused")], None)] == ["TensorBoardSink"]


def test_other_splits_and_repeated_names(tmp_path):
    run = RunDir(tmp_path)
    (sink,) = sinks_for([], run)
    sink.images("test/attention/a", PICTURES, ["same", "same"], step=1, epoch=0)
    assert pictures_of(run) == ["epochs/0000/test/same.png", "epochs/0000/test/same_2.png"]
    with pytest.raises(InputError, match="a caption and a name for each of 2 pictures"):
        sink.images("val/a", PICTURES, ["one"], step=1, epoch=0)


def test_importing_loads_no_logger():
    import subprocess
    import sys

    code = (
        "import sys, camtrain.reporting\n"
        "heavy = {'torch', 'wandb', 'pytorch_lightning', 'lightning', 'tensorboard', 'matplotlib', 'monai', 'scipy'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
