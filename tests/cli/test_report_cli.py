"""`camtrain report`: one run, two runs, and what is wrong with the words."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "reporting"))
from run_report_tools import make_run

sys.path.pop(0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two runs ä")
    return make_run(folder / "a", epochs=2), make_run(folder / "b", epochs=2, good=True)


def test_rebuilds_a_run(runs, run):
    first, _ = runs
    for given in (first.path, first.path.parents[1], first.scores_path):
        first.report_path.unlink(missing_ok=True)
        result = run("report", given)
        assert result.code == 0, result.err
        assert result.out == f"report: {first.report_path}\n"
        assert first.report_path.stat().st_size > 10_000


def test_sets_two_runs_side_by_side(runs, run, tmp_path):
    first, second = runs
    result = run("report", first.path, second.path)
    assert result.out == f"report: {second.path / f'report_against_{first.id}.html'}\n"
    out = tmp_path / "new folder" / "two.html"
    result = run("report", first.path, second.path, "--out", out, "--names", "plain, mask <loss>")
    assert result.code == 0, result.err
    assert "mask &lt;loss&gt;" in out.read_text(encoding="utf-8")


def test_refused(runs, refused, tmp_path):
    first, second = runs
    assert "there is no such folder" in refused("report", tmp_path / "no")
    assert "holds no run" in refused("report", tmp_path)
    assert "expected two runs" in refused("report", first.path, first.path)
    assert "one run or two, got 3" in refused("report", first.path, second.path, first.path)
    assert "got the folder" in refused("report", first.path, "--out", tmp_path)
    assert "a name for each of 2 runs, got 1" in refused("report", first.path, second.path, "--names", "a")
    assert "see camtrain report --help" in refused("report")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused("report", first.path, "--out", tmp_path / "file" / "report.html")


def test_needs_no_torch(runs, tmp_path):
    first = tmp_path / "copy"
    shutil.copytree(runs[0].path, first)
    code = (
        "import sys\nfrom camtrain.cli.main import main\n"
        f"assert main(['report', {str(first)!r}]) == 0\nprint([m for m in ('torch', 'monai') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
