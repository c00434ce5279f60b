"""The examination: form, headers, how long a full read takes, contents, network; then all checks, worst first."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from camtrain._errors import InputError
from camtrain.data.manifest_module import ManifestDataModule
from camtrain.data.manifest_transforms import root_input_error
from camtrain.doctor.check_table import Stage, run_checks
from camtrain.doctor.facts import Facts
from camtrain.doctor.finding import Finding, bytes_in_words
from camtrain.doctor.gathering import facts_of_manifest
from camtrain.doctor.net_facts import NetFacts
from camtrain.doctor.network import Trial, Watch, free_memory, try_network
from camtrain.doctor.reading import Estimate, probe, read_all, read_headers
from camtrain.doctor.samples import Split, read_samples, splits_of

_TRIES = 20  # training cases that may fail before no batch is made


@dataclass(frozen=True)
class Extent:
    """How far to look.

    Attributes:
        headers_only: Do not read volumes, except the few that tell how long all would take.
        workers: Threads that read.
        cases: Of data without a manifest, at most so many cases of each split; None = all.
        network: Try the network of a config on one batch.
        device: Where.
    """

    headers_only: bool = False
    workers: int = 1
    cases: int | None = None
    network: bool = True
    device: str = "cpu"


@dataclass
class Examination:
    """What came out.

    Attributes:
        facts: What is known.
        findings: What is wrong or suspicious, worst first.
        stages: What was looked at.
        estimate: How long a full read takes, or would take; None without files.
        partly: Were only some cases read?
        left_out: What was not looked at, and why.
        seconds: The examination took so long.
    """

    facts: Facts
    findings: list[Finding] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    estimate: Estimate | None = None
    partly: bool = False
    left_out: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def fails(self) -> bool:
        """Would training fail?"""
        return any(finding.severity == "error" for finding in self.findings)


def examine(
    facts: Facts | None = None,
    data: Any = None,
    model: Any = None,
    watches: Sequence[Watch] = (),
    extent: Extent = Extent(),
    say: Callable[[str], None] = lambda text: None,
    unbuilt: str = "",
) -> Examination:
    """Look at a data set, and at a network on one batch of it. Nothing is trained and no file is changed.

    Args:
        facts: What is known already, of a manifest that the data module refuses; None = asks `data`.
        data: Data module; None where it cannot be made.
        model: LightningModule; None = only the data.
        watches: Callbacks that take maps.
        extent: How far to look.
        say: Called with a sentence before what takes long.
        unbuilt: What network or callbacks said when they could not be made.

    Returns:
        Facts and findings.

    Example:
        >>> from camtrain.data import PhantomDataModule
        >>> data = PhantomDataModule(labels=["nodule"], cases=2, val_cases=2, test_cases=1, size=16)
        >>> found = examine(data=data, extent=Extent(cases=2))
        >>> found.fails, len(found.facts.rows) > 3
        (False, True)
    """
    begin = time.perf_counter()
    of_files = facts is not None or isinstance(data, ManifestDataModule)
    if facts is None:
        facts = facts_of_manifest(data) if of_files else Facts(_name(data))
    facts.unbuilt = unbuilt
    found = Examination(facts, stages=["form"])
    splits: dict[str, Split] = {}
    if of_files:
        _look_at_files(found, extent, say)
    elif data is not None:
        splits = _look_at_samples(found, data, extent, say)
    if model is not None and extent.network:
        _look_at_network(found, data, model, watches, extent, splits, say)
    found.findings = run_checks(facts, found.stages)
    found.seconds = time.perf_counter() - begin
    return found


def _look_at_files(found: Examination, extent: Extent, say: Callable[[str], None]) -> None:
    facts = found.facts
    if not facts.rows:
        found.left_out.append("no file was looked at: the manifest names none")
        return
    read_headers(facts, extent.workers)
    found.stages.append("headers")
    found.estimate = estimate = probe(facts, extent.workers)
    if estimate is None:
        found.left_out.append("no volume was read: none can be")
        return
    size = f"{bytes_in_words(estimate.bytes)} on disk, " if estimate.bytes else ""
    say(
        f"{estimate.cases:,} cases, {size}headers are read; a full read takes {_about(estimate.seconds)} with "
        f"{extent.workers} worker{'s' if extent.workers > 1 else ''} (measured on {estimate.measured})"
    )
    found.partly = extent.headers_only
    if extent.headers_only:
        seen = len(facts.contents)
        found.left_out.append(f"volumes were not read (--headers-only), except {seen} to tell how long it takes")
    else:
        read_all(facts, extent.workers)
    found.stages.append("contents")


def _look_at_samples(found: Examination, data: Any, extent: Extent, say: Callable[[str], None]) -> dict[str, Split]:
    facts = found.facts
    facts.labels = [str(name) for name in getattr(data, "labels", None) or ()]
    facts.table = getattr(data, "table", None)
    facts.free_memory = free_memory()
    try:
        splits = _set_up(found, data)
    except InputError as error:
        facts.refused = str(error)
        return {}
    facts.train, *others = splits
    facts.val = others[0] if others else None
    facts.tests = others[1:]
    limit = 1 if extent.headers_only else extent.cases
    number = sum(min(len(split.dataset), limit or len(split.dataset)) for split in splits.values())
    say(f"{facts.source}: {number:,} cases are read through the data module")
    read_samples(facts, splits, limit)
    if limit is not None and any(len(split.dataset) > limit for split in splits.values()):
        found.left_out.append(f"all but {limit} cases of each split")
    found.stages += ["headers", "contents"]
    return splits


def _set_up(found: Examination, data: Any) -> dict[str, Split]:
    """Splits of a data module. `prepare_data` is not called: it may write files."""
    if getattr(data, "make_organs", False):
        found.left_out.append("organs that make_organs makes before training: doctor makes none")
    try:
        data.setup("fit")
    except InputError:
        if not getattr(data, "make_organs", False):
            raise
        data.organs, found.facts.organs_to_come = None, True
        data.setup("fit")
    try:
        data.setup("test")
        return splits_of(data)
    except InputError as error:
        found.facts.untested = str(error)
        data.test_splits = []
        return splits_of(data)


def _look_at_network(
    found: Examination,
    data: Any,
    model: Any,
    watches: Sequence[Watch],
    extent: Extent,
    splits: dict[str, Split],
    say: Callable[[str], None],
) -> None:
    facts = found.facts
    split = splits.get(facts.train)
    if data is None or (split is None and not isinstance(data, ManifestDataModule)):
        found.left_out.append("the network: there is no data to try it on")
        return
    try:
        split = split or _training_split(data)
        batch, seconds = _training_batch(split)
        if splits:  # read before, and perhaps kept: what counts is the first time
            seconds = _first_reading(facts, seconds)
    except InputError as error:
        found.left_out.append(f"the network: no batch can be made ({error})")
        return
    say("one training step is tried, nothing is trained")
    trial = Trial(
        model=model,
        batch=batch,
        table=facts.table,
        watches=watches,
        train_cases=len(split.dataset),
        workers=split.workers,
        read_seconds=seconds,
        device=extent.device,
    )
    facts.net = _unturned(try_network(trial), facts.spacing)
    found.stages.append("network")


def _unturned(net: NetFacts, spacing: tuple[float, ...] | None) -> NetFacts:
    """Cells in the mm that all cases are resampled to: those of the batch are scaled a little by augmentation."""
    if spacing is None:
        return net
    layers = [
        replace(layer, cell_mm=tuple(n * mm for n, mm in zip(layer.cell, spacing, strict=True)))
        if len(layer.cell) == len(spacing)
        else layer
        for layer in net.layers
    ]
    return replace(net, layers=layers)


def _training_split(data: Any) -> Split:
    """Training cases of a manifest, none of them kept in memory."""
    workers, arguments = data.num_workers, dict(data.hparams)
    if "cache" in arguments:
        arguments["cache"] = False
    loader = type(data)(**arguments).train_dataloader()
    return Split("train", loader.dataset, loader.collate_fn, int(loader.batch_size or 1), workers)


def _training_batch(split: Split) -> tuple[Any, float]:
    """A batch of the first training cases that can be read, and the time that one takes."""
    cases: list[Any] = []
    seconds: list[float] = []
    last: InputError | None = None
    for index in range(min(len(split.dataset), split.batch_size + _TRIES)):
        begin = time.perf_counter()
        try:
            cases.append(split.dataset[index])
        except Exception as error:
            if (last := root_input_error(error)) is None:
                raise
            continue
        seconds.append(time.perf_counter() - begin)
        if len(cases) == split.batch_size:
            break
    if not cases:
        raise last or InputError("the training split is empty")
    return split.collate(cases), sum(seconds) / len(seconds)


def _first_reading(facts: Facts, otherwise: float) -> float:
    taken = [facts.contents[i].seconds for i in facts.of_split(facts.train) if i in facts.contents]
    good = sorted(seconds for seconds in taken if seconds == seconds)
    return good[len(good) // 2] if good else otherwise


def _name(data: Any) -> str:
    return "no data" if data is None else type(data).__name__


def _about(seconds: float) -> str:
    return duration(seconds) if seconds < 1 else f"about {duration(seconds)}"


def duration(seconds: float) -> str:
    """A length of time in words.

    Example:
        >>> duration(0.04), duration(75), duration(7300)
        ('under a second', '1 min 15 s', '2 h 1 min')
    """
    if math.isnan(seconds):
        return "unknown"
    if seconds < 1:
        return "under a second"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


__all__ = ["Examination", "Extent", "NetFacts", "duration", "examine"]
