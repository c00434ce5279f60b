"""Everything about W&B: pictures with layers, growing tables, charts, summary, config; within a budget of bytes.

What belongs to one pass goes in one `log` call, its tables in another, under the Trainer's step as the field
`trainer/global_step`, which is Lightning's x axis. W&B's own step is left alone: nothing of the user's is dropped for
coming "too late".

Scores and pictures go to W&B's process, which keeps them on the disk and sends them when it can. Tables and artifacts
of an online run are different: the client first asks the server about them, and waits 19 seconds where nobody answers.
So they go from a thread of their own; what comes while it waits, or after it failed, goes with the next table.
"""

from __future__ import annotations

import io
import json
import logging
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from camtrain.reporting._files import file_stem
from camtrain.reporting._png import png
from camtrain.reporting.background import Background
from camtrain.reporting.case_picture import CasePicture
from camtrain.reporting.panels import same_size
from camtrain.reporting.patience import SLOW, Patience

Pixels = npt.NDArray[np.uint8]
_Rows = tuple[list[str], list[list[Any]]]
_log = logging.getLogger(__name__)
BUDGET = 8_000_000  # bytes per pass
END = 30.0  # seconds that tables which still wait get when training is over
_STEP = "trainer/global_step"
_PART = 160  # bytes; a file system takes 255, and W&B puts step, checksum and ending behind it
# Quality and chroma subsampling of the JPEGs: as they should be, and where the budget is tight.
_GOOD: dict[str, int] = {"quality": 90, "subsampling": 0}
_TIGHT: dict[str, int] = {"quality": 60, "subsampling": 2}


@dataclass(frozen=True)
class _Shown:
    """One picture on its way, as the bytes that will be stored."""

    key: str
    picture: CasePicture
    caption: str
    jpeg: bytes
    masks: dict[str, bytes]

    @property
    def bytes(self) -> int:
        """What it takes, its masks included."""
        return len(self.jpeg) + sum(len(mask) for mask in self.masks.values())


@dataclass
class _Waiting:
    """What W&B's server is asked about: tables by key as (columns, rows), rows of tables that grow, artifacts."""

    tables: dict[str, _Rows] = field(default_factory=dict)
    rows: dict[str, _Rows] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Is there nothing?"""
        return not (self.tables or self.rows or self.artifacts)

    def take(self, newer: _Waiting) -> None:
        """Add what came later: a table takes the place of an older one, rows come behind."""
        self.tables |= newer.tables
        for key, (columns, rows) in newer.rows.items():
            self.rows.setdefault(key, (columns, []))[1].extend(rows)
        self.artifacts += newer.artifacts


class WandbSink:
    """Collects what a pass brings and sends it with `flush`.

    Args:
        logger: Lightning's `WandbLogger`.
        budget: Bytes of pictures, masks and case rows per pass. Beyond it pictures become coarser, then fewer, which is
            told once. 0 sends nothing about single cases: no picture, no row.
    """

    def __init__(self, logger: Any, budget: int = BUDGET) -> None:
        self.logger, self.budget = logger, budget
        self._shown: list[_Shown] = []
        self._rows_bytes = 0
        self._new = _Waiting()
        self._held = _Waiting()  # the thread's, while it is busy
        self._growing: dict[str, Any] = {}
        self._background = Background("camtrain: tables for W&B")
        later = "tables wait in memory, scores and pictures go on to W&B's files, and all is in the run folder"
        self._server = Patience("asking W&B's server", later, slow=SLOW)
        self._step = 0
        self._classed: set[tuple[str, str]] = set()
        self._told = False

    def images(
        self,
        key: str,
        pictures: Sequence[Pixels | CasePicture],
        captions: Sequence[str],
        step: int,
        epoch: int,
        names: Sequence[str] | None = None,
    ) -> None:
        """Keep pictures for `flush`; see `Sink`."""
        if not self.budget:
            return
        key = _path_safe(key)
        for picture, caption in zip(_same_size(pictures), captions, strict=True):
            masks = {name: png(mask, zlib.Z_RLE) for name, mask in picture.masks.items()}
            self._shown.append(_Shown(key, picture, caption, _encoded(picture.pixels, "JPEG", **_GOOD), masks))

    def table(self, key: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], step: int) -> None:
        """Keep a table for `flush`; it takes the place of an older one."""
        self._new.tables[_path_safe(key)] = (list(columns), [list(row) for row in rows])

    def rows(self, key: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], step: int) -> None:
        """Add rows to a table that grows over the epochs; each epoch sends its own rows only."""
        if not self.budget:
            return
        kept = self._new.rows.setdefault(key, (list(columns), []))[1]
        for row in rows:
            kept.append(list(row))
            self._rows_bytes += len(json.dumps(kept[-1])) + 2

    def define(self, keys: Mapping[str, bool]) -> None:
        """Say how scores are charted, before they are first logged.

        Args:
            keys: Key -> does it get a chart of its own? All are logged and can be put into any chart.
        """
        run = self.logger.experiment
        for key, charted in keys.items():
            run.define_metric(self._named(key), step_metric=_STEP, step_sync=True, hidden=not charted)

    def summary(self, values: Mapping[str, float | int]) -> None:
        """Set fields of the run's summary, such as `best/val/auroc`."""
        self.logger.experiment.summary.update({self._named(key): value for key, value in values.items()})

    def about(
        self,
        facts: Mapping[str, Any],
        table: Mapping[str, Any] | None,
        run: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        """The run's config entry `camtrain`, and the artifact `camtrain-<run id>` with config and organ table.

        Args:
            facts: What camtrain was asked for; plain values.
            table: The organ table as plain values.
            run: Gives all that is known of the run, for the artifact.
        """
        import wandb

        whole, experiment = run(), self.logger.experiment
        name = str(facts.get("name") or "")
        entry = "camtrain" if not name else f"camtrain_{name}"
        experiment.config.update({entry: dict(facts)}, allow_val_change=True)
        artifact = wandb.Artifact(
            file_stem("-".join(p for p in ("camtrain", name, str(experiment.id)) if p)),
            type="camtrain",
            metadata=dict(facts),
        )
        for file, content in (("camtrain.json", {**facts, **whole}), ("organ_table.json", table)):
            if content is not None:
                with artifact.new_file(file, mode="w", encoding="utf-8") as handle:
                    json.dump(content, handle, indent=1)
        self._new.artifacts.append(artifact)
        self._ask()

    def flush(self, step: int) -> None:
        """Send what has come together: the pictures, then the tables, each in one entry of the run's history."""
        shown, self._shown = self._shown, []
        spent, self._rows_bytes = self._rows_bytes, 0
        if shown:
            self._send_pictures(self._within(shown, self.budget - spent), step)
        self._step = step
        self._ask()

    def close(self) -> None:
        """Give what still waits a last chance, for `END` seconds at most; what is left stays in the run's folder."""
        until = time.monotonic() + END
        if self._background.busy:
            _log.info("camtrain: waiting up to %.0f s for W&B's server to take the last tables", END)
        if self._background.wait(END):
            self._server.forget()
            self._ask()
            self._background.wait(max(0.0, until - time.monotonic()))

    def _ask(self) -> None:
        """Send tables and artifacts, unless the last ones are still under way."""
        if self._background.busy:
            return
        self._held.take(self._new)
        self._new = _Waiting()
        if self._held.empty:
            return
        run = self.logger.experiment
        if run.offline or run.disabled:
            self._send_held(run, self._step)
        else:
            self._background.start(partial(self._server, self._send_held, run, self._step))

    def _send_pictures(self, shown: Sequence[_Shown], step: int) -> None:
        import wandb

        fields: dict[str, list[Any]] = {}
        # W&B copies files into the run's folder as it logs them.
        with tempfile.TemporaryDirectory(prefix="camtrain-") as folder:
            for number, one in enumerate(shown):
                path = Path(folder) / f"{number}.jpg"
                path.write_bytes(one.jpeg)
                masks = {name: self._mask(one, name, path) for name in one.masks}
                fields.setdefault(one.key, []).append(wandb.Image(str(path), caption=one.caption, masks=masks or None))
            if fields:
                self.logger.log_metrics(fields, step=step)

    def _send_held(self, run: Any, step: int) -> None:
        import wandb

        held = self._held
        for key, (columns, rows) in held.rows.items():
            self._grow(run, key, columns, rows)
            rows.clear()
        tables = {key: wandb.Table(columns=columns, data=rows) for key, (columns, rows) in held.tables.items()}
        tables |= {key: self._growing[key] for key in held.rows}
        if tables:
            # Not by log_metrics of the logger: scores go through it, and what guards them must not wait for a server.
            run.log({**{self._named(key): table for key, table in tables.items()}, _STEP: step})
        held.tables, held.rows = {}, {}
        while held.artifacts:
            run.log_artifact(held.artifacts[0])
            del held.artifacts[0]

    def _grow(self, run: Any, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import wandb

        if key not in self._growing:
            table = self._growing[key] = wandb.Table(columns=list(columns), log_mode="INCREMENTAL")
            # W&B 0.31 calls the first part of a new run's table "None", and then cannot read the parts in order.
            if not run.resumed and getattr(table, "_increment_num", 0) is None:
                table._increment_num = 0
        for row in rows:
            self._growing[key].add_data(*row)

    def _mask(self, one: _Shown, name: str, picture: Path) -> dict[str, Any]:
        """A mask as W&B takes it. Each time it is told what the classes mean, it writes its whole config anew."""
        if (one.key, name) not in self._classed:
            self._classed.add((one.key, name))
            return {"mask_data": one.picture.masks[name], "class_labels": CasePicture.classes_of(name)}
        path = picture.with_name(f"{picture.stem}-{file_stem(name)}.mask.png")
        path.write_bytes(one.masks[name])
        return {"path": str(path)}

    def _named(self, key: str) -> str:
        """The key as Lightning sends it: a logger may have a prefix."""
        prefix = getattr(self.logger, "_prefix", "")
        return f"{prefix}{self.logger.LOGGER_JOIN_CHAR}{key}" if prefix else key

    def _within(self, shown: Sequence[_Shown], budget: int) -> list[_Shown]:
        """As many pictures as the budget allows, coarser ones where that is not all; every key keeps its first ones."""
        if sum(one.bytes for one in shown) <= budget:
            return list(shown)
        coarse = [replace(one, jpeg=_encoded(one.picture.pixels, "JPEG", **_TIGHT)) for one in shown]
        places: dict[str, int] = {}
        ranked = []
        for one in coarse:
            places[one.key] = places.get(one.key, -1) + 1
            ranked.append((places[one.key], one))
        kept, left = [], budget
        for _, one in sorted(ranked, key=lambda item: item[0]):
            if (size := one.bytes) <= left:
                left -= size
                kept.append(one)
        if not self._told:
            self._told = True
            warnings.warn(
                f"camtrain: {len(shown)} pictures are more than the {self.budget / 1e6:g} MB that W&B gets per pass: "
                f"{len(kept)} of them go there, with less detail; the run folder has all. More with wandb_budget_mb=",
                stacklevel=2,
            )
        return kept


def _encoded(pixels: Pixels, kind: str, **how: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind, **how)
    return file.getvalue()


def _path_safe(key: str) -> str:
    """W&B makes file names of keys: a label called `..` must not lead out of the run's folder, nor one be too long.

    Example:
        >>> _path_safe("val/attention/../../x")
        'val/attention/__/__/x'
        >>> len(_path_safe("val/" + "a" * 1000))
        164
    """
    return "/".join("_" * len(part) if part.strip(".") == "" else _short(part) for part in key.split("/"))


def _short(part: str) -> str:
    """At most `_PART` bytes; different parts stay different. The caption has the whole name."""
    encoded = part.encode(errors="replace")
    if len(encoded) <= _PART:
        return part
    return f"{encoded[: _PART - 9].decode(errors='ignore')}-{zlib.crc32(encoded):08x}"


def _same_size(pictures: Sequence[Pixels | CasePicture]) -> list[CasePicture]:
    """W&B shows a list of pictures, and the masks over them, properly only when all have one size."""
    made = [p if isinstance(p, CasePicture) else CasePicture(p) for p in pictures]
    if len({p.pixels.shape for p in made}) < 2:
        return made
    padded = same_size([p.pixels for p in made])
    return [
        CasePicture(pixels, {name: _centred(mask, pixels.shape[:2]) for name, mask in p.masks.items()}, p.tile)
        for p, pixels in zip(made, padded, strict=True)
    ]


def _centred(mask: Pixels, size: tuple[int, ...]) -> Pixels:
    page = np.zeros(size, np.uint8)
    top, left = (size[0] - mask.shape[0]) // 2, (size[1] - mask.shape[1]) // 2
    page[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    return page
