"""Scripted readers of a study's page: one answers by a rule from the pictures alone, one guesses.

Not a recipe. The rule: a map shows the finding of the most similar map of a practice study, whose key the reader has
seen; of two maps the one with more of its warm colour well inside the body is the more reasonable.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
from _browser import Browser, find_browser
from PIL import Image
from scipy import ndimage

Task = dict[str, Any]
SCALE = ["1", "2", "3", "4", "5"]
SHOWN = (
    "return at('ask').hidden ? null : (({id, kind, choices}) => ({id, kind, choices}))(byId.get(order[state.place]))"
)


def read_page(path: Path) -> list[Task]:
    """The tasks as the page holds them, pictures decoded to (H, W, 3)."""
    text = path.read_text(encoding="utf-8")
    tasks: list[Task] = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])["tasks"]
    for task in tasks:
        files = [io.BytesIO(base64.b64decode(address.split(",")[1])) for address in task["pictures"]]
        task["pictures"] = [np.asarray(Image.open(file).convert("RGB"), dtype=float) for file in files]
    return tasks


def warmth(picture: np.ndarray) -> np.ndarray:
    """How much more red than blue: evidence for the finding."""
    return (picture[..., 0] - picture[..., 2]).clip(0)


def thumb(picture: np.ndarray) -> np.ndarray:
    """Where the warm colour lies, coarsely, with length 1."""
    pale = Image.fromarray(warmth(picture).astype(np.uint8))
    small = np.asarray(pale.resize((60, 20), Image.Resampling.BOX), dtype=float)
    return small.ravel() / max(1e-9, np.linalg.norm(small))


def well_inside(task: Task, side: int) -> float:
    """Share of a map's warm colour that lies at least 10 pixels inside the body."""
    body = ndimage.binary_fill_holes(task["pictures"][0].mean(axis=2) > 50)
    warm = warmth(task["pictures"][side])
    return float(warm[ndimage.binary_erosion(body, iterations=10)].sum() / max(1e-9, warm.sum()))


def by_rule(tasks: list[Task], practice: list[Task], practice_key: dict[str, Any]) -> dict[str, str]:
    """Task id -> answer of the rule reader."""
    labels = {name: task["label"] for name, task in practice_key["tasks"].items()}
    known = [(labels[t["id"]], thumb(t["pictures"][1])) for t in practice if t["kind"] == "discrimination"]
    said = {}
    for task in tasks:
        if task["kind"] == "trust":
            more = well_inside(task, 2) - well_inside(task, 1)  # above 0: the right one
            said[task["id"]] = str(3 + int(np.sign(more)) * (int(abs(more) > 0.05) + int(abs(more) > 0.2)))
        else:
            seen = thumb(task["pictures"][1])
            offered = [(float(seen @ other), label) for label, other in known if label in task["choices"]]
            said[task["id"]] = max(offered)[1] if offered else task["choices"][0]
    return said


def by_chance(tasks: list[Task], seed: int) -> dict[str, str]:
    """Task id -> answer of a guesser."""
    rng = np.random.default_rng([seed, 7])
    return {task["id"]: str(rng.choice(task["choices"] or SCALE)) for task in tasks}


def answer(page: Path, study: str, reader: str, said: dict[str, str]) -> Path:
    """Give the answers on the page by keyboard, and save the file; without a browser write it as the page would."""
    path = page.parent / f"answers_{study}_{reader}.csv"
    path.unlink(missing_ok=True)
    if find_browser() is None:
        rows = [[reader, task, text, "", study] for task, text in said.items()]
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["reader", "task", "answer", "seconds", "study"], *rows])
        return path
    with Browser(page.parent) as browser:
        browser.open(page.resolve().as_uri())
        browser.press("Tab", *reader, "Enter")
        while task := browser.run(SHOWN):
            browser.press(str((task["choices"] or SCALE).index(said[task["id"]]) + 1))
            picture = page.parent / f"{task['kind']}.png"
            if not picture.exists():
                browser.screenshot(picture)
            browser.press("Enter")
        browser.click("#save")
        for _ in range(100):
            if path.exists():
                return path
            time.sleep(0.1)
    raise RuntimeError(f"the page {page} saved no file")
