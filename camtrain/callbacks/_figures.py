"""What MaskLossCallback adds up over an epoch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from camtrain.losses.organ_mask import MaskLossParts

# Of the batch: the first two do not depend on the layer.
_COUNTS = ("unknown_labels", "cases_without_organs", "labels_without_region")


def mean_loss(parts: Mapping[str, MaskLossParts]) -> Tensor:
    """The mean of the layers' losses: every layer weighs the same, however many cells it has."""
    return torch.stack([each.loss for each in parts.values()]).mean()


class Figures:
    """Running means and counts of one epoch, without a host synchronisation per step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.task = self._mean()
        self.mask = self._mean()
        self.layers: dict[str, MeanMetric] = {}
        self.evidence: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def _mean(self) -> MeanMetric:
        return MeanMetric(nan_strategy="disable").to(self._device)

    def update(self, parts: Mapping[str, MaskLossParts]) -> None:
        """Count one step; `parts` by layer."""
        self.mask.update(mean_loss(parts).detach())
        for layer, each in parts.items():
            self.evidence[layer] = self.evidence.get(layer, 0) + each.evidence
            if len(parts) > 1:
                if layer not in self.layers:
                    self.layers[layer] = self._mean()
                self.layers[layer].update(each.loss.detach())
        for key in _COUNTS:
            # Pairs are counted once, not per layer; a small organ may have no cell on the coarsest grid only.
            count = torch.stack([getattr(each, key) for each in parts.values()]).amax()
            self.counts[key] = self.counts.get(key, 0) + count

    def compute(self) -> dict[str, Tensor]:
        """All processes must call it together; evidence and counts are those of all processes already."""
        figures = {}
        if self.task.update_called:
            figures["task_loss"] = self.task.compute()
        if self.mask.update_called:
            figures["mask_loss"] = self.mask.compute()
        figures |= {f"mask_loss/{layer}": loss.compute() for layer, loss in self.layers.items()}
        # Maps of two layers are on scales of their own, so shares are averaged, not sums.
        shares = [outside / total for outside, total in self.evidence.values() if bool(total > 0)]
        if shares:
            figures["outside_evidence"] = torch.stack(shares).mean()
        return figures | {key: value.float() for key, value in self.counts.items()}
