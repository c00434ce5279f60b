"""Splits and cases of whatever holds data: a data module, loaders by name, one loader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from camtrain._batch import Adapter
from camtrain._errors import InputError, nearest
from camtrain.cam.logits import PickLogits
from camtrain.evaluation._reading import Keys, image_for, labels_of, unlabelled
from camtrain.evaluation.case import Case
from camtrain.evaluation.predicting import logits_of

VAL = "val"


def splits_of(data: Any, wanted: Sequence[str] | None = None) -> dict[str, Iterable[Any]]:
    """Split name -> batches.

    Args:
        data: A LightningDataModule (its validation loader is `val`, its test loaders have the names in its
            `test_splits`, or test, test_1, ...), a mapping of loaders, or one iterable of batches, which is `test`.
        wanted: Names to take, in this order; None takes all.

    Raises:
        InputError: Not such data, or a split that is not there.

    Example:
        >>> list(splits_of({"val": [], "external": []}, ["external"]))
        ['external']
    """
    if callable(getattr(data, "val_dataloader", None)):
        found = _of_module(data, wanted)
    elif isinstance(data, Mapping) and "image" not in data:
        found = {str(name): batches for name, batches in data.items()}
    elif isinstance(data, Iterable) and not isinstance(data, Tensor | Mapping | str):
        found = {"test": data}
    else:
        raise InputError(
            f"data= expects a data module, a mapping of loaders, or a loader, got {type(data).__name__}: "
            "a single batch is evaluated as [batch]"
        )
    for name in wanted or ():
        if name not in found:
            raise InputError(f"the data has the splits {', '.join(found)}; got {name!r}{nearest(name, found)}")
    return {name: found[name] for name in (wanted or found)}


def _of_module(data: Any, wanted: Sequence[str] | None) -> dict[str, Iterable[Any]]:
    data.prepare_data()
    found: dict[str, Iterable[Any]] = {}
    if wanted is None or VAL in wanted:
        data.setup("validate")
        found |= _named([VAL], data.val_dataloader())
    if wanted is None or set(wanted) - {VAL}:
        data.setup("test")
        found |= _named(list(getattr(data, "test_splits", [])) or ["test"], data.test_dataloader())
    return found


def _named(names: list[str], loaders: Any) -> dict[str, Iterable[Any]]:
    listed = list(loaders) if isinstance(loaders, list | tuple) else [loaders]
    # A test split called `val` must not take the place of the validation cases.
    names = [name if name != VAL or names == [VAL] else f"{VAL}_test" for name in names]
    names = names[: len(listed)] + [f"{names[-1]}_{i}" for i in range(len(names), len(listed))]
    return dict(zip(names, listed, strict=False))


def count_of(batches: Iterable[Any], limit: int | None = None) -> int | None:
    """Cases of a split, where that is known before they are read."""
    dataset = getattr(batches, "dataset", None)
    known = len(dataset) if dataset is not None and hasattr(dataset, "__len__") else None
    return limit if known is None else known if limit is None else min(known, limit)


@dataclass
class CaseReader:
    """Reads batches of any user as cases.

    Attributes:
        model: Tells the number of outputs, and where images go.
        names: Label names as far as they are known.
        keys: Contract word -> key in the batch.
        adapter: Makes a dict with the contract's words of a batch.
        logits: Picks (B, L) from the model's output.
    """

    model: nn.Module
    names: Sequence[str] | None = None
    keys: Keys = None
    adapter: Adapter | None = None
    logits: PickLogits | None = None
    _outputs: int | None = None

    def outputs(self, image: Tensor) -> int:
        """The number of labels; one forward of one image, once."""
        if self._outputs is None:
            self._outputs = logits_of(self.model, image[:1], self.logits).shape[1]
        return self._outputs

    def cases(self, split: str, batches: Iterable[Any], limit: int | None = None) -> Iterator[Case]:
        """One case after the other.

        Raises:
            InputError: A batch has no image or no labels, or breaks the contract.
        """
        number = 0
        for batch in batches:
            words = batch if self.adapter is None else self.adapter(batch)
            for case in self._cases(split, words, number):
                if limit is not None and number >= limit:
                    return
                number += 1
                yield case

    def _cases(self, split: str, words: Any, first: int) -> Iterator[Case]:
        keys = {word: key for word, key in (self.keys or {}).items() if word != "patient"} or None
        batch = unlabelled(words, keys)
        image = _as_weights(image_for(self.model, batch), self.model)
        label = labels_of(words, keys, self.outputs(image))
        if label is None:
            raise InputError(
                "an evaluation compares with labels, but the batch has no key 'label': name yours with "
                "keys={'label': ...}, or use adapter="
            )
        patients = _patients(words.get((self.keys or {}).get("patient", "patient")), len(image))
        for row in range(len(image)):
            one = slice(row, row + 1)
            segmented = batch.organs is not None and bool(batch.has_organs[row])
            yield Case(
                id=f"case_{first + row}" if batch.ids is None else batch.ids[row],
                split=split,
                patient=patients[row],
                image=image[one],
                label=label[one].to(image.device),
                organs=batch.organs[one].to(image.device) if segmented and batch.organs is not None else None,
                affine=None if batch.affine is None else batch.affine[one],
                allowed_organs=None if batch.allowed_organs is None else batch.allowed_organs[one],
            )


def _as_weights(image: Tensor, model: nn.Module) -> Tensor:
    """The image in the precision of a model that is in half or in double precision as a whole."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    kinds = kinds or {b.dtype for b in model.buffers() if b.is_floating_point()}
    return image.to(kinds.pop()) if len(kinds) == 1 else image


def _patients(given: Any, size: int) -> list[str | None]:
    """The key `patient`: one name per case; empty or NaN is unknown."""
    if given is None:
        return [None] * size
    listed = given.tolist() if isinstance(given, torch.Tensor) else [given] if isinstance(given, str) else list(given)
    if len(listed) != size:
        raise InputError(f"expected one patient per image, got {len(listed)} for {size} images: check the batch")
    return [None if name is None or name == "" or name != name else str(name) for name in listed]
