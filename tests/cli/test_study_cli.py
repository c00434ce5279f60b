"""camtrain study make and analyse: from checkpoints to a page and a key, and from answers to tables."""

from __future__ import annotations

import csv
import json

import pytest

pytestmark = pytest.mark.slow
SMALL = ("--cases", "2", "--width", "120", "--cut", "0.001")


@pytest.fixture(scope="module")
def made(trained, tmp_path_factory):
    from camtrain.cli.main import main

    out = tmp_path_factory.mktemp("study") / "study"
    words = ["study", "make", "--ckpt_path", str(trained.checkpoint), "--out", str(out), *SMALL]
    assert main([*words, "--methods", "hirescam,gradcam", "--split", "test"]) == 0
    return out


def answers_of(made, path, change=lambda task, answer: answer, reader="ann"):
    """All tasks answered as the key says, or as `change` does."""
    key = json.loads((made / "key.json").read_text())
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["reader", "task", "answer", "seconds", "study"])
        for name, task in key["tasks"].items():
            right = task["label"] if task["kind"] == "discrimination" else "3"
            writer.writerow([reader, name, change(task, right), "1.5", key["study"]])
    return path


def test_from_a_checkpoint_to_tables(made, run, tmp_path):
    assert (made / "study.html").stat().st_size < 1_000_000
    key = json.loads((made / "key.json").read_text())
    assert {t["contest"] for t in key["tasks"].values() if t["kind"] == "trust"} == {"hirescam against gradcam"}
    files = [answers_of(made, tmp_path / f"{name}.csv", reader=name) for name in ("ann", "bob")]
    result = run("study", "analyse", "--key", made / "key.json", *files, "--out", tmp_path / "out", "--repeats", "50")
    assert result.code == 0, result.err
    for phrase in ("Which finding?", "hirescam - gradcam", "ann", "Krippendorff", "analysis.json"):
        assert phrase in result.out
    rows = list(csv.DictReader((tmp_path / "out" / "scores.csv").open(newline="")))
    whole = {r["subject"]: r for r in rows if r["part"] == "accuracy" and r["label"] == "all"}
    assert {r["value"] for r in whole.values()} == {"1.0"}
    assert {r["readers"] for r in whole.values()} == {"2"}
    assert set(json.loads((tmp_path / "out" / "analysis.json").read_text())["agreement"]) == {"discrimination", "trust"}


def test_two_checkpoints(trained, run, tmp_path):
    words = ("study", "make", "--ckpt_path", trained.checkpoint, "--against", trained.checkpoint, *SMALL)
    result = run(
        *words, "--out", tmp_path / "s", "--title", "Chest", "--config", trained.config, "--data.test_cases", "2"
    )
    assert result.code == 0, result.err
    assert "not for readers" in result.out
    key = json.loads((tmp_path / "s" / "key.json").read_text())
    assert {t["contest"] for t in key["tasks"].values() if t["kind"] == "trust"} == {"A against B, hirescam"}
    assert "<h1>Chest</h1>" in (tmp_path / "s" / "study.html").read_text()


def test_no_study_is_replaced_unasked(made, trained, run, refused):
    before = (made / "key.json").read_bytes()
    words = ("study", "make", "--ckpt_path", trained.checkpoint, "--out", made, *SMALL)
    assert "whose key would be lost" in refused(*words)
    assert (made / "key.json").read_bytes() == before
    assert run(*words, "--methods", "hirescam,gradcam", "--overwrite").code == 0
    assert (made / "key.json").read_bytes() == before  # the same study again


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--methods", "hirescan"], "nearest: hirescam"),
        (["--kinds", "trust"], "give --against, or two --methods"),
        (["--labels", "nodule"], "at least two findings"),
        (["--split", "tset"], "nearest: test"),
        (["--layer", "nowhere"], "nowhere"),
        (["--device", "gpu"], "--device 'gpu'"),
        (["--data.test_cases", "2"], "need --config"),
        (["--against", "nothing.ckpt"], "does not exist"),
        (["--cases", "many"], "--cases"),
    ],
)
def test_wrong_options_of_make(trained, refused, tmp_path, words, says):
    full = ["study", "make", "--ckpt_path", trained.checkpoint, "--out", tmp_path / "s", *SMALL]
    assert says in refused(*full, *words)
    assert not (tmp_path / "s").exists()


def test_wrong_answers_and_keys(made, refused, tmp_path):
    analyse = ("study", "analyse", "--key", made / "key.json")
    good = answers_of(made, tmp_path / "good.csv")
    other = tmp_path / "other.csv"
    other.write_text(good.read_text().replace(json.loads((made / "key.json").read_text())["study"], "0" * 12))
    assert "give the key of that study" in refused(*analyse, other)
    assert "is no choice of task" in refused(*analyse, answers_of(made, tmp_path / "x.csv", lambda task, right: "pox"))
    changed = tmp_path / "key.json"
    changed.write_text((made / "key.json").read_text().replace("hirescam", "layercam"))
    assert "checksum" in refused("study", "analyse", "--key", changed, good)
    (tmp_path / "empty.csv").write_text("")
    assert "is empty" in refused(*analyse, tmp_path / "empty.csv")
    assert "between 0 and 1" in refused(*analyse, good, "--level", "95")
    assert "got the file" in refused(*analyse, good, "--out", good)


def test_help_and_unknown_actions(run, refused):
    assert "usage: camtrain study make" in run("study", "--help").out
    assert "--against" in run("study", "make", "--help").out
    assert "nearest: make" in refused("study", "mke")
    assert "expects make or analyse" in refused("study")
