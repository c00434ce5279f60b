"""Batches that wait for each other are counted as they would have been one by one."""

from __future__ import annotations

import warnings

import pytest
import torch

from camtrain._errors import InputError
from camtrain.callbacks import _scores, _waiting_rows
from camtrain.callbacks._scores import ScoreBook
from camtrain.callbacks._waiting_rows import CELLS, ROWS, WaitingRows

NAMES = ["nodule", "stent", "effusion", "goitre"]
METHODS = ["hirescam", "gradcam"]


def batches(sizes, seed=0, grids=((3, 2, 4),), organs=True):
    """Maps with NaN and infinite cells, unknown labels, cases without organs; the grid changes now and then."""
    rng = torch.Generator().manual_seed(seed)
    for number, rows in enumerate(sizes):
        grid = grids[number % len(grids)]
        label = (torch.rand(rows, 4, generator=rng) < 0.5).float()
        label[torch.rand(rows, 4, generator=rng) < 0.1] = torch.nan
        maps = {m: torch.randn(rows, 4, *grid, generator=rng) for m in METHODS}
        maps["hirescam"][label != 1] = torch.nan
        maps["gradcam"][torch.rand(rows, 4, generator=rng) < 0.1] = -1.0
        maps["gradcam"].flatten()[::97] = torch.inf
        allowed = {m: torch.rand(rows, 4, *grid, generator=rng) < 0.4 for m in METHODS} if organs else None
        yield maps, allowed, label, torch.rand(rows, generator=rng) < 0.8, torch.randn(rows, 4, generator=rng)


def scores_of(book):
    return {(s.measure, s.method, s.label): s.value for s in book.compute(METHODS)}


def counted(given, organs=True):
    book = ScoreBook(NAMES, METHODS, organs, torch.device("cpu"))
    for maps, allowed, label, has_organs, logits in given:
        book.kept()  # as the monitor does before each batch
        book.update_logits(logits, label)
        book.update(maps, allowed, label, has_organs, logits)
    return book


@pytest.mark.parametrize("organs", [True, False])
@pytest.mark.parametrize("grids", [((3, 2, 4),), ((3, 2, 4), (5, 1, 2))])
@pytest.mark.parametrize("sizes", [[1] * 150, [2, 3, 1, 5, 2, 40, 1, 2, 100, 3]])
def test_the_scores_are_those_of_batches_counted_at_once(monkeypatch, sizes, grids, organs):
    together = counted(batches(sizes, grids=grids, organs=organs), organs)
    monkeypatch.setattr(_waiting_rows, "ROWS", 0)  # nothing waits
    alone = counted(batches(sizes, grids=grids, organs=organs), organs)
    assert not len(alone._waiting)
    assert len(together._waiting)
    found, wanted = scores_of(together), scores_of(alone)
    assert found.keys() == wanted.keys()
    assert len(wanted) > 30
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key
    for method, best in alone.thresholds(METHODS).items():
        assert torch.equal(best, together.thresholds(METHODS)[method])
    assert together.beside().keys() == alone.beside().keys()
    for name, values in alone.beside().items():
        assert together.beside()[name] == pytest.approx(values), name
    assert not len(together._waiting)


def test_what_a_user_changes_afterwards_is_not_counted():
    given = list(batches([2, 2]))
    wanted = scores_of(counted([tuple(given[0]), tuple(given[1])]))
    book = ScoreBook(NAMES, METHODS, True, torch.device("cpu"))
    for maps, allowed, label, has_organs, logits in batches([2, 2]):
        book.update_logits(logits.clone(), label.clone())
        book.update(maps, allowed, label, has_organs, logits)
        for each in (*maps.values(), label, logits):
            each.fill_(1.0)
        has_organs.zero_()
    assert scores_of(book) == wanted


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), ValueError("another")])
def test_a_batch_that_fails_half_way_is_counted_once(monkeypatch, error):
    """What waits must neither be lost nor counted twice, whichever metric fails, in a batch or in summing up."""
    given = list(batches([3] * 30))
    wanted = scores_of(counted(given))
    calls = {"left": 7}
    original = _scores.RelevanceRank.update_pairs

    def fails(self, pairs):
        calls["left"] -= 1
        if calls["left"] in (6, 3):
            raise error
        return original(self, pairs)

    monkeypatch.setattr(_scores.RelevanceRank, "update_pairs", fails)
    book, failed = ScoreBook(NAMES, METHODS, True, torch.device("cpu")), 0
    for maps, allowed, label, has_organs, logits in given:
        book.update_logits(logits, label)
        while True:
            kept = None
            try:
                kept = book.kept()
                book.update(maps, allowed, label, has_organs, logits)
            except type(error):
                failed += 1
                if kept is not None:
                    book.restore(kept)
                continue
            break
    while len(book._waiting):
        try:
            book.settle()
        except type(error):
            failed += 1
    if isinstance(error, ValueError):
        assert failed == 2
        assert scores_of(book) == pytest.approx(wanted)
    else:  # one by one they are tried before anybody hears of it; then one of them failed by itself
        assert failed == 0
        assert scores_of(book) != wanted


def test_a_case_that_never_fits_is_left_out_alone_and_told_once(monkeypatch):
    given = list(batches([1] * 30))
    others = [batch for number, batch in enumerate(given) if number not in (3, 29)]
    wanted = scores_of(counted(others))
    large = [given[number][0]["hirescam"] for number in (3, 29)]
    original = _scores.ClassSensitivity.update

    def update(self, maps, label):
        if any(torch.equal(row.nan_to_num(), one[0].nan_to_num()) for row in maps for one in large):
            raise MemoryError("too large")
        return original(self, maps, label)

    monkeypatch.setattr(_scores.ClassSensitivity, "update", update)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        book = counted(given)
        found = scores_of(book)
    words = [str(one.message) for one in told if "memory ended" in str(one.message)]
    assert len(words) == 1
    assert "2 case(s) are left out" in words[0]
    of_maps = {key: value for key, value in wanted.items() if key[1] is not None}
    assert {key: found[key] for key in of_maps} == pytest.approx(of_maps)


def test_organs_of_one_case_for_several_are_refused_however_small():
    ((maps, allowed, label, has_organs, logits),) = batches([3])
    book = ScoreBook(NAMES, METHODS, True, torch.device("cpu"))
    with pytest.raises(InputError, match="allowed of shape"):
        book.update(maps, {m: each[:1] for m, each in allowed.items()}, label, has_organs, logits)
    assert not WaitingRows().take({"maps": torch.zeros(0, 4)})


def test_going_back_lets_go_of_the_rows_that_came_since():
    first, second, third = batches([3, 3, 3])
    book, other = (ScoreBook(NAMES, METHODS, True, torch.device("cpu")) for _ in range(2))
    for maps, allowed, label, has_organs, logits in (first, third):
        other.update_logits(logits, label)
        other.update(maps, allowed, label, has_organs, logits)
    for each in (first, second, third):
        maps, allowed, label, has_organs, logits = each
        kept = book.kept()
        if each is not second:
            book.update_logits(logits, label)
        book.update(maps, allowed, label, has_organs, logits)
        if each is second:
            book.restore(kept)
    assert scores_of(book) == scores_of(other)
    book.update(*second)
    book.reset()
    assert not len(book._waiting)


def test_large_maps_and_other_kinds_do_not_wait():
    rows = WaitingRows()
    large = torch.zeros(2, CELLS // 3)
    assert not rows.take({"maps": large})
    small = {"maps": torch.arange(6.0).reshape(2, 3), "label": torch.ones(2, dtype=torch.bool)}
    assert rows.take(small)
    assert not rows.take({"maps": small["maps"]})
    assert not rows.take({"maps": small["maps"].double(), "label": small["label"]})
    assert not rows.take({"maps": torch.zeros(2, 4), "label": small["label"]})
    assert len(rows) == 2
    for _ in range(ROWS // 2 - 1):
        assert rows.take(small)
    assert not rows.take(small)
    assert rows.half_full
    assert torch.equal(rows.waiting()["maps"], small["maps"].repeat(ROWS // 2, 1))
    block = rows.waiting()["maps"].data_ptr()
    rows.cut()
    assert rows.take(small)
    assert rows.waiting()["maps"].data_ptr() == block  # the same memory
    rows.cut()
    assert (len(rows), rows.half_full) == (0, False)
    assert rows.take({"maps": torch.zeros(2, 4), "label": small["label"]})  # an empty one takes any kind
    rows.cut()
    assert rows.take({"maps": torch.zeros(2, 4), "label": small["label"]})
    assert sum(each.numel() for each in rows._room.values()) <= CELLS


def test_no_graph_is_kept_alive():
    rows = WaitingRows()
    maps = torch.ones(1, 2, 3, requires_grad=True)
    assert rows.take({"maps": maps * 2})
    assert not rows.waiting()["maps"].requires_grad
