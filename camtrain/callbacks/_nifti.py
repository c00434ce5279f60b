"""`nifti_cases=`: maps of the panel as NIfTI files in the geometry of the scan."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from camtrain._errors import InputError
from camtrain.callbacks._panel import PanelEntry
from camtrain.reporting import map_affine, resample_to, save_map
from camtrain.reporting._files import file_stem


class NiftiMaps:
    """Writes `nifti/<epoch>/<case>_<label>_<method>.nii.gz` for the chosen cases and epochs.

    A map lies on the grid of the scan before the transforms where the batch tells it (`original_shape` and
    `original_affine`, as `ManifestDataModule` does), else on the grid of the batch's image with the batch's `affine`.

    Args:
        cases: So many cases of the panel, or names of cases.
        epochs: Only these epochs; None: every pass with pictures.

    Raises:
        InputError: A negative number.
    """

    def __init__(self, cases: int | Sequence[str], epochs: Collection[int] | None = None) -> None:
        self.number = cases if isinstance(cases, int) else 0
        self.named = [] if isinstance(cases, int) else [cases] if isinstance(cases, str) else [str(c) for c in cases]
        self.epochs = None if epochs is None else frozenset(int(epoch) for epoch in epochs)
        self._met: set[str] = set()
        if self.number < 0:
            raise InputError(f"nifti_cases= expects a number of cases or their names, got {cases}")

    def due(self, epoch: int) -> bool:
        """Is this an epoch to write?"""
        return bool(self.number or self.named) and (self.epochs is None or epoch in self.epochs)

    def unmet(self, entries: Iterable[PanelEntry]) -> list[str]:
        """Names that no case of any pass has had up to this one."""
        self._met.update(entry.case for entry in entries)
        return [name for name in self.named if name not in self._met]

    def write(self, folder: Path, entries: Iterable[PanelEntry]) -> list[str]:
        """Write the maps of one pass.

        Args:
            folder: Where the files go.
            entries: The panel's pairs.

        Returns:
            Cases that cannot be written, because their geometry is unknown or they are not 3D.
        """
        listed = list(entries)
        wanted = set(self.named) | set(list(dict.fromkeys(entry.case for entry in listed))[: self.number])
        missed = []
        for entry in listed:
            if entry.case not in wanted:
                continue
            if entry.affine is None or len(entry.shape) != 3:
                missed.append(entry.case)
                continue
            for method in entry.maps:
                _save(folder, entry, method)
        return list(dict.fromkeys(missed))


def _save(folder: Path, entry: PanelEntry, method: str) -> None:
    values, seen = entry.maps[method], entry.shape
    shape, affine = entry.scan or (seen, entry.affine)
    assert affine is not None  # noqa: S101  (the caller has looked)
    assert entry.affine is not None  # noqa: S101
    own = map_affine(entry.affine, seen, values.shape)
    name = f"{file_stem(entry.case)}_{file_stem(entry.label)}_{file_stem(method)}.nii.gz"
    descrip = f"camtrain {method} {entry.label} p={entry.probability:.3f}"
    save_map(folder / name, resample_to(values, own, shape, affine), affine, descrip=descrip)
