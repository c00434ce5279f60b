"""A small tree of pictures in the format of PASCAL VOC, for machines without VOC."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_dilation

from camtrain._errors import InputError
from camtrain.data.phantom import one_of
from camtrain.data.voc_files import CLASSES, VOID
from camtrain.data.voc_pictures import OBJECTS, Drawn, draw_picture

_MOST = 3
_SMALLEST = 24
_HIDDEN = 0.5
"""Visible share of an object below which it is marked difficult, as VOC marks what is hard to recognise."""


def make_voc_tree(
    path: str | os.PathLike[str],
    train: int = 600,
    val: int = 200,
    test: int = 200,
    labels: Sequence[str] = tuple(OBJECTS),
    size: int | tuple[int, int] = 96,
    masks: float = 1.0,
    seed: int = 0,
) -> Path:
    """Draw pictures of animals and things, and write them as PASCAL VOC is written.

    The folder then holds JPEGImages, Annotations (XML with boxes, `truncated`, `occluded`, `difficult`), palette PNGs
    with a border of void (255) in SegmentationClass and SegmentationObject, and ImageSets/Main and /Segmentation,
    for `PascalVOCDataModule` and any other reader. A picture shows one to three objects before a textured ground
    with clutter; where less than half of an object can be seen it is `difficult`, and void in the masks. Such pictures
    are far simpler than photographs: a result on them says nothing about VOC itself.

    Args:
        path: Folder to write, made if missing. It must be empty.
        train: Number of training pictures.
        val: Number of validation pictures.
        test: Number of test pictures.
        labels: Classes to draw: bird, bottle, car, cat, pottedplant, sheep.
        size: Pixels: height and width, or one number.
        masks: Share of the pictures that have masks; in VOC a quarter has.
        seed: Another seed, other pictures. Each follows from seed, split and number alone.

    Returns:
        `path`, the `root=` of the data module.

    Raises:
        InputError: An argument is out of range, or the folder holds files.

    Example:
        >>> import tempfile
        >>> root = make_voc_tree(tempfile.mkdtemp(), train=2, val=1, test=0, size=32)
        >>> sorted(p.name for p in root.iterdir())
        ['Annotations', 'ImageSets', 'JPEGImages', 'SegmentationClass', 'SegmentationObject']
    """
    root = Path(path)
    counts = {"train": train, "val": val, "test": test}
    height_width = (size, size) if isinstance(size, int) else (size[0], size[1])
    _check(root, counts, labels, height_width, masks)
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "SegmentationObject", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    present: dict[str, dict[str, int]] = {}
    masked: set[str] = set()
    splits: dict[str, list[str]] = {}
    for split, count in counts.items():
        splits[split] = [f"{split}_{index:06d}" for index in range(count)]
        for index, name in enumerate(splits[split]):
            rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
            names = [str(n) for n in rng.choice(list(labels), int(rng.choice([1, 2, _MOST], p=[0.45, 0.35, 0.2])))]
            picture, objects = draw_picture(names, height_width, rng)
            has_mask = bool(rng.random() < masks)
            present[name] = _write_case(root, name, picture, objects, has_mask)
            masked |= {name} if has_mask else set()
    splits["trainval"] = splits["train"] + splits["val"]
    _write_sets(root, splits, present, masked, labels)
    return root


def _check(root: Path, counts: Mapping[str, int], labels: Sequence[str], size: tuple[int, int], masks: float) -> None:
    for split, count in counts.items():
        if count < 0:
            raise InputError(f"{split} expects a number of pictures from 0 on, got {count}")
    for name in labels:
        one_of("labels", name, tuple(OBJECTS))
    if not labels or len(set(labels)) < len(labels):
        raise InputError(f"labels expects different classes, got {list(labels)}: name each one once")
    if min(size) < _SMALLEST:
        raise InputError(f"size expects at least {_SMALLEST} pixels, got {size}: smaller objects cannot be drawn")
    if not 0 <= masks <= 1:
        raise InputError(f"masks expects a share from 0 to 1, got {masks}: 0.25 is VOC's")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise InputError(f"expected an empty or new folder to write pictures to, got {root}: name another one")


def _write_case(
    root: Path, name: str, picture: NDArray[np.float32], objects: Sequence[Drawn], has_mask: bool
) -> dict[str, int]:
    """One picture with its annotation and masks; returns class -> 1 (there), or 0 (only difficult ones)."""
    shown = [drawn for drawn in objects if drawn.visible.sum() > 8]
    hard = [bool(d.visible.sum() < max(0.004 * d.visible.size, _HIDDEN * d.whole.sum())) for d in shown]
    pixels = np.round(picture * 255).astype(np.uint8)
    Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg", quality=92)
    if has_mask:
        ids = {
            "SegmentationClass": [CLASSES.index(d.name) + 1 for d in shown],
            "SegmentationObject": list(range(1, len(shown) + 1)),
        }
        for folder, numbers in ids.items():
            mask = Image.fromarray(_mask(shown, numbers, hard, pixels.shape[:2]))
            mask.putpalette(palette())
            mask.save(root / folder / f"{name}.png", optimize=True)
    xml = _annotation(name, pixels.shape[:2], shown, hard, has_mask)
    (root / "Annotations" / f"{name}.xml").write_text(xml, encoding="utf-8")
    found: dict[str, int] = {}
    for drawn, is_hard in zip(shown, hard, strict=True):
        found[drawn.name] = max(found.get(drawn.name, 0), int(not is_hard))
    return found


def _mask(
    objects: Sequence[Drawn], ids: Sequence[int], hard: Sequence[bool], size: tuple[int, ...]
) -> NDArray[np.uint8]:
    """(H, W): numbers of the objects, void around each and in place of difficult ones."""
    mask = np.zeros(size, dtype=np.uint8)
    border = max(1, round(max(size) / 100))
    for drawn, number, is_hard in zip(objects, ids, hard, strict=True):
        mask[drawn.visible] = VOID if is_hard else number
    for drawn in objects:
        mask[binary_dilation(drawn.visible, iterations=border) & ~drawn.visible] = VOID
    return mask


def palette() -> list[int]:
    """VOC's colours: the bits of an index, three by three, become the high bits of red, green and blue."""
    colours = np.zeros((256, 3), dtype=np.uint8)
    for index in range(256):
        for place in range(8):
            for channel in range(3):
                bit = index >> (3 * place + channel) & 1 if 3 * place + channel < 8 else 0
                colours[index, channel] |= bit << (7 - place)
    return [int(value) for value in colours.ravel()]


def _annotation(
    name: str, size: tuple[int, ...], objects: Sequence[Drawn], hard: Sequence[bool], has_mask: bool
) -> str:
    lines = [
        "<annotation>",
        f"  <folder>generated</folder><filename>{escape(name)}.jpg</filename>",
        "  <source><database>drawn by camtrain</database></source>",
        f"  <size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>",
        f"  <segmented>{int(has_mask)}</segmented>",
    ]
    for drawn, is_hard in zip(objects, hard, strict=True):
        rows, columns = np.nonzero(drawn.visible)
        hidden = int(drawn.visible.sum() < 0.95 * drawn.whole.sum())
        lines += [
            f"  <object><name>{drawn.name}</name><pose>Unspecified</pose><truncated>{int(drawn.cut)}</truncated>"
            f"<occluded>{hidden}</occluded><difficult>{int(is_hard)}</difficult>",
            f"    <bndbox><xmin>{columns.min() + 1}</xmin><ymin>{rows.min() + 1}</ymin>"
            f"<xmax>{columns.max() + 1}</xmax><ymax>{rows.max() + 1}</ymax></bndbox></object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])


def _write_sets(
    root: Path,
    splits: Mapping[str, Iterable[str]],
    present: Mapping[str, Mapping[str, int]],
    masked: set[str],
    labels: Sequence[str],
) -> None:
    """Lists of pictures; in Main also one per class, with 1 = there, 0 = only difficult ones, -1 = not there."""
    for folder in ("Main", "Segmentation"):
        (root / "ImageSets" / folder).mkdir(parents=True, exist_ok=True)
    for split, names in splits.items():
        listed = list(names)
        _write_lines(root / "ImageSets" / "Main" / f"{split}.txt", listed)
        _write_lines(root / "ImageSets" / "Segmentation" / f"{split}.txt", [n for n in listed if n in masked])
        for label in labels:
            told = [f"{n} {present[n].get(label, -1):2d}" for n in listed]
            _write_lines(root / "ImageSets" / "Main" / f"{label}_{split}.txt", told)


def _write_lines(file: Path, lines: Sequence[str]) -> None:
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
