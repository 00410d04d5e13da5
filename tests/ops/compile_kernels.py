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
run = JITFunction.run


def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    compiled.add(self.fn.__name__)
    for value in args:  # what a kernel would have written are indices that other code uses
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            value.zero_()
    return run(self, *args, grid=grid, warmup=True, **options)


triton.runtime.driver.set_active(AbsentGPU())
JITFunction.run = compile_only

from sae_lens_flex import ops  # noqa: E402
from sae_lens_flex.ops import by_triton, kernels  # noqa: E402
from sae_lens_flex.ops.kernels import adam, copies, launch  # noqa: E402
from sae_lens_flex.training.dead import DeadLatents, KnownDead  # noqa: E402
from sae_lens_flex.training.requests import (  # noqa: E402
    Inputs,
    Spec,
    WantedGradients,
    Weights,
)
from sae_lens_flex.training.step import loss_on_dead, reconstruct, step  # noqa: E402

launch.why_unavailable = lambda device: None
launch.is_available = lambda device: True
launch.MOST_KEPT = 0  # every launch goes by JITFunction.run
by_triton.FEWEST_ELEMENTS = 0

B, K, F, D = 64, 16, 256, 128


def compile_loss(loss: Any, dtype: torch.dtype) -> None:
    shapes = {"weight": (F, D), "vals": (B, K), "bias": (D,), "target": (B, D)}
    inputs = {
        name: torch.zeros(shape, dtype=dtype, requires_grad=True) for name, shape in shapes.items()
    }
    loss(torch.zeros(B, K, dtype=torch.int64), **inputs).backward()


def compile_step(
    dtype: torch.dtype, is_deterministic: bool, rescales: bool, **settings: Any
) -> None:
    weights = Weights(
        W_enc=torch.zeros(F, D, dtype=dtype).T,
        b_enc=torch.zeros(F, dtype=dtype),
        W_dec=torch.zeros(F, D, dtype=dtype),
        b_dec=torch.zeros(D, dtype=dtype),
    )
    spec = Spec(
        k=K,
        levels="last",
        n_samples=B,
        rescale_acts_by_decoder_norm=rescales,
        apply_b_dec_to_input=True,
        product_dtype=torch.bfloat16,
        use_triton=True,
        deterministic=is_deterministic,
        matmul_precision="highest",
        **settings,
    )
    inputs = Inputs(torch.zeros(B, D, dtype=dtype), torch.zeros(B, D))
    wanted = WantedGradients(*[True] * 7)
    step(weights, inputs, spec, wanted=wanted)
    if not spec.over_batch:
        latents = torch.arange(D)
        for is_dead in (None, latents >= 0):
            found = DeadLatents(latents, is_dead, None)
            known = None if is_dead is None else KnownDead(torch.arange(F) < D, found)
            with torch.no_grad():
                main = reconstruct(weights, inputs, spec, wanted, known=known)
            _, of_dead = loss_on_dead(
                *(main, weights, inputs, spec, wanted, found), coefficient=1.0
            )
            of_dead.added_to(main.gradients, weights, inputs.encoder_input, main.is_absent)


def compile_adam(n_weights: int, **settings: Any) -> None:
    weights = [
        adam.Updated(*(torch.zeros(size) for _ in range(4)), torch.zeros(()))
        for size in (F * D, 1, F * D, D)[:n_weights]
    ]
    squares = adam.squares([each.gradient for each in weights])
    adam.adam_(weights, squares, torch.ones(()), adam.Adam((0.9, 0.999), 1e-8, **settings))


for n_weights in (1, 4):
    for settings in (
        {},
        {"weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
    ):
        compile_adam(n_weights, **settings)

# With copies and without, as for small batches and for others, with gradients that the backward
# pass finishes and without: of these eight, four with each dtype.
VARIANTS = {
    torch.float32: ((True, 0, 0), (True, 0, 2**14), (False, 1024, 0), (False, 1024, 2**14)),
    torch.bfloat16: ((True, 1024, 0), (True, 1024, 2**14), (False, 0, 0), (False, 0, 2**14)),
}

for dtype, variants in VARIANTS.items():
    for is_deterministic in (False, True):
        torch.use_deterministic_algorithms(is_deterministic)
        for loss in (ops.triton_hierarchical_sae_loss, ops.triton_topk_sae_loss):
            for has_copies, by_triton.SMALL_BATCH, by_triton.MOST_UNFINISHED in variants:
                copies.is_worth_copies = lambda *_, it_is=has_copies: it_is
                by_triton._plan_walk.cache_clear()
                compile_loss(loss, dtype)
        copies.is_worth_copies = lambda *_: True
        by_triton._plan_walk.cache_clear()
        for rescales in (False, True):
            compile_step(dtype, is_deterministic, rescales)
        compile_step(dtype, is_deterministic, True, over_batch=True)
        compile_step(dtype, is_deterministic, False, over_batch=True, widths=(F // 2, F))

every_kernel = {
    name
    for module in pkgutil.iter_modules(kernels.__path__, kernels.__name__ + ".")
    for name in vars(importlib.import_module(module.name))
    if name.endswith("_kernel")
}
print("compiled", *sorted(compiled))
print("not compiled", *sorted(every_kernel - compiled))
