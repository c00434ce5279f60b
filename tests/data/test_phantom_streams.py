"""The phantom's randomness is numpy's: the same streams, whatever the way to them."""

import zlib

import numpy as np
import pytest

from camtrain.data.phantom_streams import stream


def numpys(seed, split, index, name):
    words = [seed, zlib.crc32(split.encode()), index, zlib.crc32(name.encode())]
    return np.random.PCG64(np.random.SeedSequence(words))


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32, 2**70])
@pytest.mark.parametrize("index", [0, 63, 64, 799, 2**31, 2**32 - 65, 2**32 - 1, 2**40])
def test_streams_are_those_of_a_seed_sequence(seed, index):
    for split, name in (("train", "noise"), ("test", "label"), ("", "nodule")):
        assert stream(seed, split, index, name).state == numpys(seed, split, index, name).state


def test_each_call_starts_the_stream_anew():
    first = stream(0, "train", 5, "texture").random_raw(8)
    assert np.array_equal(first, stream(0, "train", 5, "texture").random_raw(8))


def test_any_part_seed_split_or_case_has_its_own():
    firsts = [
        stream(seed, split, index, name).random_raw()
        for seed in (0, 1)
        for split in ("train", "val")
        for index in range(70)
        for name in ("label", "marker")
    ]
    assert len(set(firsts)) == len(firsts)
