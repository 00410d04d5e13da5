"""Compile every kernel for an H200, which need not be there, and print their names.

A process of its own: Triton must not be in its interpreter. Kernels are compiled where they would
be launched, and nothing is computed.
"""

import importlib
import pkgutil
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class AbsentGPU:
    """What Triton asks of a driver before a launch."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


compiled: set[str] = set()
launch = JITFunction.run


def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    compiled.add(self.fn.__name__)
    for value in args:  # what a kernel would have written are indices that other code uses
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            value.zero_()
    return launch(self, *args, grid=grid, warmup=True, **options)


triton.runtime.driver.set_active(AbsentGPU())
JITFunction.run = compile_only

from sae_lens_flex import ops  # noqa: E402
from sae_lens_flex.ops import _triton, spread, topk  # noqa: E402
from sae_lens_flex.ops.encode import encode  # noqa: E402
from sae_lens_flex.ops.norms import norms_and_copy  # noqa: E402

_triton.why_unavailable = lambda device: None
_triton.is_available = lambda device: True
_triton.MOST_COMPILED = 0  # every launch goes by JITFunction.run
spread.FEWEST_PAIRS = topk.FEWEST_ELEMENTS = 0

B, K, F, D = 64, 16, 256, 128
for dtype in (torch.float32, torch.bfloat16):
    for is_deterministic in (False, True):
        torch.use_deterministic_algorithms(is_deterministic)
        for loss in (ops.triton_hierarchical_sae_loss, ops.triton_topk_sae_loss):
            shapes = {"weight": (F, D), "vals": (B, K), "bias": (D,), "target": (B, D)}
            inputs = {
                name: torch.zeros(shape, dtype=dtype, requires_grad=True)
                for name, shape in shapes.items()
            }
            loss(torch.zeros(B, K, dtype=torch.int64), **inputs).backward()
        for norms in (None, torch.ones(F)):
            inputs = {
                name: torch.zeros(shape, dtype=dtype, requires_grad=True)
                for name, shape in {
                    "x": (B, D),
                    "W_enc": (D, F),
                    "b_enc": (F,),
                    "b_dec": (D,),
                }.items()
            }
            encode(**inputs, norms=norms, k=K, backend="triton").hidden.sum().backward()
norms_and_copy(torch.zeros(F, D), torch.bfloat16)

kernels = {
    name
    for module in pkgutil.iter_modules(ops.__path__, ops.__name__ + ".")
    for name in vars(importlib.import_module(module.name))
    if name.endswith("_kernel")
}
print("compiled", *sorted(compiled))
print("not compiled", *sorted(kernels - compiled))
