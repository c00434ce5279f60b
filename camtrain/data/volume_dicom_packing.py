"""How the pixels of a DICOM file are packed (its transfer syntax), and what has to be installed to unpack them.

Source: DICOM PS3.5, annex A (transfer syntaxes); pydicom's guide to decoders for the packages.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

_JPEG, _J2K, _RLE = "pylibjpeg pylibjpeg-libjpeg", "pylibjpeg pylibjpeg-openjpeg", "pylibjpeg pylibjpeg-rle"
# Transfer syntax, without the part that all of DICOM's have -> packages of pip.
_PACKAGES = {
    **dict.fromkeys(("4.50", "4.51", "4.57", "4.70", "4.80", "4.81"), _JPEG),
    **dict.fromkeys(("4.90", "4.91", "4.92", "4.93", "4.201", "4.202", "4.203"), _J2K),
    "5": _RLE,
}
_ROOT = "1.2.840.10008.1.2."


def cannot_unpack(syntax: str) -> tuple[str, str]:
    """Why pixels of a transfer syntax cannot be read here, and what to do; both empty where they can.

    Args:
        syntax: UID of the transfer syntax; "" = not said, which is the plain one.

    Example:
        >>> cannot_unpack("1.2.840.10008.1.2.1")
        ('', '')
    """
    if not syntax or _decodes(syntax):
        return "", ""
    name = str(importlib.import_module("pydicom.uid").UID(syntax).name)
    packages = _PACKAGES.get(syntax.removeprefix(_ROOT))
    text = f"expected pixels that can be unpacked here, got {name}"
    if packages is None:
        return text, "convert the series to NIfTI with dcm2niix"
    return text, f"pip install {packages}, or convert the series to NIfTI with dcm2niix"


@cache
def _decodes(syntax: str) -> bool:
    uids: Any = importlib.import_module("pydicom.uid")
    uid = uids.UID(syntax)
    if uid.is_private or not uid.is_transfer_syntax:
        return True  # unknown to pydicom as well, which says so when it reads
    if not uid.is_encapsulated:
        return True
    try:
        pixels: Any = importlib.import_module("pydicom.pixels")
    except ImportError:  # pydicom 2
        handlers = importlib.import_module("pydicom.config").pixel_data_handlers
        return any(handler.is_available() and handler.supports_transfer_syntax(uid) for handler in handlers)
    try:
        return bool(pixels.get_decoder(uid).is_available)
    except NotImplementedError:
        return False
