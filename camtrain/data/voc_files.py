"""Reading a tree of PASCAL VOC: lists of pictures, annotations, pictures and their masks, each checked.

```
ROOT/ImageSets/<Main or Segmentation>/<split>.txt    one name per line
ROOT/JPEGImages/<name>.jpg   ROOT/Annotations/<name>.xml   ROOT/SegmentationClass/<name>.png (some names only)
```
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from camtrain._errors import InputError, nearest

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
"""Class i of VOC has the id i + 1 in the masks."""
VOID = 255
"""Id of pixels at the border of objects, and of objects that were left out."""
FOLDERS = ("JPEGImages", "Annotations", "ImageSets")


@dataclass(frozen=True)
class Picture:
    """One picture of a VOC tree, with its annotation read.

    Attributes:
        id: Its name in the lists.
        image: JPEG file.
        mask: Class mask, or None when the picture has none.
        objects: Class -> True when every object of it is marked difficult.
    """

    id: str
    image: Path
    mask: Path | None
    objects: dict[str, bool]

    def label(self, labels: Sequence[str]) -> tuple[float, ...]:
        """One value per label: 1 there, 0 not there, NaN where only difficult objects are there."""
        return tuple(0.0 if name not in self.objects else math.nan if self.objects[name] else 1.0 for name in labels)


def read_split(root: Path, image_set: str, split: str) -> list[Picture]:
    """All pictures of one split.

    Args:
        root: The folder with JPEGImages, Annotations and ImageSets (for the original: `VOCdevkit/VOC2012`).
        image_set: `"Main"` or `"Segmentation"`: folder of the list.
        split: Name of the list, such as `"train"`.

    Returns:
        Pictures in the order of the list.

    Raises:
        InputError: The tree, the list, a picture or an annotation is missing or damaged; the message names the file.
    """
    for folder in FOLDERS:
        if not (root / folder).is_dir():
            raise InputError(
                f"{root}: expected a VOC tree with the folders {', '.join(FOLDERS)}, {folder!r} is missing: "
                "set root= to the folder that holds them, such as VOCdevkit/VOC2012"
            )
    file = root / "ImageSets" / image_set / f"{split}.txt"
    if not file.is_file():
        known = sorted(p.stem for p in file.parent.glob("*.txt") if "_" not in p.stem)
        raise InputError(
            f"{file}: expected a list of pictures, got no such file{nearest(split, known)}: "
            "name a split that has a list, or write one"
        )
    names = [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise InputError(f"{file}: expected one name of a picture per line, got an empty list: name another split")
    return [_picture(root, name, file) for name in names]


def _picture(root: Path, name: str, listed: Path) -> Picture:
    image, mask = root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png"
    if not image.is_file():
        raise InputError(f"{image}: expected the picture that {listed} names, got no such file: restore it")
    return Picture(name, image, mask if mask.is_file() else None, read_objects(root / "Annotations" / f"{name}.xml"))


def read_objects(file: Path) -> dict[str, bool]:
    """Classes in an annotation, in the order of the file.

    Args:
        file: XML with `object` elements, each with a `name` and perhaps `difficult`.

    Returns:
        Class -> True when every object of it is marked difficult. Parts (heads, hands) are no objects.

    Raises:
        InputError: The file is missing, is no XML, or an object has no name or a wrong mark.
    """
    try:
        # Entities cannot be declared without a document type, and that is refused: no file expands to gigabytes.
        text = file.read_text(encoding="utf-8-sig")
        if "<!DOCTYPE" in text:
            raise InputError(f"{file}: expected an annotation without a document type: take the DOCTYPE out")
        root = ElementTree.fromstring(text)  # noqa: S314
    except OSError as error:
        raise InputError(
            f"{file}: expected an annotation (XML), got {error.strerror or error}: every listed picture needs one"
        ) from None
    except (ElementTree.ParseError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: expected an annotation as XML, got {error}: restore the file") from None
    found: dict[str, bool] = {}
    for item in root.findall("object"):
        name = (item.findtext("name") or "").strip()
        mark = (item.findtext("difficult") or "0").strip()
        if not name or mark not in ("0", "1"):
            raise InputError(
                f"{file}: expected objects with a name, and difficult as 0 or 1, got name {name!r} and difficult "
                f"{mark!r}: correct the annotation"
            )
        found[name] = found.get(name, True) and mark == "1"
    return found


def read_picture(picture: Picture) -> tuple[Image.Image, Image.Image | None]:
    """Open the files of a picture.

    Args:
        picture: From `read_split`.

    Returns:
        The RGB picture, and its mask with class ids as pixel values (mode L) or None.

    Raises:
        InputError: A file is damaged, the mask is no palette picture, has another size or ids that are no class.
    """
    image = _open(picture.image, "a JPEG picture").convert("RGB")
    if picture.mask is None:
        return image, None
    mask = _open(picture.mask, "a PNG mask")
    if mask.mode not in ("P", "L"):
        raise InputError(
            f"{picture.mask}: expected a palette PNG whose pixel values are class ids, got mode {mask.mode}: "
            "write the mask with its palette, not as colours"
        )
    if mask.size != image.size:
        raise InputError(
            f"{picture.mask}: expected the size of its picture, {image.size}, got {mask.size}: "
            "resample the mask to the picture (nearest neighbour)"
        )
    ids: NDArray[np.uint8] = np.asarray(mask)
    if odd := set(np.unique(ids).tolist()) - {*range(len(CLASSES) + 1), VOID}:
        raise InputError(
            f"{picture.mask}: expected ids 0..{len(CLASSES)} and {VOID} (void), got {sorted(odd)[0]}: "
            "write the mask with VOC's ids"
        )
    return image, Image.fromarray(ids)


def _open(file: Path, what: str) -> Image.Image:
    try:
        image = Image.open(file)
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow's words of damaged files; a truncated one is read to the end only here.
        raise InputError(f"{file}: expected {what}, got {error}: restore the file") from None
    return image
