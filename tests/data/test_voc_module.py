"""PASCAL VOC trees: what is read, how it is resized, and which files are refused."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from camtrain import InputError
from camtrain._batch import read_batch
from camtrain.data import PascalVOCDataModule
from camtrain.data.voc_files import CLASSES, read_objects
from camtrain.data.voc_module import VOCPictures, fit_into

OBJECT = "<object><name>{}</name><difficult>{}</difficult></object>"


def _write(root: Path, name: str, objects: str = "", mask: np.ndarray | None = None, size=(20, 40)) -> None:
    """One picture of a hand-made tree; its left half is red, its right half blue."""
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[:, : size[1] // 2, 0], pixels[:, size[1] // 2 :, 2] = 255, 255
    Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg", quality=95, subsampling=0)
    (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")
    if mask is not None:
        picture = Image.fromarray(mask.astype(np.uint8))
        picture.putpalette([0, 0, 0, 128, 0, 0] + [7] * 762)
        picture.save(root / "SegmentationClass" / f"{name}.png")


@pytest.fixture
def root(tmp_path):
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Main", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    mask = np.zeros((20, 40))
    mask[:, :20] = CLASSES.index("cat") + 1
    mask[:, 20:30], mask[:, 30:] = 255, CLASSES.index("dog") + 1
    part = "<object><name>person</name><part><name>cat</name></part></object>"
    _write(tmp_path, "a", OBJECT.format("cat", 0) + OBJECT.format("dog", 1) + OBJECT.format("cat", 1), mask)
    _write(tmp_path, "b", part)
    lists = {"Main/train": "a\nb\n", "Main/val": "b\n\n", "Segmentation/train": "a\n", "Segmentation/val": "a\n"}
    for name, text in lists.items():
        (tmp_path / "ImageSets" / f"{name}.txt").write_text(text)
    return tmp_path


def test_labels_masks_and_the_batch_contract(root):
    data = PascalVOCDataModule(root, size=(20, 40), image_set="Main", batch_size=2)
    assert data.labels == ["cat", "dog", "person"] == data.table.labels  # VOC's order
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    read = read_batch(batch, outputs=3)
    a, b = batch["id"].index("a"), batch["id"].index("b")
    torch.testing.assert_close(batch["label"][a], torch.tensor([1.0, math.nan, 0.0]), equal_nan=True)
    torch.testing.assert_close(batch["label"][b], torch.tensor([0.0, 0.0, 1.0]))  # parts are no objects
    assert read.has_organs.tolist() == [True, False] if a == 0 else [False, True]
    assert batch["image"].shape == (2, 3, 20, 40)
    assert batch["image"].dtype == torch.float32
    assert batch["image"].min() >= 0
    assert 0.95 < batch["image"].max() <= 1
    assert batch["image"][a, 0, :, :18].min() > 0.9  # red to the left
    assert batch["image"][a, 2, :, 22:].min() > 0.9  # blue to the right
    assert (batch["organs"].shape, batch["organs"].dtype) == ((2, 1, 20, 40), torch.int32)
    assert batch["organs"][b].max() == 0
    data.table.check_ids(batch["organs"])
    cat, dog, person = data.table.allowed(batch["organs"])[a]
    assert cat[:, :20].all()
    assert not cat[:, 20:].any()  # neither void nor dog
    assert dog[:, 30:].all()
    assert dog.sum() == 200
    assert not person.any()


def test_labels_of_the_users_choice(root):
    data = PascalVOCDataModule(root, size=8, labels=["dog", "sofa"], train="val", image_set="Main")
    assert data.labels == ["dog", "sofa"]
    assert next(iter(data.train_dataloader()))["label"].tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(("labels", "says"), [
    (["dgo"], "'dgo', which is no class of PASCAL VOC; nearest: dog"),
    (["dog", "dog"], "different classes"),
    ([], "different classes"),
])  # fmt: skip
def test_wrong_labels_are_refused(root, labels, says):
    with pytest.raises(InputError, match=re.escape(says)):
        PascalVOCDataModule(root, labels=labels)


def test_classes_that_voc_does_not_have(root):
    for name in "ab":
        (root / "Annotations" / f"{name}.xml").write_text(f"<a>{OBJECT.format('unicorn', 0)}</a>")
    with pytest.raises(InputError, match="got unicorn: name the classes as VOC does"):
        PascalVOCDataModule(root)


def test_letterbox_and_squash_move_picture_and_mask_alike(root):
    boxed = next(iter(PascalVOCDataModule(root, size=40).train_dataloader()))
    assert boxed["image"][0, :, :10].max() == 0
    assert boxed["image"][0, :, 30:].max() == 0
    assert boxed["organs"][0, 0, :10].max() == 0
    assert (boxed["organs"][0, 0, 10:30, :20] == 8).all()
    assert boxed["image"][0, 0, 10:30, :18].min() > 0.9
    flat = next(iter(PascalVOCDataModule(root, size=40, resize="squash").train_dataloader()))
    assert (flat["organs"][0, 0, :, :20] == 8).all()
    assert flat["image"][0, 0, :, :18].min() > 0.9
    small = next(iter(PascalVOCDataModule(root, size=(10, 20)).train_dataloader()))
    assert set(small["organs"].unique().tolist()) == {8, 12, 255}  # never an id between two ids


@pytest.mark.parametrize("height", [1, 7, 33])
def test_letterbox_is_centred_and_keeps_proportions(height):
    framed = fit_into(Image.new("L", (30, height), 1), (60, 60), "letterbox", Image.Resampling.NEAREST)
    rows = np.flatnonzero(framed.any(axis=1))
    assert abs((rows[0] + rows[-1]) / 2 - 29.5) <= 0.5
    assert abs(len(rows) - min(60, 60 * height / max(30, height))) <= 1
    assert abs(framed.any(axis=0).sum() - 60 * 30 / max(30, height)) <= 1


def test_pictures_beyond_the_memory_are_read_anew(root):
    pictures = PascalVOCDataModule(root, size=8)._split("train").pictures
    kept, anew = (VOCPictures(pictures, ["cat"], (8, 8), memory=memory) for memory in (10**6, 0))
    for _ in range(2):
        for key in ("image", "organs"):
            torch.testing.assert_close(kept[0][key], anew[0][key])
    assert kept[0]["image"].data_ptr() != kept[0]["image"].data_ptr()
    assert (len(kept._kept), len(anew._kept)) == (1, 0)


def test_the_order_of_training_follows_the_seed(root):
    (root / "ImageSets/Main/train.txt").write_text("a\nb\n" * 8)

    def order(seed):
        data = PascalVOCDataModule(root, size=8, image_set="Main", batch_size=16, seed=seed)
        torch.rand(3)  # the global generator has no say
        return next(iter(data.train_dataloader()))["id"]

    assert order(1) == order(1) != order(2)


def test_hyper_parameters_rebuild_the_module(root, monkeypatch):
    monkeypatch.chdir(root.parent)
    data = PascalVOCDataModule(root.name, size=(8, 12), labels=["dog"], test_splits="val", resize="squash")
    arguments = dict(data.hparams)
    assert all(isinstance(v, str | int | list) for v in arguments.values())
    monkeypatch.chdir("/")
    again = PascalVOCDataModule(**arguments)
    assert (again.labels, again.size, again.resize, again.table) == (["dog"], (8, 12), "squash", data.table)
    assert len(again.test_dataloader()) == 1


def _text(file):
    return lambda root: (root / file).write_text("not what it should be")


def _cut(file):
    return lambda root: (root / file).write_bytes((root / file).read_bytes()[:-200])


def _mask(array, size=None):
    def put(root):
        Image.fromarray(np.asarray(array, np.uint8)).resize(size or (40, 20), 0).save(root / "SegmentationClass/a.png")

    return put


@pytest.mark.parametrize(("breaking", "says"), [
    (lambda root: shutil.rmtree(root / "JPEGImages"), "'JPEGImages' is missing"),
    (lambda root: (root / "ImageSets/Segmentation/train.txt").unlink(), "train.txt: expected a list of pictures"),
    (lambda root: (root / "ImageSets/Segmentation/train.txt").write_text(" \n"), "got an empty list"),
    (lambda root: (root / "JPEGImages/a.jpg").unlink(), "a.jpg: expected the picture that"),
    (lambda root: (root / "Annotations/a.xml").unlink(), "a.xml: expected an annotation (XML), got No such file"),
    (_text("Annotations/a.xml"), "a.xml: expected an annotation as XML"),
    (lambda root: (root / "Annotations/a.xml").write_text("<!DOCTYPE x []><a/>"), "take the DOCTYPE out"),
    (lambda root: (root / "Annotations/a.xml").write_text("<a><object/></a>"), "objects with a name"),
    (lambda root: (root / "Annotations/a.xml").write_text(f"<a>{OBJECT.format('cat', 2)}</a>"), "difficult '2'"),
    (_text("JPEGImages/a.jpg"), "a.jpg: expected a JPEG picture"),
    (_cut("JPEGImages/a.jpg"), "a.jpg: expected a JPEG picture"),
    (_text("SegmentationClass/a.png"), "a.png: expected a PNG mask"),
    (_mask(np.zeros((20, 40, 3))), "a.png: expected a palette PNG whose pixel values are class ids, got mode RGB"),
    (_mask(np.zeros((20, 40)), (20, 40)), "a.png: expected the size of its picture, (40, 20), got (20, 40)"),
    (_mask(np.full((20, 40), 21)), "a.png: expected ids 0..20 and 255 (void), got 21"),
])  # fmt: skip
def test_broken_files_are_named(root, breaking, says):
    breaking(root)
    with pytest.raises(InputError, match=re.escape(says)):
        next(iter(PascalVOCDataModule(root, size=8, labels=["cat"]).train_dataloader()))


def test_a_split_that_nobody_listed(root):
    data = PascalVOCDataModule(root, size=8, test_splits=["tset", "val"], val="vall")
    (root / "ImageSets/Segmentation/test.txt").write_text("a\n")
    with pytest.raises(InputError, match="nearest: val"):
        data.setup("fit")
    with pytest.raises(InputError, match="nearest: test"):
        data.setup("test")


@pytest.mark.parametrize(("arguments", "says"), [
    ({"size": (8, 8, 8)}, "one whole number of pixels or two"),
    ({"size": 0}, "got 0"),
    ({"resize": "crop"}, "resize expects"),
    ({"image_set": "Layout"}, "image_set expects"),
    ({"batch_size": 0}, "batch_size expects a whole number of at least 1, got 0"),
])  # fmt: skip
def test_wrong_arguments_are_refused(root, arguments, says):
    with pytest.raises(InputError, match=says):
        PascalVOCDataModule(root, **arguments)


def test_annotations_without_marks_count_as_not_difficult(tmp_path):
    file = tmp_path / "x.xml"
    file.write_text("\ufeff<annotation><object><name> car </name></object></annotation>", encoding="utf-8")
    assert read_objects(file) == {"car": False}
