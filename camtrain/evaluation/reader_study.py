"""The key of a reader study: what every task shows. It stays with whoever runs the study."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from camtrain._errors import InputError
from camtrain.reporting._files import replacing

Kind = Literal["discrimination", "trust"]
KINDS: tuple[Kind, ...] = ("discrimination", "trust")
MADE_BY = "camtrain study"
TRUST_ANSWERS = ("1", "2", "3", "4", "5")
"""1 = clearly left ... 3 = both alike ... 5 = clearly right."""


@dataclass(frozen=True)
class KeyTask:
    """What one task shows.

    Attributes:
        kind: `discrimination`: which finding does the map show? `trust`: which of two maps is more reasonable?
        case: Id of the case.
        unit: Patient, or the case where that is unknown: what is resampled.
        label: The finding whose map is shown: the right answer of a discrimination.
        sources: Model and method of the map; of a trust task, of the left and of the right one.
        choices: Answers that are offered.
        present: Findings of the case, of a discrimination.
        first: Source whose preference counts as positive, of a trust task.
        contest: What a trust task compares.
    """

    kind: Kind
    case: str
    unit: str
    label: str
    sources: tuple[str, ...]
    choices: tuple[str, ...]
    present: tuple[str, ...] = ()
    first: str = ""
    contest: str = ""

    @property
    def chance(self) -> float:
        """How often a guess among the choices is right."""
        return 1 / len(self.choices)

    @property
    def chance_present(self) -> float:
        """How often a guess among the present choices is right: what reading the scan without the map can reach."""
        return 1 / max(1, len(set(self.present) & set(self.choices)))


@dataclass(frozen=True)
class StudyKey:
    """All answers of a study.

    Attributes:
        study: Name of the study, made of the content of its page.
        tasks: Task id -> what it shows.
        settings: How it was made.
    """

    study: str
    tasks: Mapping[str, KeyTask]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def sources(self) -> list[str]:
        """Sources of the discrimination tasks, in the order in which they were asked for."""
        found = dict.fromkeys(s for t in self.tasks.values() if t.kind == "discrimination" for s in t.sources)
        order = {name: place for place, name in enumerate(self.settings.get("sources", []))}
        return sorted(found, key=lambda name: order.get(name, len(order)))


def key_text(key: StudyKey) -> str:
    """The key as JSON, with a checksum of its content.

    Example:
        >>> task = KeyTask("discrimination", "c1", "c1", "nodule", ("hirescam",), ("nodule", "effusion"), ("nodule",))
        >>> text = key_text(StudyKey("0123", {"t001": task}))
        >>> parse_key(text).tasks["t001"].chance
        0.5
    """
    content = {
        "made_by": MADE_BY,
        "format": 1,
        "study": key.study,
        "settings": dict(key.settings),
        "tasks": {name: dataclasses.asdict(task) for name, task in key.tasks.items()},
    }
    return json.dumps({**content, "checksum": _checksum(content)}, indent=1) + "\n"


def parse_key(text: str, name: str = "the key") -> StudyKey:
    """The key out of its JSON.

    Raises:
        InputError: Not a key, of another version, or changed after it was written.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InputError(f"{name} is no JSON: give the key.json that camtrain study make wrote") from error
    if not isinstance(content, dict) or content.get("made_by") != MADE_BY or content.get("format") != 1:
        raise InputError(f"{name} is not the key of a reader study: give the key.json that camtrain study make wrote")
    if content.pop("checksum", None) != _checksum(content):
        raise InputError(f"{name} was changed after it was written (its checksum differs): take the original key.json")
    tasks = {task: KeyTask(**{k: _frozen(v) for k, v in of.items()}) for task, of in content["tasks"].items()}
    return StudyKey(content["study"], tasks, content["settings"])


def save_key(key: StudyKey, path: Path) -> Path:
    """Write the key; the file is whole or not there."""
    with replacing(path) as temporary:
        temporary.write_text(key_text(key), encoding="utf-8")
    return path


def read_key(path: str | Path) -> StudyKey:
    """Read a key file.

    Raises:
        InputError: No such file, or not a key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"--key {path} cannot be read ({reason}): give the key.json of the study") from error
    return parse_key(text, str(path))


def _checksum(content: Mapping[str, Any]) -> str:
    plain = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(plain.encode(), digest_size=16).hexdigest()


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
