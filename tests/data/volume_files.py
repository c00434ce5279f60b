"""Volumes written byte by byte from the formats' definitions: the readers' independent other half."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np

# Axes of three lengths, three spacings, an origin: nothing may be exchanged unnoticed.
SHAPE, SPACING, ORIGIN = (4, 5, 6), (0.5, 1.5, 3.0), (10.0, -20.0, 30.0)
DICOM_STEP, DICOM_ORIGIN = (0.8, 1.2, 2.5), (-100.0, 50.0, 20.0)
# Columns run to the left, rows to the back: an ordinary axial CT (LPS).
AXIAL = (1, 0, 0, 0, 1, 0)


def voxels(dtype="i2", shape=SHAPE):
    return (np.arange(np.prod(shape)).reshape(shape) - 40).astype(dtype)


def write_nrrd(
    path: Path, data, encoding="raw", space="left-posterior-superior", endian="little", extra="", pack=None, axes=None
):
    kinds = {"i1": "int8", "u1": "uchar", "i2": "short", "u2": "uint16", "f4": "float", "f8": "double", "i4": "int"}
    lines = [
        "NRRD0004",
        "# made by a test",
        f"type: {kinds[data.dtype.str[1:]]}",
        f"dimension: {data.ndim}",
        f"space: {space}",
        "sizes: " + " ".join(map(str, data.shape)),
        "space directions: " + " ".join(f"({a},{b},{c})" for a, b, c in (np.diag(SPACING) if axes is None else axes)),
        f"space origin: ({ORIGIN[0]},{ORIGIN[1]},{ORIGIN[2]})",
        f"endian: {endian}",
        f"encoding: {encoding}",
        "note:=a key of the user",
    ]
    packed = data.astype(data.dtype.newbyteorder("<" if endian == "little" else ">")).tobytes(order="F")
    path.write_bytes("\n".join([*lines, *([extra] if extra else []), "", ""]).encode() + (pack or bytes)(packed))
    return path


def write_mha(path: Path, data, packed=False, msb=False, file="LOCAL", **fields):
    kinds = {"i1": "MET_CHAR", "u1": "MET_UCHAR", "i2": "MET_SHORT", "u2": "MET_USHORT", "f4": "MET_FLOAT"}
    body = data.astype(data.dtype.newbyteorder(">" if msb else "<")).tobytes(order="F")
    body = zlib.compress(body) if packed else body
    said = {
        "ObjectType": "Image",
        "NDims": data.ndim,
        "BinaryData": True,
        "BinaryDataByteOrderMSB": msb,
        "CompressedData": packed,
        **({"CompressedDataSize": len(body)} if packed else {}),
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": " ".join(map(str, ORIGIN)),
        "ElementSpacing": " ".join(map(str, SPACING)),
        "DimSize": " ".join(map(str, data.shape)),
        "ElementType": kinds[data.dtype.str[1:]],
        **fields,
        "ElementDataFile": file,
    }
    header = "".join(f"{key} = {value}\n" for key, value in said.items()).encode()
    if file == "LOCAL":
        path.write_bytes(header + body)
    else:
        path.write_bytes(header)
        (path.parent / file).write_bytes(body)
    return path


def write_mrc(path: Path, data, order="<", stamp=None, mode=None, axes=(1, 2, 3), extended=b"", imod=False, **words):
    modes = {"i1": 0, "u1": 0, "i2": 1, "f4": 2, "u2": 6, "f2": 12}
    nx, ny, nz = data.shape
    head = bytearray(1024)
    cell = [n * s * 10 for n, s in zip((nx, ny, nz), SPACING, strict=True)]
    struct.pack_into(order + "4i", head, 0, nx, ny, nz, modes[data.dtype.str[1:]] if mode is None else mode)
    struct.pack_into(order + "3i", head, 28, nx, ny, nz)
    struct.pack_into(order + "6f", head, 40, *cell, 90, 90, 90)
    struct.pack_into(order + "3i", head, 64, *axes)
    struct.pack_into(order + "2i", head, 88, 1, len(extended))
    struct.pack_into(order + "3f", head, 196, *[o * 10 for o in ORIGIN])
    head[208:212] = b"MAP "
    head[212:216] = bytes([0x44, 0x44, 0, 0] if (stamp or order) == "<" else [0x11, 0x11, 0, 0])
    if imod:
        struct.pack_into(order + "2i", head, 152, 1146047817, 0)
    for word, value in words.items():
        struct.pack_into(order + "i", head, 4 * (int(word[1:]) - 1), value)
    path.write_bytes(bytes(head) + extended + data.astype(data.dtype.newbyteorder(order)).tobytes(order="F"))
    return path


def write_series(folder, data, turned=AXIAL, uid="1.2.3", name="s", slope=1, intercept=-1024, shear=0.0, **changes):
    """(columns, rows, slices) as one file per slice, in an order that no name tells."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    assert data.shape[2] <= 11  # names would repeat
    folder.mkdir(exist_ok=True)
    normal = np.cross(turned[:3], turned[3:])
    for place in range(data.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = folder / f"{name}{(place * 7 + 3) % 11:02d}.dcm"
        slice_ = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        slice_.SOPClassUID, slice_.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        slice_.SeriesInstanceUID, slice_.SeriesNumber, slice_.SeriesDescription = uid, 2, "thorax"
        slice_.Modality, slice_.InstanceNumber = "CT", data.shape[2] - place
        slice_.Columns, slice_.Rows = data.shape[:2]
        slice_.PixelSpacing, slice_.SliceThickness = [DICOM_STEP[1], DICOM_STEP[0]], 5
        at = np.array(DICOM_ORIGIN) + place * (normal * DICOM_STEP[2] + np.array([0, shear, 0]))
        slice_.ImagePositionPatient, slice_.ImageOrientationPatient = [float(v) for v in at], list(turned)
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        slice_.BitsAllocated = slice_.BitsStored = 16
        slice_.HighBit, slice_.PixelRepresentation = 15, 0
        slice_.RescaleSlope, slice_.RescaleIntercept = slope, intercept
        slice_.PixelData = data[:, :, place].T.astype("<u2").tobytes()
        for tag, value in changes.items():
            setattr(slice_, tag, value(place) if callable(value) else value)
        slice_.save_as(path, enforce_file_format=True)
    return folder
