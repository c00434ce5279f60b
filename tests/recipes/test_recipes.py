"""Every recipe runs, in a small form, and says what it promised."""

from __future__ import annotations

import csv
import ctypes.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import recipe_tools
from recipe_tools import RECIPES

ROOT = Path(__file__).parents[2]
STUDY = ["claim", "--seeds", "1", "--cases", "32", "--test-cases", "24", "--epochs", "1", "--out", "{out}"]
# Recipe -> small form; a new recipe without an entry here fails the completeness test.
SMALL = {
    "existing_module.py": ["--cases", "24", "--epochs", "1", "--out", "{out}"],
    "monitor_only.py": ["--cases", "24", "--epochs", "1", "--out", "{out}"],
    "every_method.py": ["--cases", "24", "--test-cases", "12", "--epochs", "1", "--out", "{out}"],
    "plain_pytorch.py": ["--cases", "24", "--epochs", "1"],
    "sanity_checks.py": ["--quick", "--out", "{out}"],
    "phantom_before_after.py": ["--cases", "32", "--test-cases", "24", "--epochs", "1", "--out", "{out}"],
}
SAYS = {
    "existing_module.py": ["val/organ_iou", "train/mask_loss", "val/auroc"],
    "monitor_only.py": ["organ_iou", "layercam", "scores.csv"],
    "every_method.py": ["guided_gradcam", "An account of cells", "Pictures"],
    "plain_pytorch.py": ["weighted mask loss", "layer relu"],
    "sanity_checks.py": ["Do the maps depend on the weights?", "guided_backprop"],
    "phantom_before_after.py": ["before_after.png", "wandb sync", "energy inside", "report.html"],
}


def run(script: Path, arguments: list[str], folder: Path) -> str:
    done = recipe_tools.run(script, *arguments, folder=folder)
    return done.stdout + done.stderr


def test_every_recipe_is_run():
    """Here, or in a test file of its own: `test_recipe_<name>.py`."""
    elsewhere = {path.name.removeprefix("test_recipe_") for path in Path(__file__).parent.glob("test_recipe_*.py")}
    assert {path.name for path in RECIPES.glob("[!_]*.py")} - elsewhere == set(SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALL))
def test_recipe(name, tmp_path):
    text = run(RECIPES / name, [a.format(out=tmp_path) for a in SMALL[name]], tmp_path)
    for phrase in SAYS[name]:
        assert phrase in text


@pytest.mark.slow
def test_monitoring_needs_no_organs(tmp_path):
    text = run(
        RECIPES / "monitor_only.py",
        ["--cases", "24", "--epochs", "1", "--organs", "none", "--out", str(tmp_path)],
        tmp_path,
    )
    assert "auroc" in text
    assert "organ_iou" not in text


@pytest.mark.slow
def test_an_interrupted_study_goes_on_where_it_stopped(tmp_path):
    arguments = [a.format(out=tmp_path) for a in STUDY]
    text = run(ROOT / "benchmarks" / "phantom_study.py", arguments, tmp_path)
    assert "| mask loss | hirescam |" in text
    lines = (tmp_path / "claim.jsonl").read_text()
    run(ROOT / "benchmarks" / "phantom_study.py", arguments, tmp_path)
    assert (tmp_path / "claim.jsonl").read_text() == lines


@pytest.mark.slow
def test_the_step_cost_benchmark_runs(tmp_path):
    net = "EfficientNet-B0"  # its last activation is a module that runs several times
    arguments = ["--pairs", "1", "--sizes", "32", "--labels", "5", "--nets", net, "--layers", "last", "mid"]
    text = run(ROOT / "benchmarks" / "step_cost.py", arguments, tmp_path)
    assert f"| {net} | affine | last | 5 | 32^3 | " in text
    assert f"| {net} | affine | mid | 5 | 32^3 | " in text
    assert text.count(" | 1 |\n") == 2  # pairs
    assert "processor time, batch 2, 1 thread of" in text


@pytest.mark.slow
def test_a_step_cost_benchmark_that_stopped_goes_on_with_its_pairs(tmp_path):
    words = ["--sizes", "32", "--labels", "5", "--nets", "ResNet18", "--keep", "pairs.csv"]
    kept = tmp_path / "pairs.csv"
    run(ROOT / "benchmarks" / "step_cost.py", [*words, "--pairs", "1"], tmp_path)
    first = kept.read_text()
    other, (name, plain, _) = first.replace("ResNet18", "ResNet50"), next(csv.reader(first.splitlines()))
    twice = f'"{name}",{plain},{2 * float(plain)}\r\n'  # a pair whose step with the mask loss took twice the time
    kept.write_text(other + twice * 2)
    text = run(ROOT / "benchmarks" / "step_cost.py", [*words, "--pairs", "3"], tmp_path)
    assert " | 2.000 (" in text
    assert text.count(" | 3 |\n") == 1
    assert len(kept.read_text().splitlines()) == 4
    begun = kept.read_text()
    run(ROOT / "benchmarks" / "step_cost.py", [*words, "--pairs", "2"], tmp_path)
    assert kept.read_text() == begun


@pytest.mark.slow
def test_the_step_cost_benchmark_runs_under_jemalloc_or_says_where_to_get_it(tmp_path):
    words = ["--pairs", "1", "--sizes", "32", "--labels", "5", "--nets", "DenseNet121", "--allocator", "jemalloc"]
    command = [sys.executable, str(ROOT / "benchmarks" / "step_cost.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if ctypes.util.find_library("jemalloc") is None:
        assert done.returncode == 1
        assert "apt install libjemalloc2, or leave the option out" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert "processor time, batch 2, jemalloc, 1 thread of" in done.stdout
        assert "<jemalloc>" not in done.stderr  # how it complains of a setting that it does not know


@pytest.mark.slow
def test_the_maps_benchmark_runs_beside_other_libraries(tmp_path):
    arguments = ["--rounds", "1", "--slow-rounds", "1", "--sizes", "32", "--labels", "2", "--heads", "affine"]
    text = run(ROOT / "benchmarks" / "maps_cost.py", arguments, tmp_path)
    for library in ("camtrain", "autograd loop", "torchcam", "captum", "MONAI"):
        assert f"| DenseNet121 | affine | last | 2 | 32^3 | {library} | " in text


@pytest.mark.slow
def test_the_benchmark_at_full_size_runs_on_a_few_slices(tmp_path):
    row = "validation step, monitor"
    text = run(ROOT / "benchmarks" / "full_size.py", ["--size", "6", "420", "420", "--rows", row], tmp_path)
    assert f"| {row} | " in text
    assert "A plain training step: 0.08 TFLOP" in text  # 5.34 for 405 slices


@pytest.mark.slow
def test_the_driver_of_the_benchmarks_writes_its_page_and_says_what_is_kept(tmp_path):
    row = "| DenseNet121 | affine | last | 80 | 64^3 | {} | 1.0 | 100 |"
    text = "\n".join(row.format(r) for r in ("1.020 (1.000-1.049)", "1.020 (1.000-1.051)", "1.031 (1.000-1.040)"))
    (tmp_path / "step.json").write_text(json.dumps({"command": "step_cost.py", "seconds": 90, "text": text}))
    page = tmp_path / "page.md"
    run(ROOT / "benchmarks" / "run_all.py", ["--page", "--out", str(tmp_path), "--to", str(page)], tmp_path)
    assert "1 of 3 rows keep it" in page.read_text()
    assert "Peak memory" not in page.read_text()


@pytest.mark.slow
def test_the_driver_of_the_benchmarks_takes_runs_of_the_same_row_together(tmp_path):
    row = "| EfficientNet-B0 | affine | last | 80 | 256^3 | {} | 1.0 | 100 | 60 |"
    for name, ratio in (("large", "1.030 (1.020-1.040)"), ("large_twice", "1.000 (0.990-1.010)")):
        kept = {"command": "step_cost.py", "seconds": 90, "text": row.format(ratio)}
        (tmp_path / f"{name}.json").write_text(json.dumps(kept))
    page = tmp_path / "page.md"
    run(ROOT / "benchmarks" / "run_all.py", ["--page", "--out", str(tmp_path), "--to", str(page)], tmp_path)
    # Two intervals of one width: their mean, and a width that is smaller by the root of two.
    assert "**1.015 (1.008-1.022)**" in page.read_text()
    assert page.read_text().count("runs on this page") == 1


@pytest.mark.slow
def test_the_driver_of_the_benchmarks_goes_on_with_a_stopped_part_and_begins_a_done_one_anew(tmp_path):
    part = "step_cost.py --nets ResNet18 --sizes 32 --labels 5 --pairs {}"
    code = "import run_all, sys; from pathlib import Path; run_all.PARTS['step'] = run_all.Part('', '', '{}'); "
    code += "run_all.measure('step', Path(sys.argv[1]))"

    def measure(pairs: int) -> list[str]:
        command = [sys.executable, "-c", code.format(part.format(pairs)), str(tmp_path)]
        subprocess.run(command, cwd=ROOT / "benchmarks", check=True, capture_output=True)
        return json.loads((tmp_path / "step.json").read_text())["pairs"]

    (first,) = measure(1)
    assert not (tmp_path / "step.csv").exists()
    (anew,) = measure(1)
    assert anew != first
    (tmp_path / "step.csv").write_text(first + "\n")  # as a part that was stopped leaves it, beside an earlier result
    assert measure(2)[0] == first


def test_recipes_are_short_and_flat():
    for path in RECIPES.glob("*.py"):
        text = path.read_text()
        # What several recipes share is no recipe, but short all the same.
        assert len(text.splitlines()) < (200 if path.name.startswith("_") else 150), path.name
        assert "from camtrain._" not in text, f"{path.name} uses a private name"
