"""Cases as a dataset: read at once, at first use into memory or onto disk, or every time; broken files told once."""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import multiprocessing
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import torch
from monai.data import CacheDataset, Dataset, MetaTensor, PersistentDataset
from monai.transforms import Compose
from monai.transforms.traits import RandomizableTrait
from numpy.typing import NDArray

from camtrain._errors import InputError
from camtrain.data._faults import MOST, Faults
from camtrain.data.exact_loader import CaseDraws
from camtrain.data.manifest import Case
from camtrain.data.manifest_transforms import CaseError, FillOrgans, root_input_error

OnError = Literal["raise", "skip"]
_log = logging.getLogger(__name__)


class Readable:
    """What the datasets share: an error that names file and row, and cases left out when they cannot be read.

    A batch holds the cases that can be read. Where none of its cases can, the next one that can stands in, so that
    every process of a distributed run makes as many steps.
    """

    data: Sequence[Case]
    on_error: OnError = "raise"
    draws: CaseDraws | None = None  # None: random transforms draw as they come

    def start_skipping(self, on_error: OnError) -> None:
        """Set what a broken case does; flags are shared with worker processes that are forked later."""
        self.on_error = on_error
        self.broken = shared_array(len(self.data), np.uint8)

    @property
    def case_ids(self) -> list[str]:
        """Names of all cases, in order; each is there once. The monitor counts by them."""
        return [case.id for case in self.data]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Cases of a batch, without the broken ones."""
        if self.on_error == "raise":
            return [self._drawn(index) for index in indices]
        cases = [case for index in indices if (case := self.try_case(index)) is not None]
        step = 1
        while not cases:
            if step > len(self.data) or bool(self.broken.all()):
                raise InputError(f"none of {len(self.data)} cases can be read: see the warnings above")
            following = (indices[-1] + step) % len(self.data)
            cases, step = [case for case in [self.try_case(following)] if case is not None], step + 1
        return cases

    def try_case(self, index: int) -> Any:
        """A case, or None when it cannot be read, which is told once."""
        if self.broken[index]:
            return None
        try:
            return self._drawn(index)
        except InputError as error:
            self.broken[index] = 1
            _log.warning("left out: %s", error)
            return None

    def _drawn(self, index: int) -> Any:
        with nullcontext() if self.draws is None else self.draws.at(index):
            return self[index]  # type: ignore[index]


class CaseDataset(Readable, CacheDataset):  # type: ignore[misc]
    """MONAI's cached dataset, whose errors are one `InputError` that names file and row.

    Args:
        cases: Rows of the manifest.
        transforms: From `build_transforms`.
        cache_rate: Part of the cases to keep in memory; they are read now.
        threads: Threads that fill the cache.
        on_error: `"raise"`: all broken cases among those read now are told together. `"skip"`: they are left out.
    """

    def __init__(
        self, cases: list[Case], transforms: Any, cache_rate: float, threads: int, on_error: OnError = "raise"
    ) -> None:
        self._failed: dict[int, Exception] = {}
        super().__init__(cases, transforms, cache_rate=cache_rate, num_workers=threads, progress=len(cases) > 10)
        self.start_skipping(on_error)
        if not self._failed:
            return
        if on_error == "raise":
            raise self._all_failures()
        for index, error in sorted(self._failed.items()):
            self.broken[index] = 1
            _log.warning("left out: %s", error)

    def _all_failures(self) -> Exception:
        """Input errors together; a defect by itself."""
        defects = [error for error in self._failed.values() if not isinstance(error, InputError)]
        if defects:
            return defects[0]
        faults = Faults("the cases")
        for _, error in sorted(self._failed.items()):
            faults.add_all(error)  # type: ignore[arg-type]  # the others went above
        return CaseError(faults.message()) if len(faults) == 1 else InputError(faults.message())

    def _load_cache_item(self, idx: int) -> Any:
        # An exception that leaves the pool while other threads are still reading lets the process abort at its end:
        # faults are kept, and raised when all is read; a defect, or a disk that went away, stops the others.
        if len(self._failed) >= MOST or any(not isinstance(e, InputError) for e in self._failed.values()):
            return None
        try:
            with naming(self.data[idx]):
                return super()._load_cache_item(idx)
        except Exception as error:
            self._failed[idx] = error
            return None

    def _transform(self, index: int) -> Any:
        with naming(self.data[index], alone=self.on_error == "raise"):
            return super()._transform(index)


class LazyDataset(Readable, Dataset):  # type: ignore[misc]
    """Cases kept in memory at their first use, for all worker processes together.

    The memory is mapped before the workers are forked and filled by whichever of them reads a case first; it is taken
    from the system only where it is filled. A case takes 4 bytes per voxel, and 2 more where any case has organs.

    Args:
        cases: Rows of the manifest.
        transforms: From `build_transforms`; what stands before the first random transform is kept.
        shape: (C, *S) of the image that the transforms give.
        on_error: `"raise"` or `"skip"`.
    """

    def __init__(
        self, cases: list[Case], transforms: Compose, shape: Sequence[int], on_error: OnError = "raise"
    ) -> None:
        super().__init__(cases, transforms)
        self.start_skipping(on_error)
        self._first, self._rest = split_transforms(transforms)
        rank = len(shape) - 1
        self._image = shared_array((len(cases), *shape), np.float32)
        with_organs = any(case.organs is not None for case in cases)
        self._organs = shared_array((len(cases) if with_organs else 0, 1, *shape[1:]), np.int16)
        self._affine = shared_array((len(cases), 2, 4, 4), np.float64)
        self._shape = shared_array((len(cases), rank), np.int64)
        self._state = shared_array(len(cases), np.uint8)  # 0 = not read, 1 = without organs, 2 = with organs

    @property
    def kept(self) -> int:
        """Cases in memory."""
        return int((self._state > 0).sum())

    def __getitem__(self, index: int) -> Any:
        """One case through all transforms."""
        with naming(self.data[index], alone=self.on_error == "raise"):
            if not self._state[index]:
                self._keep(index, self._first(self.data[index]))
            return self._rest(self._kept(index))

    def _keep(self, index: int, case: dict[str, Any]) -> None:
        image = case["image"]
        if image.shape != self._image.shape[1:]:
            raise InputError(
                f"expected an image of shape {self._image.shape[1:]} after the transforms, got {tuple(image.shape)}: "
                "grey and coloured pictures may not be mixed; cache=False reads them"
            )
        self._image[index] = image.as_tensor().numpy()
        if "organs" in case:
            self._organs[index] = case["organs"].as_tensor().numpy()
        self._affine[index, 0], self._affine[index, 1] = np.asarray(image.affine), np.asarray(case["original_affine"])
        self._shape[index] = case["original_shape"]
        self._state[index] = 2 if "organs" in case else 1  # last: another process reads only what is whole

    def _kept(self, index: int) -> dict[str, Any]:
        case, affine = self.data[index], torch.from_numpy(self._affine[index].copy())
        found: dict[str, Any] = {
            "id": case.id,
            "patient": case.patient,
            "image": MetaTensor(torch.from_numpy(self._image[index]), affine=affine[0]),
            "label": torch.tensor(case.label, dtype=torch.float32),
            "original_shape": tuple(self._shape[index].tolist()),
            "original_affine": affine[1],
        }
        if self._state[index] == 2:
            found["organs"] = MetaTensor(torch.from_numpy(self._organs[index]).float(), affine=affine[0])
        return found


class DiskDataset(Readable, PersistentDataset):  # type: ignore[misc]
    """MONAI's persistent dataset: what stands before the first random transform is kept in files of plain tensors.

    A file's name follows from the paths, sizes and times of the scan and its organs, and from the settings: whatever
    changes is read anew. Nothing is ever deleted.

    Args:
        cases: Rows of the manifest.
        transforms: From `build_transforms`.
        folder: Where the files are kept; made if missing.
        settings: What else the content depends on.
        on_error: `"raise"` or `"skip"`.
    """

    def __init__(
        self, cases: list[Case], transforms: Compose, folder: Path, settings: object, on_error: OnError = "raise"
    ) -> None:
        self._settings = json.dumps(settings, sort_keys=True, default=str)
        self._first, self._rest = split_transforms(transforms)
        try:
            super().__init__(cases, transforms, cache_dir=folder)
        except OSError as error:
            raise InputError(f"cache_dir expects a folder that can be written to, got {folder}: {error}") from None
        self.start_skipping(on_error)

    def _transform(self, index: int) -> Any:
        with naming(self.data[index], alone=self.on_error == "raise"):
            return self._rest(self._cachecheck(self.data[index]))

    def _cachecheck(self, item_transformed: Case) -> dict[str, Any]:
        case, place = item_transformed, Path(self.cache_dir) / f"{self._name(item_transformed)}.pt"
        try:
            held = torch.load(place, weights_only=True, mmap=True)
        except FileNotFoundError:
            held = None
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            _log.warning("%s cannot be read (%s); the case is read anew", place, error)
            held = None
        if held is None:
            held = _packed(self._first(case))
            self._write(held, place)
        return _unpacked(held, case)

    def _write(self, held: dict[str, torch.Tensor], place: Path) -> None:
        # Two machines may have processes of one number.
        part = place.with_suffix(f".{uuid4().hex}.part")
        try:
            torch.save(held, part)
            part.replace(place)  # at once: whoever reads beside us finds a whole file or none
        except OSError as error:
            part.unlink(missing_ok=True)
            raise InputError(
                f"cache_dir: {part.parent} cannot be written to ({error}): free space, or cache=False"
            ) from error

    def _name(self, case: Case) -> str:
        organs = case.organs if isinstance(case.organs, tuple) else (case.organs,) if case.organs else ()
        facts = [self._settings, *(_facts(path) for path in (case.image, *organs))]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:40]


def _facts(path: Path) -> str:
    """What tells one content of a file (or of the files in a folder) from another, without reading it."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    try:
        stats = [(file.name, file.stat()) for file in files]
    except OSError as error:
        raise InputError(f"expected {path}, got {error.strerror}: correct the manifest") from None
    return str(path.absolute()) + str([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def _packed(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Plain tensors of a case: no pickle is needed to read them."""
    held = {
        "image": case["image"].as_tensor().contiguous().clone(),
        "affine": torch.as_tensor(case["image"].affine, dtype=torch.float64),
        "original_affine": case["original_affine"],
        "original_shape": torch.tensor(case["original_shape"]),
    }
    return held | ({"organs": case["organs"].as_tensor().short().contiguous()} if "organs" in case else {})


def _unpacked(held: dict[str, torch.Tensor], case: Case) -> dict[str, Any]:
    found: dict[str, Any] = {
        "id": case.id,
        "patient": case.patient,
        "image": MetaTensor(held["image"], affine=held["affine"]),
        "label": torch.tensor(case.label, dtype=torch.float32),
        "original_shape": tuple(held["original_shape"].tolist()),
        "original_affine": held["original_affine"],
    }
    return found | ({"organs": MetaTensor(held["organs"].float(), affine=held["affine"])} if "organs" in held else {})


def split_transforms(transforms: Compose) -> tuple[Compose, Compose]:
    """What is the same every time, and what follows: random transforms, or the filling in of missing organs."""
    steps = list(transforms.transforms)
    place = next(i for i, step in enumerate(steps) if isinstance(step, (RandomizableTrait, FillOrgans)))
    return Compose(steps[:place]), Compose(steps[place:])


def shared_array(shape: int | Sequence[int], dtype: Any) -> NDArray[Any]:
    """An array of zeros that forked processes share; memory is taken from the system where it is written to."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    held: Any = mmap.mmap(-1, max(size, 1))
    array: NDArray[Any] = np.frombuffer(held, dtype=dtype, count=int(np.prod(shape))).reshape(shape)
    return array


def can_share(num_workers: int) -> bool:
    """Do worker processes see what `shared_array` made? They do when they are forked."""
    return num_workers == 0 or multiprocessing.get_start_method() == "fork"


@contextmanager
def naming(case: Case, alone: bool = False) -> Iterator[None]:
    """Put file and row before an `InputError`, also one that MONAI wrapped; let any other error pass.

    Args:
        case: Whose file is read.
        alone: Does this one stop a run that reads its files as it goes, so that it says nothing of the others?
    """
    try:
        yield
    except Exception as error:
        if (known := root_input_error(error)) is None:
            raise
        faults = Faults(case.where)
        faults.add_all(known, f"{case.where}: ")
        others = "; camtrain doctor reads all files and names every such one" if alone else ""
        raise CaseError(f"{faults.message()}{others}") from error


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, or of the container where it has a limit."""
    found = []
    readers: list[Callable[[], int]] = [_of_machine, _of_container]
    for reader in readers:
        try:
            found.append(reader())
        except (OSError, ValueError, KeyError):
            continue
    return min(found, default=0)


def _of_machine() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return int(dict(line.split(":", 1) for line in lines)["MemAvailable"].split()[0]) * 1024


def _of_container() -> int:
    folder = Path("/sys/fs/cgroup")
    limit, used = ((folder / name).read_text(encoding="ascii") for name in ("memory.max", "memory.current"))
    return max(0, int(limit) - int(used))
