"""The batch contract: what is read from a user's batch, and what is refused with which words."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from monai.data import MetaTensor

from camtrain._batch import read_batch
from camtrain._errors import InputError, nearest

B, L = 3, 4
GRID = (5, 6, 7)


def a_batch(**words):
    rng = torch.Generator().manual_seed(0)
    batch = {
        "image": torch.rand(B, 1, *GRID, generator=rng),
        "label": torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]]).float(),
        "organs": torch.randint(0, 4, (B, 1, *GRID), generator=rng),
    }
    return {k: v for k, v in {**batch, **words}.items() if v is not None}


def test_a_plain_batch():
    given = a_batch(id=["a", "b", "c"], affine=torch.eye(4).repeat(B, 1, 1))
    batch = read_batch(given, outputs=L)
    for word in ("image", "label", "organs", "affine"):
        assert torch.equal(getattr(batch, word), given[word])
    assert batch.ids == ["a", "b", "c"]
    assert batch.has_organs.tolist() == [True] * B
    assert batch.has_organs.dtype == torch.bool


def test_an_image_alone_is_a_batch():
    batch = read_batch({"image": torch.rand(2, 1, 4, 5)})
    assert batch.label is None
    assert batch.organs is None
    assert batch.ids is None
    assert batch.affine is None
    assert batch.has_organs.tolist() == [False, False]


# Labels --------------------------------------------------------------------------------------------------------------


def test_class_indices_become_one_hot():
    label = read_batch(a_batch(label=torch.tensor([2, 0, 3])), outputs=L).label
    assert label.tolist() == [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
    assert label.dtype == torch.float32


def test_one_output_takes_a_vector():
    for label in (torch.tensor([0.0, 1.0, torch.nan]), torch.tensor([0, 1, 1]), torch.tensor([True, False, True])):
        read = read_batch(a_batch(label=label), outputs=1).label
        assert read.shape == (B, 1)
        torch.testing.assert_close(read[:, 0], label.float(), equal_nan=True)


def test_nan_is_unknown_and_passes():
    label = torch.tensor([[torch.nan, 1, 0, 0]] * B)
    torch.testing.assert_close(read_batch(a_batch(label=label), outputs=L).label, label, equal_nan=True)


def test_integer_and_bool_tables_become_float():
    for dtype in (torch.bool, torch.long, torch.uint8, torch.float64):
        read = read_batch(a_batch(label=a_batch()["label"].to(dtype)), outputs=L).label
        assert read.dtype == torch.float32
        assert torch.equal(read, a_batch()["label"])


@pytest.mark.parametrize(
    ("label", "outputs", "words"),
    [
        (torch.full((B, L), 0.3), L, "0, 1 or NaN.*got 0.3.*no soft labels"),
        (torch.full((B, L), 2), L, "got 2"),
        (torch.full((B, L), -1.0), L, "got -1"),
        (torch.full((B, L), torch.inf), L, "got inf"),
        (torch.zeros(B, L + 1), L, "gives 4 outputs but the batch has 5 label columns.*number of outputs"),
        (torch.tensor([0, 1, 4]), L, r"class indices in 0\.\.3, got 0\.\.4"),
        (torch.tensor([0, -1, 2]), L, r"got -1\.\.2"),
        (torch.tensor([0, 1, 2]), None, "number of outputs is unknown"),
        (torch.rand(B), L, r"shape \(B, L\), got \(3,\)"),
        (torch.zeros(B, L, 1), L, r"got \(3, 4, 1\)"),
        (torch.zeros(B - 1, L), L, "got 2 rows for 3 images"),
    ],
)
def test_wrong_labels(label, outputs, words):
    with pytest.raises(InputError, match=words):
        read_batch(a_batch(label=label), outputs=outputs)


# Organs --------------------------------------------------------------------------------------------------------------


def test_whole_floats_are_ids():
    read = read_batch(a_batch(organs=a_batch()["organs"].float()))
    assert not read.organs.is_floating_point()
    assert torch.equal(read.organs, a_batch()["organs"].int())


def test_a_missing_channel_axis_is_put_in():
    assert read_batch(a_batch(organs=a_batch()["organs"][:, 0])).organs.shape == (B, 1, *GRID)


@pytest.mark.parametrize(
    ("organs", "words"),
    [
        (torch.full((B, 1, *GRID), 0.5), "no whole ids.*mode='nearest'"),
        (torch.zeros(B, 2, *GRID, dtype=torch.long), r"shape \(B, 1, \*S\).*got \(3, 2, 5, 6, 7\)"),
        (torch.zeros(B, 1, 5, 6, 8, dtype=torch.long), r"\(5, 6, 8\) but the image has \(5, 6, 7\).*same spatial"),
        (torch.zeros(B, 5, dtype=torch.long), r"got \(3, 5\)"),
    ],
)
def test_wrong_organs(organs, words):
    with pytest.raises(InputError, match=words):
        read_batch(a_batch(organs=organs))


@pytest.mark.parametrize("kind", ["bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"])
@pytest.mark.parametrize("value", [1, 255, -1, 256, 32768])
def test_any_id_is_an_organ_whatever_its_type(kind, value):
    dtype = getattr(torch, kind)
    organs = torch.zeros(B, 1, *GRID, dtype=torch.int64)
    organs[1, 0, -1, -1, -1] = value
    held = organs.to(dtype)
    expected = [any(one.flatten().tolist()) for one in held]
    assert read_batch(a_batch(organs=held)).has_organs.tolist() == expected
    if dtype == torch.int64:
        assert expected == [row == 1 for row in range(B)]


def test_has_organs_is_derived_or_taken():
    organs = a_batch()["organs"]
    organs[1] = 0
    assert read_batch(a_batch(organs=organs)).has_organs.tolist() == [True, False, True]
    for given in (torch.tensor([False, True, True]), torch.tensor([[0], [1], [1]]), [False, True, True]):
        assert read_batch(a_batch(organs=organs, has_organs=given)).has_organs.tolist() == [False, True, True]
    assert read_batch(a_batch(organs=None, has_organs=torch.ones(B))).has_organs.tolist() == [False] * B


# Geometry, names, layouts --------------------------------------------------------------------------------------------


def test_affine_of_a_default_collate_is_unknown_geometry():
    """torch's collate keeps one (4, 4) of a whole batch: whose it is nobody knows."""
    with pytest.warns(UserWarning, match="geometry counts as unknown"):
        assert read_batch(a_batch(affine=torch.eye(4))).affine is None
    one = {k: v[:1] for k, v in a_batch().items()}
    assert read_batch({**one, "affine": torch.eye(4)}).affine.shape == (1, 4, 4)


def test_meta_tensors_end_here_and_leave_their_affine():
    affine = torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0]))
    one = {k: v[:1] for k, v in a_batch().items()}
    batch = read_batch({**one, "image": MetaTensor(one["image"], affine=affine)})
    assert type(batch.image) is torch.Tensor
    torch.testing.assert_close(batch.affine[0].float(), affine)


def test_other_keys():
    given = {"img": torch.rand(2, 1, 4, 5), "y": torch.ones(2, 3), "seg": torch.ones(2, 1, 4, 5).long()}
    batch = read_batch(given, keys={"image": "img", "label": "y", "organs": "seg"}, outputs=3)
    assert batch.image is not None
    assert batch.label.shape == (2, 3)
    assert batch.has_organs.all()
    with pytest.raises(InputError, match="'im' for image, but the batch has img, y, seg"):
        read_batch(given, keys={"image": "im"})
    with pytest.raises(InputError, match="got 'imag'; nearest: image"):
        read_batch(given, keys={"imag": "img"})


def test_an_adapter_reads_any_batch():
    def adapter(batch):
        return {"image": batch.x, "label": batch.y}

    batch = read_batch(SimpleNamespace(x=torch.rand(2, 1, 4), y=torch.ones(2, 3)), adapter=adapter, outputs=3)
    assert batch.label.shape == (2, 3)
    with pytest.raises(InputError, match=r"got tuple.*adapter="):
        read_batch((torch.rand(2, 1, 4), torch.ones(2, 3)))


def test_ids_are_strings():
    assert read_batch(a_batch(id=torch.tensor([3, 1, 2]))).ids is not None
    assert read_batch({k: v[:1] for k, v in a_batch().items()} | {"id": "case 7"}).ids == ["case 7"]


def test_nearest():
    assert nearest("hart", ["heart", "lung"]) == "; nearest: heart"
    assert nearest("zzz", ["heart", "lung"]) == "; known: heart, lung"
    assert nearest("zzz", [f"x{i}" for i in range(20)]).endswith(", ...")
    assert nearest("zzz", []) == ""
