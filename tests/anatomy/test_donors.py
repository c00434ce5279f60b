"""The pool of cases that lend their image: never to themselves, both truths where it can, bounded in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camtrain import InputError
from camtrain._batch import Batch
from camtrain.anatomy.donors import DonorPool


def _offer(pool, cases, labels=3, size=(4, 3), seed=0, prevalence=0.3, start=0):
    generator = torch.Generator().manual_seed(seed)
    label = (torch.rand(cases, labels, generator=generator) < prevalence).float()
    label[torch.rand(label.shape, generator=generator) < 0.1] = torch.nan
    pool.offer([f"{start + i}" for i in range(cases)], torch.rand(cases, 1, *size, generator=generator), label)
    return label


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), cases=st.integers(1, 30), count=st.integers(2, 6), labels=st.integers(1, 5))
def test_a_donor_is_never_the_case_itself_and_opposite_where_it_can_be(seed, cases, count, labels):
    pool = DonorPool(count=count)
    label = _offer(pool, cases, labels, seed=seed)
    assert len(pool) == min(cases, count)
    truths = dict(zip(map(str, range(cases)), label, strict=True))
    for case in [*map(str, range(cases)), "a stranger"]:
        for column in range(labels):
            for truth in (0.0, 1.0):
                donor = pool.donor(case, column, truth, (1, 4, 3))
                others = [i for i in pool.ids if i != case]
                assert (donor is None) == (not others)
                if donor is not None:
                    assert donor.id in others
                    opposite = [i for i in others if truths[i][column] == 1 - truth]
                    assert not opposite or donor.id in opposite
                    assert pool.donor(case, column, truth, (1, 4, 3)) is donor


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), labels=st.integers(1, 3))
def test_the_pool_covers_what_the_searched_cases_have(seed, labels):
    # As many places as there are pairs to cover: no pair that occurs may be missing.
    pool = DonorPool(count=2 * labels, search=40)
    label = _offer(pool, 60, labels, seed=seed, prevalence=0.08)
    kept = torch.stack([label[int(i)] for i in pool.ids])
    for truth in (0, 1):
        assert torch.equal((kept == truth).any(0), (label[:40] == truth).any(0))
    assert pool.complete
    assert pool.seen == 40
    assert all(int(i) < 40 for i in pool.ids)


def test_a_rare_finding_takes_the_place_of_a_common_case():
    pool = DonorPool(count=3)
    pool.offer(list("abcd"), torch.rand(4, 1, 5), torch.tensor([[0.0], [0.0], [0.0], [1.0]]))
    assert "d" in pool.ids
    assert pool.donor("new", 0, 0.0, (1, 5)).id == "d"


def test_one_pair_without_a_donor_counts_more_than_second_donors_of_many():
    rare = torch.tensor([[1.0] + [torch.nan] * 8])
    common = torch.tensor([[torch.nan] + [1.0] * 8])
    pool = DonorPool(count=2)
    pool.offer(list("abc"), torch.rand(3, 1, 5), torch.cat([rare, common, common]))
    assert pool.ids == ["a", "b"]


def test_bounds_of_memory_and_count():
    pool = DonorPool(count=10, memory=4 * 200 * 2)
    _offer(pool, 30, size=(10, 20))
    assert len(pool) == 4
    assert pool.nbytes == 4 * 200 * 2
    tiny = DonorPool(memory=1)
    _offer(tiny, 5)
    assert len(tiny) == 2  # fewer would leave a member without a donor
    for option in ("count", "search"):
        with pytest.raises(InputError, match="at least 2 cases"):
            DonorPool(**{option: 1})
    with pytest.raises(InputError, match="number of bytes"):
        DonorPool(memory=0)


def test_half_precision_only_where_it_is_exact_enough():
    pool, label = DonorPool(), torch.zeros(1, 1)
    window = torch.rand(1, 1, 50)
    for name, image in {
        "window": window,
        "hounsfield": 3000 * window - 1000,
        "shifted": window + 1000,
        "huge": 1e6 * window,
        "double": window.double(),
        "half": window.half(),
    }.items():
        pool.offer([name], image, label)
    kept = {donor: pool._kept[i].image for i, donor in enumerate(pool.ids)}
    assert {name for name, image in kept.items() if image.dtype == torch.float16} == {
        *("window", "hounsfield", "double", "half")
    }
    assert kept["shifted"].dtype == torch.float32
    torch.testing.assert_close(kept["hounsfield"].float(), 3000 * window[0] - 1000, atol=3, rtol=0)
    window.zero_()
    assert kept["window"].max() > 0  # a copy


def test_donors_have_the_same_shape_and_repeats_count_once():
    pool = DonorPool()
    pool.offer(["a", "b"], torch.rand(2, 1, 4), torch.tensor([[1.0], [0.0]]))
    pool.offer(["c"], torch.rand(1, 1, 5), torch.tensor([[1.0]]))
    pool.offer(["a"], torch.rand(1, 1, 4), torch.tensor([[1.0]]))
    assert (len(pool), pool.seen) == (3, 3)
    assert pool.donor("c", 0, 1.0, (1, 5)) is None
    assert pool.donor("new", 0, 0.0, (1, 5)).id == "c"
    assert pool.donor("b", 0, 1.0, (1, 4)).id == "a"  # the only other one, of the opposite truth or not
    assert pool.donor("a", 0, 0.0, (1, 4)).id == "b"
    with pytest.raises(InputError, match="1 labels as before, got 2"):
        pool.offer(["e"], torch.rand(1, 1, 4), torch.zeros(1, 2))
    with pytest.raises(InputError, match="one id and one label row per image, got 1 ids"):
        pool.offer(["e"], torch.rand(2, 1, 4), torch.zeros(2, 1))


def test_the_first_batches_fill_a_pool_and_no_more_are_read():
    read = []

    def batches(**gone):
        for i in range(9):
            read.append(i)
            words = {"image": torch.rand(3, 1, 4), "label": torch.zeros(3, 1), "ids": [f"{i}{j}" for j in range(3)]}
            yield Batch(**(words | gone), organs=None, has_organs=torch.zeros(3).bool(), affine=None)

    pool = DonorPool.of(batches(), count=2, search=5)
    assert (read, pool.seen, len(pool)) == ([0, 1], 5, 2)
    with pytest.raises(InputError, match="donors need batches with image, label and id"):
        DonorPool.of(batches(ids=None))


def test_not_every_case_gets_the_same_donor():
    pool = DonorPool()
    _offer(pool, 16)
    lent = {pool.donor(f"case-{i:03d}", 0, 1.0, (1, 4, 3)).id for i in range(60)}
    assert len(lent) > 4
