"""Who may import whom: docs/design.md draws the arrows, this test reads the imports."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "camtrain"
PRIVATE = {"_errors", "_batch", "_grid", "_label_rates", "_lightning"}


def arrows():
    """Room -> rooms it may use, from the block of arrows in docs/design.md."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    allowed = {}
    for left, right in re.findall(r"^([a-z, ]+) -> ([a-z, ]+)$", text, flags=re.MULTILINE):
        targets = set() if right.strip() == "no other room" else {room.strip() for room in right.split(",")}
        for room in left.split(","):
            allowed.setdefault(room.strip(), set()).update(targets)
    return allowed


def rooms():
    return sorted(p.name for p in PACKAGE.iterdir() if p.is_dir() and any(p.rglob("*.py")))


def imported(source, package):
    """Every module that a file imports, wherever in it, as full dotted names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def breaches(room, source, allowed, package=None):
    """Imports of a file of `room` that no arrow allows."""
    found = []
    for name in imported(source, package or f"camtrain.{room}"):
        parts = name.split(".")
        if parts[0] != "camtrain":
            continue
        target = parts[1] if len(parts) > 1 else "camtrain itself"
        if target != room and target not in allowed[room] and target not in PRIVATE and target != "__version__":
            found.append(name)
    return found


def files():
    return [(room, path) for room in rooms() for path in sorted((PACKAGE / room).rglob("*.py"))]


def test_design_page_names_every_room():
    allowed = arrows()
    assert len(allowed) >= 9
    assert set(rooms()) <= set(allowed), "a room that docs/design.md draws no arrow for"
    for room, targets in allowed.items():
        assert targets <= set(allowed), f"{room} may use a room that is not in the picture"


def test_arrows_run_one_way_only():
    allowed = arrows()

    def reach(room, seen=()):
        assert room not in seen, f"circle: {' -> '.join([*seen, room])}"
        for target in allowed[room]:
            reach(target, (*seen, room))

    for room in allowed:
        reach(room)


@pytest.mark.parametrize(("room", "path"), files(), ids=lambda value: value.name if isinstance(value, Path) else value)
def test_no_forbidden_arrow(room, path):
    package = ".".join(("camtrain", *path.relative_to(PACKAGE).parts[:-1]))
    assert breaches(room, path.read_text(encoding="utf-8"), arrows(), package) == []


def test_private_files_at_the_top_use_no_room():
    for path in PACKAGE.glob("_*.py"):
        if path.stem in PRIVATE:
            names = [n.split(".")[1] for n in imported(path.read_text(), "camtrain") if n.startswith("camtrain.")]
            assert set(names) <= PRIVATE, path.name
    assert {p.stem for p in PACKAGE.glob("_*.py")} <= PRIVATE | {"__init__", "__main__"}


@pytest.mark.parametrize(
    "source",
    [
        "from camtrain.callbacks.mask_loss import MaskLossCallback",
        "import camtrain.losses",
        "from camtrain import losses",
        "def f():\n    from camtrain.anatomy import rules",
        "from ..metrics import organ_iou",
        "from .. import metrics",
        "import importlib\nimportlib.import_module('camtrain.reporting.panels')",
    ],
)
def test_the_check_itself_finds_a_forbidden_arrow(source):
    assert breaches("cam", source, arrows()) != []


def test_the_check_itself_lets_right_arrows_pass():
    source = "from camtrain._errors import InputError\nfrom camtrain.cam import tap\nfrom . import watch\nimport torch"
    assert breaches("cam", source, arrows()) == []
    assert breaches("callbacks", "from camtrain.cam.tap import LayerTap", arrows()) == []


HEAVY = {"monai", "pytorch_lightning", "lightning", "torchmetrics", "wandb", "matplotlib"}


@pytest.mark.parametrize("room", ["cam", "losses", "anatomy"])
def test_the_mathematics_knows_no_framework(room):
    for path in (PACKAGE / room).rglob("*.py"):
        names = {name.split(".")[0] for name in imported(path.read_text(encoding="utf-8"), f"camtrain.{room}")}
        assert not names & HEAVY, path.name


@pytest.mark.parametrize("folder", ["recipes", "benchmarks"])
def test_recipes_and_benchmarks_use_public_names_only(folder):
    private = [
        f"{path.name}: {name}"
        for path in sorted((ROOT / folder).glob("*.py"))
        for name in imported(path.read_text(encoding="utf-8"), folder)
        if name.startswith("camtrain.")
        and any(part.startswith("_") and part != "__version__" for part in name.split("."))
    ]
    assert private == []
