"""What a panel keeps on the host between its case and the end of the pass: planes, not volumes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from camtrain._batch import read_batch
from camtrain.callbacks import _fine_maps, _panel
from camtrain.callbacks._case_scores import scored
from camtrain.callbacks._panel import Panel
from camtrain.metrics import energy_inside, organ_iou
from camtrain.metrics.organ_iou import THRESHOLDS
from camtrain.reporting import compose_case

NAMES, GRID, FINE = ["nodule", "stent"], (5, 4, 3), (40, 32, 24)


def kept_bytes(value):
    """Bytes of all arrays that an object holds on to; a view holds on to what it is a view of."""
    found = {}

    def walk(one):
        if isinstance(one, torch.Tensor):
            raise AssertionError("a tensor was kept")
        if isinstance(one, np.ndarray):
            base = one
            while isinstance(base.base, np.ndarray):
                base = base.base
            assert base.base is None, "memory of a tensor was kept"
            found[id(base)] = base.nbytes
        elif dataclasses.is_dataclass(one):
            walk([getattr(one, f.name) for f in dataclasses.fields(one)])
        elif isinstance(one, dict):
            walk(list(one.values()))
        elif isinstance(one, list | tuple):
            for each in one:
                walk(each)

    walk(value)
    return sum(found.values())


def collected(affine, whole=0, size=FINE):
    """A panel of one case and two labels, and everything it was made of."""
    rng = torch.Generator().manual_seed(0)
    image = torch.rand(1, 1, *size, generator=rng)
    region = torch.zeros(2, *size, dtype=torch.bool)
    region[0, 3:20, 4:18, 5:20], region[1, 20:34, 9:25, 2:15] = True, True
    maps = {"hirescam": torch.randn(1, 2, *GRID, generator=rng), "guided": torch.randn(1, 2, *size, generator=rng)}
    cells = {m: torch.rand(1, 2, *each.shape[2:], generator=rng) < 0.3 for m, each in maps.items()}
    label = torch.ones(1, 2)
    batch = {"image": image, "label": label, "organs": torch.ones(1, 1, *size), "id": ["a"]}
    if affine is not None:
        batch["affine"] = torch.tensor(affine)[None]
    panel, logits = Panel(1, 2, whole=whole), torch.zeros(1, 2)
    rows = panel.wanted(["a"], label, torch.ones(1, dtype=torch.bool), logits.sigmoid())
    words = read_batch(batch)
    panel.collect(rows, ["a"], words, maps, logits, NAMES, lambda row, labels: region[labels], cells)
    return panel.entries, image, region, maps, cells


LPS = [[-1.0, 0, 0, 0], [0, 0, -2.0, 0], [0, 1.5, 0, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("affine", [None, LPS])
def test_a_panel_keeps_planes_and_draws_the_same_pictures(affine):
    entries, image, region, maps, _ = collected(affine)
    assert [entry.label for entry in entries] == NAMES
    x, y, z = FINE
    planes = x * y + x * z + y * z
    fine = 4 * 2 * x * y * z  # the guided maps of both labels, below the limit
    # Through organ and peak: float32 of the image, one byte of the region. Maps and cells besides.
    assert kept_bytes(entries) <= 2 * (2 * planes * (4 + 1)) + fine * 5 / 4 + 2 * 5 * np.prod(GRID) + 1000
    assert kept_bytes([entry.scenes for entry in entries]) < image.numel() * 4
    scale = {"hirescam": 2.0, "guided": 3.0}
    geometry = {} if affine is None else {"spacing": (1.0, 1.5, 2.0), "axes": "LSP"}
    for place, entry in enumerate(entries):
        whole = compose_case(
            image[0].numpy(), {m: each[0, place].numpy() for m, each in maps.items()}, region[place].numpy(),
            caption=entry.caption, scale=scale, **geometry,
        )  # fmt: skip
        drawn = entry.draw(scale)
        assert np.array_equal(drawn.pixels, whole.pixels)
        assert drawn.masks.keys() == whole.masks.keys()
        assert all(np.array_equal(drawn.masks[name], whole.masks[name]) for name in whole.masks)


@pytest.mark.parametrize("whole", [0, 1])
def test_a_map_as_fine_as_the_image_is_scored_whole_and_kept_coarse(monkeypatch, whole):
    """Unless a NIfTI file is wanted of its case."""
    most = 2000
    monkeypatch.setattr(_panel, "is_fine", lambda one: _fine_maps.is_fine(one, most))
    monkeypatch.setattr(_panel, "coarse", lambda one: _fine_maps.coarse(one, most))
    entries, _, _, maps, cells = collected(None, whole)
    limits = {m: torch.tensor([THRESHOLDS[7], THRESHOLDS[30]], dtype=torch.float64) for m in maps}
    done = scored(entries, limits, NAMES)
    for m, each in maps.items():
        ious = organ_iou(each, cells[m], torch.ones(1, 2), thresholds=limits[m])[0].tolist()
        shares = energy_inside(each, cells[m], torch.ones(1, 2))[0].tolist()
        for place, entry in enumerate(done):
            assert entry.organ_iou[m] == pytest.approx(ious[place])
            assert entry.energy_inside[m] == pytest.approx(shares[place])
            assert entry.threshold[m] == pytest.approx(float(limits[m][place]))
    kept = [entry.maps["guided"] for entry in done]
    assert all(one.shape == FINE if whole else one.size <= most for one in kept)
    assert all(entry.maps["hirescam"].shape == GRID for entry in done)
    means = [float(maps["guided"][0, place].mean()) for place in range(2)]
    assert [float(one.mean()) for one in kept] == pytest.approx(means, abs=2e-3)
