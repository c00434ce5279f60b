"""LitClassifier: a plain multi-label LightningModule around any network that gives logits (B, L)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from camtrain._batch import read_batch
from camtrain._errors import InputError, nearest
from camtrain.models._label_scores import SCORES, LabelScores
from camtrain.models._rebuild import INSTANTIATOR, check_state, class_path, net_config, outputs_argument
from camtrain.models.pretrained import Pretrained, load_pretrained

# Labels up to which each has a scalar of its own per score; above, the averages alone are logged.
MOST_SCALARS = 20


class LitClassifier(pl.LightningModule):
    """Multi-label classifier for batches with the keys `image` (B, C, *S) and `label` (B, L), NaN = unknown.

    Logs `train/loss`, `val/loss` and `test/loss` once per epoch, with `scores` also `val/auprc` and the like, and no
    more. A checkpoint holds the config of the network (as the command line read it; in Python, of camtrain's own
    networks), so that `LitClassifier.load_from_checkpoint(path)` rebuilds it alone; a network of another make that was
    built in Python is passed again (its `loss=` too): `load_from_checkpoint(path, net=...)`. The module itself is never
    pickled.

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
        class_weights: Factor of each label's present cases in the loss; `"balanced"` takes the data module's
            `class_weights`. With `loss`, one of camtrain's (`FocalLoss`, `AsymmetricLoss`), it is handed on.
        scores: Of `"auroc"`, `"auprc"` and `"calibration_error"`, per validation and test epoch: the mean over labels,
            and each label of up to 20. AttentionMonitor logs all three by itself: leave `auroc` out
            beside it; the other two it leaves to this module where they are named.
        per_patient: Scores of one row per patient (mean probability of the scans; present where any scan is).
        pretrained: File of weights to start from (`load_pretrained`): MedicalNet, MONAI's model zoo, torchvision's
            ResNet-18 for AxialNet. A checkpoint of this module does not need it again.
        pretrained_head: Take the last linear layer of that file too.

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
        class_weights: list[float] | Literal["balanced"] | None = None,
        scores: list[str] | None = None,
        per_patient: bool = False,
        pretrained: str | None = None,
        pretrained_head: bool = False,
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
        self.pretrained: Pretrained | None = None
        if pretrained is not None:
            self.pretrained = load_pretrained(net, pretrained, pretrained_head)
            rank_zero_info(str(self.pretrained))
        # Under LightningCLI this stores the parsed config (and how to instantiate it), in Python the arguments.
        self.save_hyperparameters(ignore=["net", "loss"])
        if "_instantiator" in self.hparams:
            self.save_hyperparameters()
        elif loss is None and (config := net_config(net)):
            self.save_hyperparameters({"net": config, "_instantiator": INSTANTIATOR})
        # Links hand over the data module's own object; a checkpoint takes plain lists of str only.
        self.save_hyperparameters({"labels": self.labels})
        # A checkpoint holds all weights: rebuilding it must not look for the file of the start.
        self.save_hyperparameters({"pretrained": None})
        self.net = net
        self.loss = loss
        self.scores, self.per_patient = _score_names(scores), per_patient
        self.class_weights = class_weights
        self.register_buffer("_weights", None, persistent=False)
        if isinstance(class_weights, list | tuple):
            self._set_class_weights(class_weights)
        elif class_weights not in (None, "balanced"):
            raise InputError(f"class_weights= expects a list of numbers, 'balanced' or None, got {class_weights!r}")
        self._scores: dict[str, list[LabelScores]] = {}
        self.lr, self.weight_decay, self.momentum = lr, weight_decay, momentum
        self.optimizer_name, self.schedule = optimizer, schedule

    def setup(self, stage: str) -> None:
        """Take the class weights of the data module where they are `"balanced"`.

        Raises:
            InputError: It has none.
        """
        if self.class_weights == "balanced":
            data = getattr(self.trainer, "datamodule", None)
            weights = getattr(data, "class_weights", None)
            if weights is None:
                raise InputError(
                    f"class_weights='balanced' expects a data module with `class_weights`, got "
                    f"{'none' if data is None else type(data).__name__}: give a list, one number per label"
                )
            self._set_class_weights(weights)

    def _set_class_weights(self, weights: Sequence[float]) -> None:
        found = torch.as_tensor(list(weights), dtype=torch.float32)
        wrong = found.ndim != 1 or not bool((found > 0).all()) or (self.labels and len(found) != len(self.labels))
        if wrong:
            raise InputError(f"class_weights= expects one positive number per label, got {list(weights)}")
        if self.loss is not None and not hasattr(self.loss, "class_weights"):
            raise InputError(
                f"class_weights= cannot be handed on to loss={type(self.loss).__name__}: leave one of the two out, or "
                "take a loss of camtrain.losses"
            )
        self._weights = found.to(self.device)
        if self.loss is not None:
            self.loss.class_weights = self._weights

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, L) of images (B, C, *S)."""
        logits: Tensor = self.net(image)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of a training batch."""
        return self._step(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Loss of a validation batch."""
        return self._step(batch, "val", dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Loss of a test batch; with several loaders Lightning appends `/dataloader_idx_<k>` to the key."""
        return self._step(batch, "test", dataloader_idx)

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

    def on_validation_epoch_start(self) -> None:
        """Begin the scores anew."""
        self._start_scores("val", self.trainer.num_val_batches)

    def on_test_epoch_start(self) -> None:
        """Begin the scores anew."""
        self._start_scores("test", self.trainer.num_test_batches)

    def on_validation_epoch_end(self) -> None:
        """Log the scores."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the scores; with several loaders under `/dataloader_idx_<k>`, as the loss."""
        self._log_scores("test")

    def _start_scores(self, stage: str, loaders: Sequence[Any]) -> None:
        # Made outside a step and not registered: every process makes as many, and a checkpoint knows nothing of them.
        self._scores[stage] = []
        if self.scores and self._outputs is not None:
            make = [LabelScores(self._outputs, self.scores, self.per_patient) for _ in loaders]
            self._scores[stage] = [metric.to(self.device) for metric in make]

    @property
    def _outputs(self) -> int | None:
        """Number of labels, as far as it is known before a step."""
        if self.labels:
            return len(self.labels)
        raise InputError("scores= expects labels=, the names of the outputs, got none: name them")

    def _log_scores(self, stage: str) -> None:
        for index, metric in enumerate(self._scores.get(stage, [])):
            end = f"/dataloader_idx_{index}" if len(self._scores[stage]) > 1 else ""
            for name, values in metric.compute().items():
                each = values.reshape(-1)
                known = ~each.isnan()
                # What is undefined is left out: a NaN would stop early stopping and mislead a checkpoint.
                if bool(known.any()):
                    self.log(f"{stage}/{name}{end}", each[known].mean(), add_dataloader_idx=False)
                for label, value in zip(self.labels or [], each, strict=True):
                    if len(each) <= MOST_SCALARS and not bool(value.isnan()):
                        self.log(f"{stage}/{name}/{label}{end}", value, add_dataloader_idx=False)
            metric.reset()

    def _step(self, batch: Any, stage: str, loader: int = 0) -> Tensor:
        logits = self._logits(batch)
        self._check_outputs(logits, batch)
        label = read_batch(_only(batch, "label"), outputs=logits.shape[1]).label
        if label is None or len(label) != len(logits):
            raise InputError(
                f"expected the key 'label' with one row for each of the {len(logits)} images, "
                f"got {'no such key' if label is None else f'{len(label)} rows'}: check the data"
            )
        if self._scores.get(stage):
            self._scores[stage][loader].update(logits, label, batch.get("id"), batch.get("patient"))
        loss = masked_bce(logits, label, self._weights) if self.loss is None else self._own_loss(logits, label)
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


def masked_bce(logits: Tensor, label: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Mean binary cross-entropy over the known labels.

    Args:
        logits: (B, L).
        label: (B, L) of 0, 1 and NaN = unknown.
        class_weights: (L,) factors of present pairs; None = 1.

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
    weights = None if class_weights is None else class_weights.to(logits)
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none", pos_weight=weights)
    return torch.where(known, each, 0.0).sum() / known.sum().clamp(min=1)


def _score_names(scores: Sequence[str] | None) -> list[str]:
    names = [scores] if isinstance(scores, str) else list(scores or [])
    for name in names:
        _check_choice("scores", name, SCORES)
    return list(dict.fromkeys(names))


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
