"""The squared error of a reconstruction, and what its gradient is made of, in one pass.

error = decoded + residual,     loss = sum of error^2,     decoded = scale * error, rounded
"""

import torch

from .launch import cdiv, launch, tl, triton


@triton.jit
def _scaled_error_kernel(
    decoded,
    residual,
    scale,  # a scalar
    losses,  # [programs]
    N,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    place = program * BLOCK + tl.arange(0, BLOCK)
    x_hat = tl.load(decoded + place, mask=place < N, other=0.0).to(tl.float32)
    error = x_hat + tl.load(residual + place, mask=place < N, other=0.0).to(tl.float32)
    tl.store(losses + program, tl.sum(error * error, axis=0))
    scaled = tl.load(scale).to(tl.float32) * error
    tl.store(decoded + place, scaled.to(decoded.dtype.element_ty), mask=place < N)


BLOCK = 4096
NUM_WARPS = 8


def scaled_error(
    decoded: torch.Tensor, residual: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Write scale * (decoded + residual) over `decoded`; return the sum of the squared error.

    Args:
        decoded: contiguous.
        residual: of the same shape, contiguous.
        scale: a scalar on their device.

    Returns:
        A scalar, float32.
    """
    n = decoded.numel()
    losses = decoded.new_empty(cdiv(n, BLOCK), dtype=torch.float32)
    launch(
        _scaled_error_kernel,
        (len(losses),),
        (decoded, residual, scale, losses),
        (),
        (n,),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return losses.sum()
