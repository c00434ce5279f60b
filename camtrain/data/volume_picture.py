"""Pictures (PNG, JPEG) as images with two spatial axes: rows, columns; grey or three colours, never a palette."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from monai.data import MetaTensor
from PIL import Image

from camtrain._errors import InputError
from camtrain.data.manifest_paths import suffix_of

SUFFIXES = (".png", ".jpg", ".jpeg")


def is_picture(path: Path) -> bool:
    """By its name.

    Example:
        >>> is_picture(Path("chest.PNG")), is_picture(Path("chest.nii.gz"))
        (True, False)
    """
    return suffix_of(path) in SUFFIXES


def read_picture(path: Path, ids: bool = False) -> MetaTensor:
    """One picture.

    Args:
        path: PNG or JPEG.
        ids: Are the numbers organ ids? A palette's indices are kept then, and colours refused.

    Returns:
        (C, rows, columns), C = 1 for grey and 3 for colours; uint8, int32 for 16-bit greys. The affine counts pixels.

    Raises:
        InputError: It cannot be read, has more pixels than Pillow opens, or colours where ids are expected.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                return _tensor(picture, path, ids)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(
            f"expected a picture of usual size, got more pixels than Pillow opens in {path}: shrink it"
        ) from None
    except Exception as error:  # Whatever Pillow stumbles over, it is the content of this file.
        raise InputError(
            f"expected a readable PNG or JPEG file, got {path}, which fails with {type(error).__name__} "
            f"({str(error)[:120]}): the file is truncated or of another format; copy it again"
        ) from error


def _tensor(picture: Image.Image, path: Path, ids: bool) -> MetaTensor:
    if ids:
        if picture.mode not in ("P", "L", "1", "I", "I;16"):
            raise InputError(
                f"expected one id per pixel, got a picture of mode {picture.mode} in {path}: save ids as grey"
            )
        data = np.asarray(picture).astype(np.int32)[None]
        return MetaTensor(data, affine=np.eye(4))
    mode = picture.mode
    if mode in ("P", "CMYK", "YCbCr", "RGBA", "LA", "PA"):
        grey = mode == "LA"
        picture, mode = picture.convert("L" if grey else "RGB"), "L" if grey else "RGB"
    data = np.asarray(picture)
    if mode in ("1", "L"):
        return MetaTensor(data.astype(np.uint8)[None] * (255 if mode == "1" else 1), affine=np.eye(4))
    if mode.startswith(("I", "F")):
        return MetaTensor(data.astype(np.float32 if mode == "F" else np.int32)[None], affine=np.eye(4))
    return MetaTensor(np.ascontiguousarray(data.transpose(2, 0, 1)), affine=np.eye(4))
