"""The folder of one run: a fixed layout, whole files only, and never another run's."""

from __future__ import annotations

import csv
import io
import json
import math
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from camtrain._errors import InputError
from camtrain.reporting._files import file_stem, replacing
from camtrain.reporting._logs import Ending, Log, finite, read_rows, readable_rows, rows_in
from camtrain.reporting._png import png

MEAN = "mean"  # stands in `scores.csv` where a label would


class Score(NamedTuple):
    """One row of `scores.csv`.

    Attributes:
        epoch: Epoch of the Trainer.
        step: Global step of the Trainer.
        split: `val`, `test`, or a split's own name.
        method: CAM method; empty for scores that need no map (AUROC).
        label: Label name; `mean` for the mean over labels.
        measure: Name of the score, such as `organ_iou`.
        value: Finite number.
    """

    epoch: int
    step: int
    split: str
    method: str
    label: str
    measure: str
    value: float


class RunDir:
    """`<root>/camtrain/<run id>/`, the place of everything that camtrain writes about one run.

    ```
    scores.csv                               one row per epoch, step, split, method, label, measure
    alarms.csv                               one row per alarm raised or cleared (`camtrain.reporting.alarm_log`)
    cases.csv                                one row per epoch, step, split, case, label, method of the panel
    run.json                                 what ran: labels, methods, layers, organ table, config, command
    panel.json                               which cases, labels, planes and scales the pictures show
    volumes/<case>.npz                       the panel's cases, written once; other splits in volumes/<split>/
    epochs/<epoch>/maps.npz                  their maps, on the layer's own grid
    epochs/<epoch>/<case>_<label>.png        pictures of the validation; other splits in epochs/<epoch>/<split>/;
                                             .jpg where a pass has more than 24
    epochs/<epoch>/overview.png              all pairs of the panel on one sheet; .jpg as above
    nifti/<epoch>/<case>_<label>_<method>.nii.gz   maps of `nifti_cases`; other splits in nifti/<epoch>/<split>/
    tables/<key>.csv                         tables sent to the loggers, newest state
    report.html                              the report, rewritten every epoch
    ```

    Files appear whole or not at all. A new run gets a new folder; a resumed run gives its id and goes on in its folder.
    Only one process of a run may write (rank zero).

    Args:
        root: The Trainer's log folder.
        run_id: Id of the run to go on with (it may not exist yet); None = a new, unused id.

    Raises:
        InputError: `run_id` is no plain folder name, or the folder cannot be made.

    Example:
        >>> import tempfile
        >>> root = tempfile.mkdtemp()
        >>> run = RunDir(root)
        >>> run.write_scores([Score(0, 10, "val", "hirescam", "nodule", "organ_iou", 0.25)])
        >>> [row.value for row in RunDir(root, run.id).read_scores()]
        [0.25]
    """

    def __init__(self, root: str | Path, run_id: str | None = None) -> None:
        parent = Path(root) / "camtrain"
        if run_id is not None and (not run_id or file_stem(run_id) != run_id):
            raise InputError(f"expected a run id of letters, digits, '-', '_' and '.', got {run_id!r}")
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self.path = _new_folder(parent) if run_id is None else parent / run_id
            self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the run folder under {parent}: {error.strerror or error}") from error
        self._endings: dict[Path, Ending] = {}

    @property
    def id(self) -> str:
        """The run's id: the name of its folder."""
        return self.path.name

    @property
    def scores_path(self) -> Path:
        """`scores.csv`."""
        return self.path / "scores.csv"

    @property
    def cases_path(self) -> Path:
        """`cases.csv`."""
        return self.path / "cases.csv"

    @property
    def panel_path(self) -> Path:
        """`panel.json`."""
        return self.path / "panel.json"

    @property
    def report_path(self) -> Path:
        """`report.html`."""
        return self.path / "report.html"

    @property
    def facts_path(self) -> Path:
        """`run.json`."""
        return self.path / "run.json"

    def volume_path(self, case: str, split: str = "val") -> Path:
        """File of one panel case's volume; it may not exist yet."""
        folder = self.path / "volumes"
        return (folder if split == "val" else folder / file_stem(split)) / f"{file_stem(case)}.npz"

    def maps_path(self, epoch: int, split: str = "val") -> Path:
        """File of one epoch's maps; it may not exist yet."""
        return self.epoch_path(epoch, split) / "maps.npz"

    def epoch_path(self, epoch: int, split: str = "val") -> Path:
        """Folder of one epoch's pictures; it may not exist yet."""
        folder = self.path / "epochs" / f"{epoch:04d}"
        return folder if split == "val" else folder / file_stem(split)

    def nifti_path(self, epoch: int, split: str = "val") -> Path:
        """Folder of one epoch's NIfTI maps; it may not exist yet."""
        folder = self.path / "nifti" / f"{epoch:04d}"
        return folder if split == "val" else folder / file_stem(split)

    def write_scores(self, rows: Iterable[Score]) -> None:
        """Add rows to `scores.csv`; a row of the same epoch, step, split, method, label and measure is replaced.

        Undefined values (NaN, infinite) are left out.

        Args:
            rows: Scores of any epoch and split.
        """
        fresh: dict[tuple[Any, ...], Score | None] = {}
        for row in rows:
            score = Score(int(row[0]), int(row[1]), row[2], row[3], row[4], row[5], float(row[6]))
            fresh.pop(score[:-1], None)
            fresh[score[:-1]] = score if math.isfinite(score.value) else None
        self.add_csv(self.scores_path, Score._fields, fresh, lambda: {row[:-1]: row for row in self.read_scores()})

    def read_scores(self) -> list[Score]:
        """All rows of `scores.csv`, in the order of writing; empty before the first epoch.

        Raises:
            InputError: The file was changed into something else.
        """
        return read_score_rows(self.scores_path)

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        """Replace `run.json`.

        Args:
            facts: What ran; plain Python values.
        """
        with replacing(self.facts_path) as temporary:
            text = json.dumps(facts, indent=1, ensure_ascii=False)
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")

    def write_panel(self, panel: Mapping[str, Any]) -> None:
        """Replace `panel.json`.

        Args:
            panel: What the pictures show; plain Python values.
        """
        with replacing(self.panel_path) as temporary:
            temporary.write_text(json.dumps(panel, indent=1, sort_keys=True), encoding="utf-8")

    def read_panel(self) -> dict[str, Any] | None:
        """What `panel.json` says; None before it was written.

        Raises:
            InputError: The file is no JSON.
        """
        if not self.panel_path.exists():
            return None
        try:
            panel: dict[str, Any] = json.loads(self.panel_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{self.panel_path}: not readable as JSON ({error}); delete it to choose anew") from error
        return panel

    def save_picture(
        self, picture: npt.NDArray[np.uint8], *, epoch: int, case: str, label: str, split: str = "val"
    ) -> Path:
        """Write `epochs/<epoch>/<case>_<label>.png`.

        Args:
            picture: (H, W, 3).
            epoch: Epoch of the Trainer.
            case: Case name, any text.
            label: Label name, any text.
            split: Splits other than `val` get a folder of their own.

        Returns:
            The file.
        """
        return self.save_named(picture, f"{file_stem(case)}_{file_stem(label)}", epoch=epoch, split=split)

    def save_named(
        self, picture: npt.NDArray[np.uint8], name: str, *, epoch: int, split: str = "val", ending: str = "png"
    ) -> Path:
        """Write one picture of an epoch under a name of the caller's choice, as `png` or `jpg`."""
        path = self.epoch_path(epoch, split) / f"{file_stem(name, limit=200)}.{ending}"
        with replacing(path) as temporary:
            if ending == "png":
                temporary.write_bytes(png(picture))
            else:
                Image.fromarray(picture).save(temporary, quality=90, subsampling=0)
        return path

    def save_table(self, key: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
        """Write `tables/<key>.csv`, in place of an older one.

        Returns:
            The file.
        """
        path = self.path / "tables" / f"{file_stem(key.replace('/', '_'))}.csv"
        self.write_csv(path, columns, rows)
        return path

    def add_csv(
        self,
        path: Path,
        columns: Sequence[str],
        fresh: Mapping[tuple[Any, ...], Sequence[Any] | None],
        before: Callable[[], dict[tuple[Any, ...], Sequence[Any]]],
    ) -> None:
        """Add rows to a CSV file; they take the place of those with their keys.

        Args:
            path: The file.
            columns: Its header.
            fresh: Key -> row, or None for one that is dropped; keys begin with epoch and step.
            before: Reads key -> row of what is in the file; not asked where all that is fresh comes behind it.
        """
        ending = self._endings.setdefault(path, Ending())
        if ending.is_before(path, (key[:2] for key in fresh)):
            with replacing(path) as temporary:
                shutil.copyfile(path, temporary)
                with temporary.open("a", encoding="utf-8", newline="") as file:
                    csv.writer(file, lineterminator="\n").writerows(row for row in fresh.values() if row is not None)
            ending.note(path, (key[:2] for key in fresh))
            return
        merged = before()
        for key, row in fresh.items():
            merged.pop(key, None)
            if row is not None:
                merged[key] = row
        self.write_csv(path, columns, merged.values())
        ending.note(path, (key[:2] for key in merged))

    @staticmethod
    def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Replace a CSV file as a whole."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
        with replacing(path) as temporary:
            temporary.write_text(text.getvalue(), encoding="utf-8", newline="")


def read_score_rows(path: Path) -> list[Score]:
    """All rows of a `scores.csv`, in the order of writing; empty where there is no file.

    Raises:
        InputError: The file was changed into something else.
    """
    return read_rows(path, _LOG, _row)


def readable_scores(path: Path) -> tuple[list[Score], list[str]]:
    """The rows of a `scores.csv` that can be read, and what is wrong with the others."""
    return readable_rows(path, _LOG, _row)


def scores_in(lines: Iterable[str]) -> tuple[list[Score], list[str]]:
    """As `readable_scores`, of the lines of such a file."""
    return rows_in(lines, _LOG, _row)


_LOG = Log(Score._fields, "scores")


def _row(c: list[str]) -> Score:
    return Score(int(c[0]), int(c[1]), c[2], c[3], c[4], c[5], finite(c[6]))


def _new_folder(parent: Path) -> Path:
    """A folder that did not exist: time for the reader, chance against another job that starts in the same second."""
    while True:
        folder = parent / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
