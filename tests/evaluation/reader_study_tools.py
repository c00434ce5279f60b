"""Small keys and answer files for the tests of the reader study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from camtrain.evaluation.reader_study import KeyTask, StudyKey

LABELS = ("nodule", "effusion", "mass, <b>left</b>", 'öd"em;')


def small_key(cases: int = 6) -> StudyKey:
    """Per case: one finding under two methods, and one trust task whose sides alternate."""
    tasks = {}
    for i in range(cases):
        label, other = LABELS[i % 4], LABELS[(i + 1) % 4]
        for method in ("hirescam", "gradcam"):
            tasks[f"{method[0]}{i}"] = KeyTask(
                *("discrimination", f"case{i}", f"patient{i // 2}", label, (method,), LABELS, (label, other))
            )
        sides = ("hirescam", "gradcam") if i % 2 else ("gradcam", "hirescam")
        tasks[f"t{i}"] = KeyTask(
            *("trust", f"case{i}", f"patient{i // 2}", label, sides, ("1", "2", "3", "4", "5")),
            first="hirescam",
            contest="hirescam against gradcam",
        )
    return StudyKey("abc123abc123", tasks, {"sources": ["hirescam", "gradcam"]})


def answer_file(
    path: Path,
    rows: Iterable[tuple[str, str, str]] | Mapping[str, str],
    reader: str = "ann",
    study: str = "abc123abc123",
) -> Path:
    """A CSV as the page writes it: (reader, task, answer), or {task: answer} of one reader."""
    if isinstance(rows, Mapping):
        rows = [(reader, task, answer) for task, answer in rows.items()]
    lines = ["reader,task,answer,seconds,study"]
    for row in rows:
        cells = ['"' + cell.replace('"', '""') + '"' for cell in row]
        lines.append(",".join([*cells, "2.5", study]))
    path.write_bytes(("\r\n".join(lines) + "\r\n").encode())
    return path
