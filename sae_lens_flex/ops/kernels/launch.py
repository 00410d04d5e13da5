"""How kernels are launched, and where they can be.

Where Triton is not installed, stand-ins for it let the kernel files be imported all the same.
"""

import inspect
from collections.abc import Callable, Sequence
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


MOST_PROGRAMS = (2**31 - 1, 65535, 65535)
"""How many programs CUDA takes along each axis of a grid."""


class Launch:
    """A kernel with all that does not change from call to call: its grid, sizes and constants.

    Calling it does what `kernel[grid](*tensors, *floats, *ints, **constants)` does, in a third of
    the host's time. Triton inspects every argument of every call to find the compiled program. Here
    the program is kept, so all calls take tensors of the same dtypes, on one device.

    Args:
        kernel: its parameters come in the order tensors, floats, ints, constants.
        grid: number of programs along each axis.
        ints: sizes and strides.
        num_warps: warps a program.
        max_registers: of a thread; None leaves them to the compiler.
        constants: values that are compiled in.

    Raises:
        ValueError: for more programs than CUDA takes. Its own error names neither kernel nor axis.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        ints: Sequence[int] = (),
        *,
        num_warps: int = 4,
        max_registers: int | None = None,
        **constants: Any,
    ) -> None:
        for axis, (n, most) in enumerate(zip(grid, MOST_PROGRAMS, strict=False)):
            if n > most:
                raise ValueError(
                    f"{kernel.fn.__name__} would take {n} programs along axis {axis}, expected at "
                    f"most {most}: the tensors are too large for it"
                )
        self._kernel = kernel
        self._grid = grid
        self._ints = ints
        self._constants = {**constants, "num_warps": num_warps}
        # There is no such option for AMD's GPUs, and none to interpret.
        if max_registers is not None and torch.version.hip is None and not INTERPRETED:
            self._constants["maxnreg"] = max_registers
        self._after_floats = (*ints, *constants.values())
        self._run: Any = None

    def __call__(
        self, tensors: Sequence[torch.Tensor | None], floats: Sequence[float] = ()
    ) -> None:
        """Launch the kernel on the device of the tensors, of which the first is not None.

        No program depends on the value of a float.
        """
        # Triton compiles another program for an integer, as which a setting such as 0 may come.
        floats = tuple(map(float, floats))
        if INTERPRETED:
            self._kernel[self._grid](*tensors, *floats, *self._ints, **self._constants)
            return
        first = tensors[0]
        assert first is not None
        device = first.get_device()
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(tensors, floats)
            return
        # Triton takes addresses too. Of a tensor it would ask the address, and the driver about it.
        addresses: list[int | None] = []
        bits = 0
        for tensor in tensors:
            address = None
            if tensor is not None:
                address = tensor.data_ptr()
                bits |= address
            addresses.append(address)
        # Triton compiles a program of its own for aligned addresses. Nearly all are, so only this
        # program is kept.
        is_aligned = bits % 16 == 0
        if is_aligned and self._run is not None:
            self._run(*addresses, *floats, *self._after_floats)
            return
        compiled = self._kernel[self._grid](*tensors, *floats, *self._ints, **self._constants)
        if is_aligned and MOST_KEPT > 0:
            self._run = launcher(compiled, (*self._grid, 1, 1)[:3], device)


def _is_called(hook: Any) -> bool:
    """Return whether a hook does anything: Triton's is a chain, which may be empty."""
    return hook is not None and bool(getattr(hook, "calls", True))


def _takes_known_arguments(run: Any) -> bool:
    """Return whether Triton's function that runs a kernel takes the arguments that 3.6 to 3.9 pass.

    3.6 names the first ones only.
    """
    first = ["gridX", "gridY", "gridZ", "stream", "function"]
    next_ones = ["kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook"]
    names = [*inspect.signature(run).parameters]
    return names in ([*first, "args"], [*first, *next_ones, "args"])


def launcher(compiled: Any, grid: tuple[int, ...], device: int) -> Callable[..., None]:
    """Return what launches a compiled kernel on a device, which must be the current one.

    Triton's own `compiled[grid]` describes every launch to hooks, which profilers set. That takes
    up to half of a launch's time in Python, and mostly there are none.
    """
    by_triton = compiled[grid]
    if not _takes_known_arguments(compiled.run):
        return by_triton
    hooks, stream = triton.knobs.runtime, triton.runtime.driver.active.get_current_stream
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

    def launch_without_hooks(*arguments: Any) -> None:
        if _is_called(hooks.launch_enter_hook) or _is_called(hooks.launch_exit_hook):
            by_triton(*arguments)
        else:
            run(*grid, stream(device), function, metadata, None, None, None, *arguments)

    return launch_without_hooks


_launches: dict[tuple[Any, ...], Launch] = {}
MOST_KEPT = 4096  # launches: one a kernel and set of sizes. Beyond them Triton is asked.


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[torch.Tensor | None],
    floats: Sequence[float] = (),
    ints: Sequence[int] = (),
    **options: Any,
) -> None:
    """Launch a kernel by a `Launch`, which is looked up by the arguments' types and sizes.

    Args:
        tensors, floats: as a `Launch` is called with.
        kernel, grid, ints, options: as it is made of.
    """
    if INTERPRETED:
        Launch(kernel, grid, ints, **options)(tensors, floats)
        return
    first = tensors[0]
    assert first is not None
    dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
    key = (kernel.fn, first.get_device(), grid, *ints, *dtypes, *options.values())
    kept = _launches.get(key)
    if kept is None:
        kept = Launch(kernel, grid, ints, **options)
        if len(_launches) < MOST_KEPT:
            _launches[key] = kept
    kept(tensors, floats)


__all__ = [
    "INTERPRETED",
    "IS_INSTALLED",
    "Launch",
    "cdiv",
    "is_available",
    "launch",
    "tl",
    "triton",
    "why_unavailable",
]
