"""The page of a run: whole, escaped, small enough, and built of whatever its folder holds."""

from __future__ import annotations

import base64
import json
import re
import zlib

import numpy as np
import pytest
from run_report_tools import LABELS, METHODS, chest, make_run, maps_of, scores_of
from test_evaluation_page import Page

from camtrain._errors import InputError
from camtrain.reporting import RunReport, report_blocks, write_run_comparison, write_run_report
from camtrain.reporting.case_log import CaseRow, write_cases
from camtrain.reporting.panel_files import CaseMap, PanelVolume, read_maps, write_maps, write_volume
from camtrain.reporting.report_blocks import PieceStore, on_screen, thinned
from camtrain.reporting.run_record import find_run, read_run
from camtrain.reporting.run_report import report_frame, seen_sentence

EVIL = "</script><script>alert(\"1\")</script> <b>&amp; 'q' @@ {{ 7 * 7 }} é 肺"


def text_of(path):
    return path.read_text(encoding="utf-8")


def blocks(text, kind):
    return [
        json.loads(b) for b in re.findall(rf'<script type="application/json" class="{kind}"[^>]*>(.*?)</script>', text)
    ]


def opened(block):
    return np.frombuffer(zlib.decompress(base64.b64decode(block["data"])), np.int8)


def notes(text):
    return re.findall(r"<li>(.*?)</li>", text.partition('<ul class="notes">')[2].partition("</ul>")[0])


def test_the_page_is_valid_and_says_what_matters_first(tmp_path):
    path = write_run_report(make_run(tmp_path).path)
    page = Page(text_of(path))
    assert not [link for link in page.links if not link.startswith(("#", "data:"))]
    assert len(page.ids) == len(set(page.ids))
    assert set(page.refs) <= set(page.ids)
    text = text_of(path)
    assert "http" not in re.sub("http-equiv|http://www.w3.org/2000/svg", "", text)
    first = text.partition("<main")[2]
    assert "1 of 3 labels looks mostly outside the organs: effusion since epoch\u00a02." in first[:1500]
    assert (
        "a central cell of layer4 depends on 100\u00a0% of the image. Attention inside the organ does not show" in text
    )
    assert "camtrain fit --config phantom.yaml" in text
    assert notes(text) == []


def test_what_the_blocks_hold_is_what_the_files_hold(tmp_path):
    run = make_run(tmp_path, axes="LPS", layers=("layer3", "layer4"))
    text = text_of(write_run_report(run.path))
    epochs = blocks(text, "maps")
    assert [block["epoch"] for block in epochs] == [0, 1, 2, 3]
    _, stored = read_maps(run.maps_path(2))
    place, cells = 0, opened(epochs[2])
    flat = iter(stored)
    for case, label, truth, probability, entries in epochs[2]["maps"]:
        for method, layer, shape, scale, inside in entries:
            each = next(flat)
            turned = on_screen(each.cells, "LPS")
            assert (case, label, truth, method, layer) == (each.case, each.label, each.truth, each.method, each.layer)
            assert shape == list(turned.shape)
            assert (scale, probability) == (pytest.approx(each.scale, rel=1e-5), each.probability)
            assert inside == each.inside
            np.testing.assert_array_equal(cells[place : place + turned.size], turned.ravel())
            place += turned.size
    assert place == len(cells)
    volume = blocks(text, "volume")[0]
    image, lungs, heart = chest()
    made = PanelVolume.make("x", image[None], axes="LPS").image
    raw = zlib.decompress(base64.b64decode(volume["data"]))
    grey = np.frombuffer(raw[: made.size], np.uint8).reshape(volume["size"])
    np.testing.assert_array_equal(grey, made[::-1, ::-1])
    bits = np.unpackbits(np.frombuffer(raw[made.size :], np.uint8))[: 2 * made.size].reshape(2, *made.shape)
    np.testing.assert_array_equal(bits[volume["regionOf"]["stent"]], heart[::-1, ::-1])
    np.testing.assert_array_equal(bits[volume["regionOf"]["nodule"]], lungs[::-1, ::-1])
    assert volume["voxel"] == [8, 9, 10]


def test_names_of_the_user_are_text_and_nothing_else(tmp_path):
    labels = [EVIL, "effusion", "mean value"]
    run = make_run(tmp_path / "a b ü", cases=[EVIL, "2"], labels=labels, facts={"command": EVIL, "layers": [EVIL]})
    text = text_of(write_run_report(run.path, name=EVIL))
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1 + 1 + 2 + 4  # data, own, volumes, epochs
    assert "49 é" not in text
    assert EVIL in "".join(page.text)
    assert blocks(text, "maps")[0]["maps"][0][:2] == [EVIL, EVIL]
    compared = text_of(write_run_comparison(run.path, make_run(tmp_path / "c", cases=[EVIL], labels=labels).path))
    assert [tag for tag, _ in Page(compared).tags].count("script") == 1 + 1 + 2 + 8  # the case of both has one volume


def test_over_a_hundred_labels(tmp_path):
    labels = [f"finding {i}" for i in range(120)]
    run = make_run(tmp_path, epochs=2, labels=labels, cases=["1"])
    text = text_of(write_run_report(run.path))
    assert len(re.findall(r'<th scope="row">finding \d+</th>', text)) == 3 * 120 + 120  # verdicts, two methods, organs
    assert "All 120" not in text.partition("<main")[2][:800]


def test_only_what_is_new_is_encoded(tmp_path, monkeypatch):
    run = make_run(tmp_path, epochs=3)
    report = RunReport(run.path)
    first = text_of(report.write())
    made = []
    real = report_blocks.maps_piece
    monkeypatch.setattr(
        report_blocks, "maps_piece", lambda about, *rest: made.append(about["epoch"]) or real(about, *rest)
    )
    monkeypatch.setattr(report_blocks, "volume_piece", None)  # would fail
    write_maps(run.maps_path(3), maps_of(3, ["case 1"], LABELS), epoch=3, step=9)
    again = text_of(report.write())
    assert made == [3]
    assert [b["epoch"] for b in blocks(again, "maps")] == [0, 1, 2, 3]
    assert blocks(again, "maps")[:3] == blocks(first, "maps")
    # An epoch that is written again is read again.
    write_maps(run.maps_path(1), maps_of(7, ["case 1"], LABELS), epoch=1, step=9)
    report.write()
    assert made == [3, 1]


def test_half_written_and_foreign_files_are_named_and_skipped(tmp_path):
    run = make_run(tmp_path, epochs=5)
    run.maps_path(1).write_bytes(run.maps_path(1).read_bytes()[:300])
    (run.path / "epochs" / "0002" / ".12.tmp.maps.npz").write_bytes(b"half")
    (run.path / "epochs" / "notes").mkdir()
    header = np.frombuffer(json.dumps({"layout": 7}).encode(), np.uint8)
    np.savez(run.maps_path(3), header=header)
    run.volume_path("case 2").write_bytes(b"")
    (run.path / "alarms.csv").write_text(
        "epoch,split,alarm,label,state,sentence\n0,val,reliance,stent,raised,Look.\nx,", "utf-8"
    )
    text = text_of(write_run_report(run.path))
    found = notes(text)
    assert len(found) == 4, found
    assert any("0001/maps.npz: half written" in note for note in found)
    assert any("0003/maps.npz: written in layout 7, this version reads 1" in note for note in found)
    assert any("volumes/" in note and "half written" in note for note in found)
    assert any("alarms.csv" in note for note in found)
    assert [b["epoch"] for b in blocks(text, "maps")] == [0, 2, 4]
    assert {b["case"] for b in blocks(text, "volume")} == {"case 1", "case 3"}
    assert {entry[0] for entry in blocks(text, "maps")[0]["maps"]} == {"case 1", "case 3"}
    assert "Look." in text


def test_a_run_of_another_version_is_shown_as_far_as_it_goes(tmp_path):
    run = make_run(tmp_path)
    facts = {"layout": 5, "labels": 3, "config": [], "table": {"labels": "all"}, "seen": "much"}
    run.facts_path.write_text(json.dumps(facts))
    text = text_of(write_run_report(run.path))
    assert any("layout 5" in note for note in notes(text))
    assert any("labels, config" in note for note in notes(text))
    assert "effusion since epoch" in text
    run.facts_path.unlink()
    run.panel_path.write_text("{")
    assert any("run.json: not there" in note for note in notes(text_of(write_run_report(run.path))))
    run.scores_path.write_text("what,ever\n1,2\n")
    text = text_of(write_run_report(run.path))
    assert any("scores.csv" in note for note in notes(text))
    assert "No label could be compared" in text
    for path in run.path.rglob("*.npz"):
        path.unlink()
    Page(text_of(write_run_report(run.path)))


def test_what_is_known_of_single_cases(tmp_path):
    run = make_run(tmp_path)
    lines = [
        "epoch,step,split,case,label,truth,probability,method,organ_iou,energy_inside,threshold,kind",
        "3,9,val,case 1,nodule,1,0.9,hirescam,0.5,0.25,0.1,positive",
        "3,9,val,case 2,nodule,0,0.95,hirescam,,,,hard",
    ]
    (run.path / "cases.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    first, second = read_run(run.path).cases
    assert first == ["val", 3, "case 1", "nodule", "hirescam", 0.5, "positive"]
    assert second == ["val", 3, "case 2", "nodule", "hirescam", None, "hard"]
    (run.path / "cases.csv").write_text("epoch,case\n1,2\n", encoding="utf-8")
    assert any("cases.csv" in note for note in read_run(run.path).notes)


def test_alarms_are_shown_with_their_last_state(tmp_path):
    run = make_run(tmp_path)
    lines = [
        "epoch,split,alarm,label,value,threshold,state,sentence",
        "1,val,reliance,stent,1.2,1.0,raised,Outside counts more than inside.",
        "2,val,empty maps,,0.5,0.3,raised,Maps are empty.",
        "3,val,empty maps,,0.1,0.3,cleared,Maps are filled.",
    ]
    (run.path / "alarms.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    raised, cleared = sorted(read_run(run.path).alarms, key=lambda alarm: not alarm.raised)
    assert (raised.alarm, raised.label, raised.since) == ("reliance", "stent", 1)
    assert (cleared.alarm, cleared.since, cleared.until) == ("empty maps", 2, 3)
    text = text_of(write_run_report(run.path))
    assert "1 alarm</h3>" in text
    assert "1 alarm that cleared" in text


def test_a_long_run_is_thinned_to_the_budget(tmp_path):
    run = make_run(tmp_path, epochs=30, grid=(12, 12, 12))
    record = read_run(run.path, budget=900_000)
    assert sum(piece.size for piece in (*record.maps, *record.volumes)) < 900_000
    epochs = [piece.epoch for piece in record.maps]
    assert (epochs[0], epochs[-1]) == (0, 29)
    assert 4 < len(epochs) < 30
    assert any(f"maps of {len(epochs)} of 30 epochs" in note for note in record.notes)


@pytest.mark.slow
def test_curves_tables_and_rows_of_cases_are_in_the_budget(tmp_path):
    labels, cases = [f"finding {i}" for i in range(40)], [f"patient scan {i}" for i in range(4)]
    run = make_run(tmp_path, epochs=1, labels=labels, cases=cases, size=(8, 8, 8), grid=(2, 2, 2))
    found = maps_of(0, cases, labels[:8], grid=(4, 4, 4))
    rows = []
    for epoch in range(32):
        write_maps(run.maps_path(epoch), found, epoch=epoch, step=epoch)
        rows += scores_of(epoch, 32, labels)
    run.write_scores(rows)
    known = [
        CaseRow(epoch, epoch, "val", case, label, 1, 0.5, method, 0.5, 0.5, None, "positive")
        for epoch in range(32)
        for case in cases
        for label in labels[:8]
        for method in METHODS
    ]
    write_cases(run, known)
    bare = write_run_report(make_run(tmp_path, epochs=1, cases=[]).path).stat().st_size  # style and script
    budget = 200_000
    page = report_frame([record := read_run(run.path, budget=budget)])
    size = len(page) + sum(piece.size for piece in (*record.volumes, *record.maps))
    assert size < budget + bare
    assert len(json.dumps(record.drawn)) > 0.1 * budget  # it matters whether they are counted
    epochs = {piece.epoch for piece in record.maps}
    assert {row[1] for row in record.cases} == epochs
    assert {0, 31} < epochs < set(range(32))


def test_a_report_holds_the_pieces_of_its_page_and_makes_each_once(tmp_path, monkeypatch):
    made, make = [], report_blocks.maps_piece
    monkeypatch.setattr(report_blocks, "maps_piece", lambda *args: made.append(args[0]["epoch"]) or make(*args))
    run, store = make_run(tmp_path, epochs=24, grid=(12, 12, 12)), PieceStore()
    files = {epoch: run.maps_path(epoch) for epoch in range(24)}
    for last in range(24):
        paths = [files[epoch] for epoch in thinned({e: files[e] for e in range(last + 1)}, 400_000)]
        store.maps(paths, store.volumes([run.volume_path("case 0")])[0])
        assert set(store._maps) == set(paths)
    assert 2 < len(paths) < 12
    assert made == list(range(24))


@pytest.mark.slow
def test_twenty_epochs_of_twelve_cases_and_eight_labels_stay_small(tmp_path):
    cases, labels = [f"scan {i}" for i in range(12)], [f"label {i}" for i in range(8)]
    run = make_run(tmp_path, epochs=20, cases=cases, labels=labels, size=(64, 64, 64), grid=(8, 8, 8))
    path = write_run_report(run.path)
    assert path.stat().st_size < 20e6
    assert len(blocks(text_of(path), "maps")) == 20


def test_two_runs_side_by_side(tmp_path):
    plain, masked = make_run(tmp_path / "a"), make_run(tmp_path / "b", good=True)
    path = write_run_comparison(plain.path, masked.path, names=["plain", "mask loss"])
    assert path == masked.path / f"report_against_{plain.id}.html"
    text = text_of(path)
    Page(text)
    table = text.partition('<table class="sort difference">')[2].partition("</table>")[0]
    rows = re.findall(r'<th scope="row">(.*?)</th>', table)
    assert rows[0] == "effusion"
    assert rows[-1] == "mean over labels"
    assert '<td class="pair">0.20</td><td>0.95</td><td class="d0">+0.75' in table
    assert '<th scope="row">model.lr</th><td class="t">0.2</td><td class="t">0.1</td>' in text
    assert len(blocks(text, "volume")) == 3
    assert len(blocks(text, "maps")) == 8


def test_wrong_requests(tmp_path):
    run = make_run(tmp_path / "a", epochs=1)
    with pytest.raises(InputError, match="no such folder"):
        write_run_report(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no run"):
        write_run_report(tmp_path / "empty")
    with pytest.raises(InputError, match="two runs, got"):
        write_run_comparison(run.path, tmp_path / "a")
    other = make_run(tmp_path / "a", epochs=1)
    with pytest.raises(InputError, match="holds 2 runs: name one"):
        find_run(tmp_path)
    with pytest.raises(InputError, match="two names"):
        write_run_comparison(run.path, other.path, names=["a"])
    assert find_run(other.scores_path) == other.path


def test_a_run_is_found_from_the_log_folder_above(tmp_path):
    run = make_run(tmp_path / "logs" / "version_0", epochs=1)
    assert find_run(tmp_path) == find_run(tmp_path / "logs") == find_run(run.path) == run.path


@pytest.mark.parametrize("shape", [(40,), (24, 20), (12, 10, 8)])
def test_images_of_any_rank(tmp_path, shape):
    run = make_run(tmp_path, epochs=1, cases=[])
    rng = np.random.default_rng(0)
    image = rng.random((1, *shape))
    write_volume(run.volume_path("c"), PanelVolume.make("c", image, allowed={"nodule": image[0] > 0.5}))
    values = rng.normal(size=tuple(max(2, n // 4) for n in shape))
    write_maps(run.maps_path(0), [CaseMap("c", "nodule", 1.0, 0.5, "cam", "", values)], epoch=0, step=1)
    text = text_of(write_run_report(run.path))
    assert (
        len(blocks(text, "volume")[0]["size"]) == len(blocks(text, "maps")[0]["maps"][0][4][0][2]) == max(2, len(shape))
    )


def test_a_file_that_vanishes(tmp_path):
    pieces, (note,) = PieceStore().volumes([tmp_path / "volumes" / "gone.npz"])
    assert pieces == []
    assert note == "volumes/gone.npz: No such file or directory: left out"


def test_what_a_map_can_say():
    assert "may have seen the whole scan" in seen_sentence(None)
    assert "may have seen the whole scan" in seen_sentence({"a": "x"})
    assert seen_sentence({"a": 0.9}).endswith("(OutsideSwap).")
    assert seen_sentence({"a": 0.1, "b": 0.4}).endswith("grows with depth (a: 10\u00a0%, b: 40\u00a0%).")


def test_scores_of_several_splits_have_a_table_each(tmp_path):
    run = make_run(tmp_path, epochs=2)
    run.write_scores(scores_of(1, 2, LABELS, split="shift_free"))
    text = text_of(write_run_report(run.path))
    shown = re.findall(r'<div class="scroll heat" data-split="(.*?)" data-method="(.*?)"[^>]*?( hidden)?>', text)
    assert shown == [
        ("val", "hirescam", ""),
        ("val", "gradcam", " hidden"),
        ("shift_free", "hirescam", " hidden"),
        ("shift_free", "gradcam", " hidden"),
    ]
