"""What both callbacks read from a run: batch words, organ table, label names, allowed cells."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from camtrain._batch import Adapter, Batch, read_batch
from camtrain._errors import InputError
from camtrain.anatomy.organ_table import OrganTable
from camtrain.cam.layer_lookup import default_layer, find_layer, plain_name

log = logging.getLogger("camtrain")
TableSpec = OrganTable | str | Path | None

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
        table: TableSpec,
        keys: Mapping[str, str] | None,
        adapter: Adapter | None,
        names: Sequence[str] | None,
        mode: str,
    ) -> None:
        self.keys = dict(keys) if keys else None
        self.adapter = adapter
        self.mode = mode
        self._given_names = None if names is None else list(names)
        self._given_table = table
        self._loaded: OrganTable | None = None
        self._selected: OrganTable | None = None
        self.names: list[str] | None = None

    def setup(self, trainer: Any) -> None:
        """Find the table; forget what another run resolved."""
        given = self._given_table
        if given is None:
            given = getattr(getattr(trainer, "datamodule", None), "table", None)
        self._loaded = OrganTable.load(given) if isinstance(given, str | Path | Mapping) else given
        self._selected, self.names = None, None

    @property
    def has_table(self) -> bool:
        """Is there any anatomy to compare with?"""
        return self._loaded is not None

    def read(self, batch: Any, outputs: int) -> Batch:
        """The user's batch in camtrain's words."""
        return read_batch(batch, self.keys, self.adapter, outputs)

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

    def _find_names(self, trainer: Any, pl_module: nn.Module, outputs: int) -> list[str]:
        sources = {
            "names=": self._given_names,
            "the data module's labels": getattr(getattr(trainer, "datamodule", None), "labels", None),
            "the module's labels": getattr(pl_module, "labels", None),
        }
        for source, names in sources.items():
            if names is None or isinstance(names, Tensor | nn.Module) or callable(names):
                continue
            if len(names) != outputs:
                raise InputError(
                    f"{source} has {len(names)} names but the network gives {outputs} outputs: give one name per output, in "
                    "the order of the outputs, with names="
                )
            return [str(name) for name in names]
        if self._loaded is not None:
            if len(self._loaded.labels) == outputs:
                return list(self._loaded.labels)
            raise InputError(
                f"the organ table has {len(self._loaded.labels)} labels but the network gives {outputs} outputs: say which "
                "label each output is with names=[...]"
            )
        return [f"label_{index}" for index in range(outputs)]

    def allowed(self, batch: Batch, size: Sequence[int]) -> Tensor | None:
        """(B, L, *S') bool on the map's grid, or None when the batch has no organs or there is no table."""
        if self._selected is None or batch.organs is None:
            return None
        return self._selected.allowed(batch.organs, size=size, mode=self.mode, spacing=_spacing(batch.affine))


def _spacing(affine: Tensor | None) -> Tensor | None:
    """(B, rank) mm per voxel along each axis."""
    return None if affine is None else torch.linalg.vector_norm(affine[:, :-1, :-1].double(), dim=1)


def resolve_layer(pl_module: nn.Module, layer: str | nn.Module | None, image: Tensor | None) -> str:
    """Dotted name of the layer; for None the last feature map of the module's own forward.

    Raises:
        InputError: No such layer, or None without an image or a forward.
    """
    if layer is not None:
        return find_layer(pl_module, layer)[0]
    if image is None:
        raise InputError("layer=None needs the key 'image' in the batch: name the layer with layer=")
    try:
        name, _ = default_layer(pl_module, image)
    except NotImplementedError as error:
        raise InputError(
            f"layer=None needs a forward(image) in {type(pl_module).__name__}, which has none: name the layer with layer="
        ) from error
    rank_zero_info(f"camtrain: layer=None takes {plain_name(name)!r}")
    return name
