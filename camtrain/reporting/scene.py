"""One case ready to be drawn: image, allowed region and geometry, turned so that every plane can be cut from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from camtrain._errors import InputError
from camtrain.reporting import overlays, slices
from camtrain.reporting.sections import Sections

Pixels = npt.NDArray[np.uint8]
_STRIP = 6  # a 1D image is drawn as a strip this many times as long as it is high


@dataclass(frozen=True)
class Scene:
    """A case in screen order.

    Attributes:
        image: (X, Y, Z) in RAS order, or what `thin` has kept of it; (rows, columns), or (rows, columns, 3).
        rank: 2 or 3.
        allowed: (*S) or (*S') bool in the same order, or None.
        spacing: Size of an image voxel in mm along each axis (1 where unknown).
        point: Voxel through which the planes go.
        window: Image values shown as black and white.
        axes: Axis codes of the volume as it came, or None when unknown; then the pictures carry no letters.

    Example:
        >>> scene = Scene.make(np.zeros((4, 5, 6)), spacing=(1, 1, 2), axes="LPS")
        >>> scene.planes, scene.extent("coronal")
        (('axial', 'coronal', 'sagittal'), (12.0, 4.0))
        >>> scene.tile("coronal", (24, 8)).shape
        (24, 8, 3)
    """

    image: npt.NDArray[np.generic] | Sections
    rank: int
    allowed: npt.NDArray[np.bool_] | Sections | None
    spacing: tuple[float, ...]
    point: tuple[int, ...]
    window: tuple[float, float]
    axes: str | None
    strip: bool = False

    @classmethod
    def make(
        cls,
        image: npt.NDArray[np.generic],
        allowed: npt.NDArray[np.bool_] | None = None,
        *,
        rank: int | None = None,
        spacing: Sequence[float] | None = None,
        axes: str | None = None,
        point: Sequence[int] | None = None,
        window: tuple[float, float] | None = None,
    ) -> Scene:
        """Turn a case into screen order.

        Args:
            image: (*S) or (C, *S); of several channels the first is shown, three channels of a 2D image as colours.
            allowed: (*S) or (*S') bool.
            rank: Number of spatial axes, where the image may have channels; default: all axes are spatial.
            spacing: Voxel size in mm along the axes of the image as it came.
            axes: Where the axes run, such as `"RAS"`; None = unknown, drawn as if RAS but without letters.
            point: Voxel index in the image as it came; default: where the allowed region is largest.
            window: Values shown as black and white; default: quantiles of the image.

        Raises:
            InputError: Shapes that do not fit each other.
        """
        image, rank = _spatial(np.asarray(image), rank)
        shape = image.shape[:rank]
        _check(shape, allowed, spacing, point)
        scale = tuple(float(s) for s in spacing) if spacing is not None else (1.0,) * rank
        strip = rank == 1
        if strip:
            image, allowed = image[None], None if allowed is None else allowed[None]
            scale, point = (shape[0] * scale[0] / _STRIP, scale[0]), None if point is None else (0, *point)
            rank = 2
        elif rank == 3 and axes is not None:
            point = None if point is None else slices.point_to_ras(point, shape, axes)
            scale = tuple(scale[slices.to_ras_order(axes)[i]] for i in range(3))
            image = slices.to_ras(image, axes)
            allowed = None if allowed is None else slices.to_ras(allowed, axes).astype(bool, copy=False)
        allowed = None if allowed is None else np.asarray(allowed, dtype=bool)
        grid = image.shape[:rank]
        return cls(
            image=image,
            rank=rank,
            allowed=allowed,
            spacing=scale,
            point=tuple(int(p) for p in point) if point is not None else _middle(allowed, grid),
            window=window or overlays.window_of(image),
            axes=axes if rank == 3 else None,
            strip=strip,
        )

    def thin(self) -> Scene:
        """The scene with the planes through `point` alone, so that the volume can be let go; 2D: a copy."""
        if isinstance(self.image, Sections):
            return self
        if self.rank == 2:
            return replace(self, image=self.image.copy())
        allowed = self.allowed
        if allowed is not None:
            allowed = self._sections(allowed, [self._at(i, allowed.shape) for i in range(3)])  # type: ignore[arg-type]
        return replace(self, image=self._sections(self.image, self.point), allowed=allowed)

    def _sections(self, volume: npt.NDArray[np.generic], point: Sequence[int]) -> Sections:
        kept = {plane: (point[slices.NORMAL[plane]], slices.cut(volume, plane, point[slices.NORMAL[plane]]))
                for plane in slices.PLANES}  # fmt: skip
        if volume.dtype != bool:  # nobody asks it of an image
            return Sections(volume.shape, kept)
        return Sections(volume.shape, kept, bool(volume.all()), bool(volume.any()))

    def _at(self, axis: int, shape: Sequence[int], index: int | None = None) -> int:
        """Where a position along an axis of the image (default: that of `point`) lies on another grid."""
        index = self.point[axis] if index is None else index
        return int((index + 0.5) / self.image.shape[axis] * shape[axis])

    def through(self, plane: str) -> int:
        """Where along its normal the plane through `point` lies; 0 for an image that is one."""
        return self.point[slices.NORMAL[plane]] if self.rank == 3 else 0

    def plane(self, name: str, index: int) -> npt.NDArray[np.generic]:
        """One plane of the image, or the image where it is one."""
        return slices.cut(self.image, name, index) if self.rank == 3 or isinstance(self.image, Sections) else self.image

    @property
    def planes(self) -> tuple[str, ...]:
        """Names of the planes that can be cut."""
        return slices.PLANES if self.rank == 3 else ("image",)

    def extent(self, plane: str) -> tuple[float, float]:
        """Height and width of a plane in mm (in voxels where the spacing is unknown)."""
        mm = [n * s for n, s in zip(self.image.shape, self.spacing, strict=False)]
        return slices.on_screen(mm, plane)

    def orient(self, values: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """A map (*S') of the image as it came, in screen order.

        Raises:
            InputError: The map has another number of axes than the image.
        """
        values = np.asarray(values)
        if values.ndim != (1 if self.strip else self.rank):
            raise InputError(
                f"expected a map with {1 if self.strip else self.rank} axes like the image, got shape {values.shape}: "
                "give the map of one case and one label"
            )
        if self.strip:
            return values[None]
        return slices.to_ras(values, self.axes) if self.axes is not None else values  # type: ignore[return-value]

    def tile(
        self,
        plane: str,
        size: tuple[int, int],
        values: npt.NDArray[np.floating] | None = None,
        *,
        scale: float = 1.0,
        index: int | None = None,
        outlined: bool = True,
        marked: bool = False,
    ) -> Pixels:
        """Draw one plane.

        Args:
            plane: One of `planes`.
            size: Rows and columns of the picture.
            values: Map in screen order (from `orient`), or None for the image alone.
            scale: Absolute map value with the strongest colour.
            index: Position of the plane; default: through `point`.
            outlined: Draw the rim of the allowed region.
            marked: Draw a cross at the map's peak, in planes that cut its cell.

        Returns:
            (rows, columns, 3).
        """
        index = self.through(plane) if index is None else index
        pixels = overlays.grey(self.plane(plane, index), self.window, size)
        if values is not None:
            pixels = overlays.blend(pixels, self.enlarged(values, plane, index, size), scale)
        elif pixels.ndim == 2:
            pixels = np.repeat(pixels[..., None], 3, axis=2)
        if outlined and self.allowed is not None and not self.allowed.all():
            pixels = pixels.copy()
            pixels[overlays.outline(self.inside(plane, index, size), width=1 + size[1] // 400)] = overlays.OUTLINE
        if marked and values is not None:
            pixels = self.crossed(pixels, values, plane, index)
        return pixels

    def enlarged(
        self, values: npt.NDArray[np.floating], plane: str, index: int, size: tuple[int, int]
    ) -> npt.NDArray[np.float32]:
        """A map (in screen order) on one plane, at the size of the picture; undefined cells are zero."""
        return overlays.enlarge(self.flat(values, plane, index), size)

    def flat(self, values: npt.NDArray[np.floating], plane: str, index: int) -> npt.NDArray[np.float32]:
        """A map (*S') in screen order, or several (n, *S'), on one plane: the cells there; undefined ones are zero."""
        values = np.nan_to_num(values.astype(np.float32), copy=False, nan=0.0)
        if self.rank == 2:
            return values
        axis = slices.NORMAL[plane]
        cut = overlays.section(values, axis - 3, (index + 0.5) / self.image.shape[axis])
        return cut.swapaxes(-1, -2)[..., ::-1, ::-1]

    def inside(self, plane: str, index: int, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
        """The allowed region on one plane, at the size of the picture."""
        allowed = self.allowed
        if allowed is None:
            return np.zeros(size, dtype=bool)
        smooth = allowed.shape == self.image.shape[: self.rank]
        if self.rank == 3:
            allowed = slices.cut(allowed, plane, self._at(slices.NORMAL[plane], allowed.shape, index)).astype(bool)
        elif isinstance(allowed, Sections):
            raise TypeError("planes of a volume for a picture of two axes")
        return overlays.region(allowed, size, smooth=smooth)

    def crossed(self, pixels: Pixels, values: npt.NDArray[np.floating], plane: str, index: int) -> Pixels:
        """The tile with a cross at the map's peak, where the plane cuts the peak's cell."""
        shape = self.image.shape[: self.rank]
        top = slices.peak(values, shape)
        if top is None:
            return pixels
        if self.rank == 3:
            axis = slices.NORMAL[plane]
            cell = shape[axis] / values.shape[axis]
            if abs(top[axis] - index) > cell / 2 + 0.5:
                return pixels
            row, column = slices.on_screen([n - 1 - t for n, t in zip(shape, top, strict=True)], plane)
            rows, columns = slices.on_screen(shape, plane)
        else:
            (row, column), (rows, columns) = top, shape
        height, width = pixels.shape[:2]
        y, x = int((row + 0.5) * height / rows), int((column + 0.5) * width / columns)
        return _crossed(pixels, y, x, arm=max(4, width // 40))


def _crossed(pixels: Pixels, y: int, x: int, arm: int) -> Pixels:
    """A white cross with a dark rim and an open centre."""
    pixels = pixels.copy()
    for colour, thick, reach in ((0, 1, arm + 1), (255, 0, arm)):
        for side in (-1, 1):
            near, far = sorted((side * 2, side * reach))
            rows, columns = slice(max(0, y + near), max(0, y + far + 1)), slice(max(0, x + near), max(0, x + far + 1))
            pixels[rows, max(0, x - thick) : x + thick + 1] = colour
            pixels[max(0, y - thick) : y + thick + 1, columns] = colour
    return pixels


def _spatial(image: npt.NDArray[np.generic], rank: int | None) -> tuple[npt.NDArray[np.generic], int]:
    """Take the channel axis away: first channel, or colours last for a 2D image with three channels."""
    rank = image.ndim if rank is None else rank
    if image.ndim == rank + 1:
        colour = rank == 2 and image.shape[0] == 3
        image = np.moveaxis(image, 0, -1) if colour else image[0]
    elif image.ndim != rank:
        raise InputError(f"expected an image with {rank} spatial axes like its map, got shape {image.shape}")
    if not 1 <= rank <= 3:
        raise InputError(f"expected an image with 1, 2 or 3 spatial axes, got {rank}: pictures of more cannot be drawn")
    return image, rank


def _check(
    shape: tuple[int, ...],
    allowed: npt.NDArray[np.bool_] | None,
    spacing: Sequence[float] | None,
    point: Sequence[int] | None,
) -> None:
    rank = len(shape)
    if allowed is not None and np.ndim(allowed) != rank:
        raise InputError(f"expected an allowed region with {rank} axes like the image, got shape {np.shape(allowed)}")
    if spacing is not None and (len(spacing) != rank or not all(np.isfinite(s) and s > 0 for s in spacing)):
        raise InputError(f"expected {rank} positive voxel sizes in mm, got {list(spacing)}")
    if point is not None and (len(point) != rank or not all(0 <= p < n for p, n in zip(point, shape, strict=True))):
        raise InputError(f"expected a voxel index inside the image of shape {shape}, got {list(point)}")


def _middle(allowed: npt.NDArray[np.bool_] | None, grid: tuple[int, ...]) -> tuple[int, ...]:
    if allowed is None:
        return tuple(n // 2 for n in grid)
    cell = slices.largest_section(allowed)
    return tuple(min(n - 1, int((c + 0.5) * n / m)) for c, n, m in zip(cell, grid, allowed.shape, strict=True))
