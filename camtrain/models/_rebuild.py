"""What a checkpoint must tell so that it rebuilds its network, and what an error must tell when it does not fit."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from camtrain._errors import InputError

# The function by which Lightning builds a module from the config in its hyper-parameters; the command line stores the
# same name, and Lightning trusts no other.
INSTANTIATOR = "pytorch_lightning.cli.instantiate_module"

_OUTPUT_ARGUMENTS = (
    "num_classes",
    "out_channels",
    "n_classes",
    "num_labels",
    "labels",
    "num_outputs",
    "n_outputs",
    "out_features",
    "classes",
)


def class_path(net: nn.Module) -> str:
    """Dotted name of the class.

    Example:
        >>> class_path(nn.ReLU())
        'torch.nn.modules.activation.ReLU'
    """
    return f"{type(net).__module__}.{type(net).__qualname__}"


def net_config(net: nn.Module) -> dict[str, Any] | None:
    """`{"class_path", "init_args"}` of one of camtrain's own networks, which record their arguments; else None.

    Example:
        >>> from camtrain.models import PoolNet
        >>> net_config(PoolNet(labels=2))["class_path"], net_config(nn.ReLU())
        ('camtrain.models.pool_net.PoolNet', None)
    """
    config = getattr(net, "config", None)
    if not type(net).__module__.startswith("camtrain.models.") or not isinstance(config, dict):
        return None
    return {"class_path": class_path(net), "init_args": dict(config)}


def outputs_argument(net: nn.Module, labels: int) -> str:
    """What to do about a wrong number of outputs, as a clause for an error message.

    Example:
        >>> outputs_argument(nn.Linear(3, 2), 8)
        'set out_features=8 of Linear'
    """
    if hasattr(net, "resize_head"):
        return "pass labels= to LitClassifier, which then sizes the network"
    arguments = inspect.signature(type(net).__init__).parameters
    found = next((name for name in _OUTPUT_ARGUMENTS if name in arguments), None)
    if found is None:
        return f"give the last layer of {type(net).__name__} {labels} outputs"
    return f"set {found}={labels} of {type(net).__name__}"


def check_state(given: Mapping[str, Any], own: Mapping[str, Any], strict: bool) -> None:
    """Compare the weights of a checkpoint with those of a model.

    Args:
        given: State dict of the checkpoint.
        own: State dict of the model.
        strict: Are missing and surplus entries errors as well?

    Raises:
        InputError: They differ; the first difference is named.
    """
    remedy = "use the config that the checkpoint was trained with"
    for name in given:
        if name in own and given[name].shape != own[name].shape:
            raise InputError(
                f"the checkpoint does not fit this model: {name} has shape {tuple(given[name].shape)}, "
                f"expected {tuple(own[name].shape)}; {remedy}"
            )
    missing, surplus = [n for n in own if n not in given], [n for n in given if n not in own]
    if strict and (missing or surplus):
        what = f"it lacks {missing[0]}" if missing else f"it holds {surplus[0]}, which the model does not have"
        raise InputError(
            f"the checkpoint does not fit this model: {what} ({len(missing)} missing, {len(surplus)} surplus); {remedy}"
        )
