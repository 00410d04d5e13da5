"""Gradients times a factor that lies on the device.

    gradient <- factor * gradient

The kernel reads the factor itself, so the host does not wait for it. Where the factor is 1, as it
almost always is, the kernel returns without touching a gradient.
"""

from collections.abc import Sequence

import torch

from .launch import cdiv, launch, tl, triton


@triton.jit
def scale_part(gradient, scale, n_elements, BLOCK: tl.constexpr):
    """Multiply a program's part of a gradient; the parts of all programs are the whole."""
    wide = tl.float64 if gradient.dtype.element_ty == tl.float64 else tl.float32
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n_elements, stride):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < n_elements
        scaled = tl.load(gradient + offsets, mask=mask).to(wide) * scale
        tl.store(gradient + offsets, scaled.to(gradient.dtype.element_ty), mask=mask)


@triton.jit
def _scale_kernel(factor, a, b, c, d, n_a, n_b, n_c, n_d, BLOCK: tl.constexpr):
    scale = tl.load(factor)
    if scale != 1.0:
        scale_part(a, scale, n_a, BLOCK)
        scale_part(b, scale, n_b, BLOCK)
        scale_part(c, scale, n_c, BLOCK)
        scale_part(d, scale, n_d, BLOCK)


BLOCK = 8192
NUM_WARPS = 8
A_LAUNCH = 4  # gradients: as many as a loss and a training step have
MOST_PROGRAMS = 1024


def scale_in_place(gradients: Sequence[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply gradients, which are contiguous, by a scalar tensor."""
    for start in range(0, len(gradients), A_LAUNCH):
        some = gradients[start : start + A_LAUNCH]
        sizes = [gradient.numel() for gradient in some]
        n_absent = A_LAUNCH - len(some)
        launch(
            _scale_kernel,
            (min(MOST_PROGRAMS, cdiv(max(sizes), BLOCK)),),
            (factor, *some, *(factor,) * n_absent),
            (),
            (*sizes, *(0,) * n_absent),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
