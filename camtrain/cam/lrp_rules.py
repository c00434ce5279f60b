"""Rules of layer-wise relevance propagation (LRP), as pure functions of one layer.

Relevance is carried by ordinary autograd. Of every layer y = f(x; w) + b a rule builds a *flow*: a tensor with the
value of y (or zero where a unit has no evidence to pass on) whose derivative encodes the rule,

    flow = sum_i c_i * q_i(x) * y / d_i        with y, d_i and c_i held constant,

q_i being contributions to the layer and d_i what they add up to. `surrogate` puts the derivative of the flow under the
value of y. If the gradient that arrives at y is R / y, what leaves at x is (1 / x) * sum_i c_i * q_ij / d_i * R: at
every tensor on the way relevance is value times gradient, and additions, concatenations, views and pooling need no
rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from camtrain._errors import InputError

# Exact zeros are read as this, in numerators and denominators alike, so that it cancels.
TINY = 1e-18
# Stabiliser of denominators that only guards the division, relative to the sample's mean |d|.
GUARD = 1e-9


def safe(t: Tensor) -> Tensor:
    """The values of a tensor with exact zeros (and all below 1e-18) replaced by 1e-18; no gradient.

    Relevance is `safe(A) * gradient`, and a gradient starts as `relevance / safe(logits)`: a zero loses nothing.

    Args:
        t: Any floating tensor.

    Returns:
        Same shape; float32 for half precision, where 1e-18 does not exist or products with it overflow.

    Example:
        >>> safe(torch.tensor([2.0, 0.0, -1e-20], dtype=torch.float64)).tolist()
        [2.0, 1e-18, -1e-18]
    """
    t = full(t.detach())
    tiny = t.new_full((), TINY)
    return torch.where(t.abs() < TINY, torch.where(t < 0, -tiny, tiny), t)


def full(t: Tensor) -> Tensor:
    """In float32 at least, and plain (no MetaTensor); keeps the graph.

    Example:
        >>> full(torch.zeros(1, dtype=torch.bfloat16)).dtype, full(torch.zeros(1, dtype=torch.float64)).dtype
        (torch.float32, torch.float64)
    """
    t = t.as_subclass(Tensor)
    return t if t.dtype == torch.float64 else t.float()


def surrogate(y: Tensor, flow: Tensor) -> Tensor:
    """The value of y with the derivative of the flow.

    Args:
        y: What a layer returned.
        flow: Same shape, any floating dtype, finite.

    Returns:
        Same shape, dtype and value as y.

    Example:
        >>> x = torch.tensor([3.0], requires_grad=True)
        >>> y = surrogate(torch.tensor([5.0]), 2 * x)
        >>> y.item(), torch.autograd.grad(y, x)[0].item()
        (5.0, 2.0)
    """
    return y.detach() + (flow - flow.detach()).to(y.dtype)


@dataclass(frozen=True)
class Affine:
    """A layer y = f(x; w) + b, taken apart.

    Attributes:
        apply: (x, w) -> f(x; w), linear in both.
        weight: w, no gradient.
        bias: b as it is added to y, no gradient; None without one.
    """

    apply: Callable[[Tensor, Tensor], Tensor]
    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """f(x; w), without the bias."""
        return self.apply(x, self.weight)

    def signed(self, x: Tensor, above: Tensor, below: Tensor) -> Tensor:
        """f(x+; above) + f(x-; below): one weight for positive inputs, one for negative ones."""
        if bool((x >= 0).all()):
            return self.apply(x, above)
        return self.apply(x * (x > 0), above) + self.apply(x * (x < 0), below)

    def positive(self, x: Tensor) -> Tensor:
        """Sum of every unit's positive contributions."""
        return self.signed(x, self.weight.clamp(min=0), self.weight.clamp(max=0))

    def negative(self, x: Tensor) -> Tensor:
        """Sum of every unit's negative contributions."""
        return self.signed(x, self.weight.clamp(max=0), self.weight.clamp(min=0))


class Rule(Protocol):
    """How a layer's relevance is shared out among its inputs."""

    def __call__(self, x: Tensor, y: Tensor, layer: Affine) -> Tensor:
        """The flow of a layer.

        Args:
            x: Input, with a graph; float32 or float64.
            y: Output, of the same dtype; its graph is not used.
            layer: What was done to x.

        Returns:
            Flow of the shape of y (see the module's docstring).
        """
        ...


@dataclass(frozen=True)
class Epsilon:
    """R_j = sum_k z_jk / (z_k + b_k + epsilon_k) R_k, with z_jk = x_j w_jk; epsilon = 0 is LRP-0.

    epsilon_k has the sign of the denominator and is relative: `epsilon` times the sample's mean |z + b|.
    Reference: Bach et al. 2015 (PLoS ONE 10(7) e0130140), with the bias as one more input.
    Conservation: the bias and epsilon absorb their shares. With epsilon = 0 on a ReLU network relevance is activation
    times gradient at every layer.

    Example:
        >>> layer = Affine(lambda x, w: x @ w, torch.tensor([[2.0], [-1.0]]))
        >>> x = torch.tensor([[1.0, 1.0]], requires_grad=True)
        >>> y = layer(x)
        >>> (x * torch.autograd.grad(Epsilon(0.0)(x, y, layer), x, 1 / y)[0]).tolist()
        [[2.0, -1.0]]
    """

    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        """Check.

        Raises:
            InputError: Negative or not finite.
        """
        _at_least_zero("epsilon", self.epsilon)

    def __call__(self, x: Tensor, y: Tensor, layer: Affine) -> Tensor:
        """See `Rule`."""
        z = layer(x)
        return z if self.epsilon == 0 else z * share(y, _with_bias(z, layer.bias), self.epsilon)


@dataclass(frozen=True)
class ZPlus:
    """R_j = sum_k (z_jk)+ / sum_j' (z_j'k)+ R_k, with z_jk = x_j w_jk of any sign, without the bias.

    A unit with no positive contribution at all (a depthwise filter with one effective tap, say) shares its relevance by
    its negative ones.
    Reference: Montavon et al. 2017 (Pattern Recognition 65), z+ rule; for signed inputs alpha = 1, beta = 0 of Bach et
    al. 2015.
    Conservation: exact, wherever a unit has any evidence. Relevances keep the sign that they start with.

    Example:
        >>> layer = Affine(lambda x, w: x @ w, torch.tensor([[2.0], [-1.0]]))
        >>> x = torch.tensor([[1.0, 1.0]], requires_grad=True)
        >>> y = layer(x)
        >>> (x * torch.autograd.grad(ZPlus()(x, y, layer), x, 1 / y)[0]).tolist()
        [[1.0, 0.0]]
    """

    def __call__(self, x: Tensor, y: Tensor, layer: Affine) -> Tensor:
        """See `Rule`."""
        positive = layer.positive(x)
        p = positive.detach()
        usual = share(y, p)
        # Rounding in fast convolutions leaves traces where the evidence is zero.
        bare = p <= _rounding(p) * _scale(p)
        if not bool(bare.any()):
            return positive * usual
        signed = layer(x)
        z = signed.detach()
        bare &= p <= _rounding(p) * z.abs()
        return positive * usual.masked_fill(bare, 0) + signed * share(y, z).masked_fill(~bare, 0)


@dataclass(frozen=True)
class AlphaBeta:
    """R_j = sum_k (alpha (z_jk)+ / sum (z_jk)+ - beta (z_jk)- / sum (z_jk)-) R_k, with alpha - beta = 1, no bias.

    Units that have contributions of one sign only share their relevance among these, as with alpha = 1, beta = 0.
    Reference: Bach et al. 2015 (PLoS ONE 10(7) e0130140).
    Conservation: exact, wherever a unit has any evidence.

    Example:
        >>> layer = Affine(lambda x, w: x @ w, torch.tensor([[2.0], [-1.0]]))
        >>> x = torch.tensor([[1.0, 1.0]], requires_grad=True)
        >>> y = layer(x)
        >>> (x * torch.autograd.grad(AlphaBeta()(x, y, layer), x, 1 / y)[0]).tolist()
        [[2.0, -1.0]]
    """

    alpha: float = 2.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        """Check.

        Raises:
            InputError: alpha - beta is not 1, or beta < 0.
        """
        _at_least_zero("beta", self.beta)
        if not math.isclose(self.alpha - self.beta, 1.0, abs_tol=1e-6):
            raise InputError(
                f"AlphaBeta expects alpha - beta = 1, or relevance is not conserved; got alpha={self.alpha}, "
                f"beta={self.beta}: take alpha={1 + self.beta:g}"
            )

    def __call__(self, x: Tensor, y: Tensor, layer: Affine) -> Tensor:
        """See `Rule`."""
        positive, negative = layer.positive(x), layer.negative(x)
        p, n = positive.detach(), negative.detach()
        only_positive = n.abs() <= _rounding(p) * p
        only_negative = ~only_positive & (p <= _rounding(p) * n.abs())
        alpha = torch.full_like(p, self.alpha).masked_fill(only_positive, 1).masked_fill(only_negative, 0)
        return positive * (alpha * share(y, p)) + negative * ((1 - alpha) * share(y, n))


@dataclass(frozen=True)
class Gamma:
    """Epsilon rule with the favoured contributions weighted by 1 + gamma: positive where y >= 0, else negative ones.

    R_j = sum_k (z_jk + gamma (z_jk)s) / (z_k + b_k + gamma (sum_j' (z_j'k)s + (b_k)s)) R_k, s the sign of y_k.
    Reference: Montavon et al. 2019 (Explainable AI, LNCS 11700, ch. 10) for positive inputs and outputs; here for
    inputs and outputs of both signs.
    Conservation: the bias absorbs its share. gamma -> infinity is z+ with the favourable bias, gamma = 0 is LRP-0.

    Example:
        >>> layer = Affine(lambda x, w: x @ w, torch.tensor([[2.0], [-1.0]]))
        >>> x = torch.tensor([[1.0, 1.0]], requires_grad=True)
        >>> y = layer(x)
        >>> (x * torch.autograd.grad(Gamma(1.0)(x, y, layer), x, 1 / y)[0] * 3).round().tolist()
        [[4.0, -1.0]]
    """

    gamma: float = 0.25

    def __post_init__(self) -> None:
        """Check.

        Raises:
            InputError: Negative or not finite.
        """
        _at_least_zero("gamma", self.gamma)

    def __call__(self, x: Tensor, y: Tensor, layer: Affine) -> Tensor:
        """See `Rule`."""
        above, below = (layer.weight + self.gamma * part for part in _parts(layer.weight))
        rising, falling = layer.signed(x, above, below), layer.signed(x, below, above)
        up, down = (None, None) if layer.bias is None else (layer.bias + self.gamma * b for b in _parts(layer.bias))
        q = torch.where(y.detach() >= 0, rising, falling)
        d = torch.where(y.detach() >= 0, _with_bias(rising, up), _with_bias(falling, down))
        return q * share(y, d)


@dataclass(frozen=True)
class Box:
    """zB rule for the layer that sees the image, whose intensities lie in [low, high].

    R_j = sum_k (x_j w_jk - low (w_jk)+ - high (w_jk)-) / sum_j' (same) R_k, no bias.
    `low` and `high` are the bounds of the preprocessing (the CT window after scaling), not those of one image. Zeros
    that pad the image inside the layer take no part; zeros that a layer of its own has put around it do, and keep
    their share.
    Reference: Montavon et al. 2017 (Pattern Recognition 65), zB rule.
    Conservation: exact. Relevances keep the sign that they start with.

    Example:
        >>> layer = Affine(lambda x, w: x @ w, torch.tensor([[2.0], [-1.0]]))
        >>> x = torch.tensor([[1.0, 0.0]], requires_grad=True)
        >>> y = layer(x)
        >>> (safe(x) * torch.autograd.grad(Box(-1.0, 1.0)(x, y, layer), x, 1 / y)[0] * 5).round().tolist()
        [[4.0, 1.0]]
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        """Check.

        Raises:
            InputError: The bounds are not finite, or not in order.
        """
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise InputError(f"box= expects finite bounds (low, high) with low < high, got ({self.low}, {self.high})")

    def __call__(self, x: Tensor, y: Tensor, layer: Affine) -> Tensor:
        """See `Rule`.

        Raises:
            InputError: The input leaves the box.
        """
        values = x.detach()
        slack = 1e-4 * (self.high - self.low)
        if values.numel() and (float(values.min()) < self.low - slack or float(values.max()) > self.high + slack):
            raise InputError(
                f"box=({self.low:g}, {self.high:g}) does not hold the input of the first layer, which runs from "
                f"{float(values.min()):g} to {float(values.max()):g}: give the range that the preprocessing "
                "clips intensities to"
            )
        above, below = _parts(layer.weight)
        q = layer(x) - layer.apply(_constant(self.low, x), above) - layer.apply(_constant(self.high, x), below)
        return q * share(y, q.detach())


def identity(x: Tensor, y: Tensor) -> Tensor:
    """Flow of an elementwise layer or a normalisation: relevance passes as it is, R_x = R_y.

    Args:
        x: Input, with a graph.
        y: Output, same shape.

    Example:
        >>> x = torch.tensor([0.0, -2.0], requires_grad=True)
        >>> flow = identity(x, torch.tensor([3.0, 4.0]))
        >>> (safe(x) * torch.autograd.grad(flow, x, torch.tensor([1.0, 1.0]) / torch.tensor([3.0, 4.0]))[0]).tolist()
        [1.0, 1.0]
    """
    return x * (safe(y) / safe(x))


def share(y: Tensor, d: Tensor, relative: float = GUARD) -> Tensor:
    """Y / d with a stabilised d, and 0 where d is 0: a unit without evidence has nothing to share out.

    Args:
        y: Output (B, ...).
        d: What the contributions add up to, same shape; no gradient.
        relative: |d| grows by this times the mean |d| of its sample, so that a sample's relevance is its own affair.

    Example:
        >>> share(torch.tensor([[3.0, 5.0]]), torch.tensor([[1.0, 0.0]]), 1.0).tolist()
        [[2.0, 0.0]]
    """
    d = d.detach()
    room = (relative * _scale(d)).clamp(min=TINY)
    return (safe(y) / torch.where(d < 0, d - room, d + room)).masked_fill(d == 0, 0)


def _scale(d: Tensor) -> Tensor:
    """Mean |d| of every sample, broadcastable to d."""
    return d.abs().mean(dim=tuple(range(1, d.ndim)), keepdim=True) if d.ndim > 1 else d.abs().mean()


def _rounding(d: Tensor) -> float:
    return torch.finfo(d.dtype).eps


def _parts(t: Tensor) -> tuple[Tensor, Tensor]:
    """Positive and negative part."""
    return t.clamp(min=0), t.clamp(max=0)


def _with_bias(z: Tensor, bias: Tensor | None) -> Tensor:
    return z.detach() if bias is None else z.detach() + bias


def _constant(value: float, x: Tensor) -> Tensor:
    """The value everywhere, with the derivative by which it counts as a contribution of x: safe(x) * d/dx = value."""
    return value + (x - x.detach()) * (value / safe(x))


def _at_least_zero(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"{name} expects a number >= 0, got {value}")
