"""Grad and inference mode of the user's forward, while watches need a graph of it."""

from __future__ import annotations

import torch


class UserModes:
    """Inference and grad mode of the user's forward: the first watch that enters leaves them, the last restores them.

    Trainer.validate and Trainer.test run under inference mode, where no gradient can ever be taken.
    """

    def __init__(self) -> None:
        self._holders = 0
        self._context: torch.inference_mode | None = None
        self._grad_enabled = False

    def leave(self) -> None:
        """Into no mode at all: neither gradients nor inference."""
        self._holders += 1
        if self._holders > 1:
            return
        self._grad_enabled = torch.is_grad_enabled()
        if torch.is_inference_mode_enabled():
            self._context = torch.inference_mode(False)
            self._context.__enter__()
        torch.set_grad_enabled(False)

    def give_back(self) -> bool:
        """Was this the last holder?"""
        self._holders -= 1
        if self._holders:
            return False
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = None
        torch.set_grad_enabled(self._grad_enabled)
        return True


USER_MODES = UserModes()
"""Watches of one forward share it."""
