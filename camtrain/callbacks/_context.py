"""What both callbacks read from a run: batch words, organ table, label names, allowed cells."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from camtrain._batch import Adapter, Batch, read_batch
from camtrain._errors import InputError
from camtrain.anatomy import OrganTable, spacing_of

# What was already said in a run; both callbacks of one Trainer share it.
_told: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def tell_once(trainer: Any, message: str) -> None:
    """Log a message on rank zero, once per Trainer."""
    seen = _told.setdefault(trainer, set())
    if message not in seen:
        seen.add(message)
        rank_zero_info(message)


class RunContext:
    """The arguments that both callbacks share, resolved against a Trainer.

    Args:
        table: Organ table, its source, or None for `trainer.datamodule.table`.
        keys: Contract word -> key of the user's batch.
        adapter: Makes a dict with the contract's words of the user's batch.
        names: Label names in the order of the outputs.
        mode: How regions come down to the map's grid (see `OrganTable.allowed`).
    """

    def __init__(
        self,
        table: OrganTable | str | Path | Mapping[str, Any] | None,
        keys: Mapping[str, str] | None,
        adapter: Adapter | None,
        names: Sequence[str] | None,
        mode: str,
    ) -> None:
        self.keys = dict(keys) if keys else None
        self.adapter = adapter
        self.mode = mode
        self._given_names = None if names is None else [str(name) for name in names]
        self._given_table = table
        self._loaded: OrganTable | None = None
        self._selected: OrganTable | None = None
        self.names: list[str] | None = None
        self._told_one_cell = False

    def setup(self, trainer: Any) -> None:
        """Find the table; forget what another run resolved.

        Raises:
            InputError: There is no such table, or it is wrong.
        """
        given = self._given_table
        if given is None:
            given = getattr(getattr(trainer, "datamodule", None), "table", None)
        self._loaded = None if given is None else OrganTable.load(given)
        self._selected, self.names = None, None

    @property
    def has_table(self) -> bool:
        """Is there any anatomy to compare with?"""
        return self._loaded is not None

    @property
    def outputs(self) -> int | None:
        """The number of outputs, once the labels are resolved."""
        return None if self.names is None else len(self.names)

    @property
    def selected(self) -> OrganTable:
        """The table of the labels that `resolve` found."""
        if self._selected is None:
            raise InputError("there is no organ table: pass table=, or use a data module that has one")
        return self._selected

    def read(self, batch: Any, outputs: int | None) -> Batch:
        """The user's batch in camtrain's words."""
        return read_batch(batch, self.keys, self.adapter, outputs)

    def ahead(self, batch: Any, batch_idx: int) -> tuple[Tensor | None, list[str]]:
        """Labels and names of a batch before the user's step has had it; None where labels cannot be told yet.

        What is wrong with them is said when the batch is read behind the step, which may repair labels; an adapter is
        called there alone.
        """
        if self.adapter is not None or not isinstance(batch, Mapping):
            return None, []
        keys = {word: (self.keys or {}).get(word, word) for word in ("label", "id")}
        try:
            words = read_batch({word: batch[key] for word, key in keys.items() if key in batch}, outputs=self.outputs)
        except (TypeError, ValueError, RuntimeError):  # an InputError is a ValueError
            return None, []
        return words.label, words.names(batch_idx)

    def labelled(self, batch: Any, outputs: int, who: str) -> tuple[Batch, Tensor]:
        """The same, and its labels (B, L).

        Raises:
            InputError: It has none, which `who` cannot do without.
        """
        words = self.read(batch, outputs)
        if words.label is None:
            raise InputError(
                f"{who} needs labels, but the batch has no key 'label': name yours with keys={{'label': ...}}"
            )
        return words, words.label

    def segmented(self, words: Batch) -> Tensor:
        """(B,) bool: cases whose maps are scored; without a table all are."""
        return words.has_organs if self.has_table else torch.ones_like(words.has_organs)

    def image(self, batch: Any) -> Tensor | None:
        """The image alone; class indices as labels cannot be read before the number of outputs is known."""
        words = batch if self.adapter is None else self.adapter(batch)
        key = (self.keys or {}).get("image", "image")
        if isinstance(words, Mapping):
            words = {"image": words[key]} if key in words else {}
        return read_batch(words).image

    def expected(self, trainer: Any, pl_module: nn.Module) -> int | None:
        """The number of outputs that the label names speak of, where there are any."""
        if self.outputs is not None:
            return self.outputs
        _, names = next(self._sources(trainer, pl_module), ("", None))
        return None if names is None else len(names)

    def resolve(self, trainer: Any, pl_module: nn.Module, outputs: int) -> list[str]:
        """Label names in the order of the outputs, once per run.

        Raises:
            InputError: Their number differs from the outputs, or the table has no rule for one.
        """
        if self.names is None or len(self.names) != outputs:
            self.names = self._find_names(trainer, pl_module, outputs)
            self._selected = None if self._loaded is None else self._loaded.select(self.names)
            tell_once(trainer, f"camtrain: {outputs} labels in the order of the outputs: {', '.join(self.names)}")
        return self.names

    def _sources(self, trainer: Any, pl_module: nn.Module) -> Iterator[tuple[str, list[str]]]:
        if self._given_names is not None:
            yield "names=", self._given_names
        for owner, thing in (
            ("the data module's labels", getattr(trainer, "datamodule", None)),
            ("the module's labels", pl_module),
        ):
            names = getattr(thing, "labels", None)
            # A user's `labels` may be anything: a tensor, a path, a count, a method.
            if isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(n, str) for n in names):
                yield owner, [str(name) for name in names]
        if self._loaded is not None:
            yield "the organ table", self._loaded.labels

    def _find_names(self, trainer: Any, pl_module: nn.Module, outputs: int) -> list[str]:
        source, names = next(self._sources(trainer, pl_module), ("", [f"label_{i}" for i in range(outputs)]))
        if len(names) != outputs:
            raise InputError(
                f"{source} has {len(names)} names, but the network gives {outputs} outputs: say which label each one "
                "is with names=[...], or set the network's number of outputs; if those are features and no logits, say "
                "where the logits are with logits="
            )
        return names

    def allowed(self, batch: Batch, size: Sequence[int], labels: Sequence[int] | None = None) -> Tensor | None:
        """(B, L, *S') bool on the map's grid, or None when the batch has no organs or there is no table.

        Args:
            batch: The batch.
            size: *S'.
            labels: Only these columns, in this order: at the image's resolution all of them would not fit.
        """
        table = self._selected
        if table is None or batch.organs is None:
            return None
        if labels is not None and self.names is not None:
            table = table.select([self.names[index] for index in labels])
        if math.prod(size) == 1 and not self._told_one_cell:
            self._told_one_cell = True
            rank_zero_warn(
                "camtrain: the tapped layer has a single cell on these images, so its maps cannot say where: choose an "
                "earlier layer (camtrain layers, or ct.layers, lists them) or larger images"
            )
        spacing = spacing_of(batch.affine) if table.needs_spacing and batch.affine is not None else None
        told = batch.allowed_organs
        if told is not None and labels is not None:
            told = told[:, list(labels)]
        return table.allowed(batch.organs, size, self.mode, spacing, told)

    def allowed_on_grids(self, batch: Batch, maps: Mapping[str, Tensor], present: Tensor) -> dict[str, Tensor] | None:
        """Method -> (B, L, *S') bool on the grid of its maps; None without a table."""
        if not self.has_table:
            return None
        on_grid: dict[tuple[int, ...], Tensor] = {}
        for grid in {tuple(each.shape[2:]) for each in maps.values()}:
            allowed = self.allowed(batch, grid)
            on_grid[grid] = present.new_zeros(*present.shape, *grid) if allowed is None else allowed.to(present.device)
        return {method: on_grid[tuple(each.shape[2:])] for method, each in maps.items()}

    def region(self, batch: Batch, row: int, labels: Sequence[int]) -> Tensor | None:
        """(labels, *S) bool of one case at the image's resolution; None where it is not segmented."""
        if batch.organs is None or not bool(batch.has_organs[row]):
            return None
        one = Batch(
            image=None,
            label=None,
            organs=batch.organs[row : row + 1],
            has_organs=batch.has_organs[row : row + 1],
            ids=None,
            affine=None if batch.affine is None else batch.affine[row : row + 1],
            allowed_organs=None if batch.allowed_organs is None else batch.allowed_organs[row : row + 1],
        )
        allowed = self.allowed(one, batch.organs.shape[2:], labels)
        return None if allowed is None else allowed[0]
