"""How an end of memory shows."""

from __future__ import annotations

import torch

# CUDA, ROCm, MPS and XLA say the first; cuBLAS and the allocators of the CPU the others.
_WORDS = ("out of memory", "ALLOC_FAILED", "not enough memory", "can't allocate memory", "std::bad_alloc")


def out_of_memory(error: BaseException) -> bool:
    """Is this what torch, numpy or Python say when memory has ended, on any device?

    Example:
        >>> out_of_memory(MemoryError()), out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
        (True, True)
        >>> out_of_memory(RuntimeError("shapes differ"))
        False
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
