"""The page of a reader study: one HTML file that asks, keeps and hands over answers, without network or server."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camtrain._errors import InputError
from camtrain.reporting._files import replacing
from camtrain.reporting._pages import asset, environment, script_hash


@dataclass(frozen=True, kw_only=True)
class StudyTask:
    """One question, as a reader may see it.

    Attributes:
        id: Says nothing.
        kind: `discrimination` or `trust`.
        group: Tasks of one group show the same case; a reader sees them far apart.
        choices: Answers, in the order in which they are offered; of a trust task none: its scale is fixed.
        pictures: WebP files: the scan alone, then the map, or the left and the right one.
        finding: What a trust task is about.
    """

    id: str
    kind: str
    group: int
    choices: tuple[str, ...]
    pictures: tuple[bytes, ...]
    finding: str = ""


@dataclass(frozen=True)
class StudyPage:
    """All that the page holds.

    Attributes:
        tasks: In any order: each reader gets another.
        title: Heading. It should not tell what is compared.

    Raises:
        InputError: No tasks.

    Example:
        >>> task = StudyTask(id="t1", kind="discrimination", group=0, choices=("a", "b"), pictures=(b"", b""))
        >>> len(StudyPage([task]).study)
        12
    """

    tasks: Sequence[StudyTask]
    title: str = "Reader study"

    def __post_init__(self) -> None:
        if not self.tasks:
            raise InputError("a reader study needs at least one task, got none")

    @property
    def study(self) -> str:
        """A name made of the content: answers to another page do not fit the key of this one."""
        return hashlib.blake2b(json.dumps(self.content()).encode(), digest_size=6).hexdigest()

    def content(self) -> list[dict[str, Any]]:
        """The tasks as plain values, pictures as data URIs."""
        return [
            {
                "id": task.id,
                "kind": task.kind,
                "group": task.group,
                "choices": list(task.choices),
                "finding": task.finding,
                "pictures": [f"data:image/webp;base64,{base64.b64encode(p).decode()}" for p in task.pictures],
            }
            for task in self.tasks
        ]


def study_html(page: StudyPage) -> str:
    """The page as one string: no request leaves it, the same input gives the same bytes.

    Label names are data of the page's script, which writes them as text; the only script allowed is the page's own.

    Example:
        >>> task = StudyTask(id="t1", kind="discrimination", group=0, choices=("<b>", "c"), pictures=(b"", b""))
        >>> text = study_html(StudyPage([task]))
        >>> "<b>" in text, "http" in text.replace("http-equiv", "")
        (False, False)
    """
    script = asset("study.js")
    return (
        environment()
        .get_template("study.html.j2")
        .render(
            title=page.title,
            data={"study": page.study, "tasks": page.content()},
            kinds=[kind for kind in ("discrimination", "trust") if any(task.kind == kind for task in page.tasks)],
            total=len(page.tasks),
            style=asset("evaluation.css") + "\n" + asset("study.css"),
            script=script,
            digest=script_hash(script),
        )
    )


def write_study(page: StudyPage, path: Path) -> Path:
    """Write the page; the file is whole or not there."""
    text = study_html(page)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
