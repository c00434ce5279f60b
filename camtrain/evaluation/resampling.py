"""Resampling of cases, or of patients where they are known: bootstrap multiplicities and swaps of paired models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from camtrain._errors import InputError

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

# Numbers of one chunk of resamplings: 16 MB of float64.
CHUNK = 1 << 21


@dataclass(frozen=True, eq=False)
class Units:
    """What is drawn: the cases, or the patients that they belong to.

    Scans of one patient resemble each other; drawing them one by one would make intervals too narrow.

    Attributes:
        index: (n,) unit of each case, 0 to count - 1.
        count: Number of units.

    Example:
        >>> Units.of(["a", "b", "c", "d"], patients=["p", "q", "p", None]).index
        array([0, 1, 0, 2])
    """

    index: Ints
    count: int

    @staticmethod
    def of(ids: Sequence[str], patients: Sequence[str | None] | None = None) -> Units:
        """Units of cases.

        Args:
            ids: Name of each case (n); cases of one name are one unit.
            patients: Patient of each case; None or "" = unknown, such a case is a unit of its own.

        Raises:
            InputError: No cases, or another number of patients than of cases.
        """
        if not len(ids):
            raise InputError("no cases to resample: score at least one case first")
        names = patients if patients is not None else [None] * len(ids)
        if len(names) != len(ids):
            raise InputError(
                f"expected one patient for each of {len(ids)} cases, got {len(names)}: use None for unknown"
            )
        keys = [("id", i) if p is None or p == "" else ("patient", p) for i, p in zip(ids, names, strict=True)]
        order = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        return Units(np.array([order[key] for key in keys], dtype=np.int64), len(order))

    def __len__(self) -> int:
        """Number of cases."""
        return len(self.index)

    def having(self, mask: Bools) -> Bools:
        """Which units have a case of the mask: (n, ...) bool -> (count, ...) bool."""
        found = np.zeros((self.count, *mask.shape[1:]), dtype=bool)
        where = np.nonzero(mask)
        found[(self.index[where[0]], *where[1:])] = True
        return found


def bootstrap_weights(units: Units, repeats: int, seed: int = 0) -> Floats:
    """How often each case is drawn in each bootstrap repeat (Efron 1979), all repeats at once.

    As many units as there are, drawn with replacement; all cases of a unit share its multiplicity.

    Args:
        units: What is drawn.
        repeats: R.
        seed: The same seed gives the same weights, whatever the chunks.

    Returns:
        (R, n).

    Raises:
        InputError: Fewer than one repeat.

    Example:
        >>> bootstrap_weights(Units.of(["a", "b", "c"]), repeats=4).sum(axis=1)
        array([3., 3., 3., 3.])
    """
    return np.concatenate(list(bootstrap_chunks(units, repeats, seed)))


def bootstrap_chunks(units: Units, repeats: int, seed: int = 0, chunk: int = CHUNK) -> Iterator[Floats]:
    """`bootstrap_weights` in blocks of rows, so that memory does not grow with R x n.

    Args:
        units: What is drawn.
        repeats: R.
        seed: Of the generator.
        chunk: Numbers per block, at least one row.

    Yields:
        (r, n), the r summing up to R.

    Raises:
        InputError: Fewer than one repeat.

    Example:
        >>> [len(w) for w in bootstrap_chunks(Units.of(["a", "b", "c"]), repeats=5, chunk=6)]
        [2, 2, 1]
    """
    rng = np.random.default_rng(seed)
    for rows in _blocks(repeats, len(units), chunk):
        drawn = rng.integers(0, units.count, (rows, units.count))
        cells = drawn + units.count * np.arange(rows)[:, None]
        times = np.bincount(cells.ravel(), minlength=rows * units.count).reshape(rows, units.count)
        yield times.astype(np.float64)[:, units.index]


def swaps_are_exact(units: Units, repeats: int) -> bool:
    """Are there so few units that all swaps are tried, instead of random ones?"""
    return units.count < 63 and 2**units.count <= repeats


def swap_chunks(units: Units, repeats: int, seed: int = 0, chunk: int = CHUNK) -> Iterator[Floats]:
    """Swaps of two models under the hypothesis that they are alike: each unit is swapped with probability 1/2.

    All 2^units swaps, the identity among them, when these are no more than `repeats`; else random ones.

    Args:
        units: What is swapped as one.
        repeats: R.
        seed: Of the generator.
        chunk: Numbers per block, at least one row.

    Yields:
        (r, n): 1 = swapped, 0 = as it is.

    Raises:
        InputError: Fewer than one repeat.

    Example:
        >>> np.concatenate(list(swap_chunks(Units.of(["a", "b"]), repeats=100)))
        array([[0., 0.],
               [1., 0.],
               [0., 1.],
               [1., 1.]])
    """
    exact = swaps_are_exact(units, repeats)
    # Another stream than that of the bootstrap under the same seed.
    rng = np.random.default_rng([seed, 1])
    done = 0
    for rows in _blocks(2**units.count if exact else repeats, len(units), chunk):
        if exact:
            swapped = np.arange(done, done + rows)[:, None] >> np.arange(units.count) & 1
        else:
            swapped = rng.integers(0, 2, (rows, units.count))
        done += rows
        yield swapped.astype(np.float64)[:, units.index]


def _blocks(repeats: int, cases: int, chunk: int) -> Iterator[int]:
    """Sizes of blocks of rows."""
    if isinstance(repeats, bool) or not isinstance(repeats, int | np.integer) or repeats < 1:
        raise InputError(f"expected at least one resampling, got {repeats!r}: 2000 is usual")
    rows = max(1, chunk // max(1, cases))
    for start in range(0, int(repeats), rows):
        yield min(rows, int(repeats) - start)
