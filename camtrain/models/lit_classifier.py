"""LitClassifier: a plain multi-label LightningModule around any network that gives logits (B, L)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from camtrain._batch import read_batch
from camtrain._errors import InputError, nearest
from camtrain.models._rebuild import INSTANTIATOR, check_state, class_path, net_config, outputs_argument


class LitClassifier(pl.LightningModule):
    """Multi-label classifier for batches with the keys `image` (B, C, *S) and `label` (B, L), NaN = unknown.

    Logs `train/loss`, `val/loss` and `test/loss` and nothing else, once per epoch. A checkpoint holds the config of the
    network (as the command line read it; in Python, of camtrain's own networks), so that
    `LitClassifier.load_from_checkpoint(path)` rebuilds it alone; a network of another make that was built in Python is
    passed again (its `loss=` too): `load_from_checkpoint(path, net=...)`. The module itself is never pickled.

    Args:
        net: Network whose output is (B, L). When it has `resize_head(labels)`, as camtrain's have, it is given as many
            outputs as there are labels.
        labels: Names of the labels in the order of the outputs; None = not known here.
        lr: Learning rate.
        weight_decay: Weight decay.
        loss: Module called as `loss(logits, label)`, with NaN where a label is unknown. None = the mean binary
            cross-entropy over the known labels; exactly 0, with a graph, when none is known.
        optimizer: `"adamw"` or `"sgd"`.
        momentum: Momentum of SGD.
        schedule: `"constant"`, or `"one_cycle"`: up to `lr` over the first 30 % of all steps and down to 0 at the end.

    Raises:
        InputError: An argument out of range; in a step, a network with a wrong number of outputs, NaN or infinity in an
            image, or a batch that breaks the contract.

    Example:
        >>> from camtrain.models import FlattenNet
        >>> model = LitClassifier(FlattenNet(size=12, widths=(2, 2, 2, 2)), labels=["nodule", "effusion"], lr=1e-3)
        >>> model(torch.zeros(3, 1, 12, 12, 12)).shape, model.labels
        (torch.Size([3, 2]), ['nodule', 'effusion'])
    """

    def __init__(
        self,
        net: nn.Module | None = None,
        labels: list[str] | None = None,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        loss: nn.Module | None = None,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        momentum: float = 0.9,
        schedule: Literal["constant", "one_cycle"] = "constant",
    ) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise InputError(
                f"net= expects a torch.nn.Module, got {type(net).__name__}: pass the network (a checkpoint "
                "whose network was built in Python is loaded with load_from_checkpoint(path, net=...))"
            )
        _check_choice("optimizer", optimizer, ("adamw", "sgd"))
        _check_choice("schedule", schedule, ("constant", "one_cycle"))
        self.labels = _label_names(labels)
        if self.labels and callable(resize_head := getattr(net, "resize_head", None)):
            resize_head(len(self.labels))
        # Under LightningCLI this stores the parsed config (and how to instantiate it), in Python the arguments.
        self.save_hyperparameters(ignore=["net", "loss"])
        if "_instantiator" in self.hparams:
            self.save_hyperparameters()
        elif loss is None and (config := net_config(net)):
            self.save_hyperparameters({"net": config, "_instantiator": INSTANTIATOR})
        # Links hand over the data module's own object; a checkpoint takes plain lists of str only.
        self.save_hyperparameters({"labels": self.labels})
        self.net = net
        self.loss = loss
        self.lr, self.weight_decay, self.momentum = lr, weight_decay, momentum
        self.optimizer_name, self.schedule = optimizer, schedule

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, L) of images (B, C, *S)."""
        logits: Tensor = self.net(image)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of a training batch."""
        return self._step(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Loss of a validation batch."""
        return self._step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Loss of a test batch; with several loaders Lightning appends `/dataloader_idx_<k>` to the key."""
        return self._step(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Logits (B, L)."""
        return self._logits(batch)

    def configure_optimizers(self) -> Any:
        """The optimizer, with a scheduler that steps every batch when `schedule="one_cycle"`."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer
        if self.optimizer_name == "sgd":
            optimizer = torch.optim.SGD(parameters, self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        else:
            optimizer = torch.optim.AdamW(parameters, self.lr, weight_decay=self.weight_decay)
        if self.schedule == "constant":
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise InputError("schedule='one_cycle' needs an end: set max_epochs or max_steps of the Trainer")
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    def _step(self, batch: Any, stage: str) -> Tensor:
        logits = self._logits(batch)
        self._check_outputs(logits, batch)
        label = read_batch(_only(batch, "label"), outputs=logits.shape[1]).label
        if label is None or len(label) != len(logits):
            raise InputError(
                f"expected the key 'label' with one row for each of the {len(logits)} images, "
                f"got {'no such key' if label is None else f'{len(label)} rows'}: check the data"
            )
        loss = masked_bce(logits, label) if self.loss is None else self._own_loss(logits, label)
        self.log(
            f"{stage}/loss",
            loss,
            on_step=False,
            on_epoch=True,
            prog_bar=stage != "test",
            batch_size=len(logits),
            sync_dist=True,
        )
        return loss

    def _logits(self, batch: Any) -> Tensor:
        read = read_batch(_only(batch, "image", "id"))
        if read.image is None:
            raise InputError(f"expected the key 'image' in the batch, got {', '.join(map(str, batch))}")
        _check_finite(read.image, read.ids)
        logits = self(read.image)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(read.image):
            came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(
                f"expected logits of shape ({len(read.image)}, L) from {type(self.net).__name__}, got {came}: "
                "wrap the network in a module that returns the logits only"
            )
        return logits

    def _check_outputs(self, logits: Tensor, batch: Any) -> None:
        label = batch.get("label")
        columns = label.shape[1] if isinstance(label, Tensor) and label.ndim == 2 else None
        expected = len(self.labels) if self.labels else columns
        if expected is not None and logits.shape[1] != expected:
            raise InputError(
                f"{type(self.net).__name__} gives {logits.shape[1]} outputs for {expected} labels: "
                f"{outputs_argument(self.net, expected)}"
            )

    def _own_loss(self, logits: Tensor, label: Tensor) -> Tensor:
        assert self.loss is not None  # noqa: S101
        loss: Tensor = self.loss(logits, label)
        if bool(label.isnan().any()) and not bool(torch.isfinite(loss).all()):
            raise InputError(
                f"loss={type(self.loss).__name__} is not finite on unknown labels (NaN): leave loss= out for a masked "
                "cross-entropy, or pass a loss that ignores NaN"
            )
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which classes the checkpoint belongs to."""
        checkpoint["camtrain_net"] = class_path(self.net)
        checkpoint["camtrain_loss"] = "" if self.loss is None else class_path(self.loss)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the network's config, so that a reloaded and retrained model can be rebuilt again.

        Raises:
            InputError: The checkpoint was written with a network of another class.
        """
        wrote = checkpoint.get("camtrain_net")
        if wrote is not None and wrote != class_path(self.net):
            raise InputError(
                f"the checkpoint holds a {wrote}, but this model is a {class_path(self.net)}: "
                "use the config that it was trained with"
            )
        own = "" if self.loss is None else class_path(self.loss)
        if (loss := checkpoint.get("camtrain_loss", own)) != own:
            theirs, ours = (name or "the masked cross-entropy" for name in (loss, own))
            rank_zero_warn(f"the checkpoint was trained with {theirs}, but this model has {ours}: pass loss=")
        saved = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        if "net" in saved and "net" not in self.hparams:
            kept = {k: saved[k] for k in ("net", "loss", "_instantiator") if k in saved}
            self.save_hyperparameters(kept)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights.

        Raises:
            InputError: They do not fit this model.
        """
        check_state(state_dict, self.state_dict(), strict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def masked_bce(logits: Tensor, label: Tensor) -> Tensor:
    """Mean binary cross-entropy over the known labels.

    Args:
        logits: (B, L).
        label: (B, L) of 0, 1 and NaN = unknown.

    Returns:
        A scalar in float32 (float64 for float64 logits); exactly 0, with a graph, when no label is known.

    Example:
        >>> label = torch.tensor([[1.0, float("nan")]])
        >>> round(masked_bce(torch.zeros(1, 2), label).item(), 4)
        0.6931
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    known = ~label.isnan()
    target = label.nan_to_num(0.0).to(logits.dtype)
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return torch.where(known, each, 0.0).sum() / known.sum().clamp(min=1)


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(f"{name}= expects one of {', '.join(known)}, got {value!r}{nearest(str(value), known)}")


def _label_names(labels: Sequence[str] | None) -> list[str] | None:
    if labels is None:
        return None
    names = [str(name) for name in labels] if not isinstance(labels, str) else []
    if not names or len(set(names)) != len(names):
        raise InputError(f"labels= expects a list of different names, at least one, got {labels!r}")
    return names


def _only(batch: Any, *keys: str) -> Mapping[str, Any]:
    if not isinstance(batch, Mapping):
        raise InputError(
            f"LitClassifier expects dict batches with the keys image and label, got {type(batch).__name__}: "
            "let the dataset return dicts"
        )
    return {key: batch[key] for key in keys if key in batch}


def _check_finite(image: Tensor, ids: Sequence[str] | None) -> None:
    # One pass without a temporary: the sum is finite unless a value is not (or the values are absurdly large).
    if not image.is_floating_point() or bool(torch.isfinite(image.sum(dtype=torch.float32))):
        return
    wrong = (~torch.isfinite(image)).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if wrong:
        cases = ", ".join(ids[i] if ids else f"row {i} of the batch" for i in wrong[:3])
        raise InputError(f"the image of case {cases} has NaN or infinite voxels: mend or drop the file")
