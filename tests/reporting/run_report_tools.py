"""Small synthetic runs: a chest of two lungs and a heart, random maps, scores with one label that goes astray."""

from __future__ import annotations

import numpy as np

from camtrain.reporting import RunDir, Score
from camtrain.reporting.panel_files import LAYOUT, CaseMap, PanelVolume, write_maps, write_volume

LABELS = ["nodule", "effusion", "stent"]
METHODS = ["hirescam", "gradcam"]
SIZE = (24, 20, 16)
GRID = (6, 5, 4)


def ball(size, centre, radii):
    grid = np.indices(size)
    return sum(((g - c * n) / (r * n)) ** 2 for g, c, r, n in zip(grid, centre, radii, size, strict=True)) < 1


def chest(size=SIZE, seed=0):
    """Image and the regions of lungs and heart, RAS."""
    rng = np.random.default_rng(seed)
    lungs = ball(size, (0.3, 0.5, 0.5), (0.17, 0.28, 0.4)) | ball(size, (0.72, 0.5, 0.5), (0.17, 0.28, 0.4))
    heart = ball(size, (0.48, 0.6, 0.4), (0.12, 0.14, 0.18))
    image = np.where(ball(size, (0.5, 0.5, 0.5), (0.46, 0.36, 0.9)), 0.6, 0.0)
    image[lungs] = 0.1
    return (image + rng.normal(0, 0.02, size)).astype(np.float32), lungs, heart


def energy(epoch, epochs, label, good=False):
    """`effusion` leaves the organ in the middle of the run, unless it is the good one."""
    if label == 1 and not good:
        return 0.9 - 0.7 * epoch / max(1, epochs - 1)
    return 0.5 + 0.45 * epoch / max(1, epochs - 1)


def scores_of(epoch, epochs, labels, methods=METHODS, split="val", good=False):
    rows = []
    for index, label in enumerate(labels):
        for method in methods:
            inside = energy(epoch, epochs, index, good)
            named = {"energy_inside": inside, "organ_iou": 0.9 * inside, "empty_map_rate": 0.1}
            rows += [Score(epoch, epoch, split, method, label, key, value) for key, value in named.items()]
        rows.append(Score(epoch, epoch, split, "", label, "auroc", 0.6 + 0.01 * index))
    rows += [Score(epoch, epoch, split, m, "mean", "energy_inside", 0.6) for m in methods]
    return rows


def maps_of(epoch, cases, labels, methods=METHODS, grid=GRID, layers=(), seed=0):
    """Case i shows label i; the first label of the second case is a false positive, the first case's last is missed."""
    rng = np.random.default_rng((seed, epoch))
    found = []
    for place, case in enumerate(cases):
        for index, label in enumerate(labels):
            truth = float(index == place % len(labels))
            right = 0.9 if truth else 0.1
            probability = 0.95 if (place, index) == (1, 0) else 0.2 if truth and place == 2 else right
            for method in methods:
                values = rng.normal(0, 1 + epoch, grid).astype(np.float32)
                found.append(CaseMap(case, label, truth, probability, method, "", values, 0.25))
            for depth, layer in enumerate(layers):
                shape = tuple(n * 2 ** (len(layers) - 1 - depth) for n in grid)
                values = rng.normal(0, 1, shape).astype(np.float32)
                found.append(CaseMap(case, label, truth, probability, methods[0], layer, values))
    return found


def make_run(
    root,
    *,
    epochs=4,
    cases=("case 1", "case 2", "case 3"),
    labels=LABELS,
    size=SIZE,
    axes="RAS",
    layers=(),
    good=False,
    grid=GRID,
    facts=None,
    methods=METHODS,
    spacing=(8, 9, 10),
):
    """A run's folder with everything but the report."""
    run = RunDir(root)
    image, lungs, heart = chest(size)
    allowed = {label: heart if index % 3 == 2 else lungs for index, label in enumerate(labels)}
    for case in cases:
        volume = PanelVolume.make(case, image[None], allowed=allowed, spacing=spacing, axes=axes)
        write_volume(run.volume_path(case), volume)
    organs = {label: ["heart"] if index % 3 == 2 else ["lungs"] for index, label in enumerate(labels)}
    table = {"organs": {"lung": 1, "heart": 2}, "groups": {"lungs": ["lung"]}, "labels": organs}
    about = {
        "layout": LAYOUT,
        "labels": list(labels),
        "methods": list(methods),
        "layers": list(layers) or ["layer4"],
        "seen": {"layer4": 1.0},
        "table": table,
        "config": {"model": {"lr": 0.1 if good else 0.2}, "trainer": {"max_epochs": epochs}},
        "command": "camtrain fit --config phantom.yaml",
        "versions": {"camtrain": "0.1.0"},
    }
    run.write_facts({**about, **(facts or {})})
    rows = []
    for epoch in range(epochs):
        rows += scores_of(epoch, epochs, labels, methods, good=good)
        found = maps_of(epoch, cases, labels, methods, grid, layers, seed=int(good))
        write_maps(run.maps_path(epoch), found, epoch=epoch, step=10 * epoch)
    run.write_scores(rows)
    return run
