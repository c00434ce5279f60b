"""Run a benchmark under an allocator that keeps what was freed. Not a benchmark.

At 256^3 glibc gives some 50 GB back in every step and gets them anew: page faults are then half of the step's processor
time and most of its noise, with the mask loss and without. jemalloc keeps the blocks and joins them, which glibc told
to keep them does not: that ran out of 24 GB.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys

_KEEP = "dirty_decay_ms:-1,muzzy_decay_ms:-1,oversize_threshold:0,narenas:1,thp:always"


def loaded() -> bool:
    """Does this process allocate with jemalloc?"""
    return hasattr(ctypes.CDLL(None), "mallctl")


def start_anew_under_jemalloc() -> None:
    """Replace this process by the same command under jemalloc; nothing where it is loaded already."""
    if loaded():
        return
    found = ctypes.util.find_library("jemalloc")
    if found is None or os.environ.get("LD_PRELOAD") == found:
        sys.exit(
            "--allocator jemalloc needs a libjemalloc that the loader finds, and there is none: "
            "apt install libjemalloc2, or leave the option out"
        )
    surroundings = os.environ | {"LD_PRELOAD": found, "MALLOC_CONF": _KEEP}
    os.execve(sys.executable, [sys.executable, *sys.argv], surroundings)  # noqa: S606
