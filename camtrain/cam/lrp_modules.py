"""Which kind of layer a module is for LRP, and convolutions and linear layers taken apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camtrain.cam.layer_lookup import find_layer
from camtrain.cam.lrp_rules import Affine, full

Kind = Literal["conv", "dense", "norm", "activation", "sigmoid", "softmax", "refused", "unruled", "exact"]
Gates = Iterable[str] | Callable[[str, nn.Module], bool] | None

_Conv = nn.modules.conv._ConvNd
_Transposed = nn.modules.conv._ConvTransposeNd
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
# ReLU is missing on purpose: its own derivative already is the rule. ReLU6 and Hardtanh need one where they saturate.
_ACTIVATIONS = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.PReLU,
    nn.RReLU,
    nn.SELU,
    nn.SiLU,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
)
_REFUSED = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
# Known by name: classes of MONAI, torchvision and timm, none of which this package imports here.
_NAMED: dict[str, Kind] = {
    "FrozenBatchNorm2d": "norm",
    "Swish": "activation",
    "MemoryEfficientSwish": "activation",
    "Mish": "activation",
    "GEGLU": "unruled",
    "SABlock": "refused",
    "CrossAttentionBlock": "refused",
    "WindowAttention": "refused",
}
# (class, attribute): a module whose output only scales others.
_GATES = (("ChannelSELayer", "fc"), ("MBConvBlock", "_se_expand"))


def kind_of(module: nn.Module) -> Kind:
    """What LRP does with a module.

    - `conv`, `dense`: a rule of the preset; `norm`, `activation`: the identity rule;
    - `sigmoid`: a gate, except on (B, K), where it is an activation; `softmax`: refused, except on (B, K);
    - `refused`: attention and recurrent layers, which no rule here covers;
    - `unruled`: has parameters, or multiplies, but no rule: its plain gradient is used;
    - `exact`: everything else (ReLU, pooling, dropout, padding, containers), where the gradient is the rule.

    Example:
        >>> [kind_of(m) for m in (nn.Conv3d(1, 1, 1), nn.BatchNorm1d(2), nn.SiLU(), nn.ReLU(), nn.GRU(1, 1))]
        ['conv', 'norm', 'activation', 'exact', 'refused']
    """
    classes: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], Kind], ...] = (
        (_Conv, "conv"),
        (nn.Linear, "dense"),
        (_NORMS, "norm"),
        (_ACTIVATIONS, "activation"),
        ((nn.Sigmoid, nn.Hardsigmoid), "sigmoid"),
        ((nn.Softmax, nn.Softmax2d), "softmax"),
        (_REFUSED, "refused"),
        ((nn.GLU, nn.LogSoftmax, nn.Softmin), "unruled"),
    )
    for known, kind in classes:
        if isinstance(module, known):
            return kind
    for name in _ancestors(module):
        if name in _NAMED:
            return _NAMED[name]
    return "unruled" if any(p is not None for p in module._parameters.values()) else "exact"


def find_gates(model: nn.Module, gates: Gates, usual: bool = True) -> set[nn.Module]:
    """Modules whose output only scales others and is held constant.

    Args:
        model: The model.
        gates: What the user names: dotted names, or callable(name, module) -> bool.
        usual: Add those known by class: `fc` of MONAI's squeeze-and-excitation layers, `_se_expand` of its
            EfficientNet.

    Raises:
        InputError: No module of that name.

    Example:
        >>> model = nn.ModuleDict({"conv": nn.Conv1d(2, 2, 1), "scale": nn.Linear(2, 2)})
        >>> find_gates(model, ["scale"]) == find_gates(model, lambda name, _: name == "scale") == {model["scale"]}
        True
    """
    if gates is None:
        found = set()
    elif callable(gates):
        found = {m for n, m in model.named_modules(remove_duplicate=False) if n and gates(n, m)}
    else:
        found = {find_layer(model, name)[1] for name in ([gates] if isinstance(gates, str) else gates)}
    if usual:
        for module in model.modules():
            names = _ancestors(module)
            found |= {
                child for o, a in _GATES if o in names and isinstance(child := getattr(module, a, None), nn.Module)
            }
    return found


def take_apart(module: nn.Module, x: Tensor, y: Tensor) -> Affine | None:
    """A convolution, transposed convolution or linear layer as y = f(x; w) + b, in float32 or float64.

    Args:
        module: Of kind `conv` or `dense`.
        x: Its input.
        y: What it returned.

    Returns:
        The layer taken apart, or None where a subclass has a forward of its own that does something else.

    Example:
        >>> linear, x = nn.Linear(3, 2), torch.rand(4, 3)
        >>> layer = take_apart(linear, x, linear(x))
        >>> bool(torch.allclose(layer(x) + layer.bias, linear(x)))
        True
    """
    if isinstance(module, _Transposed):
        apply = _transposed(module, x, y)
    elif isinstance(module, _Conv):
        apply = _convolution(module)
    elif isinstance(module, nn.Linear):
        apply = _linear
    else:
        raise TypeError(f"{type(module).__name__} is no convolution or linear layer")
    bias = None if module.bias is None else full(module.bias.detach())
    if bias is not None and not isinstance(module, nn.Linear):
        bias = bias.view(-1, *[1] * len(module.kernel_size))
    layer = Affine(apply, full(module.weight.detach()), bias)
    return layer if _torchs_forward(module) or _reproduces(layer, full(x.detach()), full(y.detach())) else None


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def _convolution(module: _Conv) -> Callable[[Tensor, Tensor], Tensor]:
    def apply(x: Tensor, weight: Tensor) -> Tensor:
        return module._conv_forward(x, weight, None)

    return apply


def _transposed(module: _Transposed, x: Tensor, y: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    rank = len(module.kernel_size)
    padding = [int(p) for p in module.padding]
    # A caller may have asked for another output size than the module's own.
    extra = [
        have - ((size - 1) * stride - 2 * pad + dilation * (kernel - 1) + 1)
        for have, size, stride, pad, dilation, kernel in zip(
            y.shape[-rank:],
            x.shape[-rank:],
            module.stride,
            padding,
            module.dilation,
            module.kernel_size,
            strict=True,
        )
    ]

    def apply(x: Tensor, weight: Tensor) -> Tensor:
        return _TRANSPOSED[rank](x, weight, None, module.stride, padding, extra, module.groups, module.dilation)

    return apply


def _torchs_forward(module: nn.Module) -> bool:
    return "forward" not in vars(module) and type(module).forward.__module__.startswith("torch.nn.modules.")


def _reproduces(layer: Affine, x: Tensor, y: Tensor) -> bool:
    """Is this what a subclass with a forward of its own did to x?"""
    with torch.no_grad():
        try:
            z = layer(x)
        except RuntimeError:
            return False
        z = z if layer.bias is None else z + layer.bias
        return z.shape == y.shape and bool((z - y).abs().max() <= 1e-2 * y.abs().max())


def _ancestors(module: nn.Module) -> set[str]:
    return {c.__name__ for c in type(module).__mro__}
