"""When the mask loss acts: a warm-up without it, then a linear ramp, counted in optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass

from camtrain._errors import InputError


@dataclass(frozen=True)
class Ramp:
    """Factor for the weight of the mask loss: 0 during the warm-up, then linear up to 1.

    It keeps no state: the factor is a function of the optimizer step (`trainer.global_step`), which a checkpoint
    restores, so that a resumed run continues where it stopped. The paper uses neither warm-up nor ramp (both 0).

    Attributes:
        warmup_steps: Optimizer steps without the mask loss.
        ramp_steps: Optimizer steps from 0 to the full weight after the warm-up; 0 switches it on at once.

    Raises:
        InputError: A number of steps is negative or no whole number.

    Example:
        >>> ramp = Ramp(warmup_steps=10, ramp_steps=4)
        >>> [ramp.weight_at(step) for step in (0, 10, 11, 14, 99)]
        [0.0, 0.0, 0.25, 1.0, 1.0]
    """

    warmup_steps: int = 0
    ramp_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "ramp_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise InputError(f"expected {name} as a number of optimizer steps, 0 or more, got {value!r}")

    def weight_at(self, step: int) -> float:
        """The factor at one optimizer step.

        Args:
            step: Number of optimizer steps done so far; 0 before the first.

        Returns:
            A number from 0 to 1 that never falls as the step grows.

        Example:
            >>> Ramp().weight_at(0)
            1.0
        """
        if step < self.warmup_steps:
            return 0.0
        if self.ramp_steps == 0:
            return 1.0
        return min(1.0, (step - self.warmup_steps) / self.ramp_steps)
