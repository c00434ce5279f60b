"""What the studies of this folder share: finished runs are kept, diverged ones are told, tables have spread.

Not a recipe. A study is a list of jobs (plain dicts) and a function that trains one and returns plain numbers. Every
finished job is a line of `<out>/runs.jsonl`; a study that was interrupted goes on with what is missing.
"""

from __future__ import annotations

import fcntl
import json
import math
import multiprocessing
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from _start import quiet
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from scipy.stats import t as student

from camtrain import InputError

Job = dict[str, Any]
Run = dict[str, Any]
"""`{"job": ..., "seconds": ...}` with `"result"`, or with `"diverged"` and the reason."""


class Diverged(Exception):  # noqa: N818 - an outcome, not a fault
    """A training whose weights or scores are no longer finite: reported in the tables, never dropped."""


def finish(
    jobs: Sequence[Job],
    train: Callable[[Job], dict[str, Any]],
    out: Path,
    workers: int = 1,
    together: Callable[[Job], Hashable] = lambda job: None,
) -> list[Run]:
    """Do the jobs that are not done yet; returns all runs, in the order of the jobs.

    Args:
        jobs: Settings of each run, as JSON can hold them; equal settings are one run.
        train: Does one job; a function of the recipe's top level. Raises `Diverged` for a run that went astray.
        out: Folder of `runs.jsonl`.
        workers: Processes, each with one thread; 1 = in this process.
        together: Jobs of one key go to one process one after the other (they share data that are made once).
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "runs.jsonl"
    done = {_key(run["job"]): run for run in finished(out)}
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("a") as file:
            file.write("\n")  # an interruption cut a line off; the next one must not join it
    groups: dict[Hashable, list[Job]] = {}
    for job in jobs:
        if _key(job) not in done:
            groups.setdefault(together(job) if workers > 1 else None, []).append(job)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(f"{out.name}: runs", total=len(jobs), completed=len(jobs) - sum(map(len, groups.values())))
        for run in _runs(list(groups.values()), train, path, workers):
            done[_key(run["job"])] = run
            bar.advance(task)
    return [done[_key(job)] for job in jobs]


def _runs(groups: list[list[Job]], train: Callable[[Job], dict[str, Any]], path: Path, workers: int) -> Iterable[Run]:
    if workers == 1:
        for jobs in groups:
            for job in jobs:
                yield _one(job, train, path)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
        try:
            for future in as_completed([pool.submit(_many, jobs, train, path) for jobs in groups]):
                yield from future.result()
        except BrokenProcessPool as error:
            raise InputError(
                f"a worker process was ended from outside (for want of memory?): finished runs are kept in {path}, so "
                "start the same command again, with fewer --workers if need be"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)  # after a fault nobody should wait hours for the other groups


def _many(jobs: list[Job], train: Callable[[Job], dict[str, Any]], path: Path) -> list[Run]:
    return [_one(job, train, path) for job in jobs]


def _one(job: Job, train: Callable[[Job], dict[str, Any]], path: Path) -> Run:
    start = time.perf_counter()
    try:
        outcome: dict[str, Any] = {"result": train(job)}
    except Diverged as reason:
        outcome = {"diverged": str(reason)}
    run = {"job": job, **outcome, "seconds": round(time.perf_counter() - start, 1)}
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(run) + "\n")
    return run


def _one_thread() -> None:
    torch.set_num_threads(1)
    quiet()


def finished(out: Path) -> list[Run]:
    """Runs that are done; a line that is none, as after an interruption, is left out and so done again."""
    path, runs = out / "runs.jsonl", []
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            run = json.loads(line or "null")
        except json.JSONDecodeError:
            run = line
        if isinstance(run, dict) and "job" in run and ("result" in run or "diverged" in run):
            runs.append(run)
        elif run is not None:
            warnings.warn(
                f"{path}, line {number}: cut off or damaged; its run is done again unless a later line holds it",
                stacklevel=2,
            )
    return runs


def _key(job: Job) -> str:
    return json.dumps(job, sort_keys=True)


def finite(values: Iterable[float | None]) -> list[float]:
    """Values that are numbers."""
    return [v for v in values if v is not None and math.isfinite(v)]


def spread(values: Iterable[float | None], digits: int = 3) -> str:
    """Mean and range over seeds, as `0.981 (0.975-0.990)`; one value has no range; `-` without values."""
    found = finite(values)
    if len(found) < 2:
        return f"{found[0]:.{digits}f}" if found else "-"
    return f"{statistics.mean(found):.{digits}f} ({min(found):.{digits}f}-{max(found):.{digits}f})"


def interval(values: Iterable[float | None], level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean over seeds."""
    found = finite(values)
    if len(found) < 2:
        return math.nan, math.nan
    half = student.ppf((1 + level) / 2, len(found) - 1) * statistics.stdev(found) / math.sqrt(len(found))
    return statistics.mean(found) - half, statistics.mean(found) + half


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def hardware() -> str:
    """The machine in a line, for the page of results."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} cores of {name}, torch {torch.__version__}, Python {platform.python_version()}"
