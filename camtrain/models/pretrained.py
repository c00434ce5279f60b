"""Weights of another training: find them in a file, fit names to names, and say what was taken and what was not."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from camtrain._errors import InputError

# Under these keys files keep the weights beside other things.
_PLACES = ("state_dict", "model_state_dict", "model", "net", "network", "network_weights", "weights", "params")
# Less than this part of the network's numbers, and of its tensors, is no start from that file.
LEAST = 0.1


@dataclass(frozen=True)
class Pretrained:
    """What came of a file of weights.

    Attributes:
        path: The file.
        loaded: Names in the network that were taken.
        adapted: Of these, name -> what was done (another number of image channels).
        left_out: Name in the file -> why it was not taken.
        fresh: Names in the network that keep their own start.
        share: Part of the network's numbers that were taken.
    """

    path: str
    loaded: tuple[str, ...]
    adapted: Mapping[str, str]
    left_out: Mapping[str, str]
    fresh: tuple[str, ...]
    share: float

    def __str__(self) -> str:
        """A short account."""
        lines = [f"{self.path}: {len(self.loaded)} tensors taken, {self.share:.1%} of the network's numbers"]
        lines += [f"  adapted {name}: {how}" for name, how in self.adapted.items()]
        reasons: dict[str, list[str]] = {}
        for name, why in self.left_out.items():
            reasons.setdefault(why, []).append(name)
        lines += [f"  left out ({why}): {_few(names)}" for why, names in reasons.items()]
        if self.fresh:
            lines.append(f"  not in the file, so as they were: {_few(self.fresh)}")
        return "\n".join(lines)


def load_pretrained(net: nn.Module, path: str | os.PathLike[str], head: bool = False) -> Pretrained:
    """Start a network from a file of weights, in place.

    Reads what `torch.save` wrote: a state dict, or a mapping that holds one (MedicalNet, MONAI's model zoo, Lightning).
    Names may differ by what stands before them (`module.`, `net.`, `backbone.`); a prefix is found by trying all of
    them. The file is read without running code from it.

    Args:
        net: The network.
        path: The file. torchvision's ResNet-18 fits `AxialNet` and `BodyCAM`.
        head: Take the last linear layer too, where it has the same shape; its outputs then must mean the same labels.

    Returns:
        An account; `print` it.

    Raises:
        InputError: No such file, nothing in it that is a state dict, or nearly nothing that fits the network.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp()) / "pretrained.pth"
        >>> torch.save({"state_dict": {"module.0.weight": torch.ones(2, 3), "module.0.bias": torch.ones(2)}}, path)
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        >>> account = load_pretrained(net, path)
        >>> account.loaded, account.fresh
        (('0.weight', '0.bias'), ('1.weight', '1.bias'))
    """
    given = read_weights(path)
    own = net.state_dict()
    strip, add = _prefixes(given, own)
    last = () if head else _last_layer(net)
    taken: dict[str, Tensor] = {}
    adapted: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for name, value in given.items():
        target = add + name.removeprefix(strip) if name.startswith(strip) else None
        if target is None or target not in own:
            left_out[name] = "the network has no such tensor"
        elif target in last:
            left_out[name] = "the last layer: its outputs are other labels"
        elif value.shape == own[target].shape:
            taken[target] = value
        elif (changed := other_channels(value, own[target].shape)) is not None:
            taken[target] = changed
            adapted[target] = f"{value.shape[1]} image channels became {changed.shape[1]}"
        else:
            left_out[name] = f"shape {tuple(value.shape)}, in the network {tuple(own[target].shape)}"
    for name in _without_bias(taken, own):
        taken[name] = torch.zeros_like(own[name])
        adapted[name] = "a bias of 0: the file's convolution has none"
    account = _account(str(path), net, own, taken, adapted, left_out)
    _refuse_little(account, given, own)
    net.load_state_dict({**own, **taken})
    return account


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a file, by name.

    Raises:
        InputError: No such file, one that needs code to be run, or no state dict in it.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*TorchScript archive")  # told below, in words of ours
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"pretrained= expects a file of weights, got {path}: {error.strerror or error}") from None
    except RuntimeError as error:
        if "TorchScript" in str(error):
            raise InputError(
                f"pretrained= expects a file of weights, got {path}, which is a TorchScript archive: a bundle of the "
                "model zoo has its weights in models/model.pt"
            ) from None
        raise _unreadable(path, error) from error
    except (pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error
    for found in _mappings(content):
        tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors
    raise InputError(f"pretrained= expects a state dict, got {type(content).__name__} without tensors in {path}")


def _unreadable(path: str | os.PathLike[str], error: Exception) -> InputError:
    first = (str(error).strip().splitlines() or ["no message"])[0][:160]
    return InputError(
        f"pretrained= expects a file of plain tensors, got {path}, which cannot be opened without running code "
        f"from it, or is damaged ({first}): save its state_dict() alone where you trust it"
    )


def _without_bias(taken: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Biases of convolutions whose weights were taken from a file that has no bias for them."""
    weights = (name for name, value in taken.items() if name.endswith(".weight") and value.ndim > 2)
    biases = [f"{name.removesuffix('.weight')}.bias" for name in weights]
    return [name for name in biases if name in own and name not in taken]


def _mappings(content: Any) -> Iterator[Mapping[Any, Any]]:
    """The mappings that may be state dicts, the likely ones first."""
    if isinstance(content, Mapping):
        for key in _PLACES:
            if isinstance(content.get(key), Mapping):
                yield from _mappings(content[key])
        yield content


def other_channels(value: Tensor, shape: Sequence[int]) -> Tensor | None:
    """A first convolution for another number of image channels; None where that is not all that differs.

    One channel is repeated and divided by their number, several become one as their sum, so that the same grey image
    gives the same activations.

    Args:
        value: (K, C, ...) weights.
        shape: What is wanted.

    Example:
        >>> other_channels(torch.ones(2, 1, 3), (2, 3, 3)).sum(dim=1).unique()
        tensor([1.])
    """
    shape = tuple(shape)
    if value.ndim < 3 or len(shape) != value.ndim or (value.shape[0], *value.shape[2:]) != (shape[0], *shape[2:]):
        return None
    if value.shape[1] == 1:
        return value.expand(shape) / shape[1]
    return value.sum(dim=1, keepdim=True) if shape[1] == 1 and value.shape[1] == 3 else None


def _prefixes(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[str, str]:
    """What to take off the file's names and put before them, so that most names fit, and of these most numbers."""
    strips, adds = _starts(given), _starts(own)
    sizes = {name: value.shape for name, value in own.items()}
    best, found = (-1, -1), ("", "")
    for strip in strips:
        for add in adds:
            pairs = ((add + name[len(strip) :], value) for name, value in given.items() if name.startswith(strip))
            known = [(name, value) for name, value in pairs if name in sizes]
            fits = len(known), sum(value.numel() for name, value in known if sizes[name] == value.shape)
            if fits > best:
                best, found = fits, (strip, add)
    return found


def _starts(names: Mapping[str, Any], depth: int = 3) -> list[str]:
    """All that may stand before a name, up to so many dots; "" first."""
    parts = [name.split(".") for name in names]
    found = {".".join(part[:n]) + "." for part in parts for n in range(1, min(depth, len(part) - 1) + 1)}
    return ["", *sorted(found, key=lambda start: (start.count("."), start))]


def _last_layer(net: nn.Module) -> tuple[str, ...]:
    """Names of the last linear layer's tensors."""
    linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    return (f"{linear[-1]}.weight", f"{linear[-1]}.bias") if linear else ()


def _account(
    path: str,
    net: nn.Module,
    own: Mapping[str, Tensor],
    taken: Mapping[str, Tensor],
    adapted: Mapping[str, str],
    left_out: Mapping[str, str],
) -> Pretrained:
    numbers = {name: parameter.numel() for name, parameter in net.named_parameters()}
    share = sum(n for name, n in numbers.items() if name in taken) / max(1, sum(numbers.values()))
    fresh = tuple(name for name in own if name not in taken and not name.endswith("num_batches_tracked"))
    return Pretrained(path, tuple(name for name in own if name in taken), adapted, left_out, fresh, share)


def _refuse_little(account: Pretrained, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    # Half a ResNet, as detectors hold it, has few of the numbers (the last stages are the large ones) and many tensors.
    counted = [name for name in own if not name.endswith("num_batches_tracked")]
    tensors = sum(name in account.loaded for name in counted) / max(1, len(counted))
    if max(account.share, tensors) >= LEAST:
        return
    examples = [f"{name} ({why})" for name, why in list(account.left_out.items())[:3]]
    raise InputError(
        f"pretrained={account.path} fits {account.share:.1%} of the network's numbers ({len(account.loaded)} of "
        f"{len(own)} tensors; the file has {len(given)}): not taken are {'; '.join(examples)}; the network has "
        f"{', '.join(list(own)[:3])}, ...: use the architecture that the file was trained with"
    )


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
