"""`alarms.csv` of a run folder, and alerts to loggers that have them."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from camtrain.reporting._files import replacing
from camtrain.reporting._logs import Log, read_rows, readable_rows

NAME = "alarms.csv"


class AlarmEvent(NamedTuple):
    """One row of `alarms.csv`.

    Attributes:
        epoch: Epoch of the Trainer.
        split: `val`, or a further validation loader's name.
        alarm: Name of the alarm, such as `reliance`.
        label: Label name; `all` for what concerns all labels together.
        value: The number that was compared, finite.
        threshold: With what.
        state: `raised` or `cleared`.
        sentence: What it says, what it means, what to try.
    """

    epoch: int
    split: str
    alarm: str
    label: str
    value: float
    threshold: float
    state: str
    sentence: str


def write_alarms(folder: Path, events: Iterable[AlarmEvent]) -> Path:
    """Add events to `alarms.csv`; one of the same epoch, split, alarm and label is replaced.

    The file is written even when there are none, so that its absence tells "not watched" from "nothing to tell".

    Args:
        folder: The run folder.
        events: Events of any epoch.

    Returns:
        The file.

    Raises:
        InputError: The file was changed into something else.
    """
    merged = {event[:4]: event for event in read_rows(folder / NAME, _LOG, _event)}
    for event in events:
        merged.pop(event[:4], None)
        merged[event[:4]] = event
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(AlarmEvent._fields)
    writer.writerows(merged.values())
    with replacing(folder / NAME) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8", newline="")
    return folder / NAME


def read_alarms(folder: Path) -> list[AlarmEvent]:
    """All events of a run folder, in the order of writing; a file of another form is passed over with a warning.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = write_alarms(folder, [AlarmEvent(3, "val", "reliance", "nodule", 0.8, 0.5, "raised", "A shortcut.")])
        >>> [(event.label, event.value) for event in read_alarms(folder)]
        [('nodule', 0.8)]
    """
    events, faults = readable_alarms(folder)
    if not faults:
        return events
    warnings.warn(
        f"{folder / NAME} is not a file of alarms and is passed over: {faults[0].lstrip(':, ')}", stacklevel=2
    )
    return []


def readable_alarms(folder: Path) -> tuple[list[AlarmEvent], list[str]]:
    """The events of a run folder that can be read, and what is wrong with the other lines."""
    return readable_rows(folder / NAME, _LOG, _event)


_LOG = Log(AlarmEvent._fields, "alarms")


def _event(r: list[str]) -> AlarmEvent:
    return AlarmEvent(int(r[0]), r[1], r[2], r[3], float(r[4]), float(r[5]), r[6], r[7])


def alert(loggers: Iterable[Any], title: str, text: str) -> None:
    """Send a message through Weights & Biases, where a run is online; other loggers have nothing like it.

    A service that does not answer is told once as a warning, and stops nothing.

    Args:
        loggers: `trainer.loggers`, recognised by the name of their class.
        title: A few words.
        text: A sentence or two.
    """
    for logger in loggers:
        if "WandbLogger" not in {cls.__name__ for cls in type(logger).__mro__}:
            continue
        try:
            run = logger.experiment
            if not getattr(run, "offline", True) and not getattr(run, "disabled", False):
                run.alert(title=title, text=text, level="WARN")
        except Exception as error:  # whatever a network client throws must not end a training
            warnings.warn(f"W&B took no alert ({type(error).__name__}: {error})", stacklevel=2)
