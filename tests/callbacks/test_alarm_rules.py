"""The rules of the alarms on figures made by hand: from where on, how long, what is undefined, what is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from camtrain import InputError
from camtrain.callbacks import replay_alarms
from camtrain.callbacks._alarm_board import AlarmBoard
from camtrain.callbacks._alarm_rules import ALARMS, Depth, Drifting, Reliance, SamePlaces, read_alarms
from camtrain.callbacks._alarm_seen import ALL
from camtrain.callbacks._scores import ScoreBook


def events(history, name, **options):
    found = replay_alarms(history, [{"name": name, **options}])
    return [(e.epoch, e.label, e.state) for e in found]


def rows(**measures):
    """measure=[values of `nodule` per epoch], None = undefined; one dict per epoch."""
    count = max(map(len, measures.values()))
    return [{m: {"nodule": v[i]} for m, v in measures.items() if v[i] is not None} for i in range(count)]


def test_reliance_needs_share_and_pull():
    share, pull = [0.9, 0.9, 0.9, 0.2], [0.3, 0.05, 0.3, 0.3]
    history = rows(outside_share=share, outside_pull=pull)
    assert events(history, "reliance", patience=1) == [
        (0, "nodule", "raised"), (1, "nodule", "cleared"), (2, "nodule", "raised"), (3, "nodule", "cleared")
    ]  # fmt: skip
    assert events(history, "reliance", patience=2) == []
    assert events(history, "reliance", patience=1, threshold=0.95) == []
    assert events(history, "reliance", patience=1, outside=0.01)[:2] == [
        (0, "nodule", "raised"),
        (3, "nodule", "cleared"),
    ]


def test_an_epoch_without_figures_changes_nothing():
    history = rows(outside_share=[0.9, None, 0.9, None, 0.1], outside_pull=[0.3, None, 0.3, None, 0.3])
    assert events(history, "reliance", patience=2) == [(2, "nodule", "raised"), (4, "nodule", "cleared")]


def test_the_last_validation_of_an_epoch_counts():
    board, low, high = AlarmBoard(read_alarms([{"name": "energy_below_chance", "patience": 2}])), 0.01, 0.2

    def take(epoch, energy, **more):
        found = {"energy_inside": {"nodule": energy}, "energy_inside_chance": {"nodule": 0.1}} if energy else {}
        return [(e.epoch, e.state) for e in board.take(epoch, "val", {**found, **more})]

    assert take(0, low) == take(0, low) == take(0, low) == []
    assert take(1, high) == take(1, low)[1:] == []  # raised by the second one
    assert take(1, low) == []
    assert take(1, high) == [(1, "cleared")]
    assert take(1, low) == [(1, "raised")]
    assert take(1, None) == []
    again = AlarmBoard(board.alarms)
    again.load(board.state())  # in the middle of an epoch
    assert [
        (e.epoch, e.state) for e in again.take(1, "val", rows(energy_inside=[high], energy_inside_chance=[0.1])[0])
    ] == [(1, "cleared")]
    assert take(2, high) == [(2, "cleared")]
    assert [row["energy_inside"]["nodule"] for row in board.state()["history"]["val"]] == [low, low, high]


def test_a_check_in_the_first_of_several_validations_is_kept():
    board = AlarmBoard(read_alarms([{"name": "reliance", "patience": 2}]))
    check = {"outside_share": {"nodule": 0.9}, "outside_pull": {"nodule": 0.5}}
    found = [board.take(epoch, "val", now) for epoch, now in ((1, check), (1, {}), (3, check), (3, {}))]
    assert [len(events) for events in found] == [0, 0, 1, 0]


def test_depth_needs_the_last_layer_inside_and_the_mid_layer_at_chance():
    history = rows(mid_energy_inside=[0.1, 0.1, 0.3, 0.1], mid_energy_inside_chance=[0.1] * 4,
                   last_energy_inside=[0.9, 0.3, 0.9, None])  # fmt: skip
    assert events(history, "depth", patience=1) == [(0, "nodule", "raised"), (1, "nodule", "cleared")]


def test_energy_below_chance():
    history = rows(energy_inside=[0.05, 0.05, 0.2, 0.05], energy_inside_chance=[0.1, 0.1, 0.1, 0.0])
    assert events(history, "energy_below_chance", patience=2, threshold=0.8) == [
        (1, "nodule", "raised"),
        (2, "nodule", "cleared"),
    ]


def test_same_place_of_all_labels_and_same_map_of_one():
    history = [{"same_place": {ALL: 0.9}, "class_sensitivity": {"nodule": 0.99, "mass": 0.5}}] * 2
    assert events(history, "same_place", patience=2) == [(1, ALL, "raised"), (1, "nodule", "raised")]
    assert events(history, "same_place", patience=2, threshold=0.95, correlation=0.999) == []


@pytest.mark.parametrize(("name", "measure"), [("empty_maps", "empty_map_rate"), ("bias_share", "bias_share")])
def test_what_rises_is_compared_with_the_lowest_of_the_window(name, measure):
    options = {"patience": 1, "threshold": 0.3, "window": 2}
    assert events(rows(**{measure: [0.9, 0.9, 0.9]}), name, **options) == []
    assert events(rows(**{measure: [0.1, 0.3, 0.5]}), name, **options) == [(2, "nodule", "raised")]
    assert events(rows(**{measure: [0.1, 0.3, 0.35, 0.5, 0.5]}), name, **options) == []
    assert events(rows(**{measure: [0.1, 0.5, 0.5, 0.5]}), name, **options)[-1] == (3, "nodule", "cleared")


def test_bias_of_either_sign():
    assert events(rows(bias_share=[-0.1, -0.9]), "bias_share", patience=1) == [(1, "nodule", "raised")]


def test_drifting_needs_a_rise_of_auroc_and_a_fall_of_attention():
    energy = [0.6, 0.5, 0.3]
    options = {"patience": 1, "threshold": 0.3, "gain": 0.02}
    assert events(rows(auroc=[0.7, 0.75, 0.8], energy_inside=energy), "drifting", **options) == [
        (2, "nodule", "raised")
    ]
    assert events(rows(auroc=[0.7, 0.7, 0.7], energy_inside=energy), "drifting", **options) == []
    assert events(rows(auroc=[0.7, 0.75, 0.8], energy_inside=[0.6, 0.6, 0.6]), "drifting", **options) == []
    early = rows(auroc=[0.6, 0.75, 0.8], energy_inside=energy)
    assert events(early, "drifting", **options) == [(2, "nodule", "raised")]
    assert events(early[:1] + early[2:], "drifting", **options) == []
    both = rows(auroc=[0.7, 0.8], energy_inside=[0.6, 0.6], organ_iou=[0.5, 0.1])
    assert events(both, "drifting", **options) == [(1, "nodule", "raised")]
    assert events(both, "drifting", **(options | {"window": 1})) == [(1, "nodule", "raised")]


def peaks(cells, labels=4):
    """Figures of a book that has counted a map of each cell: label 0 peaks in one cell, the others where it says."""
    book = ScoreBook([f"label {i}" for i in range(labels)], ["hirescam"], True, torch.device("cpu"))
    maps, allowed = torch.zeros(len(cells), labels, 4, 4, 4), torch.ones(labels, 4, 4, 4, dtype=torch.bool)
    allowed[:, 0] = False
    for row, cell in enumerate(cells):
        maps[row, 0, 0, 0, 0] = 1.0
        for label in range(1, labels):
            maps[row, label].view(-1)[(cell + 7 * label) % 64] = 1.0
    label = torch.ones(len(cells), labels)
    label[:, 1:] = torch.where(torch.arange(len(cells))[:, None] % 2 > 0, 1.0, torch.nan)  # that pooled is not the same
    shown, segmented = {"hirescam": allowed.expand(len(cells), -1, -1, -1, -1)}, torch.ones(len(cells)) > 0
    book.update({"hirescam": maps}, shown, label, segmented, torch.zeros(len(cells), labels))
    return book.beside()


def test_one_label_that_always_peaks_in_one_place():
    """A text burnt in that goes with one label of four: all labels together say nothing."""
    found = peaks(range(0, 40, 2))
    assert found["same_place"][ALL] < 0.5
    assert found["same_place"]["label 0"] == 1.0
    assert found["same_place_maps"] == {"label 0": 20.0, "label 1": 10.0, "label 2": 10.0, "label 3": 10.0}
    assert events([found] * 3, "same_place") == [(2, "label 0", "raised")]


def test_few_maps_in_one_place_say_nothing():
    for count, raised in ((1, False), (2, False), (7, False), (8, True)):
        found = peaks(range(0, 2 * count, 2))
        assert found["same_place"]["label 0"] == 1.0
        assert ((2, "label 0", "raised") in events([found] * 3, "same_place")) is raised
    assert (2, "label 0", "raised") in events([peaks([0, 2])] * 3, "same_place", cases=2)


def test_place_and_correlation_of_a_label_are_one_judgement():
    """Each may be silent while the other one speaks, in any order of the epochs."""
    place = {"same_place": {"nodule": 0.9}, "same_place_maps": {"nodule": 9}, "class_sensitivity": {"nodule": 0.5}}
    alike = {"same_place": {"nodule": 0.1}, "same_place_maps": {"nodule": 9}, "class_sensitivity": {"nodule": 0.99}}
    assert events([place, alike, place], "same_place") == [(2, "nodule", "raised")]
    assert events([place, {"class_sensitivity": {"nodule": 0.5}}], "same_place", patience=1) == [
        (0, "nodule", "raised"), (1, "nodule", "cleared")
    ]  # fmt: skip


DOCUMENTED = {
    "reliance": ("threshold", "outside"),
    "depth": ("inside", "threshold"),
    "energy_below_chance": ("threshold",),
    "same_place": ("correlation", "cases"),
    "empty_maps": ("threshold", "window"),
    "drifting": ("gain", "window", "auroc"),
    "bias_share": ("threshold", "window"),
}


def test_the_documented_limits_are_the_defaults():
    """docs/alarms.md: its table, and the sentence about the fixed cases."""
    text = (Path(__file__).parents[2] / "docs" / "alarms.md").read_text(encoding="utf-8")
    table = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[0].strip("`") in ALARMS:
            table.setdefault(cells[0].strip("`"), (cells[1], cells[2]))
    assert list(table) == list(ALARMS)
    for alarm in read_alarms(None):
        speaks, patience = table[alarm.name]
        numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", speaks)]
        assert numbers == [getattr(alarm, option) for option in DOCUMENTED[alarm.name]], alarm.name
        assert int(patience.split()[0]) == alarm.patience, alarm.name
    # These two are said in words.
    assert "more than half" in table["same_place"][0]
    assert "lost half" in table["drifting"][0]
    assert (SamePlaces().threshold, Drifting().threshold) == (0.5, 0.5)
    for alarm in (Reliance(), Depth()):
        assert f"They keep {alarm.cases} validation cases (`cases`)" in text
        assert f"within `memory_mib` ({alarm.memory_mib};" in text
        assert alarm.every_n_epochs == 2
    assert "every `every_n_epochs` (2)" in text
    assert f"`window` ({Reliance().window}) checks" in text


@pytest.mark.parametrize("name", list(ALARMS))
def test_no_figures_no_judgement(name):
    board = AlarmBoard(read_alarms([{"name": name, "patience": 1}]))
    for epoch in range(3):
        assert board.take(epoch, "val", {}) == []
    assert board.by_label("val") == {}


def test_told_once_with_five_of_many_labels():
    board = AlarmBoard(read_alarms([{"name": "empty_maps", "patience": 1}]))
    names = [f"label{i:03d}" for i in range(120)]
    said = []
    for epoch, rate in enumerate((0.0, 0.5, 0.0, 0.5)):
        said.append(board.news(board.take(epoch, "val", {"empty_map_rate": {n: rate + i / 1e3 for i, n in
                                                                           enumerate(names)}})))  # fmt: skip
    assert [len(news) for news in said] == [0, 1, 0, 0]
    (title, sentence), = said[1]  # fmt: skip
    assert title == "empty_maps (val)"
    assert "and 115 more labels" in sentence
    assert sentence.count("(limit 0.30)") == 5
    assert len(board.raised("val", "empty_maps")) == 120
    assert board.raised("val_1", "empty_maps") == []


def test_state_goes_on_where_it_was(tmp_path):
    history = rows(empty_map_rate=[0.0, 0.6, 0.6, 0.6, 0.6])
    options = [{"name": "empty_maps", "patience": 3}]
    whole, first = AlarmBoard(read_alarms(options)), AlarmBoard(read_alarms(options))
    expected = [whole.take(epoch, "val", now) for epoch, now in enumerate(history)]
    for epoch, now in enumerate(history[:3]):
        first.take(epoch, "val", now)
    torch.save(first.state(), tmp_path / "state.pt")
    second = AlarmBoard(read_alarms(options))
    second.load(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [second.take(epoch, "val", history[epoch]) for epoch in (3, 4)] == expected[3:]
    assert expected[3]
    assert second.state() == whole.state()
    other = AlarmBoard(read_alarms(["reliance"]))
    other.load(whole.state())
    assert other.by_label("val") == {}


def test_what_can_be_asked_for():
    assert [alarm.name for alarm in read_alarms(None)] == list(ALARMS)
    assert read_alarms([]) == []
    (alarm,) = read_alarms([{"name": "reliance", "replacement": "blur", "patience": 3, "margin": 0}])
    assert (alarm.replacement, alarm.patience, alarm.margin) == ("blur", 3, 0)
    for kind in ALARMS.values():
        assert kind.means.endswith(".")
        assert not kind.tries.endswith(".")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("reliance", "expects a list such as"),
        (["relianse"], "nearest: reliance"),
        ([{"threshold": 1}], "names of alarms, got None"),
        ([{"name": "reliance", "treshold": 1}], "nearest: threshold"),
        ([{"name": "reliance", "threshold": "high"}], "threshold= expects a number"),
        ([{"name": "depth", "patience": 0}], "patience= expects a whole number of at least 1"),
        ([{"name": "depth", "cases": 1}], "at least 2"),
        ([{"name": "reliance", "replacement": "water"}], "expects case, air, blur, mean"),
        ([{"name": "reliance", "margin": 0.5}], "margin= expects a share of the image"),
        (["depth", "depth"], "twice"),
    ],
)
def test_wrong_arguments(given, message):
    with pytest.raises(InputError, match=message):
        read_alarms(given)
