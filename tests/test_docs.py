"""What the pages show exists, and no page is half written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_files(page):
    text = page.read_text(encoding="utf-8")
    assert "@@" not in text
    targets = [t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text)]
    missing = [t for t in targets if t and "://" not in t and not (page.parent / t).exists()]
    assert not missing


def test_every_method_has_a_section_and_a_picture():
    import camtrain as ct

    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for row in ct.methods():
        assert f"\n### {row.name}\n" in text
        assert f"](methods/{row.name}.jpg)" in text


@pytest.mark.parametrize("page", ["evaluate.md", "metrics.md", "report.md"])
def test_examples_run(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})  # noqa: S102 - our own pages


def test_every_measure_is_explained():
    from camtrain.evaluation import MEASURES

    text = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
    assert not [name for name in MEASURES if f"`{name}`" not in text]
