"""alarms.csv and alerts: rows are replaced, foreign files passed over, only an online W&B run hears anything."""

from __future__ import annotations

import csv

import pytest

from camtrain.reporting.alarm_log import AlarmEvent, alert, read_alarms, write_alarms

ODD = 'lung, "left" <script>\nnew line'


def event(epoch=3, label="nodule", value=0.75, state="raised"):
    return AlarmEvent(epoch, "val", "reliance", label, value, 0.5, state, "It is a shortcut, try this.")


def test_rows_are_added_replaced_and_read_back(tmp_path):
    assert read_alarms(tmp_path) == []
    write_alarms(tmp_path, [])
    assert (tmp_path / "alarms.csv").read_text().splitlines() == [
        "epoch,split,alarm,label,value,threshold,state,sentence"
    ]
    write_alarms(tmp_path, [event(), event(label=ODD)])
    write_alarms(tmp_path, [event(value=0.25, state="cleared"), event(4)])
    rows = read_alarms(tmp_path)
    assert [(r.epoch, r.label, r.value, r.state) for r in rows] == [
        (3, ODD, 0.75, "raised"), (3, "nodule", 0.25, "cleared"), (4, "nodule", 0.75, "raised")
    ]  # fmt: skip
    assert len(list(csv.DictReader((tmp_path / "alarms.csv").open(newline="")))) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["alarms.csv"]


@pytest.mark.parametrize(
    "text", ["when,what\n1,2\n", "epoch,split,alarm,label,value,threshold,state,sentence\n1,val,x"]
)
def test_a_foreign_or_cut_file_is_passed_over(tmp_path, text):
    (tmp_path / "alarms.csv").write_text(text)
    with pytest.warns(UserWarning, match="is not a file of alarms"):
        assert read_alarms(tmp_path) == []


class Run:
    def __init__(self, offline, broken=False):
        self.offline, self.broken, self.heard = offline, broken, []

    def alert(self, title, text, level):
        if self.broken:
            raise ConnectionError("no route")
        self.heard.append((title, text, level))


class WandbLogger:
    def __init__(self, run):
        self.experiment = run


class Other(WandbLogger):
    pass


class Plain:
    """Knows no run."""


def test_only_an_online_run_is_alerted():
    online, offline, child = Run(False), Run(True), Run(False)
    alert([Plain(), WandbLogger(online), WandbLogger(offline), Other(child)], "title", "text")
    assert online.heard == child.heard == [("title", "text", "WARN")]
    assert offline.heard == []


def test_a_dead_service_stops_nothing():
    with pytest.warns(UserWarning, match="no alert .*no route"):
        alert([WandbLogger(Run(False, broken=True))], "title", "text")
