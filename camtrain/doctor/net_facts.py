"""What was measured of a network on one batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

BY_DEFAULT = "layer=None"


@dataclass(frozen=True)
class WatchedLayer:
    """A layer that maps would be taken of.

    Attributes:
        asked_by: Callback of the config, or `layer=None`.
        name: Dotted name; the text that was given where there is no such layer.
        shape: Channels and cells.
        cell: Voxels of the image per cell.
        cell_mm: The same in mm, None without geometry.
        fault: Why it cannot be taken, "" = it can.
    """

    asked_by: str
    name: str
    shape: tuple[int, ...] = ()
    cell: tuple[float, ...] = ()
    cell_mm: tuple[float, ...] | None = None
    fault: str = ""


@dataclass(frozen=True)
class StepCost:
    """Time and memory of one training step.

    Attributes:
        seconds: Forward and backward.
        held: Bytes that the forward keeps for the backward pass, beside the parameters.
    """

    seconds: float
    held: int


@dataclass(frozen=True)
class NetFacts:
    """A network on one batch.

    Attributes:
        kind: Class of the network.
        device: Where it was measured.
        parameters: Bytes of the parameters.
        trainable: Bytes of those that are trained.
        optimizer_states: Copies of the trained parameters that the optimiser keeps.
        optimizer: Its name, or what was assumed.
        batch: Bytes of a batch.
        batch_size: Cases in it.
        image_shape: Of the batch.
        train_cases: Cases of an epoch.
        workers: Processes that read.
        read_seconds: Reading of one training case, preparation and augmentation included.
        forward_seconds: A forward without gradients.
        step: The step of the config's module; None = not measured, see `skipped`.
        masked_step: The same with the mask loss of the config, where it has one.
        skipped: Why no step was measured.
        layers: Layers that maps would be taken of.
        fault: Why a step fails, "" = it does not.
    """

    kind: str
    device: str = "cpu"
    parameters: int = 0
    trainable: int = 0
    optimizer_states: int = 2
    optimizer: str = ""
    batch: int = 0
    batch_size: int = 0
    image_shape: Sequence[int] = ()
    train_cases: int = 0
    workers: int = 0
    read_seconds: float = math.nan
    forward_seconds: float = math.nan
    step: StepCost | None = None
    masked_step: StepCost | None = None
    skipped: str = ""
    layers: Sequence[WatchedLayer] = ()
    fault: str = ""

    @property
    def heaviest(self) -> StepCost | None:
        """The step that training makes: with the mask loss where the config has one."""
        return self.masked_step or self.step

    @property
    def memory(self) -> int | None:
        """Bytes of a training step: parameters, gradients, optimiser, batch, and what is kept for the backward pass."""
        if self.heaviest is None:
            return None
        return self.parameters + self.trainable * (1 + self.optimizer_states) + self.batch + self.heaviest.held

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return math.ceil(self.train_cases / self.batch_size) if self.batch_size else 0

    @property
    def epoch_seconds(self) -> float | None:
        """Steps of an epoch, with all cases at hand."""
        return None if self.heaviest is None else self.steps * self.heaviest.seconds

    @property
    def epoch_reading_seconds(self) -> float:
        """Reading all training cases once, with the config's workers."""
        return self.train_cases * self.read_seconds / max(1, self.workers)
