"""A folder of DICOM files as one volume: one series, slices in the order of their places, values as rescaled.

Source: DICOM PS3.3, C.7.6.2 (Image Plane) and C.11.1 (Modality LUT). Reading the files is pydicom's work.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camtrain._errors import InputError
from camtrain.data._faults import Faults
from camtrain.data.volume_dicom_packing import cannot_unpack
from camtrain.data.volume_raw import LPS_TO_RAS, RawVolume, VolumeHeader, check_size

_log = logging.getLogger(__name__)

# Slices may lie this part of their distance away from an even grid.
_EVEN = 0.05
# Modality -> what such a file holds.
_NO_SCANS = {"SEG": "a DICOM segmentation (SEG)", "RTDOSE": "a dose (RTDOSE)"}
_TAGS = [
    *("SOPClassUID", "SeriesInstanceUID", "SeriesDescription", "SeriesNumber", "Modality", "Rows", "Columns"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    *("SamplesPerPixel", "NumberOfFrames", "RescaleSlope", "RescaleIntercept", "BitsAllocated", "InstanceNumber"),
]


def read_dicom_header(folder: Path) -> VolumeHeader:
    """Shape and place of the series in a folder, from the headers of all its files.

    Raises:
        InputError: No series, several, or one that makes no even volume; pydicom is not installed.
    """
    slices = _sorted(folder, _headers(folder))
    first = slices[0]
    shape = (int(first.Columns), int(first.Rows), len(slices))
    return VolumeHeader(shape, _affine(slices, folder), "float32" if _scaled(slices) else "int16")


def read_dicom(folder: Path) -> RawVolume:
    """The series in a folder: (columns, rows, slices), slope and intercept applied.

    Raises:
        InputError: As `read_dicom_header`, or pixels are missing, truncated or packed in a way that cannot be read.
    """
    slices = _sorted(folder, _headers(folder))
    shape = (int(slices[0].Columns), int(slices[0].Rows), len(slices))
    kind = np.dtype(np.float32 if _scaled(slices) else np.int32)
    check_size(shape, kind, folder)
    data = np.empty(shape, kind, order="F")
    for place, header in enumerate(slices):
        data[:, :, place] = _pixels(header).T
    return RawVolume(data, _affine(slices, folder))


def series_of(folder: Path) -> dict[str, int]:
    """Series in a folder, by number and description, with the number of their files.

    Raises:
        InputError: No DICOM file is there; pydicom is not installed.
    """
    counts: dict[str, int] = {}
    for header in _headers(folder):
        name = _name(header)
        counts[name] = counts.get(name, 0) + 1
    return counts


def _pydicom() -> Any:
    try:
        return importlib.import_module("pydicom")
    except ImportError:
        raise InputError(
            "reading DICOM expects the package pydicom, which is not installed: pip install 'pydicom>=2.4' (for "
            "packed pixels also pylibjpeg with its plugins), or convert the series to NIfTI with dcm2niix"
        ) from None


def _headers(folder: Path) -> list[Any]:
    """Headers of all images in a folder; other files and other DICOM objects are left out."""
    pydicom = _pydicom()
    found, others = [], 0
    for path in _files(folder):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
        except pydicom.errors.InvalidDicomError:
            others += 1
            continue
        except Exception as error:  # Whatever the header makes pydicom stumble over, it is the content of this file.
            raise InputError(f"expected a DICOM file, got {path}, which fails with {error}: copy it again") from error
        if "Rows" not in header or "SeriesInstanceUID" not in header:
            others += 1
            continue
        header.camtrain_path = path
        found.append(header)
    if not found:
        raise InputError(
            f"expected a folder with a DICOM series, got no DICOM image among {others} files in {folder}: name the "
            "folder that holds the slices"
        )
    if others:
        _log.info("%s: %d files that are no DICOM images are left out", folder, others)
    return found


def _files(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_file() and not entry.name.startswith("."))
    for name in names:
        yield folder / name


def _sorted(folder: Path, headers: Sequence[Any]) -> list[Any]:
    """The slices of the one series from the first to the last, after all checks.

    Raises:
        InputError: All that is wrong with the series.
    """
    series: dict[str, list[Any]] = {}
    for header in headers:
        series.setdefault(str(header.SeriesInstanceUID), []).append(header)
    if len(series) > 1:
        names = "; ".join(f"{_name(of[0])}: {len(of)} files" for of in series.values())
        raise InputError(
            f"expected one DICOM series, got {len(series)} in {folder} ({names}): give each series a folder of its own"
        )
    faults = _Kinds(folder)
    _check_kind(headers, faults)
    faults.stop()
    _check_plane(headers, faults)
    faults.stop()
    normal = _normal(headers[0])
    ordered = sorted(headers, key=lambda h: float(np.dot(normal, _vector(h.ImagePositionPatient))))
    _check_places(folder, ordered, normal)
    return ordered


def _check_kind(headers: Sequence[Any], faults: _Kinds) -> None:
    for header in headers:
        name = header.camtrain_path.name
        if header.get("Modality") in _NO_SCANS:
            faults.add(
                f"expected a scan, got {_NO_SCANS[header.Modality]}",
                name,
                "convert it to a NIfTI label map on the grid of its scan (dcmqi's segimage2itkimage, 3D Slicer) and "
                "name that file",
            )
            continue
        text, todo = cannot_unpack(_syntax(header))
        if text:
            faults.add(text, name, todo)
        if int(header.get("SamplesPerPixel", 1)) != 1:
            faults.add(f"expected grey values, got {header.SamplesPerPixel} colours (RGB)", name, "export grey")
        if int(header.get("NumberOfFrames", 1) or 1) > 1:
            faults.add(
                f"expected one slice per file, got {header.NumberOfFrames} frames",
                name,
                "convert the series to NIfTI with dcm2niix",
            )
            continue  # where its frames lie stands elsewhere, so the tags below would all be missing
        for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
            if not header.get(tag):
                faults.add(f"expected the tag {tag}, got none", name, "it is no slice of a volume; take it out")


def _check_plane(headers: Sequence[Any], faults: _Kinds) -> None:
    first = headers[0]
    odd = "take the odd ones out (localizers are often among them)"
    for header in headers[1:]:
        name = header.camtrain_path.name
        if (header.Rows, header.Columns) != (first.Rows, first.Columns):
            sizes = f"{first.Columns} x {first.Rows} and {header.Columns} x {header.Rows}"
            faults.add(f"expected slices of one size, got {sizes}", name, odd)
        turned = np.abs(_vector(header.ImageOrientationPatient) - _vector(first.ImageOrientationPatient)).max() > 1e-3
        if turned:
            faults.add("expected slices of one orientation, got a mixture, others lie across", name, odd)
        if np.abs(_vector(header.PixelSpacing) - _vector(first.PixelSpacing)).max() > 1e-3:
            faults.add("expected pixels of one size, got others", name, "take the odd ones out")


class _Kinds:
    """Faults of the files of a folder: one line for each kind, however many files have it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[tuple[str, str], list[str]] = {}

    def add(self, text: str, name: str, todo: str) -> None:
        self.files.setdefault((text, todo), []).append(name)

    def stop(self) -> None:
        faults = Faults(str(self.folder))
        for (text, todo), names in self.files.items():
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            faults.add(f"{text} in {self.folder / names[0]}{more}: {todo}")
        faults.stop()


def _check_places(folder: Path, slices: Sequence[Any], normal: NDArray[np.float64]) -> None:
    if len(slices) < 2:
        return
    along = np.array([np.dot(normal, _vector(h.ImagePositionPatient)) for h in slices])
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    if usual <= 0 or gaps.min() < 1e-3:
        at = int(np.argmin(gaps))
        one, other = (slices[i].camtrain_path.name for i in (at, at + 1))
        raise InputError(
            f"expected every slice at a place of its own, got {one} and {other} at one place in {folder}: it holds two "
            "reconstructions or time points; keep one"
        )
    odd = np.abs(gaps - usual) > _EVEN * usual
    if odd.any():
        raise InputError(_uneven(folder, slices, gaps, usual))


def _uneven(folder: Path, slices: Sequence[Any], gaps: NDArray[np.float64], usual: float) -> str:
    """The sentence for slices that are missing, or were taken at two distances.

    They are not filled in: what would be put between two slices is tissue that nobody has seen.
    """
    at = int(np.argmax(np.abs(gaps - usual)))
    behind = slices[at].camtrain_path.name
    more = np.rint(gaps / usual) - 1
    whole = np.abs(gaps - (more + 1) * usual) <= _EVEN * usual
    if whole.all():
        lost = int(more.sum())
        return (
            f"expected slices at even distances, got {usual:.4g} mm and {gaps[at]:.4g} mm behind {behind} in {folder}: "
            f"{lost} of {len(slices) + lost} slices {'is' if lost == 1 else 'are'} missing; copy the series again, or "
            "convert it with dcm2niix and take the file that it calls _Eq, which has them filled in"
        )
    return (
        f"expected slices at even distances, got {usual:.4g} mm and {gaps[at]:.4g} mm behind {behind} in {folder}: the "
        "series was taken at several distances; convert it with dcm2niix and take the file that it calls _Eq"
    )


def _affine(slices: Sequence[Any], folder: Path) -> NDArray[np.float64]:
    """Voxel (column, row, slice) to RAS in mm; a tilted gantry gives a sheared matrix."""
    first, last = slices[0], slices[-1]
    along = _vector(first.ImageOrientationPatient)
    rows, columns = _vector(first.PixelSpacing)
    matrix = np.eye(4)
    matrix[:3, 0], matrix[:3, 1] = along[:3] * columns, along[3:] * rows
    matrix[:3, 3] = _vector(first.ImagePositionPatient)
    if len(slices) > 1:
        matrix[:3, 2] = (_vector(last.ImagePositionPatient) - matrix[:3, 3]) / (len(slices) - 1)
    else:
        thickness = float(first.get("SpacingBetweenSlices") or first.get("SliceThickness") or 1.0)
        matrix[:3, 2] = _normal(first) * thickness
    return LPS_TO_RAS @ matrix


def _pixels(header: Any) -> NDArray[Any]:
    """(rows, columns) with slope and intercept."""
    pydicom, path = _pydicom(), header.camtrain_path
    try:
        whole = pydicom.dcmread(path)
        pixels: NDArray[Any] = whole.pixel_array
    except Exception as error:  # Truncated, or packed in a way for which nothing is installed; pydicom says which.
        raise InputError(
            f"expected readable pixels, got {path}, which fails with {type(error).__name__} ({str(error)[:160]}): "
            "copy it again, or convert the series to NIfTI with dcm2niix"
        ) from error
    slope, intercept = float(header.get("RescaleSlope", 1) or 1), float(header.get("RescaleIntercept", 0) or 0)
    # A slope of 2 as a whole number would wrap around in the file's own 16 bits.
    return pixels if (slope, intercept) == (1, 0) else pixels * slope + intercept


def _syntax(header: Any) -> str:
    """How the pixels are packed, "" = not said."""
    meta = getattr(header, "file_meta", None)
    return str(meta.get("TransferSyntaxUID", "") or "") if meta is not None else ""


def _scaled(slices: Sequence[Any]) -> bool:
    numbers = [float(h.get(tag, d) or d) for h in slices for tag, d in (("RescaleSlope", 1), ("RescaleIntercept", 0))]
    return any(n % 1 for n in numbers)


def _normal(header: Any) -> NDArray[np.float64]:
    along = _vector(header.ImageOrientationPatient)
    return np.cross(along[:3], along[3:])


def _vector(values: Any) -> NDArray[np.float64]:
    return np.array([float(v) for v in values])


def _name(header: Any) -> str:
    number, says = header.get("SeriesNumber"), str(header.get("SeriesDescription", "") or "")
    return " ".join(word for word in (f"series {number}" if number is not None else "series", says) if word)
