"""What reading costs: epochs from NIfTI, from the caches and from memory, interleaved in one run; and bytes per case.

    python benchmarks/reading_cost.py --cases 12 --size 64 --file 128 --repeats 3
    python benchmarks/reading_cost.py --rows 36316        # a large manifest: its check, and the way to the first batch

Ratios are to the time of the same training with the same volumes from a list in memory: of the clock, and of the
processor (which a machine that others use as well does not blur; it misses waiting for the disk, and workers). `first`
starts with an empty cache and reads every file, `later` is the epoch behind it. `loading alone` goes through the same
loaders without a step, so that the few milliseconds by which the caches differ from memory are not lost in the noise of
the steps: its ratio is (step + loading) over (step + loading from memory), in seconds of the processor. The step is
that of MONAI's ResNet-18 on this machine: a faster step makes reading weigh more, workers make it weigh less; the
seconds per case say how much.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.networks.nets import ResNet

from camtrain.data import ManifestDataModule
from camtrain.data.manifest import read_manifest
from camtrain.data.manifest_transforms import collate
from camtrain.models import LitClassifier

Seconds = tuple[float, float]
TABLE = {"organs": {"lung": 1, "heart": 2}, "labels": {"nodule": ["lung"], "effusion": ["lung"], "stent": ["heart"]}}


def write_scans(folder: Path, cases: int, voxels: int, spacing: float) -> Path:
    """Noisy volumes with organs, in HU, that pack about as a CT does."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, voxels)] * 3, indexing="ij"))
    radius = np.sqrt((grid**2).sum(axis=0))
    organs = (radius < 0.7).astype(np.uint8) + (radius < 0.3)
    affine = np.diag([-spacing, -spacing, spacing, 1.0])
    rows = ["id,image,organs,split,nodule,effusion,stent"]
    for i in range(cases):
        hu = np.where(radius < 0.9, 40, -1000) - 800 * (organs == 1) + rng.normal(0, 20, radius.shape)
        nib.save(nib.Nifti1Image(hu.astype(np.int16), affine), folder / f"{i}.nii.gz")
        nib.save(nib.Nifti1Image(organs, affine), folder / f"{i}_organs.nii.gz")
        rows.append(f"{i},{i}.nii.gz,{i}_organs.nii.gz,train,{i % 2},{i // 2 % 2},{i // 4 % 2}")
    (folder / "cases.csv").write_text("\n".join(rows) + "\n")
    return folder / "cases.csv"


def epoch(model: LitClassifier, optimizer: torch.optim.Optimizer, loader: object) -> Seconds:
    """Seconds of one epoch of training, by the clock and of the processor."""
    start = time.perf_counter(), time.process_time()
    for batch in loader:
        optimizer.zero_grad()
        model.training_step(batch, 0).backward()
        optimizer.step()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def loading(loader: object, cases: int, rounds: int = 4) -> float:
    """Seconds of the processor per case to make the batches, without a step: the least of some rounds."""
    used = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in loader:
            pass
        used.append((time.process_time() - start) / cases)
    return min(used)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--size", type=int, default=64, help="voxels per axis that the network sees")
    parser.add_argument("--file", type=int, default=128, help="voxels per axis in the files")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=0, help="rows of a manifest to check instead, with 84 labels")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.rows:
            check_rows(options.rows, folder)
            return
        manifest = write_scans(folder, options.cases, options.file, spacing=300 / options.file)
        measure(options, folder, manifest)


def check_rows(rows: int, folder: Path) -> None:
    """A manifest of many rows (of the same few scans): its form alone, its files too, and the first batch."""
    write_scans(folder, cases=8, voxels=48, spacing=6)
    names = [f"finding_{i}" for i in range(84)]
    lines = [",".join(["id,image,organs,split,patient", *names])]
    lines += [f"c{i},{i % 8}.nii.gz,{i % 8}_organs.nii.gz,train,p{i // 2}" + ",0,1,-1,,0,0" * 14 for i in range(rows)]
    (folder / "many.csv").write_text("\n".join(lines) + "\n")
    for check_files in (False, True):
        start = time.perf_counter(), time.process_time()
        read_manifest(folder / "many.csv", check_files=check_files)
        used = time.perf_counter() - start[0], time.process_time() - start[1]
        what = "form and files" if check_files else "form alone"
        print(f"{rows} rows, 84 labels, {what}: {used[0]:.1f} s by the clock, {used[1]:.1f} s of the processor")
    table = {"organs": {"lung": 1, "heart": 2}, "labels": dict.fromkeys(names, "anywhere")}
    start = time.perf_counter(), time.process_time()
    data = ManifestDataModule(folder / "many.csv", table, size=48, val_split=None, cache_dir=folder / "cache")
    data.setup("fit")
    next(iter(data.train_dataloader()))
    used = time.perf_counter() - start[0], time.process_time() - start[1]
    print(f"data module to first batch: {used[0]:.1f} s by the clock, {used[1]:.1f} s of the processor")


def measure(options: argparse.Namespace, folder: Path, manifest: Path) -> None:
    """All kinds of reading, one after the other in every repeat."""
    torch.manual_seed(0)
    net = ResNet("basic", [2, 2, 2, 2], [64, 128, 256, 512], n_input_channels=1, num_classes=3)
    model = LitClassifier(net, list(TABLE["labels"]))
    model.log = lambda *_, **__: None  # no Trainer here
    optimizer = torch.optim.AdamW(net.parameters())

    def data(cache: object, run: str) -> ManifestDataModule:
        made = ManifestDataModule(
            manifest,
            TABLE,
            spacing=300 / options.size,
            size=options.size,
            num_workers=options.workers,
            cache=cache,
            cache_dir=folder / f"cache{run}",
            val_split=None,
        )
        made.setup("fit")
        return made

    start = time.process_time()
    plain = data(False, "").train_dataloader().dataset
    held = [plain[i] for i in range(options.cases)]
    read = (time.process_time() - start) / options.cases
    memory = torch.utils.data.DataLoader(held, batch_size=2, shuffle=True, collate_fn=collate)
    epoch(model, optimizer, memory)  # warm up
    seconds: dict[str, list[Seconds]] = {}
    alone = {"from memory": loading(memory, options.cases)}
    for repeat in range(options.repeats):
        for kind in ("lazy", "disk", False):
            # Between any two kinds once from memory, so that a machine that slows down slows both.
            seconds.setdefault("from memory", []).append(epoch(model, optimizer, memory))
            loader = data(kind, f"{kind}{repeat}").train_dataloader()
            for when in ("first", "later") if kind else ("every epoch",):
                seconds.setdefault(f"{kind or 'no cache'}, {when}", []).append(epoch(model, optimizer, loader))
            if kind:
                alone[f"{kind}, later"] = min(alone.get(f"{kind}, later", 9e9), loading(loader, options.cases))
    report(options, folder, seconds, read, alone)


def report(
    options: argparse.Namespace,
    folder: Path,
    seconds: dict[str, list[Seconds]],
    read: float,
    alone: dict[str, float],
) -> None:
    """Ratios and bytes."""
    base = [statistics.median(times) for times in zip(*seconds["from memory"], strict=True)]
    print(f"{options.cases} cases, files of {options.file}^3, network {options.size}^3, {options.workers} workers")
    print(f"{'epoch':<22}{'clock s':>9}{'lowest':>9}{'highest':>9}{'ratio':>8}{'cpu s':>9}{'ratio':>8}")
    for kind, times in seconds.items():
        clock, cpu = (list(each) for each in zip(*times, strict=True))
        middle, used = statistics.median(clock), statistics.median(cpu)
        print(
            f"{kind:<22}{middle:>9.2f}{min(clock):>9.2f}{max(clock):>9.2f}{middle / base[0]:>8.3f}"
            f"{used:>9.2f}{used / base[1]:>8.3f}"
        )
    step = base[1] / options.cases - alone["from memory"]
    for kind, used in alone.items():
        ratio = (step + used) / (step + alone["from memory"])
        print(f"loading alone, {kind:<14}{used * 1e3:>8.2f} ms of the processor per case, ratio {ratio:.4f}")
    print(f"processor: step {base[1] / options.cases:.3f} s per case, reading {read:.3f} s per case")
    print(f"reading takes {read / options.file**3 * 1e9:.0f} ns per voxel of the file")
    files = [path.stat().st_size for path in (folder / "cachedisk0").glob("*.pt")]
    scans = [path.stat().st_size for path in folder.glob("*.nii.gz")]
    voxels = options.size**3
    print(f"cache on disk {statistics.mean(files) / voxels:.2f} bytes per voxel of the network's grid")
    print(f"scans and organs {sum(scans) / options.cases / options.file**3:.2f} bytes per voxel of the files")


if __name__ == "__main__":
    main()
