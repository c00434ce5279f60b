"""Tables of a study whose arms are trained twice, without and with the mask loss, and whose maps are scored by method.

Not a recipe. A run's job has `arm`, `mask_loss` and `seed`; its result `auroc` {name: value} and `maps` {method: {name:
value}}. Comparisons are paired by seed: both nets of a pair saw the same cases and started from the same weights.
"""

from __future__ import annotations

import math
from pathlib import Path

from _runs import Run, finite, hardware, interval, markdown, spread
from PIL import Image

from camtrain.reporting import plot_seeds

METHODS = {"gradcam": "Grad-CAM", "hirescam": "HiResCAM"}
# Of the maps, what the mask loss is trained on or near to it: column -> name in the result.
SEEN = {
    "OrganIoU micro": "organ_iou_micro",
    "OrganIoU macro": "organ_iou",
    "energy inside": "energy_inside",
    "chance": "energy_inside_chance",
}
# What it never saw: column -> name in the result, name of the level of chance.
UNSEEN = {
    "energy in lesions": ("lesions energy", "lesions chance"),
    "lesion hit rate": ("lesions hits", "lesions chance"),
    "energy in eroded organ": ("eroded energy", "eroded chance"),
    "energy in organ, voxels": ("organ energy", "organ chance"),
}


class Paired:
    """Finished runs by arm, mask loss and seed."""

    def __init__(self, runs: list[Run]) -> None:
        self.lost = [run for run in runs if "diverged" in run]
        self.runs = {(r["job"]["arm"], r["job"]["mask_loss"], r["job"]["seed"]): r.get("result") for r in runs}
        self.arms, _, self.seeds = (list(dict.fromkeys(column)) for column in zip(*self.runs, strict=True))

    def values(self, arm: str, mask: bool, method: str | None, name: str) -> list[float]:
        """One value per seed, NaN for a diverged one; without a method: AUROC."""
        found = [self.runs[arm, mask, seed] for seed in self.seeds]
        parts = [{} if r is None else r["maps"][method] if method else r["auroc"] for r in found]
        return [part.get(name, math.nan) for part in parts]

    def rows(self, aurocs: list[str], names: list[str]) -> list[list[str]]:
        """Arms x mask loss x methods, columns as asked for."""
        rows = []
        for arm, mask in ((arm, mask) for arm in self.arms for mask in (False, True)):
            for method, title in METHODS.items():
                ranks = [spread(self.values(arm, mask, None, name)) for name in aurocs]
                scores = [spread(self.values(arm, mask, method, name)) for name in names]
                rows.append([arm, "yes" if mask else "no", title, *ranks, *scores])
        return rows

    def ratio(self, arm: str, name: str, below: str = "gradcam") -> str:
        """HiResCAM with mask loss over another map without: geometric mean and 95 % interval (t on log ratios).

        `-` where a seed scores 0: it has no ratio, and the others alone would be too few or too good.
        """
        pairs = zip(self.values(arm, True, "hirescam", name), self.values(arm, False, below, name), strict=True)
        both = [(a, b) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
        if not both or any(min(pair) <= 0 for pair in both):
            return "-"
        logs = [math.log(a / b) for a, b in both]
        low, high = interval(logs)
        return f"{math.exp(sum(logs) / len(logs)):.2f} ({math.exp(low):.2f}-{math.exp(high):.2f})"

    def change(self, arm: str, name: str) -> str:
        """AUROC with mask loss minus without: mean and 95 % interval (t)."""
        pairs = zip(self.values(arm, True, None, name), self.values(arm, False, None, name), strict=True)
        found = finite(a - b for a, b in pairs)
        if not found:
            return "-"
        low, high = interval(found)
        return f"{sum(found) / len(found):+.3f} ({low:+.3f} to {high:+.3f})"

    def chance(self, name: str) -> float:
        """Mean level of chance over arms and seeds."""
        found = finite(v for arm in self.arms for v in self.values(arm, False, "hirescam", name))
        return sum(found) / len(found) if found else math.nan


def report(table: Paired) -> str:
    """Scores on organs, scores on what the loss never saw, and comparisons paired by seed."""
    first = ["net", "mask loss", "map"]
    organs = markdown([*first, "AUROC", "worst label", *SEEN], table.rows(["mean", "worst"], list(SEEN.values())))
    titles = [f"{title} (chance {table.chance(chance):.3f})" for title, (_, chance) in UNSEEN.items()]
    unseen = markdown([*first, *titles], table.rows([], [name for name, _ in UNSEEN.values()]))
    compared = ["net", "AUROC, with - without", "OrganIoU: both / neither", "OrganIoU: mask loss under HiResCAM"]
    ratios = [
        [
            *(arm, table.change(arm, "mean"), table.ratio(arm, "organ_iou_micro")),
            table.ratio(arm, "organ_iou_micro", "hirescam"),
            *(table.ratio(arm, name) for name, _ in UNSEEN.values()),
        ]
        for arm in table.arms
    ]
    ratio = markdown([*compared, *(f"{title}: both / neither" for title in UNSEEN)], ratios)
    lost = [f"diverged: {run['job']}: {run['diverged']}" for run in table.lost]
    return "\n\n".join([organs, unseen, ratio, f"{len(table.seeds)} seeds; {hardware()}", *lost])


def figure(table: Paired, path: Path) -> None:
    """Bars with seeds as dots."""
    shown = {"OrganIoU (micro)": "organ_iou_micro"} | {title: UNSEEN[title][0] for title in list(UNSEEN)[:2]}
    chance = {"OrganIoU (micro)": table.chance("energy_inside_chance")}
    chance |= {title: table.chance(UNSEEN[title][1]) for title in list(shown)[1:]}
    series = {
        f"{title}, {'mask loss' if mask else 'plain'}": (mask, method)
        for method, title in METHODS.items()
        for mask in (False, True)
    }
    panels = {
        measure: {arm: {s: table.values(arm, *key, name) for s, key in series.items()} for arm in table.arms}
        for measure, name in shown.items()
    }
    pixels = plot_seeds(panels, chance, title="Test cases without shortcuts; bars: mean, dots: seeds")
    Image.fromarray(pixels).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
