"""How kernels are launched, and where they can be.

Where Triton is not installed, stand-ins for it let the kernel files be imported all the same.
"""

from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # type checkers misread the language that kernels are written in

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
            """Stands for `triton` and `tl`. Its decorator leaves a kernel as it is."""

            constexpr = Any

            @staticmethod
            def jit(kernel: Any = None, **options: Any) -> Any:
                return kernel or (lambda kernel: kernel)

        triton = tl = _Absent
        IS_INSTALLED = False

INTERPRETED: bool = IS_INSTALLED and triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, which takes CPU tensors."""


def why_unavailable(device: torch.device) -> str | None:
    """Return why Triton kernels cannot run on `device`, or None where they can."""
    if not IS_INSTALLED:
        return "the package triton, which there is for Linux, is not installed"
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return (
            "they run on CUDA devices (or, with TRITON_INTERPRET=1 set before the import, slowly "
            f"on a CPU), and the tensors are on {str(device)!r}"
        )
    return None


def is_available(device: torch.device) -> bool:
    """Return whether "auto" picks the Triton kernels on `device`."""
    return device.type == "cuda" and why_unavailable(device) is None


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


_compiled: dict[tuple[Any, ...], Any] = {}
MOST_COMPILED = 4096  # entries: one a kernel and set of sizes. Beyond them Triton is asked.


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[torch.Tensor | None],
    floats: Sequence[float] = (),
    ints: Sequence[int] = (),
    *,
    num_warps: int = 4,
    **constants: Any,
) -> None:
    """Launch a kernel on the device of its tensors.

    It does what `kernel[grid](*tensors, *floats, *ints, **constants)` does, in half the host's
    time. Triton inspects every argument of every launch to find the compiled program; here the
    program is looked up by the arguments' types and sizes.

    Args:
        kernel: its parameters come in the order tensors, floats, ints, constants.
        grid: number of programs along each axis.
        tensors: the first is not None.
        floats: numbers whose value no program depends on.
        ints: sizes and strides.
        num_warps: warps a program.
        constants: values that are compiled in.
    """
    arguments = (*tensors, *floats, *ints)
    if INTERPRETED:
        kernel[grid](*arguments, **constants, num_warps=num_warps)
        return
    first = tensors[0]
    assert first is not None
    device = first.get_device()
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, tensors, floats, ints, num_warps=num_warps, **constants)
        return
    # Triton takes addresses too. Of a tensor it would ask the address, and the driver about it.
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
    # Triton compiles a program of its own for aligned addresses. Nearly all are, so only these
    # programs are kept.
    is_aligned = reduce(or_, filter(None, addresses), 0) % 16 == 0
    key = (kernel.fn, device, grid, num_warps, *ints, *dtypes, *constants.values())
    run = _compiled.get(key) if is_aligned else None
    if run is not None:
        run(*addresses, *floats, *ints, *constants.values())
        return
    compiled = kernel[grid](*arguments, **constants, num_warps=num_warps)
    if is_aligned and len(_compiled) < MOST_COMPILED:
        _compiled[key] = compiled[(*grid, 1, 1)[:3]]


__all__ = [
    "INTERPRETED",
    "IS_INSTALLED",
    "cdiv",
    "is_available",
    "launch",
    "tl",
    "triton",
    "why_unavailable",
]
