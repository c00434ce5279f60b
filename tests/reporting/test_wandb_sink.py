"""The budget of bytes for W&B: kept, told once, every key keeps its first picture."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import pytest

from camtrain.reporting import CasePicture, patience, wandb_sink
from camtrain.reporting.sinks import sinks_for
from camtrain.reporting.wandb_sink import WandbSink

wandb = pytest.importorskip("wandb")


class WandbLogger:
    """Keeps what it was given; pictures as W&B made them, before any run."""

    LOGGER_JOIN_CHAR = "-"
    _prefix = ""

    def __init__(self, online=False):
        self.entries = []
        self.experiment = self
        self.offline, self.disabled, self.resumed = not online, False, False
        self.asked_from = set()

    def log(self, fields):
        self.asked_from.add(threading.current_thread())
        step = fields.pop("trainer/global_step")
        self.entries.append((step, fields))

    def log_metrics(self, fields, step):
        self.entries.append((step, fields))


def noisy(seed, masks=True):
    rng = np.random.default_rng(seed)
    mask = {"allowed region": (rng.random((120, 160)) < 0.1).astype(np.uint8)} if masks else {}
    return CasePicture(rng.integers(0, 255, (120, 160, 3), dtype=np.uint8), mask)


def sent(budget, labels=3, each=4, epochs=1):
    """What a pass of labels x each pictures becomes: (logger, told)."""
    logger = WandbLogger()
    sink = WandbSink(logger, budget)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for epoch in range(epochs):
            for label in range(labels):
                pictures = [noisy(10 * label + i) for i in range(each)]
                sink.images(f"val/attention/{label}", pictures, [f"{label} {i}" for i in range(each)], 5, epoch)
            sink.flush(5 + epoch)
    return logger, [str(w.message) for w in seen]


def bytes_of(fields):
    """Of the files as W&B will store them."""
    images = [image for value in fields.values() for image in value]
    return sum(image._size + sum(mask._size for mask in (image._masks or {}).values()) for image in images)


def test_all_pictures_fit():
    logger, told = sent(10_000_000)
    ((step, fields),) = logger.entries
    assert (step, len(fields), told) == (5, 3, [])
    assert all(len(value) == 4 for value in fields.values())


@pytest.mark.parametrize("budget", [150_000, 80_000, 30_000])
def test_a_tight_budget_is_kept_and_told_once(budget):
    logger, told = sent(budget, epochs=3)
    assert len(told) == 1
    assert f"{budget / 1e6:g} MB" in told[0]
    for _, fields in logger.entries:
        assert 0 < bytes_of(fields) <= budget
        counts = [len(value) for value in fields.values()]
        assert max(counts) - min(counts) <= 1  # no label pays for another
    plenty, _ = sent(10_000_000)
    assert bytes_of(logger.entries[0][1]) < bytes_of(plenty.entries[0][1])


def test_a_budget_of_nothing_sends_no_case():
    logger = WandbLogger()
    (sink,) = sinks_for([logger], None, wandb_budget=0)
    sink.images("val/attention/a", [noisy(0)], ["case 1"], 1, 0)
    sink.rows("val/cases", ["case"], [["case 1"]], 1)
    sink.flush(1)
    assert logger.entries == []
    sink.table("val/scores", ["label"], [["a"]], 1)
    sink.flush(2)
    assert [list(fields) for _, fields in logger.entries] == [["val/scores"]]


class CommError(Exception):
    __module__ = "wandb.errors"


def told_while(work):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        work()
    return [str(w.message) for w in seen]


def test_tables_wait_for_a_server_that_does_not_answer_and_pictures_do_not(monkeypatch):
    def lost(fields):
        raise CommError("no answer")

    monkeypatch.setattr(patience, "WAIT", 0.0)
    logger = WandbLogger(online=True)
    sink, answers = WandbSink(logger), logger.log

    def work():
        for epoch in range(3):
            sink.images("val/attention/a", [noisy(epoch)], ["one"], epoch, epoch)
            sink.table("val/scores", ["label"], [[f"epoch {epoch}"]], epoch)
            sink.rows("val/cases", ["case"], [[f"case {epoch}"]], epoch)
            logger.log = answers if epoch == 2 else lost
            sink.flush(epoch)
            assert sink._background.wait(20)

    (said,) = told_while(work)
    assert "asking W&B's server failed (CommError: no answer). Training goes on; tables wait" in said
    assert [(step, list(fields)) for step, fields in logger.entries] == [
        *((epoch, ["val/attention/a"]) for epoch in range(3)), (2, ["val/scores", "val/cases"]),
    ]  # fmt: skip
    assert logger.entries[-1][1]["val/scores"].data == [["epoch 2"]]
    assert logger.entries[-1][1]["val/cases"].data == [["case 0"], ["case 1"], ["case 2"]]
    assert threading.main_thread() not in logger.asked_from


def test_a_server_that_is_silent_holds_up_nobody_and_all_rows_come_in_the_end():
    """Nothing is timed: while the server is silent, a flush that waited for it would never come back."""
    logger, answer = WandbLogger(online=True), threading.Event()
    sink, answers = WandbSink(logger), logger.log

    def silent(fields):
        assert answer.wait(20)
        rows = {key: list(table.data) for key, table in fields.items() if key != "trainer/global_step"}
        answers({**rows, "trainer/global_step": fields["trainer/global_step"]})

    logger.log = silent
    for epoch in range(4):
        sink.rows("val/cases", ["case"], [[f"case {epoch}"]], epoch)
        sink.flush(epoch)
    assert logger.entries == []
    answer.set()
    sink.close()
    first, rest = [["case 0"]], [[f"case {epoch}"] for epoch in range(4)]
    assert logger.entries == [(0, {"val/cases": first}), (3, {"val/cases": rest})]
    sink.close()
    assert len(logger.entries) == 2


def test_the_end_waits_for_a_silent_server_no_longer_than_said(monkeypatch, caplog):
    monkeypatch.setattr(wandb_sink, "END", 0.2)
    logger, answer = WandbLogger(online=True), threading.Event()
    sink = WandbSink(logger)
    logger.log = lambda fields: answer.wait(20)
    sink.table("val/scores", ["label"], [["a"]], 1)
    sink.flush(1)
    with caplog.at_level("INFO", logger="camtrain"):
        sink.close()
    assert "waiting up to 0 s for W&B's server" in caplog.text
    assert sink._background.busy
    answer.set()
    assert sink._background.wait(20)


def test_the_end_is_a_last_chance_however_lately_the_server_failed():
    def lost(fields):
        raise CommError("no answer")

    logger = WandbLogger(online=True)
    sink, logger.log, answers = WandbSink(logger), lost, logger.log
    sink.rows("val/cases", ["case"], [["case 0"]], 1)
    (said,) = told_while(lambda: sink.flush(1) or sink._background.wait(20))
    assert "asking W&B's server failed" in said
    logger.log = answers
    sink.flush(2)
    assert logger.entries == []  # left alone for a while
    sink.close()
    assert [fields["val/cases"].data for _, fields in logger.entries] == [[["case 0"]]]


def test_offline_tables_are_written_at_once():
    logger = WandbLogger()
    sink = WandbSink(logger)
    sink.table("val/scores", ["label"], [["a"]], 1)
    sink.flush(1)
    assert logger.asked_from == {threading.main_thread()}


def test_masks_are_padded_with_their_pictures():
    logger = WandbLogger()
    sink = WandbSink(logger)
    small = CasePicture(np.zeros((60, 80, 3), np.uint8), {"allowed region": np.ones((60, 80), np.uint8)})
    sink.images("val/attention/a", [noisy(0), small], ["one", "two"], 1, 0)
    shown = sink._shown
    assert {one.picture.pixels.shape for one in shown} == {(120, 160, 3)}
    mask = shown[1].picture.masks["allowed region"]
    assert mask.shape == (120, 160)
    assert mask[30:90, 40:120].all()
    assert mask.sum() == 60 * 80


@pytest.mark.parametrize(
    ("key", "safe"), [("val/attention/../../x", "val/attention/__/__/x"), ("val/a.b/c", "val/a.b/c")]
)
def test_keys_do_not_lead_out_of_the_run(key, safe):
    logger = WandbLogger()
    sink = WandbSink(logger)
    sink.images(key, [noisy(0, masks=False)], ["one"], 1, 0)
    sink.flush(1)
    assert list(logger.entries[0][1]) == [safe]
