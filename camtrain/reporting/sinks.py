"""Pictures and tables to every logger of a Trainer.

A logger is recognised by the name of its class, never by isinstance: `pytorch_lightning` and `lightning.pytorch` have
different classes of the same names, and no logger's package is imported here.
"""

from __future__ import annotations

import inspect
import shlex
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from camtrain._errors import InputError
from camtrain.reporting._files import distinct, file_stem
from camtrain.reporting.case_picture import CasePicture
from camtrain.reporting.run_dir import RunDir
from camtrain.reporting.score_table import rows_as_markdown
from camtrain.reporting.wandb_sink import BUDGET, WandbSink

Pixels = npt.NDArray[np.uint8]
LOSSLESS = 24


class Sink(Protocol):
    """A place for pictures and tables.

    A sink may also have `begin(pictures)` (a pass with so many is coming), `rows(key, columns, rows, step)` (add to a
    table that grows over the epochs), `define(keys)`, `summary(values)`, `about(facts, table)` and `flush(step)` (the
    pass is over); see `WandbSink`.
    """

    def images(
        self,
        key: str,
        pictures: Sequence[Pixels | CasePicture],
        captions: Sequence[str],
        step: int,
        epoch: int,
        names: Sequence[str] | None = None,
    ) -> None:
        """Take the pictures of one key.

        Args:
            key: Such as `val/attention/nodule`; the first part is the split.
            pictures: (H, W, 3) uint8 each, or composed with masks, which are shown where a logger can.
            captions: One line for each picture.
            step: Global step of the Trainer.
            epoch: Epoch of the Trainer.
            names: A short name for each picture that stays the same over the epochs; default: the captions.
        """

    def table(self, key: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], step: int) -> None:
        """Take a table.

        Args:
            key: Such as `val/scores`.
            columns: Column names.
            rows: Values, one per column.
            step: Global step of the Trainer.
        """


class FolderSink:
    """Writes into the run's folder; pictures of `val/...` to `epochs/<epoch>/`, of other splits one level below.

    PNG, or JPEG where a pass has more than `LOSSLESS` pictures: a PNG of a scan takes twenty times as long.

    Args:
        run_dir: The folder.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self._ending = "png"

    def begin(self, pictures: int) -> None:
        """A pass with so many pictures is coming."""
        self._ending = picture_ending(pictures)

    def images(  # noqa: D102
        self,
        key: str,
        pictures: Sequence[Pixels | CasePicture],
        captions: Sequence[str],
        step: int,
        epoch: int,
        names: Sequence[str] | None = None,
    ) -> None:
        split = key.split("/", 1)[0] if "/" in key else "val"
        for name, picture in zip(_names(key, pictures, captions, names), map(_pixels, pictures), strict=True):
            self.run_dir.save_named(picture, name, epoch=epoch, split=split, ending=self._ending)

    def table(self, key: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], step: int) -> None:  # noqa: D102
        self.run_dir.save_table(key, columns, rows)


def picture_ending(pictures: int) -> str:
    """Of a pass with so many: `png` or `jpg`."""
    return "png" if pictures <= LOSSLESS else "jpg"


@dataclass(frozen=True)
class TensorBoardSink:
    """Logs each picture under a tag of its own (TensorBoard has a slider per tag), tables as text."""

    logger: Any

    def images(  # noqa: D102
        self,
        key: str,
        pictures: Sequence[Pixels | CasePicture],
        captions: Sequence[str],
        step: int,
        epoch: int,
        names: Sequence[str] | None = None,
    ) -> None:
        for name, picture in zip(_names(key, pictures, captions, names), map(_pixels, pictures), strict=True):
            self.logger.experiment.add_image(f"{key}/{name}", picture, global_step=step, dataformats="HWC")

    def table(self, key: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], step: int) -> None:  # noqa: D102
        self.logger.experiment.add_text(key, rows_as_markdown(columns, rows), global_step=step)

    def rows(self, key: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], step: int) -> None:
        """The rows of this pass as text; the slider of the tag goes back to earlier ones."""
        self.table(key, columns, rows, step)


@dataclass(frozen=True)
class MLFlowSink:
    """Logs through MLflow's client, as far as the installed MLflow can take pictures."""

    logger: Any

    def images(  # noqa: D102
        self,
        key: str,
        pictures: Sequence[Pixels | CasePicture],
        captions: Sequence[str],
        step: int,
        epoch: int,
        names: Sequence[str] | None = None,
    ) -> None:
        log_image = self.logger.experiment.log_image
        by_step = "step" in inspect.signature(log_image).parameters
        for name, picture in zip(_names(key, pictures, captions, names), map(_pixels, pictures), strict=True):
            place: dict[str, Any] = {"artifact_file": f"{key}/{epoch:04d}/{name}.png"}
            if by_step:  # MLflow 2.11 and later: a series over the steps
                place = {"key": f"{key}/{name}", "step": step}
            log_image(self.logger.run_id, Image.fromarray(picture), **place)

    def table(self, key: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], step: int) -> None:  # noqa: D102
        if hasattr(self.logger.experiment, "log_text"):
            text = rows_as_markdown(columns, rows)
            self.logger.experiment.log_text(self.logger.run_id, text, f"{key}/step_{step}.md")


# Class name -> sink. None: the logger keeps scalars in files, its pictures are those of the run's folder.
_SINKS: dict[str, type[WandbSink] | type[TensorBoardSink] | type[MLFlowSink] | None] = {
    "WandbLogger": WandbSink,
    "TensorBoardLogger": TensorBoardSink,
    "MLFlowLogger": MLFlowSink,
    "CSVLogger": None,
    "DummyLogger": None,
}


def sinks_for(loggers: Iterable[Any], run_dir: RunDir | None, wandb_budget: int = BUDGET) -> list[Sink]:
    """One sink per logger that can take pictures, and one for the run's folder.

    A logger of another kind keeps its scalars, which Lightning sends by itself; a warning says once what it misses.

    Args:
        loggers: `trainer.loggers`, of either Lightning package; may be empty.
        run_dir: The run's folder; None (as under `fast_dev_run`) writes no files.
        wandb_budget: Bytes per pass that go to W&B.

    Returns:
        The sinks, the folder first.

    Example:
        >>> import tempfile
        >>> [type(s).__name__ for s in sinks_for([], RunDir(tempfile.mkdtemp()))]
        ['FolderSink']
    """
    sinks: list[Sink] = [FolderSink(run_dir)] if run_dir is not None else []
    unknown = []
    for logger in loggers:
        names = [cls.__name__ for cls in type(logger).__mro__]
        known = next((name for name in names if name in _SINKS), None)
        kind = _SINKS[known] if known else None
        if kind is MLFlowSink and not _takes_pictures(logger):
            known = kind = None
        if kind is WandbSink:
            sinks.append(WandbSink(logger, wandb_budget))
        elif kind is not None:
            sinks.append(kind(logger))
        elif known is None:
            unknown.append(names[0])
    if unknown:
        where = f"; they are in {run_dir.path}" if run_dir is not None else ""
        warnings.warn(
            f"{', '.join(dict.fromkeys(unknown))} gets scores but no pictures and no tables from camtrain{where}",
            stacklevel=2,
        )
    return sinks


def _takes_pictures(logger: Any) -> bool:
    try:
        return hasattr(logger.experiment, "log_image")
    except Exception:  # a server that is gone: the first picture will say so
        return True


def _pixels(picture: Pixels | CasePicture) -> Pixels:
    return picture.pixels if isinstance(picture, CasePicture) else picture


def describe_loggers(loggers: Iterable[Any]) -> list[str]:
    """Where a run's scalars and pictures lie, one line per logger, for the end of a fit.

    Args:
        loggers: `trainer.loggers`.

    Returns:
        Lines such as `W&B (offline): runs/wandb/offline-run-...; upload with: wandb sync runs/wandb/offline-run-...`.

    Example:
        >>> describe_loggers([])
        []
    """
    lines = []
    for logger in loggers:
        names = {cls.__name__ for cls in type(logger).__mro__}
        if "WandbLogger" in names:
            lines.append(_describe_wandb(logger.experiment))
        elif names & {"TensorBoardLogger", "CSVLogger"}:
            kind = "TensorBoard" if "TensorBoardLogger" in names else "CSV"
            look = shlex.join(["tensorboard", "--logdir", str(logger.log_dir)])
            how = f"; look with: {look}" if kind == "TensorBoard" else ""
            lines.append(f"{kind}: {logger.log_dir}{how}")
    return lines


def _describe_wandb(run: Any) -> str:
    # `run.dir` is the run's folder `files`; wandb sync takes the folder above it.
    folder = Path(str(run.dir)).parent
    if getattr(run, "offline", False):
        word = shlex.quote(str(folder))  # for a shell, as it stands
        return f"W&B (offline): {folder}; look with: wandb leet {word}; upload with: wandb sync {word}"
    return f"W&B: {getattr(run, 'url', None) or folder}"


def _names(
    key: str, pictures: Sequence[Pixels | CasePicture], captions: Sequence[str], names: Sequence[str] | None
) -> list[str]:
    chosen = list(captions if names is None else names)
    if len(chosen) != len(pictures) or len(captions) != len(pictures):
        raise InputError(
            f"{key}: expected a caption and a name for each of {len(pictures)} pictures, got {len(chosen)}"
        )
    return distinct(file_stem(name) for name in chosen)
