"""The public surface: names, laziness, typing marker, version."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import camtrain as ct

ROOT = Path(__file__).resolve().parents[1]
NAMES = [
    "AttentionMonitor",
    "ExactResume",
    "InputError",
    "LayerTap",
    "MaskLossCallback",
    "OrganMaskLoss",
    "OrganTable",
    "OutsideSwap",
    "__version__",
    "account",
    "channel_weights",
    "compile_backbone",
    "describe",
    "evaluate",
    "explain",
    "layers",
    "methods",
    "sanity_check",
]
SIGNATURES = {
    "explain": "model image method layer labels size target logits reshape fuse call options",
    "layers": "model image depth affine seen",
    "methods": "",
    "LayerTap": "model layer logits reshape call",
    "LayerTap.maps": "self y method labels create_graph fuse",
}


def loaded_by(statement):
    """Heavy modules that a fresh interpreter has after a statement."""
    code = f"{statement}\nimport sys; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.split()


HEAVY = ["torch", "numpy", "pytorch_lightning", "lightning", "monai", "torchmetrics", "wandb", "matplotlib", "rich"]


def test_import_loads_nothing_heavy():
    assert loaded_by("import camtrain; dir(camtrain); camtrain.__version__; camtrain.InputError") == []


@pytest.mark.slow
def test_the_attention_engine_needs_torch_only():
    loaded = loaded_by("import camtrain; camtrain.explain, camtrain.methods, camtrain.LayerTap")
    assert set(loaded) <= {"torch", "numpy"}


def test_names():
    assert sorted(ct.__all__) == NAMES
    assert dir(ct) == NAMES
    for name in NAMES:
        assert getattr(ct, name) is not None


def test_names_come_from_where_the_table_says():
    for name, module in ct._PUBLIC.items():
        assert getattr(ct, name) is getattr(importlib.import_module(module), name)
        assert inspect.getdoc(getattr(ct, name)), f"{name} has no docstring"


def test_no_top_level_file_bears_the_name_of_a_public_function():
    """`camtrain/methods.py` would take the place of `ct.methods` as soon as anything imported it."""
    inside = {path.stem for path in (ROOT / "camtrain").iterdir()}
    assert not inside & {name for name in NAMES if not name.startswith("_")}


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'explian'"):
        ct.explian  # noqa: B018
    with pytest.raises(ImportError):
        exec("from camtrain import explian", {})  # noqa: S102


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    thing = ct
    for part in name.split("."):
        thing = getattr(thing, part)
    assert list(inspect.signature(thing).parameters) == SIGNATURES[name].split()


def test_input_error_is_a_value_error():
    assert issubclass(ct.InputError, ValueError)


def test_typing_marker():
    assert (ROOT / "camtrain" / "py.typed").is_file()


def test_type_checkers_see_the_same_names():
    """The names under TYPE_CHECKING are those of the table."""
    text = (ROOT / "camtrain" / "__init__.py").read_text(encoding="utf-8")
    pairs = re.findall(r"^    from (\S+) import (\w+)", text, flags=re.MULTILINE)
    assert {name: module for module, name in pairs} == ct._PUBLIC


def test_version_is_that_of_the_changelog():
    assert re.fullmatch(r"\d+\.\d+\.\d+([.-]?\w+)*", ct.__version__)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[?(\d+\.\d+\.\d+[^\]\s]*)", changelog, flags=re.MULTILINE)
    assert versions, "no heading of the form '## 1.2.3'"
    assert versions[0] == ct.__version__
