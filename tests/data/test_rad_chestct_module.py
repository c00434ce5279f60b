"""RAD-ChestCT folders as batches: labels, sides, organs, turns, and folders that cannot be used."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import torch
from test_rad_chestct_files import DEMO, needs_demo

from camtrain import InputError, OrganTable
from camtrain._batch import read_batch
from camtrain.anatomy.partition import lungs_of, rough_organs, segmap_file, split_organs
from camtrain.data import RadChestCTDataModule, make_rad_chestct_tree
from camtrain.data.phantom import Phantom
from camtrain.data.rad_chestct_files import read_scan, read_table
from camtrain.data.rad_chestct_transforms import Turn, affine_of, central_crop
from camtrain.data.rad_chestct_tree import LABELS, to_rad_axes

SIZE = (27, 30, 34)
SMALL = {"size": SIZE, "lung_borders": None, "least_voxels": 40}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A tree and its lungs; nothing is written into it by a test."""
    root = make_rad_chestct_tree(tmp_path_factory.mktemp("rad") / "data", train=6, val=3, test=2, size=(28, 32, 32))
    data = RadChestCTDataModule(root, organs=root.parent / "lungs", make_organs=True, labels=LABELS, **SMALL)
    data.prepare_data()
    return root


@pytest.fixture
def lungs(tree):
    return tree.parent / "lungs"


@pytest.fixture
def copy(tree, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(tree, tmp_path / "data")


def dataset(data, split="train"):
    data.setup("fit" if split != "test" else "test")
    return data._splits[split]


def test_the_tree_is_one_of_the_published_layout(tree):
    names = sorted(file.name for file in tree.iterdir())
    assert [n for n in names if n.startswith("trn")] == [f"trn0000{i}.npz" for i in range(1, 7)]
    volumes = [read_scan(tree / n) for n in names if n.endswith(".npz")]
    assert {v.dtype for v in volumes} == {np.dtype(np.int16)}
    assert all(v.min() >= -1000 and v.max() <= 1000 and v.shape[1] == v.shape[2] for v in volumes)
    assert len({v.shape[0] for v in volumes}) == 3  # numbers of slices differ
    table = read_table(tree / "imgtrain_Abnormality_and_Location_Labels.csv", lambda header: header)
    assert (len(table.columns), table.ids[-1]) == (4368, "trn99999")
    text = (tree / "Extrema_35747.csv").read_text()
    assert "nan" in text
    assert "inf" in text
    with pytest.raises(InputError, match="empty or new folder"):
        make_rad_chestct_tree(tree)


def test_scans_and_truths_are_those_of_the_phantom(tree):
    """Written here once more from the phantom itself: the left lung's nodule is on the left in all tables."""
    case = Phantom(size=(32, 32, 27), shortcut=None).case("train", 0)
    hu = read_scan(tree / "trn00001.npz")
    phantom = np.rint(np.clip(case.hu, -1000, 1000)).astype(np.int16)
    assert np.array_equal(hu, phantom[::-1, ::-1, ::-1].transpose(2, 1, 0))
    left = to_rad_axes(case.organs) == 1  # the phantom's id of the left lung
    assert np.argwhere(left)[:, 2].mean() > hu.shape[2] / 2  # axis 2 runs to the left


def test_batches_keep_the_contract(tree, lungs):
    data = RadChestCTDataModule(tree, organs=lungs, batch_size=3, **SMALL)
    assert (len(data.labels), data.labels) == (80, data.table.labels)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    read = read_batch(batch, outputs=80)
    assert batch["image"].shape == batch["organs"].shape == (3, 1, *SIZE)
    assert (batch["image"].dtype, batch["organs"].dtype) == (torch.float32, torch.uint8)
    assert batch["image"].min() >= -0.449
    assert batch["image"].max() <= 0.551
    assert read.allowed_organs.shape == (3, 80, 5)
    assert read.affine.shape == (3, 4, 4)
    assert read.has_organs.all()
    assert all(p.startswith("trnmrn") for p in batch["patient"])
    assert len(data.train_dataloader().dataset) == 6  # the row without a volume is left out
    assert [len(loader.dataset) for loader in data.test_dataloader()] == [2]
    again = next(iter(RadChestCTDataModule(**data.hparams).val_dataloader()))
    assert torch.equal(again["image"], next(iter(data.val_dataloader()))["image"])


def test_a_case_by_hand(tree, lungs):
    data = RadChestCTDataModule(tree, organs=lungs, labels=LABELS, **SMALL)
    cases = dataset(data)
    hu = read_scan(tree / "trn00002.npz")
    crop = central_crop(hu.shape, SIZE)
    case = cases.case(1, Turn())
    wanted = (np.clip(crop.of(hu, hu.min()), -1000, 800) + 1000) / 1800 - 0.449
    np.testing.assert_allclose(case["image"][0].numpy(), wanted, atol=1e-6)
    organs = crop.of(split_organs(lungs_of(hu, 40), None), 0)
    assert np.array_equal(case["organs"][0].numpy(), organs)
    assert set(np.unique(organs)) == {0, 1, 2, 3}
    np.testing.assert_allclose(case["affine"], crop.affine(affine_of()), atol=1e-6)


@pytest.mark.parametrize("turn", [Turn(0), Turn(1, 1), Turn(2, 2), Turn(None, 3), Turn(2, 0)])
def test_image_organs_and_truth_turn_together(tree, lungs, turn):
    """What a label may be read from, turned, is what it may be read from in the turned scan; names are not touched."""
    data = RadChestCTDataModule(tree, organs=lungs, labels=LABELS, **{**SMALL, "size": (27, 30, 30)})
    cases = dataset(data)
    told = 0
    for index in range(len(cases)):
        plain, turned = cases.case(index, Turn()), cases.case(index, turn)
        for key in ("image", "organs"):
            assert np.array_equal(turn.of(plain[key][0].numpy()), turned[key][0].numpy())
        assert torch.equal(plain["label"], turned["label"])
        before, after = (
            data.table.allowed(c["organs"][None], allowed_organs=c["allowed_organs"][None])[0].numpy()
            for c in (plain, turned)
        )
        for label in range(len(LABELS)):
            assert np.array_equal(turn.of(before[label]), after[label])
        # In world coordinates nothing has moved at all.
        for case, allowed in ((plain, before), (turned, after)):
            where = np.argwhere(allowed.any(0)) @ case["affine"][:3, :3].numpy().T + case["affine"][:3, 3].numpy()
            told += where.mean(0) if case is plain else -where.mean(0)
    np.testing.assert_allclose(told, 0, atol=1e-3)


def test_a_label_may_be_read_from_the_side_of_its_lesion_only(tree, lungs):
    """The phantom knows where it drew a finding; the region that a case allows is that lung, and not the other."""
    names = [label for label in LABELS if label.startswith("lung_")]
    data = RadChestCTDataModule(tree, organs=lungs, labels=names, **{**SMALL, "size": (28, 32, 32)})
    seen = set()
    for cases in (dataset(data), dataset(data, "val")):
        for index, name in enumerate(cases.ids):
            case = cases.case(index, Turn())
            allowed = data.table.allowed(case["organs"][None], allowed_organs=case["allowed_organs"][None])[0]
            both = data.table.allowed(case["organs"][None])[0]
            middle = read_scan(cases.scans[index]).shape[2] // 2
            for label in range(len(names)):
                left, right = cases.truths.left[index, label], cases.truths.right[index, label]
                assert case["allowed_organs"][label].tolist() == [right, True, left, right, left]
                columns = allowed[label].any(0).any(0)
                assert (bool(columns[:middle].any()), bool(columns[middle:].any())) == (right, left), name
                assert (allowed[label].sum() < both[label].sum()) == (left != right)
                seen.add((bool(case["label"][label]), bool(left), bool(right)))
    assert seen >= {(False, True, True), (True, True, False), (True, False, True)}


def test_rough_regions_where_a_lung_is_missing(tree, lungs, tmp_path):
    """Lungs 300 voxels wide are not to be had here: with the authors' borders every scan is a bad one."""
    cases = dataset(RadChestCTDataModule(tree, organs=lungs, **{**SMALL, "lung_borders": (130, 300)}))
    case = cases.case(0, Turn())
    assert np.array_equal(case["organs"][0].numpy(), rough_organs(SIZE))
    assert case["has_organs"]
    none = {**SMALL, "lung_borders": (130, 300), "fallback": "none"}
    case = dataset(RadChestCTDataModule(tree, organs=lungs, **none)).case(0, Turn())
    assert not case["has_organs"]
    assert case["organs"].max() == 0


def test_without_organs(tree):
    case = dataset(RadChestCTDataModule(tree, **SMALL)).case(0, Turn())
    assert not case["has_organs"]


def test_around_the_lungs(tree, lungs, copy):
    centred = {**SMALL, "size": (20, 21, 22), "centre": "lungs"}
    with_table = RadChestCTDataModule(tree, organs=lungs, **centred)
    case = dataset(with_table, "val").case(0, Turn())
    box = with_table._boxes["val00001"]
    middle = np.array([(a + b) / 2 for a, b in box])
    corner = -np.linalg.inv(affine_of()[:3, :3]) @ -case["affine"][:3, 3].numpy()
    np.testing.assert_allclose(corner + np.array(centred["size"]) / 2, middle, atol=1.01)
    (copy / "Extrema_35747.csv").unlink()
    without = dataset(RadChestCTDataModule(copy, organs=lungs, **centred), "val").case(0, Turn())
    assert without["image"].shape == (1, 20, 21, 22)  # from the lungs themselves
    assert abs(without["affine"] - case["affine"]).max() < 3


def test_organs_of_a_segmenter(tree, tmp_path):
    """Ids of any table, on the grid of the scan; sides follow the names of the organs."""
    table = {
        "organs": {"upper_lobe_left": 7, "lobe_right": 9, "heart": 51},
        "labels": {"lung_nodule": ["upper_lobe_left", "lobe_right"], "heart_cardiomegaly": ["heart"]},
    }
    hu = read_scan(tree / "trn00001.npz")
    ids = np.random.default_rng(0).choice([0, 7, 9, 51], hu.shape).astype(np.int32)
    np.savez_compressed(tmp_path / "trn00001_organs.npz", organs=ids)
    shutil.copy(tree.parent / "lungs" / "val00001_seg.npz", tmp_path)
    data = RadChestCTDataModule(tree, organs=tmp_path, table=table, **SMALL)
    assert data.labels == ["lung_nodule", "heart_cardiomegaly"]
    cases = data._read("train")
    case = cases.case(0, Turn())
    assert np.array_equal(case["organs"][0].numpy(), central_crop(hu.shape, SIZE).of(ids, 0))
    assert case["allowed_organs"].shape == (2, 3)
    assert not cases.case(1, Turn())["has_organs"]
    with pytest.raises(InputError, match="expected a table with the organs of the partition"):
        data._read("val").case(0, Turn())
    wrong_ones = (ids[1:], "the grid of its scan"), (ids + 1, "ids that belong to no organ"), (ids - 9, "0 to 255")
    for wrong, says in wrong_ones:
        np.savez_compressed(tmp_path / "trn00001_organs.npz", organs=wrong)
        with pytest.raises(InputError, match=f"trn00001_organs.npz.*{says}"):
            cases.case(0, Turn())


def test_plain_labels(tree):
    data = RadChestCTDataModule(tree, label_set="plain", **SMALL)
    assert len(data.labels) == 84
    batch = next(iter(data.val_dataloader()))
    assert batch["label"].shape == (1, 84)
    assert "allowed_organs" not in batch
    located = RadChestCTDataModule(tree, labels=["lung_nodule"], **SMALL)
    some = [dataset(d).truths.label for d in (data, located)]
    assert np.array_equal(some[0][:, data.labels.index("nodule")], some[1][:, 0])


@needs_demo
def test_the_authors_demo():
    with pytest.raises(InputError, match=r"findings without places.*label_set: plain"):
        RadChestCTDataModule(DEMO)
    data = RadChestCTDataModule(DEMO, label_set="plain", size=(9, 12, 12), batch_size=3)
    assert len(data.labels) == 83  # the older tables have no other_path
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (3, 1, 9, 12, 12)
    assert sorted(batch["patient"]) == ["MRN000", "MRN111", "MRN222"]
    with pytest.raises(InputError, match="expected at least one case with a volume"):
        data.setup("test")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"labels": ["lung_nodul"]}, "'lung_nodul', which has no rule in the table; nearest: lung_nodule"),
        ({"labels": ["lung_nodule", "lung_nodule"]}, "name each one once"),
        ({"labels": []}, "name each one once"),
        ({"label_set": "both"}, "label_set expects 'located', 'plain', got 'both'"),
        ({"sides": "left"}, "sides expects"),
        ({"centre": "heart"}, "centre expects"),
        ({"fallback": "fine"}, "fallback expects"),
        ({"test_splits": ["tst"]}, "test_splits expects 'train', 'val', 'test'"),
        ({"size": (3, 4)}, "three whole numbers"),
        ({"window": (800, -1000)}, "window expects two growing numbers"),
        ({"batch_size": 0}, "batch_size"),
        ({"make_organs": True}, "set organs="),
        ({"tables": "nowhere"}, "expected imgtrain_Abnormality"),
        ({"table": {"organs": {"lung": 1}, "labels": {"liver_mass": ["lung"]}}}, "made of a place"),
    ],
)
def test_wrong_arguments(tree, arguments, says):
    with pytest.raises(InputError, match=re.escape(says)):
        RadChestCTDataModule(tree, **arguments).setup("fit")


def test_wrong_folders(copy, tmp_path):
    with pytest.raises(InputError, match="no such folder: set root="):
        RadChestCTDataModule(tmp_path / "nowhere")
    with pytest.raises(InputError, match="make_organs: true"):
        RadChestCTDataModule(copy, organs=tmp_path / "empty", **SMALL).setup("fit")
    for file in copy.glob("val*.npz"):
        file.unlink()
    with pytest.raises(InputError, match=r"imgvalid_.*none of 4"):
        RadChestCTDataModule(copy, **SMALL).setup("fit")
    (copy / "imgvalid_Abnormality_and_Location_Labels.csv").unlink()
    with pytest.raises(InputError, match="findings of the split 'val'"):
        RadChestCTDataModule(copy, **SMALL).setup("fit")


def test_a_patient_in_two_splits(copy):
    file = copy / "CT_Scan_Metadata_Complete_35747.csv"
    file.write_text(file.read_text().replace("valmrn0000", "trnmrn0001"))
    with pytest.raises(InputError, match=r"'trnmrn0001' in 'train' and 'val' \(1 in all\)"):
        RadChestCTDataModule(copy, **SMALL).setup("fit")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_volume_is_one_sentence(copy, workers):
    (copy / "val00002.npz").write_bytes(b"PK\3\4 no more")
    data = RadChestCTDataModule(copy, num_workers=workers, **SMALL)
    data.setup("fit")
    with pytest.raises(InputError, match=r"^\S*val00002.npz: expected an npz file") as caught:
        list(data.val_dataloader())
    assert "\n" not in str(caught.value)


def test_lungs_are_made_where_they_are_missing(copy, tmp_path, caplog):
    (copy / "tst00001.npz").write_bytes(b"")
    data = RadChestCTDataModule(copy, organs=tmp_path / "lungs", make_organs=True, labels=LABELS, **SMALL)
    data.prepare_data()
    made = {file.name for file in (tmp_path / "lungs").iterdir()}
    wanted = {"tst00002", *(f"trn0000{i}" for i in range(1, 7)), *(f"val0000{i}" for i in (1, 2, 3))}
    assert made == {f"{name}_seg.npz" for name in wanted}
    assert "1 scans could not be segmented, the first is tst00001" in caplog.text
    assert not list(copy.glob("*_seg*"))  # nothing is written beside the scans
    assert segmap_file(tmp_path / "lungs", "trn00001").exists()


def test_the_shipped_table_is_that_of_the_data(tree):
    assert RadChestCTDataModule(tree, **SMALL).table == OrganTable.load("rad_chestct")


def test_orders_follow_from_the_seed_and_the_epoch(tree, lungs):
    """A run that goes on from a checkpoint sees its scans as it would have seen them."""

    def order():
        data = RadChestCTDataModule(tree, organs=lungs, labels=LABELS, batch_size=2, seed=5, **SMALL)
        data.setup("fit")
        return data.train_dataloader().sampler

    whole, resumed = order(), order()
    epochs = [list(whole) for _ in range(3)]
    assert len({tuple(each) for each in epochs}) > 1
    resumed.set_epoch(2)
    assert list(resumed) == epochs[2]
