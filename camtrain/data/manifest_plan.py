"""Where the cases of a manifest are kept: in memory, on disk or nowhere, by their number and size."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from camtrain._errors import InputError, nearest
from camtrain.data.manifest import Case
from camtrain.data.manifest_cache import can_share, free_memory
from camtrain.data.manifest_files import read_header
from camtrain.data.volume_picture import is_picture, read_picture

Kind = Literal["memory", "lazy", "disk", "none"]
Cache = Literal["auto", "lazy", "disk"]
_log = logging.getLogger(__name__)

# Read before the stage begins: so few that the wait is short, and all broken files are told before the first step.
FEW_CASES, FEW_BYTES = 200, 2 * 2**30
# The part of the free memory that cases may take; the rest is for the network's batches and the workers.
SHARE = 0.6
# Image in float32, organs as 16-bit ids.
BYTES_PER_VOXEL = 6
_SAMPLE = 8


def check_cache(cache: Any, cache_dir: Any, size: Any) -> bool | float | Cache:
    """The argument `cache`, if it makes sense.

    Raises:
        InputError: Another word, a rate outside [0, 1], `"disk"` without a folder, `"lazy"` without a size.
    """
    words = get_args(Cache)
    if isinstance(cache, str):
        if cache not in words:
            raise InputError(
                f"cache expects True, False, a rate in [0, 1], or {', '.join(words)}, got {cache!r}"
                f"{nearest(cache, words)}"
            )
        if cache == "disk" and cache_dir is None:
            raise InputError("cache='disk' expects cache_dir, got none: name a folder with room for the cases")
        if cache == "lazy" and size is None:
            raise InputError("cache='lazy' expects size, got none: cases of any size are kept by cache=True")
    elif not 0 <= float(cache) <= 1:
        raise InputError(f"cache expects True, False or a rate in [0, 1], got {cache}: 0.5 keeps half of the cases")
    return cache  # type: ignore[no-any-return]


@dataclass
class CachePlan:
    """Chooses for one split after the other; what earlier ones were promised is not free any more.

    Attributes:
        cache: The data module's argument.
        size: Its size.
        spacing: Its spacing.
        num_workers: Its workers.
        cache_dir: Its folder.
        promised: Bytes of memory that earlier splits will take.
    """

    cache: bool | float | Cache
    size: Any
    spacing: Any
    num_workers: int
    cache_dir: Path | None
    promised: int = field(default=0)

    def kind(self, split: str, cases: Sequence[Case]) -> Kind:
        """Where the cases of a split are kept."""
        if not isinstance(self.cache, str):
            return "memory" if self.cache else "none"
        if self.cache == "disk":
            return "disk"
        sharing = can_share(self.num_workers)
        if self.cache == "lazy":
            return "lazy" if sharing else "memory"
        needed = self.bytes(cases)
        processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1))
        free = int(SHARE * free_memory() / processes) - self.promised
        kind = self._by_memory(len(cases), needed, free, sharing)
        if kind in ("memory", "lazy"):
            self.promised += needed
        where = {"memory": "in memory", "lazy": "in memory", "disk": f"in {self.cache_dir}", "none": "nowhere"}[kind]
        text = (
            f"{split}: {len(cases)} cases take about {needed / 2**30:.3g} GiB, "
            f"{free / 2**30:.3g} GiB of memory may be used"
        )
        _log.info("%s: kept %s", text, where)
        if kind == "none":
            _log.warning("%s, and there is no cache_dir: every epoch reads all files", text)
        return kind

    def _by_memory(self, cases: int, needed: int, free: int, sharing: bool) -> Kind:
        if needed <= free and cases <= FEW_CASES and needed <= FEW_BYTES:
            return "memory"
        if needed <= free and self.size is not None and sharing:
            return "lazy"
        return "none" if self.cache_dir is None else "disk"

    def bytes(self, cases: Sequence[Case]) -> int:
        """What the cases take once they are read; by the headers of some where `size` does not tell."""
        if self.size is not None:
            return len(cases) * math.prod(self.shape(cases)) * BYTES_PER_VOXEL
        sample = [cases[i] for i in np.linspace(0, len(cases) - 1, min(_SAMPLE, len(cases)), dtype=int)]
        voxels = []
        for case in sample:
            try:
                header = read_header(case.image)
            except InputError:
                continue  # Told when the case is read.
            steps = header.spacing if self.spacing is None else np.broadcast_to(self.spacing, 3)
            voxels.append(header.voxels * math.prod(header.spacing) / math.prod(steps))
        return int(len(cases) * (np.mean(voxels) if voxels else 0) * BYTES_PER_VOXEL)

    def shape(self, cases: Sequence[Case]) -> tuple[int, ...]:
        """(C, *S) of an image."""
        picture = is_picture(cases[0].image)
        axes = 2 if picture else 3
        size = [self.size] * axes if isinstance(self.size, int) else list(self.size)
        return (read_picture(cases[0].image).shape[0] if picture else 1, *size)
