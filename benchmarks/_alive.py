"""What a process holds: memory, tensors, graph, hooks, files, threads. Not a benchmark."""

from __future__ import annotations

import gc
import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
MIB = 2**20


def memory() -> dict[str, float]:
    """Unique (USS), resident and, since the last call, peak resident memory in MiB."""
    rollup = _numbers(Path("/proc/self/smaps_rollup"))
    peak = _numbers(Path("/proc/self/status"))["VmHWM"]
    Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
    unique = rollup["Private_Clean"] + rollup["Private_Dirty"]
    return {"USS MiB": unique / 1024, "RSS MiB": rollup["Rss"] / 1024, "peak MiB": peak / 1024}


def _numbers(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def handles() -> dict[str, float]:
    """Open file descriptors and threads of this process."""
    return {
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": _numbers(Path("/proc/self/status"))["Threads"],
    }


def tensors() -> dict[str, float]:
    """Tensors that Python holds, their memory (each storage once), and the nodes of autograd graphs behind them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at deprecated attributes of strangers warns
        found = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in found}
    return {
        "tensors": len(found),
        "tensors MiB": sum(storages.values()) / MIB,
        "graph nodes": graph_nodes(found),
        "objects": len(gc.get_objects()),
    }


def graph_nodes(found: Iterable[Tensor]) -> int:
    """Nodes of the autograd graphs that these tensors keep alive, accumulators of leaves left out."""
    waiting = [each.grad_fn for each in found if each.grad_fn is not None]
    seen: dict[Any, None] = {}
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen[node] = None
            waiting += [behind for behind, _ in node.next_functions if behind is not None]
    return sum(type(node).__name__ != "AccumulateGrad" for node in seen)


def hooks(model: nn.Module) -> dict[str, float]:
    """Hooks on modules and on parameters, and steps that are wrapped."""
    on_modules = sum(len(getattr(module, kind)) for module in model.modules() for kind in _HOOKS)
    on_parameters = sum(len(p._backward_hooks or {}) for p in model.parameters())
    return {"hooks": on_modules + on_parameters, "wrapped steps": sum(k.endswith("_step") for k in vars(model))}


def held_by(owner: Any, strangers: Iterable[Any]) -> float:
    """MiB of tensors, arrays, text and bytes that can be reached from an object, but not through strangers."""
    seen, total = {id(each) for each in strangers}, 0
    waiting = [owner]
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, type | ModuleType | FunctionType | MethodType | nn.Module):
            continue
        seen.add(id(each))
        if issubclass(type(each), Tensor):
            total += each.untyped_storage().nbytes()
        elif isinstance(each, np.ndarray):
            total += each.nbytes
        elif isinstance(each, str | bytes):
            total += len(each)
        elif isinstance(each, Mapping | list | tuple | set | frozenset) or hasattr(each, "__dict__"):
            waiting += gc.get_referents(each)
            waiting += gc.get_referents(vars(each)) if hasattr(each, "__dict__") else []
    return total / MIB


def plain_size(state: Any) -> float:
    """KiB of a state as it goes into a checkpoint."""
    return len(pickle.dumps(state)) / 1024
