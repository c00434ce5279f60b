"""The phantom's randomness: a stream of its own for each part of each case.

The streams are those that numpy's `SeedSequence` starts. One of those takes about as long as the painting of the
spine, and a case has eight; here the seeds of many cases are worked out at once.
"""

from __future__ import annotations

import functools
import zlib
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray

Words = NDArray[np.uint32]
_BLOCK = 64  # cases whose seeds are worked out together


class _Ready(ISeedSequence):
    """A seed sequence whose words are known already."""

    def __init__(self, words: NDArray[np.uint64]) -> None:
        self._words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Any:
        """The words; a PCG64 asks for just these."""
        return self._words


def stream(seed: int, split: str, index: int, name: str) -> np.random.PCG64:
    """Random bits of one part of a case, as `PCG64(SeedSequence([seed, crc32(split), index, crc32(name)]))` has them.

    Example:
        >>> stream(0, "train", 3, "noise").random_raw() == stream(0, "train", 3, "label").random_raw()
        False
    """
    if not (0 <= seed < 2**32 and 0 <= index < 2**32 - _BLOCK):
        words = [seed, zlib.crc32(split.encode()), index, zlib.crc32(name.encode())]
        return np.random.PCG64(np.random.SeedSequence(words))
    block, place = divmod(index, _BLOCK)
    ready: Any = _Ready(_states(seed, split, name, block)[place])  # any seed sequence will do; the types know but one
    return np.random.PCG64(ready)


@functools.lru_cache(maxsize=256)
def _states(seed: int, split: str, name: str, block: int) -> NDArray[np.uint64]:
    """(cases, 4) words that seed a PCG64: `SeedSequence.generate_state(4, np.uint64)` of each case of a block.

    The algorithm is M. O'Neill's `seed_seq_fe`, https://www.pcg-random.org/posts/developing-a-seed_seq-alternative.html
    with the constants that numpy guarantees not to change.
    """
    index = np.arange(_BLOCK * block, _BLOCK * (block + 1), dtype=np.uint32)
    given = seed, zlib.crc32(split.encode()), index, zlib.crc32(name.encode())
    scramble = _Scrambler(0x43B0D7E5, 0x931E8875)
    pool = [scramble(np.broadcast_to(np.asarray(word, np.uint32), index.shape)) for word in given]
    for source in range(4):
        for target in range(4):
            if source != target:
                mixed = np.uint32(0xCA01F9DD) * pool[target] - np.uint32(0x4973F715) * scramble(pool[source])
                pool[target] = mixed ^ (mixed >> np.uint32(16))
    scramble = _Scrambler(0x8B51F9DD, 0x58F38DED)
    words = np.stack([scramble(pool[n % 4]) for n in range(8)], axis=1).astype("<u4")
    states: NDArray[np.uint64] = words.view("<u8").astype(np.uint64)
    states.setflags(write=False)
    return states


class _Scrambler:
    """Hash of words whose constant moves on with every use."""

    def __init__(self, constant: int, factor: int) -> None:
        self._constant, self._factor = constant, factor

    def __call__(self, words: Words) -> Words:
        result = words ^ np.uint32(self._constant)
        self._constant = self._constant * self._factor % 2**32
        result *= np.uint32(self._constant)
        result ^= result >> np.uint32(16)
        return result
