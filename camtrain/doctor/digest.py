"""What was seen, as small tables: labels, scans, organs, layers, cost. The same on the terminal and on the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from camtrain.doctor.check_table import CHECKS
from camtrain.doctor.examining import Examination, duration
from camtrain.doctor.facts import Facts
from camtrain.doctor.finding import SEVERITIES, bytes_in_words, count, number_in_words, some
from camtrain.doctor.grids import turned_to_ras
from camtrain.doctor.label_checks import tally
from camtrain.doctor.net_checks import organ_size
from camtrain.doctor.net_facts import NetFacts, WatchedLayer
from camtrain.reporting.doctor_page import DoctorPage, DoctorTable

Rows = list[tuple[str, ...]]


def page_of(found: Examination, command: str = "") -> DoctorPage:
    """All that the page shows.

    Args:
        found: From `examine`.
        command: What was typed.
    """
    numbers = Counter(finding.severity for finding in found.findings)
    said = ", ".join(count(numbers[severity], severity) for severity in SEVERITIES if numbers[severity])
    return DoctorPage(
        title=f"camtrain doctor: {Path(found.facts.source).name}",
        verdict=verdict(found),
        fails=found.fails,
        counts=said or "no finding",
        lead=_lead(found),
        findings=found.findings,
        tables=tables_of(found),
        quiet=[(name, CHECKS[name].asks) for name in _quiet(found)],
        left_out=found.left_out,
        command=command,
    )


def _quiet(found: Examination) -> list[str]:
    """Checks that looked at all there is for them, and had nothing to say."""
    told = {finding.check for finding in found.findings}
    return [
        name
        for name, check in CHECKS.items()
        if check.stage in found.stages
        and name not in told
        and not (check.stage == "contents" and found.partly)
        and (found.facts.files or not check.of_files)
    ]


def verdict(found: Examination) -> str:
    """One sentence."""
    if found.fails:
        return "Training would fail."
    if any(finding.severity == "warning" for finding in found.findings):
        return "Training would start. Look at the warnings first."
    return "Nothing stands in the way of training."


def _lead(found: Examination) -> str:
    facts = found.facts
    splits = ", ".join(f"{len(facts.of_split(name)):,} {name}" for name in facts.splits)
    cases, labels = count(len(facts.rows), "case"), count(len(facts.labels), "label")
    text = f"{facts.source}: {cases} ({splits or 'no split'}), {labels}."
    if found.estimate is not None:
        text += f" {bytes_in_words(found.estimate.bytes)} on disk."
    return f"{text} The examination took {duration(found.seconds)}."


def tables_of(found: Examination) -> list[DoctorTable]:
    """All tables that have rows."""
    makers: Sequence[Callable[[Facts], DoctorTable]] = (_labels, _scans, _organs, _layers, _cost)
    return [table for make in makers if (table := make(found.facts)).rows]


def _labels(facts: Facts) -> DoctorTable:
    rows: Rows = []
    for number, label in enumerate(facts.labels):
        cells = []
        for split in facts.splits:
            t = tally(facts, facts.of_split(split), number)
            cells.append(f"{t.present:,} / {t.absent:,}" + (f" / {t.unknown:,}" if t.unknown else ""))
        rows.append((label, *cells, _rule(facts, label)))
    says = "Present / absent / unknown, where any is."
    return DoctorTable("Labels", says, ("label", *facts.splits, "may be read from"), rows)


def _rule(facts: Facts, label: str) -> str:
    rule = None if facts.table is None else facts.table.rules.get(label)
    if rule is None:
        return "no rule"
    return "anywhere" if rule.anywhere else some(rule.organs, 4)


def _scans(facts: Facts) -> DoctorTable:
    """Range of what headers and volumes say."""
    good = [h for h in facts.image_headers.values() if len(h.shape) == 3 and not h.fault]
    turned = [turned_to_ras(h.shape, h.affine) for h in good]
    shapes = np.array([shape for shape, _ in turned]).reshape(-1, 3)
    steps = np.array([np.linalg.norm(affine[:3, :3], axis=0) for _, affine in turned]).reshape(-1, 3)
    rows: Rows = []
    for axis, name in enumerate(("right-left", "back-front", "bottom-top")):
        rows += _range(f"voxel {name}, mm", steps[:, axis])
        rows += _range(f"voxels {name}", shapes[:, axis])
    read = [content for content in facts.contents.values() if content.low == content.low]
    unit = "HU" if facts.hounsfield else "intensity"
    rows += _range(f"lowest {unit}", np.array([c.low for c in read]))
    rows += _range(f"middle {unit}", np.array([c.quantiles[1] for c in read]))
    rows += _range(f"highest {unit}", np.array([c.high for c in read]))
    rows += _range("outside the window, %", np.array([100 * c.clipped for c in read if c.clipped == c.clipped]))
    rows += _range("reading a case, s", np.array([c.seconds for c in read if c.seconds == c.seconds]))
    says = f"{count(len(good) or len(read), 'scan')}."
    if good:
        says += " Axes as the patient's."
        axes = Counter("".join(nib.aff2axcodes(h.affine)) for h in good)
        kinds = Counter(h.dtype for h in good)
        says += f" Orientation on disk: {_counted(axes)}; numbers: {_counted(kinds)}."
    return DoctorTable("Scans", says, ("", "least", "median", "most"), rows)


def _range(name: str, values: np.ndarray) -> Rows:
    if not values.size:
        return []
    return [(name, *(f"{value:.4g}" for value in (values.min(), np.median(values), values.max())))]


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counter.most_common(4))


def _organs(facts: Facts) -> DoctorTable:
    """Every organ that a rule names, how large it is, and how many cells of each layer it fills."""
    layers = _distinct(facts.net)
    rows: Rows = []
    if facts.table is not None and any(content.organs for content in facts.contents.values()):
        segmented = [i for i, content in facts.contents.items() if content.organs is not None]
        for name in facts.table.organs:
            users = [label for label, rule in facts.table.rules.items() if name in rule.organs]
            if users:
                rows.append((name, *_organ_cells(facts, name, segmented, layers), some(users, 3)))
    heads = [f"cells of {layer.name}" for layer in layers]
    columns = ("organ", "cases", "median size", "longest side", "in the crop", *heads, "for")
    says = "Organs that a rule names. Cells: median size of the organ over the size of a cell."
    return DoctorTable("Organs", says, columns, rows)


def _organ_cells(facts: Facts, name: str, segmented: list[int], layers: list[WatchedLayer]) -> list[str]:
    has = [i for i in segmented if facts.organ_voxels(i, name)]
    size = organ_size(facts, name)
    if size is None:
        return [f"0 of {len(segmented):,}", *["-"] * (3 + len(layers))]
    volume, unit = size
    ids = facts.organ_ids(name)
    longest = np.median([max(_extent(facts, i, n)) for i in has for n in ids if _extent(facts, i, n)])
    kept = np.median([facts.organ_voxels(i, name, inside=True) / facts.organ_voxels(i, name) for i in has])
    cells = []
    for layer in layers:
        cell = np.prod(layer.cell_mm) / 1000 if unit == "ml" and layer.cell_mm else np.prod(layer.cell)
        cells.append(number_in_words(float(volume / cell)))
    length = f"{longest:.3g} {'mm' if unit == 'ml' else 'voxels'}"
    return [f"{len(has):,} of {len(segmented):,}", f"{number_in_words(volume)} {unit}", length, f"{kept:.0%}", *cells]


def _extent(facts: Facts, index: int, organ_id: int) -> tuple[float, ...]:
    size = (facts.contents[index].organs or {}).get(organ_id)
    return () if size is None else size.extent


def _distinct(net: NetFacts | None) -> list[WatchedLayer]:
    found = {} if net is None else {layer.name: layer for layer in net.layers if not layer.fault}
    return list(found.values())


def _layers(facts: Facts) -> DoctorTable:
    rows: Rows = []
    for layer in () if facts.net is None else facts.net.layers:
        shape = " x ".join(map(str, layer.shape)) or layer.fault
        mm = "-" if layer.cell_mm is None else " x ".join(f"{n:.3g}" for n in layer.cell_mm)
        rows.append((layer.name, layer.asked_by, shape, " x ".join(f"{n:.3g}" for n in layer.cell) or "-", mm))
    says = "Where maps would be taken. A map tells cells apart, nothing smaller; camtrain layers lists all."
    return DoctorTable("Layers", says, ("layer", "asked for by", "channels x cells", "cell, voxels", "cell, mm"), rows)


def _cost(facts: Facts) -> DoctorTable:
    """Memory and time of an epoch, from one batch."""
    net = facts.net
    if net is None:
        return DoctorTable("Memory and time", "", ("", "", ""), [])
    where = "measured" if net.device == "cpu" else f"measured on {net.device}"
    rows: Rows = [
        ("parameters", bytes_in_words(net.parameters), f"{net.kind}"),
        ("gradients and optimiser", bytes_in_words(net.trainable * (1 + net.optimizer_states)), net.optimizer),
        ("a batch", bytes_in_words(net.batch), " x ".join(map(str, net.image_shape))),
    ]
    for name, cost in (("a step", net.step), ("a step with the mask loss", net.masked_step)):
        if cost is not None:
            rows.append((f"kept for backward, {name}", bytes_in_words(cost.held), where))
            rows.append((f"time of {name}", f"{cost.seconds:.3g} s", where))
    if net.memory is not None:
        rows.append(
            ("memory of training, about", bytes_in_words(net.memory), "the sum; workspaces of the device come on top")
        )
    if net.epoch_seconds is not None:
        rows.append(("an epoch, cases at hand", duration(net.epoch_seconds), f"{net.steps:,} steps"))
    if net.read_seconds == net.read_seconds:
        reading = f"{net.train_cases:,} cases x {net.read_seconds:.3g} s / {count(max(1, net.workers), 'worker')}"
        rows.append(("reading all training cases once", duration(net.epoch_reading_seconds), reading))
    if facts.cached_bytes:
        free = "" if facts.free_memory is None else f"of {bytes_in_words(facts.free_memory)} free"
        rows.append(("cases kept in memory", bytes_in_words(facts.cached_bytes), free))
    device = "the CPU of this machine" if net.device == "cpu" else net.device
    says = f"One batch on {device}; nothing was trained, and callbacks that only look come on top."
    return DoctorTable("Memory and time", says, ("", "", "from"), rows)
