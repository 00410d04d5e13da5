"""Which backend computes, and in which dtypes."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .kernels import launch

BACKENDS = ("auto", "triton", "torch")

CHECKS_INDICES = os.environ.get("SAE_LENS_FLEX_CHECK_INDICES") == "1"
"""Whether the Triton kernels, too, raise for a latent outside [0, F). Every call then waits for the
device."""


def uses_triton(backend: str, device: torch.device) -> bool:
    """Return whether a backend means the Triton kernels on `device`.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: for "triton" where the kernels cannot run; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return launch.is_available(device)
    if backend == "triton" and (reason := launch.why_unavailable(device)) is not None:
        raise RuntimeError(
            f"the Triton kernels cannot run here: {reason}. backend='auto' in an SAE's config, and "
            "the functions without the prefix triton_, do without them"
        )
    return backend == "triton"


def computes_by_triton(backend: str, *tensors: torch.Tensor) -> bool:
    """Return whether a backend means the Triton kernels for these tensors.

    "auto" leaves float64 to PyTorch, because the kernels accumulate in float32.

    Raises:
        ValueError: for "triton" and float64, and as `uses_triton`.
        RuntimeError: as `uses_triton`.
    """
    if accumulation_dtype(*tensors) == torch.float64 and backend in ("auto", "triton"):
        if backend == "triton":
            raise ValueError(
                "backend is 'triton' for float64 tensors, expected 'auto' or 'torch': the Triton "
                "kernels compute in float32"
            )
        return False
    return uses_triton(backend, tensors[0].device)


def accumulation_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Return the dtype of sums: float64 where an input is float64, else float32."""
    is_double = torch.float64 in [tensor.dtype for tensor in tensors]
    return torch.float64 if is_double else torch.float32


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the gradient of an input is kept until the backward pass.

    It is the input's own, but float32 for float16. The range of float16 is narrow, and the factor
    of a gradient scaler comes in the backward pass only. Autograd then rounds to float16.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def in_dtype(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return a tensor in `dtype`, or as it is where that is None."""
    # Comparing takes less of the host's time than calling `to` for nothing.
    return tensor if dtype is None or tensor.dtype == dtype else tensor.to(dtype)


def product_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return the dtype of products with `weight`: autocast's where it is on, but float64 stays."""
    device_type = weight.device.type
    if torch.is_autocast_enabled(device_type) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return weight.dtype


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which autocast is off."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()  # Entering a context of autocast takes time, also where autocast is off.


def is_deterministic() -> bool:
    """Return whether `torch.use_deterministic_algorithms(True)` is in force."""
    return torch.are_deterministic_algorithms_enabled()


_UNTRACED_TYPES: frozenset[Callable[..., Any]] = frozenset(
    (torch.Tensor, torch.nn.Parameter, type(None))
)


def is_traced(*tensors: torch.Tensor | None) -> bool:
    """Return whether the tensors stand for others, as they do within torch.compile."""
    return torch.compiler.is_compiling() or not _UNTRACED_TYPES.issuperset(map(type, tensors))
