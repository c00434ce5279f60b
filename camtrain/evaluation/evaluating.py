"""`evaluate`: methods x layers x measures of a trained model, with intervals over cases or patients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from camtrain._batch import Adapter
from camtrain._errors import InputError, nearest
from camtrain.anatomy.baselines import check_baseline
from camtrain.cam.asked import Asked, read_asked
from camtrain.cam.engine import Reshape
from camtrain.cam.logits import PickLogits
from camtrain.evaluation.case_filter import CaseFilter, check_filter
from camtrain.evaluation.evaluation import Evaluation
from camtrain.evaluation.intervals import check_level
from camtrain.evaluation.label_names import Names
from camtrain.evaluation.measures import read_measures
from camtrain.evaluation.reading_cases import VAL, CaseReader, splits_of
from camtrain.evaluation.reliance import judge_with
from camtrain.evaluation.running import Run
from camtrain.evaluation.scoring import At, Plan
from camtrain.evaluation.thresholds import Thresholds

REPLACEMENTS = ("case", "air", "blur")


def evaluate(
    model: nn.Module,
    data: Any,
    table: Any = None,
    methods: Sequence[str | Mapping[str, Any]] = ("hirescam",),
    layers: Sequence[Any] = (None,),
    *,
    names: Sequence[str] | None = None,
    measures: str | Sequence[str] = "free",
    cases: CaseFilter = "positives",
    cut: float = 0.5,
    splits: Sequence[str] | None = None,
    thresholds: Thresholds | str | Path | None = None,
    at: At = "layer",
    replacements: Sequence[str] = REPLACEMENTS,
    trained_with: Iterable[str] = (),
    baseline: str | float = "air",
    air: float | None = None,
    seam: int = 1,
    steps: int = 20,
    contrast_labels: int | None = 4,
    tolerance_mm: float | None = None,
    authors_edge_case: bool = False,
    groups: Mapping[str, Sequence[str]] | None = None,
    repeats: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    limit: int | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    keys: Mapping[str, str] | None = None,
    adapter: Adapter | None = None,
    logits: PickLogits | None = None,
    reshape: Reshape | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure where a model looks and what it uses, case by case, and say how sure the means are.

    Cases are scored one at a time on the grid of each layer, so that memory is that of one case whatever the number of
    labels. The model is left as it was.

    Args:
        model: Any module whose output contains logits (B, L).
        data: A LightningDataModule, a mapping from split to loader, or one loader (split `test`).
        table: `OrganTable` or what `OrganTable.load` takes; None: the data's `table`, else measures without organs.
        methods: Names of `ct.methods()`, or dicts with the key `name` and options.
        layers: Dotted names, modules, or None for the last feature map.
        names: Label names in the order of the outputs; None: those of data, model or table.
        measures: Names of `camtrain.evaluation.MEASURES`, or `free`, `paid`, `reliance`, `all`.
        cases: Which (case, label) pairs maps are looked at for: `positives`, `correct`, `fn`, `fp`, `all`.
        cut: Predicted means probability >= cut.
        splits: Splits in order; None: all. Where `val` is among them, it goes first and chooses OrganIoU's thresholds.
        thresholds: Frozen OrganIoU thresholds, {"method@layer": {label: threshold}}, or the thresholds.json of an
            earlier evaluation.
        at: `layer`: scores on the grid of the layer; `image`: maps enlarged to the image.
        replacements: What takes the place of what lies outside (or inside) the organs: `case`, `air`, `blur`.
        trained_with: Replacements that the model was trained with; it is judged with the others.
        baseline: What hidden voxels become for average drop, insertion and deletion: `air`, `mean`, `blur`, a number.
        air: Intensity of air; None: 0, the low end of images in 0..1, and refused for images that go below.
        seam: Voxels over which a replaced region fades in beyond what is kept; 0 cuts hard.
        steps: Steps of insertion and deletion curves.
        contrast_labels: Other labels per case whose maps are made for class sensitivity and rank agreement; None: all.
        tolerance_mm: Radius of the pointing game.
        authors_edge_case: OrganIoU as in the published code.
        groups: Name -> labels: rows of their own, means over all pairs of these labels.
        repeats: Bootstrap repeats.
        level: Of the intervals.
        seed: Of donors and bootstrap.
        limit: Cases per split at most.
        out: Folder that keeps finished cases; the same call goes on where an earlier one was stopped.
        overwrite: Throw away the cases that an earlier call has finished in `out`.
        keys: Contract word -> key in the batch; `patient` is a word here too.
        adapter: Callable that makes a dict with the contract's words of a batch.
        logits: Callable that picks (B, L) from the model's output.
        reshape: Callable that makes (B, K, *S') of a layer's output.
        progress: Show a bar on stderr.

    Returns:
        The rows, the raw numbers of every case, thresholds and notes.

    Raises:
        InputError: An unknown measure, split, filter or method; thresholds of other labels; `out` holds an evaluation
            with other settings; or what a method refuses.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv1d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1))
        >>> batch = {"image": torch.rand(6, 1, 4), "label": torch.tensor([[1.0], [0.0]] * 3)}
        >>> batch["organs"] = torch.tensor([[[0, 3, 3, 0]]] * 6)
        >>> table = {"organs": {"heart": 3}, "labels": {"stent": ["heart"]}}
        >>> found = evaluate(model, [batch], table, measures=["energy_inside"], repeats=200, progress=False)
        >>> [(row.label, row.measure, row.n) for row in found.rows]
        [('macro', 'energy_inside', 3), ('micro', 'energy_inside', 3), ('stent', 'energy_inside', 3)]
    """
    _check_numbers(cut, at, level, repeats=(repeats, 20), contrast_labels=(contrast_labels, 0), limit=(limit, 1),
                   steps=(steps, 2), seam=(seam, 0))  # fmt: skip
    check_baseline(baseline)
    reader = CaseReader(model, None, keys, adapter, logits)
    loaders = splits_of(data, splits)
    wanted = read_measures(measures)
    known = Names(names, data, model, table)
    plan = Plan(
        names=(),
        table=None,
        methods=_once(read_asked([methods] if isinstance(methods, str) else methods)),
        layers=list(layers),
        measures=wanted,
        cases=check_filter(cases),
        cut=cut,
        at=at,
        contrast_labels=contrast_labels,
        baseline=air if baseline == "air" and air is not None else baseline,
        air=air,
        seam=seam,
        steps=steps,
        tolerance_mm=tolerance_mm,
        authors_edge_case=authors_edge_case,
        logits=logits,
        reshape=reshape,
    )
    judged, dropped = judge_with(replacements, trained_with) if plan.asks("reliance") else ((), "")
    run = Run(model, plan, reader, known, judged, seed, limit, progress, thresholds, groups=groups, overwrite=overwrite)
    run.notes += [dropped] if dropped else []
    if at == "image":
        run.notes += run.without_sums()
    first = sorted(loaders, key=lambda split: split != VAL)
    with run.stored(None if out is None else Path(out), first):
        for split in first:
            run.split(split, loaders[split])
    return run.evaluation(loaders, repeats, level)


def _check_numbers(cut: float, at: str, level: float, **whole: tuple[Any, int]) -> None:
    """Said before anything is computed; `whole` holds values and the least that each may be."""
    check_level(level)
    for name, (value, least) in whole.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise InputError(f"{name}= expects a whole number from {least} on, got {value!r}")
    if not 0 <= cut <= 1:
        raise InputError(f"cut= expects a probability, got {cut!r}: 0.5 is usual")
    if at not in ("layer", "image"):
        raise InputError(f"at= knows layer and image, got {at!r}{nearest(str(at), ('layer', 'image'))}")


def _once(methods: list[Asked]) -> list[Asked]:
    keys = [method.key for method in methods]
    for key in keys:
        if keys.count(key) > 1:
            raise InputError(f"methods= lists {key!r} twice: name each once, or with different options")
    return methods
