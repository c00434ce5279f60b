"""Small batches of maps wait for each other: what a metric's update costs hardly depends on how many maps it gets.

On volumes of 32^3 the maps of a batch are a few hundred numbers, and eight metrics take 3 ms for them whatever their
number, beside a forward of 45 ms.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

ROWS = 64
"""Cases that wait at most."""
CELLS = 1 << 18
"""Numbers that wait at most, of all tensors together: a megabyte of float32."""


class WaitingRows:
    """Rows of named tensors, copied into one block of memory that stays.

    A block, because tensors kept of every batch lie between the large ones of the network and keep the C allocator from
    joining what is freed around them: the process would grow (see `add_block`).

    Example:
        >>> import torch
        >>> rows = WaitingRows()
        >>> rows.take({"maps": torch.ones(2, 3, 4), "label": torch.zeros(2, 3)}), len(rows)
        (True, 2)
        >>> {name: tuple(each.shape) for name, each in rows.waiting().items()}
        {'maps': (2, 3, 4), 'label': (2, 3)}
    """

    def __init__(self) -> None:
        self._room: dict[str, Tensor] = {}
        self._number = 0

    def __len__(self) -> int:
        """How many rows wait."""
        return self._number

    @property
    def half_full(self) -> bool:
        """Is it time to count them?"""
        return self._number > 0 and 2 * self._number >= len(next(iter(self._room.values())))

    def take(self, fresh: Mapping[str, Tensor]) -> bool:
        """Copy some rows; False where there is no room for them, where rows of another kind wait, or there are none.

        Args:
            fresh: Name -> (b, ...), the same b for all.
        """
        number = len(next(iter(fresh.values())))
        if not number or any(len(each) != number for each in fresh.values()):
            return False  # whoever counts them says what is wrong
        if not self._number:
            self._make_room(fresh)
        end = self._number + number
        if any(not _fits(self._room.get(name), each, end) for name, each in fresh.items()):
            return False
        if len(self._room) != len(fresh):
            return False
        for name, each in fresh.items():
            self._room[name][self._number : end].copy_(each.detach())
        self._number = end
        return True

    def waiting(self) -> dict[str, Tensor]:
        """Name -> the rows that wait, in their order: views, good until the next `take` behind a `cut`."""
        return {name: room[: self._number] for name, room in self._room.items()}

    def cut(self, number: int = 0) -> None:
        """Let go of all rows but the first so many."""
        self._number = min(self._number, number)

    def _make_room(self, fresh: Mapping[str, Tensor]) -> None:
        """As many rows as there is room for; those of large maps do not wait, nor need they."""
        numbers = sum(each[:1].numel() for each in fresh.values())
        rows = min(ROWS, CELLS // max(1, numbers))
        if self._room.keys() == fresh.keys() and all(_fits(self._room[n], each, rows) for n, each in fresh.items()):
            return
        enough = rows >= 2 * len(next(iter(fresh.values())))
        self._room = {n: each.new_empty(rows, *each.shape[1:]) for n, each in fresh.items()} if enough else {}


def _fits(room: Tensor | None, fresh: Tensor, end: int) -> bool:
    """Is there room up to the row `end`, for rows like these?"""
    if room is None or end > len(room) or room.shape[1:] != fresh.shape[1:]:
        return False
    return room.dtype == fresh.dtype and room.device == fresh.device
