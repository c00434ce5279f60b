"""Checks of the network on a batch of the data: does a step run, what does it need, what can its maps tell apart."""

from __future__ import annotations

import numpy as np

from camtrain.doctor.facts import Facts
from camtrain.doctor.finding import Finding, Severity, bytes_in_words, count, number_in_words, some
from camtrain.doctor.net_facts import BY_DEFAULT, WatchedLayer

_MEMORY_SHARE = 0.9


def step(facts: Facts) -> list[Finding]:
    """Does a training step run?"""
    if facts.net is None or not facts.net.fault:
        return []
    title = f"a training step of {facts.net.kind} fails"
    todo = "see what came"
    return [Finding("step", "error", title, "a loss from a batch of the data", facts.net.fault, todo)]


def layers(facts: Facts) -> list[Finding]:
    """Are the layers there that the callbacks ask for?"""
    found = []
    for layer in () if facts.net is None else facts.net.layers:
        if layer.fault:
            title = f"{layer.asked_by}: no map can be taken of layer {layer.name!r}"
            todo = "camtrain layers --config ... lists the layers"
            found.append(Finding("layers", "error", title, "a layer with a map", layer.fault, todo))
    return found


def small_organs(facts: Facts) -> list[Finding]:
    """Organs that are smaller than a cell of the map: no map can tell them from what lies beside them."""
    if facts.net is None or facts.table is None:
        return []
    used = {name for rule in facts.table.rules.values() for name in rule.organs}
    found, told = [], set()
    for layer in sorted(facts.net.layers, key=lambda layer: layer.asked_by == BY_DEFAULT):  # those that are used first
        if layer.fault or layer.name in told:
            continue
        told.add(layer.name)
        small = [
            f"{name} ({said})" for name in facts.table.organs if name in used and (said := _smaller(facts, name, layer))
        ]
        if small:
            cell = " x ".join(f"{n:.3g}" for n in layer.cell_mm or layer.cell)
            unit = "mm" if layer.cell_mm else "voxels"
            title = f"{count(len(small), 'organ is', 'organs are')} smaller than a cell of {layer.name!r}"
            todo = "take an earlier layer (camtrain layers), or smaller voxels: a cell there is half organ at best"
            expected = f"organs larger than a cell, {cell} {unit}"
            # Where callbacks name their layers, nobody takes the one of layer=None.
            aside = layer.asked_by == BY_DEFAULT and any(other.asked_by != BY_DEFAULT for other in facts.net.layers)
            severity: Severity = "note" if aside else "warning"
            found.append(Finding("small_organs", severity, title, expected, some(small), todo))
    return found


def _smaller(facts: Facts, name: str, layer: WatchedLayer) -> str:
    """In words, where the median organ fills less than a cell."""
    size = organ_size(facts, name)
    if size is None:
        return ""
    volume, unit = size
    cell = float(np.prod(layer.cell_mm)) / 1000 if unit == "ml" and layer.cell_mm else float(np.prod(layer.cell))
    if unit == "ml" and not layer.cell_mm:
        return ""
    return f"{number_in_words(volume)} {unit} in cells of {number_in_words(cell)}" if volume < cell else ""


def organ_size(facts: Facts, name: str) -> tuple[float, str] | None:
    """Median volume of an organ over the cases that have it, in ml or, without geometry, in voxels."""
    volumes, voxels = [], []
    for content in facts.contents.values():
        sizes = [content.organs[i] for i in facts.organ_ids(name) if content.organs and i in content.organs]
        if sizes:
            volumes.append(sum(size.ml for size in sizes))
            voxels.append(sum(size.voxels for size in sizes))
    if not voxels:
        return None
    middle = float(np.median(volumes))
    return (middle, "ml") if middle == middle else (float(np.median(voxels)), "voxels")


def memory(facts: Facts) -> list[Finding]:
    """Do the cases that are kept fit into the memory of this machine, and a step as well?"""
    found = []
    free = facts.free_memory
    if free and facts.cached_bytes > _MEMORY_SHARE * free:
        title = "the cached cases do not fit into the memory of this machine"
        todo = "set cache: 0.3 (a part of the cases) or cache: false, or a smaller size="
        expected = f"at most {bytes_in_words(free)} that are free"
        found.append(Finding("memory", "warning", title, expected, bytes_in_words(facts.cached_bytes), todo))
    net = facts.net
    if net is not None and net.device == "cpu" and net.memory and free and net.memory > _MEMORY_SHARE * free:
        title = "a training step does not fit into the memory of this machine"
        todo = "a smaller batch_size or size, or train where there is more (a GPU counts by its own memory)"
        found.append(
            Finding("memory", "warning", title, f"at most {bytes_in_words(free)}", bytes_in_words(net.memory), todo)
        )
    if net is not None and net.skipped:
        todo = "see what came"
        found.append(Finding("memory", "note", "no training step was measured", "a short one", net.skipped, todo))
    return found
