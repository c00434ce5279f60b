"""`account`: a logit as a sum over cells and biases, exact where the network is piecewise linear behind the layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from camtrain._errors import InputError
from camtrain.cam.bias_tape import BiasTape
from camtrain.cam.engine import NO_LINK, Reshape, precise, spatial
from camtrain.cam.explaining import checked_image, checked_model
from camtrain.cam.layer_lookup import plain_name
from camtrain.cam.logits import PickLogits, pick_logits
from camtrain.cam.question import Layer, Question, WantedLayer, asking
from camtrain.cam.selection import Labels, Selection, select
from camtrain.cam.several import one_layer
from camtrain.cam.validity import between, respond_clipped_share, respond_warnings, signed_share

# Part of |logit| + sum |cells| + |bias| that rounding in float32 may leave unexplained.
TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False, repr=False)
class Account:
    """What the logits of a batch are made of: `logits = cells.sum + bias + residual`.

    Attributes:
        layer: Name of the layer whose cells are accounted.
        logits: (B, n).
        cells: (B, n, *S'), the HiResCAM map: activation x gradient, summed over channels.
        bias: (B, n), the part of all biases and norm shifts behind the layer.
        residual: (B, n), what is left: rounding, unless `why` says otherwise.
        channels: (B, n, K), the same sum as `cells` by channel: sum over cells of activation x gradient.
        importance: (B, n, K), mean gradient of each channel (Grad-CAM's neuron importance alpha).
        activations: (B, K, *S').
        balanced: (B, n) bool: the residual is rounding. False where a label was not asked for.
        why: Why this is not an account of the logits, in sentences; empty when it is one.
        obstacles: Those of `why` that hold whatever the image, as they lie in the network.
        respond_why: Why a Respond-CAM of this layer should be read with care; empty when there is no reason.
        signed_share: (B,) share of sum |activations| that is negative.
        respond_clipped: (B,) share of the live channels that Respond-CAM divides by its safe denominator.
    """

    layer: str
    logits: Tensor
    cells: Tensor
    bias: Tensor
    residual: Tensor
    channels: Tensor
    importance: Tensor
    activations: Tensor
    balanced: Tensor
    why: tuple[str, ...]
    obstacles: tuple[str, ...]
    respond_why: tuple[str, ...]
    signed_share: Tensor
    respond_clipped: Tensor

    @property
    def valid(self) -> bool:
        """Do cells and bias add up to every logit?"""
        return not self.why

    def __repr__(self) -> str:
        kind = "valid" if self.valid else f"not valid: {'; '.join(self.why)}"
        return f"Account(layer {self.layer!r}, cells {tuple(self.cells.shape)}, {kind})"


def account(
    model: nn.Module,
    image: Tensor,
    layer: Layer = None,
    *,
    labels: Labels | Callable[[Tensor], Labels] = None,
    logits: PickLogits | None = None,
    reshape: Reshape | None = None,
    call: int | None = None,
) -> Account:
    """Split the logits of a batch into parts of cells and a part of biases.

    One forward in float32 (float64 for float64 models) and one partial backward pass per label; the model is left as it
    was. Behind the layer, Conv, Linear, eval BatchNorm, ReLU, LeakyReLU, pooling, adding, concatenating and reshaping
    keep the account exact; Instance-, Group- and LayerNorm and other activations end it, and `why` says so. The sum
    rule is Euler's for piecewise linear functions; with biases it is the completeness of FullGrad (Srinivas and
    Fleuret 2019, arXiv:1905.00780), taken at an inner layer.

    Args:
        model: Any module whose output contains logits (B, L).
        image: (B, C, *S).
        layer: Dotted name, module, "input", or None for the last feature map.
        labels: As in `explain`; or a callable that chooses them from the logits (B, L).
        logits: Callable that picks (B, L) from the model's output.
        reshape: Linear callable that makes (B, K, *S') of the layer's output.
        call: Which call of the layer counts, where one forward runs it several times (layer=None: the last one).

    Returns:
        The account, detached, on the image's device; NaN where a bool mask per sample left a label out.

    Raises:
        InputError: Unknown layer or several, a layer without spatial axes, no logits, NaN or Inf in the image, an empty
            batch.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 24, 3))
        >>> found = account(model, torch.rand(2, 1, 6, 8))
        >>> torch.allclose(found.cells.sum(dim=(2, 3)) + found.bias, found.logits, atol=1e-5), found.valid
        (True, True)
    """
    image = checked_image(image, checked_model(model))
    with asking(model, image):
        wanted = WantedLayer.of(model, image, one_layer(layer), call)
        question = Question(model, image, (wanted,), logits=logits, reshape=reshape)
        tape = BiasTape(len(image))
        with tape:
            answer = question.forward(precise=True)
        with torch.autocast(device_type=image.device.type, enabled=False):
            scores = precise(pick_logits(answer.output, logits, len(image)))
            asked = labels(scores.detach()) if callable(labels) else labels
            chosen = select(asked, scores.shape[0], scores.shape[1], scores.device)
            ledger = _Ledger(answer.sources[0], scores, chosen, tape, reshape)
            return ledger.account(plain_name(wanted.name))


@dataclass
class _Ledger:
    """One backward pass per label, and the sums that it brings."""

    source: Tensor
    scores: Tensor
    chosen: Selection
    tape: BiasTape
    reshape: Reshape | None

    def account(self, layer: str) -> Account:
        activations = self._activations()
        passes = [self._pass(j, activations) for j in range(self.chosen.picks.shape[1])]
        cells, channels, importance, bias = (
            self.chosen.arrange(part) for part in (_stacked(passes) if passes else _nothing(activations.detach()))
        )
        logits = self.chosen.take(self.scores.detach())
        residual = logits.to(bias.dtype) - bias - cells.flatten(2).sum(dim=2, dtype=bias.dtype)
        scale = logits.abs() + bias.abs() + cells.flatten(2).abs().sum(dim=2)
        runs = between(self.scores, self.source)
        loose = residual.abs() > TOLERANCE * scale
        obstacles = tuple(runs.reasons(layer))
        return Account(
            layer=layer,
            logits=logits,
            cells=cells,
            bias=bias.to(logits.dtype),
            residual=residual.to(logits.dtype),
            channels=channels,
            importance=importance,
            activations=activations.detach(),
            balanced=~loose & ~residual.isnan(),
            why=obstacles + self._why(layer, residual, loose, bool(obstacles)),
            obstacles=obstacles,
            respond_why=tuple(respond_warnings(activations.detach(), runs.norms, layer)),
            signed_share=signed_share(activations.detach()),
            respond_clipped=respond_clipped_share(activations.detach()),
        )

    def _activations(self) -> Tensor:
        activations = precise(spatial(self.source, self.reshape))
        if activations.shape[0] != self.scores.shape[0]:
            raise InputError(
                f"the layer gives {tuple(activations.shape)} for {self.scores.shape[0]} rows of logits: if it works on "
                "slices or patches, bring them back to (B, K, *S) with reshape="
            )
        return activations

    def _pass(self, number: int, activations: Tensor) -> tuple[Tensor, ...]:
        """Cells (B, *S'), channels (B, K), importance (B, K) and bias (B,) of each sample's label of this number."""
        scores = self.scores.gather(1, self.chosen.picks[:, number : number + 1])[:, 0]
        if self.chosen.valid is not None:
            scores = torch.where(self.chosen.valid[:, number], scores, torch.zeros_like(scores))
        gradient = None
        if scores.grad_fn is not None:
            (gradient,) = torch.autograd.grad(scores.sum(), self.source, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise InputError(NO_LINK)
        gradient = precise(spatial(gradient, self.reshape))
        product = (activations * gradient).detach()
        channels = product.flatten(2).sum(dim=2)
        return product.sum(dim=1), channels, gradient.flatten(2).mean(dim=2), self.tape.take(product)

    def _why(self, layer: str, residual: Tensor, loose: Tensor, explained: bool) -> tuple[str, ...]:
        why = []
        if self.tape.unfolded:
            why.append(
                f"{', '.join(sorted(self.tape.unfolded))} works on rows that are no multiple of the "
                f"{self.tape.batch} images, so that its bias belongs to no single image: give one image at a time"
            )
        if not (why or explained) and bool(loose.any()):
            why.append(
                f"up to {float(residual.abs().nan_to_num().max()):.2g} of a logit is neither cells nor bias: part of "
                f"the network reaches the logits around layer {layer!r} (a skip connection), an activation saturates, "
                "or a constant is added outside Conv, Linear and norm layers"
            )
        return tuple(why)


def _stacked(passes: list[tuple[Tensor, ...]]) -> list[Tensor]:
    return [torch.stack(parts, dim=1) for parts in zip(*passes, strict=True)]


def _nothing(activations: Tensor) -> list[Tensor]:
    """What no pass at all gives: n = 0."""
    nobody = activations.new_zeros(activations.shape[0], 0, activations.shape[1])
    return [activations[:, :0], nobody, nobody, nobody[..., 0]]
