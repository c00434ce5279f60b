"""The batch contract: what a callback reads from any user's batch, checked once and in one place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from camtrain._errors import InputError, nearest

KEYS = ("image", "label", "organs", "has_organs", "allowed_organs", "id", "affine", "original_shape", "original_affine")
Adapter = Callable[[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Batch:
    """One batch in the vocabulary of camtrain.

    Attributes:
        image: (B, C, *S) float, or None where a loss needs no image.
        label: (B, L) float, NaN = unknown, or None when the batch has no labels.
        organs: (B, 1, *S) integer ids, or None.
        has_organs: (B,) bool; derived when the batch has no such key: organs present and not all zero.
        ids: Case names, or None.
        affine: (B, 4, 4) voxel to world in mm, or None.
        original_shape: (B, 3) shape of the scan before the transforms, or None.
        original_affine: (B, 4, 4) voxel to world of the scan before the transforms, or None.
        allowed_organs: (B, L, O) bool, what is known of single cases: may the label be read from the table's organ in
            this one? None = the table's rule holds everywhere.
    """

    image: Tensor | None
    label: Tensor | None
    organs: Tensor | None
    has_organs: Tensor
    ids: list[str] | None
    affine: Tensor | None
    original_shape: Tensor | None = None
    original_affine: Tensor | None = None
    allowed_organs: Tensor | None = None

    def names(self, batch_idx: int) -> list[str]:
        """The cases' names, or their places where they have none."""
        return self.ids or [f"case_{batch_idx}_{row}" for row in range(len(self.has_organs))]

    def rows(self, rows: slice) -> Batch:
        """Some of the cases."""
        given: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        return replace(self, **{name: value[rows] for name, value in given.items() if value is not None})


def read_batch(
    batch: Any, keys: Mapping[str, str] | None = None, adapter: Adapter | None = None, outputs: int | None = None
) -> Batch:
    """Read a user's batch.

    Args:
        batch: Dict with the keys of the contract, or anything `adapter` understands.
        keys: Contract word -> key in the user's batch, for example `{"image": "img"}`.
        adapter: Callable that turns the batch into a dict with the contract's words.
        outputs: Number of network outputs L; needed to one-hot encode class indices and to check the labels.

    Returns:
        The batch, as plain tensors (MONAI's MetaTensor ends here).

    Raises:
        InputError: The batch is no dict and no adapter was given, or a value breaks the contract.
    """
    words = _words(batch, keys or {}, adapter)
    image = _plain(words.get("image"))
    organs = _organs(_plain(words.get("organs")), image)
    label = _label(_plain(words.get("label")), outputs)
    size = next((len(t) for t in (image, label, organs) if t is not None), 0)
    if label is not None and len(label) != size:
        raise InputError(f"expected one label row per image, got {len(label)} rows for {size} images: check the batch")
    device = next((t.device for t in (image, label, organs) if t is not None), None)
    has_organs = _has_organs(words.get("has_organs"), organs, size, device)
    ids = words.get("id")
    return Batch(
        image=image,
        label=label,
        organs=organs,
        has_organs=has_organs,
        ids=None if ids is None else [str(i) for i in ([ids] if isinstance(ids, str) else ids)],
        affine=_affine(_plain(words.get("affine")), words.get("image"), size),
        original_shape=_of_shape(words.get("original_shape"), (size, 3)),
        original_affine=_of_shape(words.get("original_affine"), (size, 4, 4)),
        allowed_organs=_allowed_organs(_plain(words.get("allowed_organs")), label, size),
    )


def _words(batch: Any, keys: Mapping[str, str], adapter: Adapter | None) -> Mapping[str, Any]:
    if unknown := [k for k in keys if k not in KEYS]:
        raise InputError(f"keys= expects the words {', '.join(KEYS)}, got {unknown[0]!r}{nearest(unknown[0], KEYS)}")
    if adapter is not None:
        batch = adapter(batch)
    if not isinstance(batch, Mapping):
        raise InputError(
            f"expected a dict batch with the keys image, label, organs, got {type(batch).__name__}: "
            "pass adapter=, a callable that makes such a dict of your batch"
        )
    for word, key in keys.items():
        if key not in batch:
            raise InputError(f"keys= names {key!r} for {word}, but the batch has {', '.join(map(str, batch))}")
    return {word: batch[keys.get(word, word)] for word in KEYS if keys.get(word, word) in batch}


def _plain(value: Any) -> Tensor | None:
    if value is None:
        return None
    tensor: Tensor = torch.as_tensor(value)
    return tensor.as_subclass(Tensor)


def _label(label: Tensor | None, outputs: int | None) -> Tensor | None:
    """Class indices become one-hot, one probability per case becomes a column, soft values are refused."""
    if label is None:
        return None
    if label.ndim == 1 and not label.is_floating_point() and label.dtype != torch.bool and outputs != 1:
        if outputs is None:
            raise InputError("labels are class indices of shape (B,), but the number of outputs is unknown")
        top = int(label.max()) if label.numel() else 0
        if top >= outputs or (label.numel() and int(label.min()) < 0):
            raise InputError(
                f"expected class indices in 0..{outputs - 1}, got {int(label.min())}..{top}: check the labels"
            )
        return torch.nn.functional.one_hot(label.long(), outputs).float()
    if label.ndim == 1 and outputs in (1, None):
        label = label[:, None]
    if label.ndim != 2:
        raise InputError(f"expected labels of shape (B, L), got {tuple(label.shape)}: one column per network output")
    if outputs is not None and label.shape[1] != outputs:
        raise InputError(
            f"the network gives {outputs} outputs but the batch has {label.shape[1]} label columns: "
            "set the number of outputs of the network to the number of labels"
        )
    label = label.float()
    # One reduction, one synchronisation: NaN compares false with everything, so it passes here.
    if bool(((label != 0) & (label != 1) & ~label.isnan()).any()):
        wrong = label[(label != 0) & (label != 1) & ~label.isnan()][0].item()
        raise InputError(f"expected labels 0, 1 or NaN (unknown), got {wrong:g}: camtrain takes no soft labels")
    return label


def _organs(organs: Tensor | None, image: Tensor | None) -> Tensor | None:
    if organs is None:
        return None
    if image is not None and organs.ndim == image.ndim - 1:
        organs = organs[:, None]
    if image is not None and (organs.ndim != image.ndim or organs.shape[1] != 1):
        raise InputError(
            f"expected organs of shape (B, 1, *S) with integer ids, got {tuple(organs.shape)} "
            f"for an image of shape {tuple(image.shape)}"
        )
    if image is not None and organs.shape[2:] != image.shape[2:]:
        raise InputError(
            f"organs have the grid {tuple(organs.shape[2:])} but the image has {tuple(image.shape[2:])}: "
            "give both the same spatial transforms"
        )
    if organs.is_floating_point():
        if bool((organs != organs.round()).any()):
            raise InputError(
                "organs hold values that are no whole ids, as a linear resampling leaves them: "
                "resample organs with mode='nearest'"
            )
        organs = organs.to(torch.int32)
    return organs


# torch has no least and greatest of these; as signed numbers the same bytes are zero.
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def _has_organs(given: Any, organs: Tensor | None, size: int, device: torch.device | None) -> Tensor:
    if organs is None:
        return torch.zeros(size, dtype=torch.bool, device=device)
    if given is not None:
        return torch.as_tensor(given, device=device).bool().reshape(size)
    flat = organs.flatten(1)
    # The ends of the ids: comparing each voxel first takes ten times as long, and every batch is asked.
    flat = flat.view(_SIGNED[flat.dtype]) if flat.dtype in _SIGNED else flat
    return (flat.amax(dim=1) != 0) | (flat.amin(dim=1) != 0)


def _allowed_organs(allowed: Tensor | None, label: Tensor | None, size: int) -> Tensor | None:
    """How many organs the table has is checked where the table is."""
    if allowed is None:
        return None
    labels = allowed.shape[1:2] if label is None else label.shape[1:]
    if allowed.ndim != 3 or allowed.shape[:2] != (size, *labels):
        raise InputError(
            f"expected allowed_organs of shape (B, L, O), one bool for each case, label and organ of the table, got "
            f"{tuple(allowed.shape)} for {size} cases: check the batch"
        )
    return allowed.bool()


def _affine(affine: Tensor | None, image: Any, size: int) -> Tensor | None:
    """Voxel-to-world of each case; what torch's default collate leaves of it (one for all) is unknown geometry."""
    if affine is None and hasattr(image, "affine"):
        affine = torch.as_tensor(image.affine).as_subclass(Tensor)
    if affine is None:
        return None
    if affine.ndim == 2 and size == 1:
        affine = affine[None]
    if affine.ndim == 3 and len(affine) == size:
        return affine
    warnings.warn(
        f"an affine of shape {tuple(affine.shape)} for {size} images says nothing about each of them (torch's default "
        "collate keeps the first case's only), so the geometry counts as unknown: use monai.data.DataLoader",
        stacklevel=2,
    )
    return None


def _of_shape(value: Any, shape: tuple[int, ...]) -> Tensor | None:
    """What says something about each case, else None: torch's default collate turns triples inside out."""
    if value is None:
        return None
    try:
        tensor = _plain(value)
    except (TypeError, ValueError):
        return None
    return tensor if tensor is not None and tuple(tensor.shape) == shape else None
