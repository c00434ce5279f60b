"""What a model says of images: probabilities without a trace, for the measures that change the image."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from camtrain._errors import InputError
from camtrain.cam.explaining import checked_image, checked_model
from camtrain.cam.logits import PickLogits, pick_logits
from camtrain.cam.question import asking


def logits_of(model: nn.Module, image: Tensor, logits: PickLogits | None = None) -> Tensor:
    """Logits of a batch in eval mode; the model is left as it was.

    Args:
        model: Any module whose output contains logits (B, L).
        image: (B, C, *S).
        logits: Callable that picks them from the model's output.

    Returns:
        (B, L) float32 (float64 for float64 models), detached.

    Raises:
        InputError: No logits, NaN or Inf in image or logits, an empty batch.

    Example:
        >>> logits_of(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.rand(2, 1, 4)).shape
        torch.Size([2, 3])
    """
    image = checked_image(image, checked_model(model))
    with asking(model, image), torch.no_grad():
        found = pick_logits(model(image.clone()), logits, len(image)).detach()
    found = found if found.dtype == torch.float64 else found.float()
    if not bool(torch.isfinite(found).all()):
        raise InputError("the model gives NaN or Inf logits: check its weights, and the precision it runs in")
    return found


def probabilities_of(model: nn.Module, images: Iterable[Tensor], logits: PickLogits | None = None) -> Tensor:
    """Probabilities of many images, a batch at a time, so that only one batch is in memory.

    Args:
        model: Any module whose output contains logits (B, L).
        images: Batches (b, C, *S), made when they are needed.
        logits: Callable that picks the logits from the model's output.

    Returns:
        (N, L), sigmoid of the logits.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> probabilities_of(model, (torch.rand(2, 1, 4) for _ in range(3))).shape
        torch.Size([6, 3])
    """
    rows = [logits_of(model, image, logits).sigmoid() for image in images]
    if not rows:
        raise InputError("expected at least one image to predict, got none")
    return torch.cat(rows)
