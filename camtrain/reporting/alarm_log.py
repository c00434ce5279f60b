"""`alarms.csv` of a run folder, and alerts to loggers that have them."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from camtrain.reporting._files import replacing

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
    """
    merged = {event[:4]: event for event in read_alarms(folder)}
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
    path = folder / NAME
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        try:
            if header != list(AlarmEvent._fields):
                raise ValueError(f"its columns are {header}")
            return [AlarmEvent(int(r[0]), r[1], r[2], r[3], float(r[4]), float(r[5]), r[6], r[7]) for r in reader if r]
        except (ValueError, IndexError) as error:
            warnings.warn(f"{path} is not a file of alarms ({error}) and is passed over", stacklevel=2)
            return []


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
