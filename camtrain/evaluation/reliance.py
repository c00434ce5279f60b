"""Probabilities with one side of each label's organs replaced, and which replacement may judge which model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from camtrain._errors import InputError
from camtrain.anatomy.donors import DonorPool
from camtrain.anatomy.organ_table import OrganTable, Spacing
from camtrain.anatomy.sides import CASE, REPLACEMENTS, Probabilities, ask_sides, known_replacement
from camtrain.cam.logits import PickLogits
from camtrain.evaluation.predicting import logits_of

SWAP = "OutsideSwap"


class Judges(NamedTuple):
    """Replacements that may judge a model.

    Attributes:
        replacements: Those that remain, in the order asked for.
        dropped: The sentence that says which was left out and why; empty if none was.
    """

    replacements: tuple[str, ...]
    dropped: str


def reliance_probabilities(
    model: nn.Module,
    image: Tensor,
    organs: Tensor | None,
    table: OrganTable,
    label: Tensor,
    replacement: str,
    donors: DonorPool | None = None,
    ids: Sequence[str] | None = None,
    columns: Iterable[int] | None = None,
    spacing: Spacing | None = None,
    logits: PickLogits | None = None,
    chunk: int = 4,
    *,
    has_organs: Tensor | None = None,
    seam: int = 1,
    air: float | None = None,
) -> Probabilities:
    """What the model says once everything outside a label's organs, or everything inside, is something else.

    A pair is measured where the label is known, the case has organs, and the label's region is neither empty nor the
    whole image; labels of the rule `anywhere` have no outside. For `"case"` there must be a donor of the same shape.
    Labels with the same rule (and donor) share their two images, so a case costs two forwards per distinct rule, for
    `"case"` per rule and donor. One region at full resolution is held at a time, and the changed images of a forward.

    Args:
        model: Any module whose output contains logits (B, L); it is left as it was.
        image: (B, C, *S) on the model's device.
        organs: (B, 1, *S) integer ids; None = nothing is measured.
        table: Rules of all L labels, in the order of the outputs.
        label: (B, L), NaN = unknown.
        replacement: `"case"` (another case's image, of the opposite truth where there is one), `"air"`, `"blur"` or
            `"mean"`.
        donors: For `"case"`: cases of the same split.
        ids: For `"case"`: names of the B cases, so that none becomes its own donor.
        columns: Labels to measure; None = all.
        spacing: Voxel size in mm, for rules with lengths; one number per axis or (B, axes).
        logits: Callable that picks (B, L) from the model's output.
        chunk: Most images per forward; fewer where that many would take more than 256 MiB.
        has_organs: (B,) bool, was the case segmented? None: told by `organs`, which are all zero otherwise.
        seam: Voxels over which a replacement fades in (`camtrain.anatomy.replacing`).
        air: For `"air"`: its intensity in the units of the image; None = 0.0, for images in 0..1.

    Returns:
        `outside` and `inside`, (B, L) each, on the device of `image`; `ShortcutReliance` takes them.

    Raises:
        InputError: Unknown replacement, `"case"` without donors or ids, or inputs that do not fit each other.

    Example:
        >>> import torch
        >>> from camtrain.metrics import shortcut_reliance
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False))
        >>> _ = model[1].weight.data.copy_(torch.tensor([[0.0, 0.0, 0.0, 5.0]]))
        >>> table = OrganTable(organs={"heart": 1}, labels={"stent": ["heart"]})
        >>> image, organs, label = torch.ones(1, 1, 4), torch.tensor([[[1, 1, 0, 0]]]), torch.ones(1, 1)
        >>> changed = reliance_probabilities(model, image, organs, table, label, "air")
        >>> shortcut_reliance(logits_of(model, image).sigmoid(), *changed, label).share
        tensor([1.], dtype=torch.float64)
    """

    def said(images: Tensor) -> Tensor:
        return logits_of(model, images, logits).sigmoid()

    return ask_sides(said, image, organs, table, label, replacement, donors, ids, columns, spacing, chunk,
                     has_organs=has_organs, seam=seam, air=air)  # fmt: skip


def trained_replacements(checkpoint: Mapping[str, Any]) -> set[str]:
    """What a model saw outside the organs while it was trained.

    A Lightning checkpoint keeps the state of its callbacks under their class names. One of an `OutsideSwap` says what
    it put there, under `replacement`, else another case's image.

    Args:
        checkpoint: What `torch.load` gave.

    Returns:
        Replacements; empty if there was no such callback, or if the file holds weights alone.

    Example:
        >>> trained_replacements({"callbacks": {"OutsideSwap[]": {"replacement": "air"}, "ModelCheckpoint": {}}})
        {'air'}
    """
    callbacks = checkpoint.get("callbacks")
    found = set()
    for key, state in callbacks.items() if isinstance(callbacks, Mapping) else ():
        # 'OutsideSwap', 'OutsideSwap[second]', "OutsideSwap{'p': 0.5}", 'package.OutsideSwap': names end there.
        name = re.match(r"[\w.]*", getattr(key, "__qualname__", str(key)))
        if name and name[0].rpartition(".")[2] == SWAP:
            replacement = state.get("replacement") if isinstance(state, Mapping) else None
            found.add(replacement if isinstance(replacement, str) else CASE)
    return found


def judge_with(replacements: Iterable[str], trained: Iterable[str]) -> Judges:
    """Leave out the replacement that a model was trained with: it has learnt not to react to that one.

    Args:
        replacements: Those asked for.
        trained: What `trained_replacements` found.

    Raises:
        InputError: An unknown replacement, or none remains.

    Example:
        >>> judge_with(["case", "air"], {"case"}).replacements
        ('air',)
    """
    asked = tuple(dict.fromkeys(known_replacement(name) for name in replacements))
    seen = {known_replacement(name) for name in trained}
    remain = tuple(name for name in asked if name not in seen)
    out = [repr(name) for name in asked if name in seen]
    others = [name for name in REPLACEMENTS if name not in seen]
    if not remain:
        raise InputError(
            f"no replacement is left to judge with: expected one that the model was not trained with, got "
            f"{', '.join(out) or 'none'}; take {', '.join(others) or 'another model'}"
        )
    if not out:
        return Judges(remain, "")
    return Judges(
        remain,
        f"Replacement {', '.join(out)} is left out: the model was trained with it ({SWAP}), and a model trained with "
        f"one replacement is judged with another.",
    )
