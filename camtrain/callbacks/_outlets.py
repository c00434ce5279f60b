"""Where one run's numbers and pictures go: its folder and its loggers, none of which can stop the training."""

from __future__ import annotations

import errno
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from camtrain._errors import InputError
from camtrain.callbacks._logger_guard import patience_with
from camtrain.callbacks._memory import out_of_memory
from camtrain.callbacks._nifti import NiftiMaps
from camtrain.callbacks._panel import PanelEntry
from camtrain.reporting import Patience, PatientSink, RunDir, Unwritten, file_failure, sinks_for, write_cases
from camtrain.reporting._logs import adding
from camtrain.reporting.alarm_log import NAME, readable_alarms, write_alarms
from camtrain.reporting.case_log import readable_cases
from camtrain.reporting.run_dir import readable_scores
from camtrain.reporting.wandb_sink import WandbSink

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE}


class Outlets:
    """The run's folder and one sink per logger.

    Args:
        run_dir: The folder.
        loggers: `trainer.loggers`.
        wandb_budget: Bytes per pass for W&B.

    Attributes:
        run_dir: The folder.
        files: What every write to it goes through.
        drawing: What the pictures of a pass go through, until they are written.
        scores: Takes rows of `scores.csv`.
        cases: Takes rows of `cases.csv`.
        alarms: Takes rows of `alarms.csv`.
        masked: Does anybody take the masks of pictures?
    """

    def __init__(self, run_dir: RunDir, loggers: Sequence[Any], wandb_budget: int) -> None:
        self.run_dir = run_dir
        meanwhile = "scores stay in memory until they can be written, and go to the loggers"
        self.files = Patience(f"writing to {run_dir.path}", meanwhile, _file_failure)
        self.drawing = Patience("drawing", "scores are complete", out_of_memory)
        # Pictures are what a full disk refuses first: the tables are tried all the same.
        tables = self.files.alike()
        path = run_dir.scores_path
        self.scores = Unwritten(adding(path, run_dir.write_scores, lambda: readable_scores(path)), tables)
        self.cases = Unwritten(
            adding(run_dir.cases_path, lambda rows: write_cases(run_dir, rows), lambda: readable_cases(run_dir)),
            tables,
        )
        folder = run_dir.path
        self.alarms = Unwritten(
            adding(folder / NAME, lambda rows: write_alarms(folder, rows), lambda: readable_alarms(folder)), tables
        )
        self._sinks = []
        sinks = sinks_for(loggers, run_dir, wandb_budget)
        self.masked = any(isinstance(sink, WandbSink) for sink in sinks)
        for sink in sinks:
            logger = getattr(sink, "logger", None)  # none: the folder
            self._sinks.append(PatientSink(sink, self.files if logger is None else patience_with(logger)))
        self._defined: set[str] = set()
        self._told: set[str] = set()

    def send(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Call a method of every sink that has it."""
        for sink in self._sinks:
            sink.send(name, *args, **kwargs)

    def close(self) -> None:
        """The run is over: what still waits for a logger's server gets a last chance."""
        self.send("close")

    def define(self, keys: Mapping[str, bool]) -> None:
        """Say of new keys whether they get a chart."""
        if fresh := {key: charted for key, charted in keys.items() if key not in self._defined}:
            self._defined |= set(fresh)
            self.send("define", fresh)

    def nifti(self, maps: NiftiMaps, entries: Mapping[str, Sequence[PanelEntry]], epoch: int) -> None:
        """Write maps of the chosen cases, and tell once of which the geometry is unknown, and which there are not."""

        def write() -> None:
            for split, listed in entries.items():
                missed = maps.write(self.run_dir.nifti_path(epoch, split), listed)
                why = "the batch has no affine of shape (B, 4, 4) for them, or they are not 3D"
                self._tell_once(missed, why)

        unmet = maps.unmet(entry for listed in entries.values() for entry in listed)
        why = "has no case of that id with a known label (in this process), or the panel was chosen before it was named"
        self._tell_once(unmet, f"nifti_cases= names them, but {' and '.join(entries)} {why}")
        self.files(write)

    def _tell_once(self, names: Sequence[str], why: str) -> None:
        if names and why not in self._told:
            self._told.add(why)
            warnings.warn(f"camtrain: no NIfTI map of {', '.join(names)}: {why}", stacklevel=4)


class Opening:
    """Makes the outlets of a run when they are first needed.

    A disk that is full or gone is told of once and tried again later; any other reason why there can be no folder is
    the user's to mend.
    """

    def __init__(self) -> None:
        self._patience = Patience("making the run folder", "scores go to the loggers only", _disk_failure)

    def __call__(self, root: str, run_id: str | None, loggers: Sequence[Any], wandb_budget: int) -> Outlets | None:
        """The outlets, or None.

        Raises:
            InputError: The folder cannot be made.
        """
        made: list[Outlets] = []
        self._patience(lambda: made.append(Outlets(RunDir(root, run_id), loggers, wandb_budget)))
        return made[0] if made else None


def bring_run(earlier: Path, root: Path, run_id: str) -> None:
    """Copy the folder of a run that is resumed under another log folder, so that scores and report go on in one place.

    A copy, because two runs may go on from one checkpoint. Where it fails, that is told, and the folder begins anew.

    Args:
        earlier: Log folder of the run up to here.
        root: That of the run from here on.
        run_id: Name of the folder.
    """
    old, new = earlier / "camtrain" / run_id, root / "camtrain" / run_id
    if new.exists() or not old.is_dir():
        return
    part = new.with_name(f".{run_id}.part")
    try:
        shutil.copytree(old, part, dirs_exist_ok=True)
        part.rename(new)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        warnings.warn(f"camtrain: the epochs up to here stay in {old}: copying them failed ({error})", stacklevel=2)


def _file_failure(error: Exception) -> bool:
    return file_failure(error) or out_of_memory(error)


def _disk_failure(error: Exception) -> bool:
    return isinstance(error, InputError) and getattr(error.__cause__, "errno", None) in _DISK
