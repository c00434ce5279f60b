"""The drawn VOC tree: its format, its truth, and that every picture follows from seed, split and number."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from camtrain import InputError
from camtrain.data import PascalVOCDataModule, make_voc_tree
from camtrain.data.voc_files import CLASSES
from camtrain.data.voc_pictures import OBJECTS, draw_picture
from camtrain.data.voc_tree import palette


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_voc_tree(tmp_path_factory.mktemp("voc") / "tree", train=24, val=8, test=4, size=(48, 64), masks=0.7)


@pytest.mark.slow
def test_a_data_module_reads_it(tree):
    data = PascalVOCDataModule(tree, size=48, image_set="Main", batch_size=24, test_splits=["val", "test"])
    assert data.labels == [name for name in CLASSES if name in OBJECTS]
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert 0.3 < batch["has_organs"].float().mean() < 1
    assert [len(loader.dataset) for loader in data.test_dataloader()] == [8, 4]
    allowed = data.table.allowed(batch["organs"]).flatten(2).any(dim=2)
    shown = batch["has_organs"][:, None] & (batch["label"] == 1)
    assert (allowed | ~shown)[shown].float().mean() > 0.9  # small ones may be lost to void and resizing
    assert not allowed[(batch["label"] == 0)].any()


def test_lists_annotations_and_masks_agree(tree):
    listed = {kind: (tree / f"ImageSets/{kind}/train.txt").read_text().split() for kind in ("Main", "Segmentation")}
    assert set(listed["Segmentation"]) < set(listed["Main"])
    assert listed["Segmentation"] == [n for n in listed["Main"] if (tree / f"SegmentationClass/{n}.png").exists()]
    told = dict(line.split() for line in (tree / "ImageSets/Main/cat_train.txt").read_text().splitlines())
    assert set(told.values()) <= {"1", "0", "-1"}
    for name in listed["Main"]:
        root = ElementTree.parse(tree / f"Annotations/{name}.xml").getroot()  # noqa: S314 - our own file
        marks = [o.findtext("difficult") for o in root.findall("object") if o.findtext("name") == "cat"]
        assert told[name] == ("-1" if not marks else "1" if "0" in marks else "0")
        picture = Image.open(tree / f"JPEGImages/{name}.jpg")
        assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (64, 48))
        for box in root.iter("bndbox"):
            left, top, right, bottom = (int(box.findtext(k)) for k in ("xmin", "ymin", "xmax", "ymax"))
            assert 1 <= left <= right <= 64
            assert 1 <= top <= bottom <= 48


def test_masks_hold_classes_void_and_vocs_palette(tree):
    for name in (tree / "ImageSets/Segmentation/train.txt").read_text().split():
        classes, objects = (Image.open(tree / f"Segmentation{kind}/{name}.png") for kind in ("Class", "Object"))
        assert classes.mode == objects.mode == "P"
        ids, numbers = np.asarray(classes), np.asarray(objects)
        assert (ids == 255).any()
        assert ((ids == 255) == (numbers == 255)).all()
        assert ((ids == 0) == (numbers == 0)).all()
        assert set(np.unique(ids)) <= {0, 255, *(CLASSES.index(n) + 1 for n in OBJECTS)}
    colours = np.array(palette()).reshape(256, 3)
    assert colours[[0, 1, 2, 15, 255]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [192, 128, 128],
        [224, 224, 192],
    ]


def test_pictures_follow_from_seed_split_and_number(tree, tmp_path):
    more = make_voc_tree(tmp_path / "more", train=26, val=0, test=0, size=(48, 64), masks=0.7)
    other = make_voc_tree(tmp_path / "other", train=1, val=0, test=0, size=(48, 64), seed=1)
    for number in (0, 7):
        for file in (f"JPEGImages/train_{number:06d}.jpg", f"Annotations/train_{number:06d}.xml"):
            assert (tree / file).read_bytes() == (more / file).read_bytes()
    first = "JPEGImages/train_000000.jpg"
    assert (other / first).read_bytes() != (tree / first).read_bytes()
    assert (tree / "JPEGImages/val_000000.jpg").read_bytes() != (tree / first).read_bytes()


@pytest.mark.parametrize("name", OBJECTS)
def test_every_class_can_be_drawn_and_stands_out(name):
    for seed in range(6):
        picture, (drawn,) = draw_picture([name], (64, 80), np.random.default_rng(seed))
        assert picture.shape == (64, 80, 3)
        assert picture.min() >= 0
        assert picture.max() <= 1
        assert drawn.whole.sum() > 60
        assert not (drawn.visible & ~drawn.whole).any()


def test_what_stands_before_hides_what_stands_behind():
    hidden = 0
    for seed in range(12):
        _, objects = draw_picture(["sheep", "car", "sheep"], (48, 48), np.random.default_rng(seed))
        seen = np.stack([o.visible for o in objects])
        assert seen.sum(axis=0).max() <= 1  # a pixel shows one object
        hidden += sum(int((o.whole & ~o.visible).sum()) for o in objects[:2])
        assert not (objects[2].whole & (seen[0] | seen[1])).any()
    assert hidden > 0


def test_difficult_objects_are_unknown_and_void(tree):
    data = PascalVOCDataModule(tree, size=(48, 64), batch_size=24, val="train", test_splits=["train"])
    batch = next(iter(data.val_dataloader()))
    unknown = batch["label"].isnan()
    assert unknown.any()
    assert not data.table.allowed(batch["organs"]).flatten(2).any(dim=2)[unknown].any()


@pytest.mark.parametrize(("arguments", "says"), [
    ({"train": -1}, "train expects"),
    ({"labels": ["horse"]}, "does not know 'horse'"),
    ({"labels": ["cat", "cat"]}, "different classes"),
    ({"labels": []}, "different classes"),
    ({"size": 16}, "at least 24 pixels"),
    ({"masks": 1.5}, "share from 0 to 1"),
])  # fmt: skip
def test_wrong_arguments_are_refused(tmp_path, arguments, says):
    with pytest.raises(InputError, match=says):
        make_voc_tree(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_folders_in_use_are_left_alone(tree):
    with pytest.raises(InputError, match="empty or new folder"):
        make_voc_tree(tree, train=1)
