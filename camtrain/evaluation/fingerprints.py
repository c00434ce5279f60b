"""What an evaluation depends on, as short texts: weights, architecture, callables."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def fingerprint(model: nn.Module) -> str:
    """A short hash of all parameters, buffers and of how the modules are put together.

    Example:
        >>> a, b = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> _ = b.load_state_dict(a.state_dict())
        >>> fingerprint(a) == fingerprint(b), fingerprint(a) == fingerprint(nn.Linear(2, 1))
        (True, False)
    """
    digest = hashlib.blake2b(repr(model).encode(), digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        if isinstance(tensor, torch.Tensor):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def named(function: Callable[..., Any] | None) -> str | None:
    """Name and code of a callable, as far as Python shows them; None for none.

    Example:
        >>> named(len), named(lambda y: y) == named(lambda y: -y)
        ('builtins.len', False)
    """
    if function is None:
        return None
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    code = getattr(function, "__code__", None)
    return name if code is None else f"{name}#{zlib.crc32(code.co_code + repr(code.co_consts).encode()):08x}"
