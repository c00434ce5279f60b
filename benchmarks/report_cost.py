"""What an epoch of the report costs: writing the raw maps, and the page around all epochs so far.

    python benchmarks/report_cost.py                # 20 epochs x 12 cases x 8 labels, volumes of 64^3, maps of 8^3
    python benchmarks/report_cost.py --grid 16
    python benchmarks/report_cost.py --epochs 300 --scored 120   # a long run with scores of very many labels

Random maps and noisy volumes: the worst that compression can meet. Times are those of the processor, which a busy
machine does not change.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import numpy as np

from camtrain.reporting import RunDir, RunReport, Score
from camtrain.reporting.case_log import CaseRow, write_cases
from camtrain.reporting.panel_files import CaseMap, PanelVolume, write_maps, write_volume

MEASURES = ("energy_inside", "organ_iou", "pointing_game", "mask_iou", "relevance_rank", "empty_map_rate")


def main() -> None:
    """Make a run epoch by epoch and print seconds and megabytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("epochs", 20), ("cases", 12), ("labels", 8), ("size", 64), ("grid", 8), ("methods", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--scored", type=int, help="labels with scores (default: --labels, those with maps of a case)")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    cases = [f"case {i}" for i in range(options.cases)]
    labels = [f"label {i}" for i in range(options.labels)]
    scored = [*labels, *(f"label {i}" for i in range(options.labels, options.scored or 0)), "mean"]
    methods = ["hirescam", "gradcam", "layercam"][: options.methods]
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(folder)
        start = time.process_time()
        for case in cases:
            image = rng.normal(0, 1, (1, *(options.size,) * 3)).astype(np.float32)
            half = np.zeros(image.shape[1:], dtype=bool)
            half[: options.size // 2] = True
            write_volume(run.volume_path(case), PanelVolume.make(case, image, allowed=dict.fromkeys(labels, half)))
        print(f"volumes, once: {time.process_time() - start:.2f} s")
        report = RunReport(run.path)
        spent = []
        for epoch in range(options.epochs):
            maps = [
                CaseMap(case, label, 1.0, 0.5, method, "", rng.normal(size=(options.grid,) * 3), 0.5)
                for case in cases
                for label in labels
                for method in methods
            ]
            run.write_scores(
                Score(epoch, epoch, "val", method, label, measure, float(rng.random()))
                for method in methods
                for label in scored
                for measure in MEASURES
            )
            write_cases(
                run,
                (
                    CaseRow(epoch, epoch, "val", case, label, 1, 0.5, method, 0.5, 0.5, None, "positive")
                    for case in cases
                    for label in labels
                    for method in methods
                ),
            )
            times = [time.process_time()]
            write_maps(run.maps_path(epoch), maps, epoch=epoch, step=epoch)
            times.append(time.process_time())
            report.write()
            times.append(time.process_time())
            spent.append(np.diff(times))
        first, later = spent[0], np.array(spent[1:] or spent)
        print(f"first epoch (volumes are encoded): maps {first[0]:.3f} s, page {first[1]:.3f} s")
        middle = np.median(later, axis=0)
        print(
            f"median of the others: maps {middle[0]:.3f} s, page {middle[1]:.3f} s; longest {later.sum(1).max():.3f} s"
        )
        last = later[-10:].mean(axis=0)
        print(f"mean of the last {len(later[-10:])}: maps {last[0]:.3f} s, page {last[1]:.3f} s")
        print(f"report.html: {run.report_path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
