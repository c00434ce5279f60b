"""Every command that a page shows is one that the recipe, or `camtrain`, takes."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
RECIPE = re.compile(r"\$?\(?(?:BIN\)/)?python (?P<script>(?:recipes|benchmarks)/\w+\.py)(?P<words>[^`\n&]*)")
COMMAND = re.compile(
    r"^`?camtrain (?P<name>evaluate|explain|study make|study analyse|import scans|import rad_chestct|import voc) "
    r"(?P<words>[^`\n]*)",
    re.MULTILINE,
)


class Parsed(Exception):  # noqa: N818 - no fault
    """All words were taken."""


def shown(pattern, pages):
    found = set()
    for page in pages:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for match in pattern.finditer(text):
            first, words = match.groups()
            found.add((first, words.split("#")[0].split(" && ")[0].strip().rstrip(".),")))
    return sorted(found)


@pytest.mark.parametrize(("script", "words"), shown(RECIPE, [*PAGES, ROOT / "Makefile"]))
def test_recipes_take_what_pages_show(script, words, monkeypatch, tmp_path):
    (tmp_path / "runs" / "relevance_cam" / "models").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, *arguments, **options):
        parse(self, *arguments, **options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [script, *shlex.split(words)])
    spec = importlib.util.spec_from_file_location(f"shown_{Path(script).stem}", ROOT / script)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    with pytest.raises(Parsed):
        recipe.main()


@pytest.mark.parametrize(("name", "words"), shown(COMMAND, PAGES))
def test_camtrain_takes_what_pages_show(name, words):
    from camtrain.cli import evaluate, explain, import_data, study

    parser = {
        "evaluate": evaluate._parser,
        "explain": explain._parser,
        "study make": study._make_parser,
        "study analyse": study._analyse_parser,
        "import scans": import_data._scans_parser,
        "import rad_chestct": import_data._rad_parser,
        "import voc": import_data._voc_parser,
    }[name]()
    for action in parser._actions:
        action.required = False  # a page may show one option alone
    parser.parse_args(shlex.split(re.sub(r"[\[\]]", " ", words)))
