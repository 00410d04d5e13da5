"""Triton where it is installed; elsewhere stand-ins that let the kernel files import."""

import os
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # kernels are a language of their own, which type checkers misread

    class _Unchecked(type):
        def __getattr__(cls, name: str) -> Any: ...

    class _Language(metaclass=_Unchecked):
        constexpr = Any

    tl = _Language
    triton: Any = None
    IS_INSTALLED: bool = True
else:
    try:
        import triton
        import triton.language as tl

        IS_INSTALLED = True
    except ImportError:

        class _Absent:
            """Takes the place of `triton` and `tl`: decorates kernels that are never launched."""

            constexpr = Any

            @staticmethod
            def jit(kernel: Any = None, **options: Any) -> Any:
                return kernel or (lambda kernel: kernel)

        triton = tl = _Absent
        IS_INSTALLED = False

INTERPRETED = IS_INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, which takes CPU tensors."""


def why_unavailable(device: torch.device) -> str | None:
    """Return why Triton kernels cannot run on `device`, or None where they can."""
    if not IS_INSTALLED:
        return "the package triton, which there is for Linux, is not installed"
    if device.type != "cuda" and not INTERPRETED:
        return f"they run on CUDA and ROCm devices, and the tensors are on {str(device)!r}"
    return None


def is_available(device: torch.device) -> bool:
    """Return whether "auto" picks the Triton kernels on `device`."""
    return device.type == "cuda" and why_unavailable(device) is None


__all__ = ["INTERPRETED", "IS_INSTALLED", "is_available", "tl", "triton", "why_unavailable"]
