"""`camtrain explain --segment`: the maps of one scan as binary masks, and their overlap with known findings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from camtrain._errors import InputError, nearest

Bools = npt.NDArray[np.bool_]


def add_segment_options(add: Callable[..., Any]) -> None:
    """`--segment` and `--lesions`."""
    add("--segment", metavar="RULE", help="write a mask per label too: mean+std, mean+2std, ..., or otsu")
    add(
        *("--lesions",),
        action="append",
        default=[],
        metavar="[LABEL=]NIFTI",
        help="voxels of a finding (not 0), on the scan's grid: Dice of the mask in scores.json; may be repeated",
    )


def check_segment_options(rule: str | None, lesions: Sequence[str]) -> None:
    """Say what is wrong with them before anything is computed.

    Raises:
        InputError: Lesions without a rule, or an unknown rule.
    """
    from camtrain.reporting import segmentation_level

    if rule is None and lesions:
        raise InputError("--lesions scores the masks of --segment: add --segment mean+std")
    if rule is not None:
        segmentation_level(np.zeros(1), rule)


def read_lesions(given: Sequence[str], names: Sequence[str], case: Mapping[str, Any]) -> dict[str, Bools]:
    """Label -> voxels of its finding on the scan's grid.

    Args:
        given: `LABEL=FILE`, or `FILE` where one label alone is explained.
        names: The labels that are explained.
        case: What `load_case` read.

    Raises:
        InputError: An unknown label or one that is named twice, a file that cannot be read, or another grid than the
            scan's.
    """
    found: dict[str, Bools] = {}
    for text in given:
        label, equals, file = text.partition("=")
        if not equals:
            if len(names) != 1:
                raise InputError(
                    f"--lesions {text!r}: {len(names)} labels are explained, so say which one it shows: "
                    f"--lesions {names[0]}={text}"
                )
            label, file = names[0], text
        if label not in names:
            raise InputError(f"--lesions: {label!r} is none of the labels explained{nearest(label, names)}")
        if label in found:
            raise InputError(f"--lesions names {label!r} twice: give one file with all its voxels")
        found[label] = _voxels(Path(file), case)
    return found


def _voxels(file: Path, case: Mapping[str, Any]) -> Bools:
    import nibabel as nib
    from nibabel.filebasedimages import ImageFileError

    try:
        image = nib.load(file)
        values = np.asarray(image.dataobj)
    except (OSError, ImageFileError, EOFError) as error:
        raise InputError(f"--lesions: cannot read {file} as NIfTI ({error}): correct the path") from error
    shape, affine = tuple(case["original_shape"]), case["original_affine"].numpy()
    if values.shape != shape or not np.allclose(image.affine, affine, atol=1e-3):
        raise InputError(
            f"--lesions: {file} has another grid than the scan, shape {values.shape} against {shape}: "
            "resample it to the scan"
        )
    found: Bools = values != 0
    return found


def save_segmentations(
    folder: Path,
    maps: Mapping[str, npt.NDArray[np.float32]],
    stems: Sequence[str],
    rule: str,
    case: Mapping[str, Any],
    lesions: Mapping[str, Bools],
) -> dict[str, dict[str, Any]]:
    """Write `<label>.segment.nii.gz`, 1 or 0 in the geometry of the scan.

    The level is taken from the map enlarged to what the network saw, before any normalisation; it is then applied to
    the map on the scan's grid, and what the network did not see is 0.

    Args:
        folder: To write into.
        maps: Label -> (*S') signed, on the grid of the layer.
        stems: Names of the files, one per label.
        rule: See `camtrain.reporting.segment`.
        case: What `load_case` read.
        lesions: Label -> voxels of the finding, for the labels that are known.

    Returns:
        Label -> what scores.json says of it: file, rule, level, volume in ml, and Dice where it is known.
    """
    from camtrain.reporting import dice, save_map

    affine = case["original_affine"].numpy()
    millilitres = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
    rows = {}
    for (name, values), stem in zip(maps.items(), stems, strict=True):
        mask, level = _segmented(values, rule, case)
        file = f"{stem}.segment.nii.gz"
        save_map(folder / file, mask.astype(np.float32), affine, descrip=f"camtrain {rule} {name}")
        row: dict[str, Any] = {
            "file": file,
            "rule": rule,
            "level": level if math.isfinite(level) else None,
            "ml": float(np.count_nonzero(mask)) * millilitres,
        }
        if name in lesions:
            overlap = dice(mask, lesions[name])
            row["dice"] = overlap if math.isfinite(overlap) else None
        rows[name] = row
    return rows


def _segmented(values: npt.NDArray[np.float32], rule: str, case: Mapping[str, Any]) -> tuple[Bools, float]:
    """(X, Y, Z) mask on the scan's grid, and the level."""
    import torch

    from camtrain.cam.enlarge import enlarge
    from camtrain.reporting import map_affine, resample_to, segmentation_level

    size = tuple(case["image"].shape[2:])
    seen = enlarge(torch.from_numpy(np.ascontiguousarray(values))[None, None], size)[0, 0].numpy()
    level = segmentation_level(seen, rule)
    network, scan = case["affine"].numpy(), case["original_affine"].numpy()
    shape = tuple(case["original_shape"])
    on_scan = resample_to(values, map_affine(network, size, values.shape), shape, scan)
    inside = resample_to(np.ones(size, np.float32), network, shape, scan) > 0
    mask: Bools = (on_scan > level) & inside
    return mask, level
