"""The norms of a dictionary's rows and a copy of it in a lower precision, in one pass over it.

Under autocast SAELens decodes with weights rounded to its dtype. The decoder losses mostly read
rows of W_dec, so they gain by such a copy what it costs several times over.
"""

import torch

from . import _triton
from ._triton import tl, triton
from .fused_loss import NAMESPACE, _library, _operators, is_traced


@triton.jit
def _norms_and_copy_kernel(weight, norms, copy, D, BLOCK: tl.constexpr):
    f = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        w = tl.load(weight + f * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(copy + f * D + d, w.to(copy.dtype.element_ty), mask=d < D)
        total += w * w
    tl.store(norms + f, tl.sqrt(tl.sum(total)))


BLOCK = 1024


def _norms_and_copy(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    n_latents, d_in = weight.shape
    norms, copy = _shapes(weight, dtype)
    _triton.launch(
        _norms_and_copy_kernel,
        (n_latents,),
        (weight.contiguous(), norms, copy),
        (),
        (d_in,),
        BLOCK=BLOCK,
    )
    return norms, copy


def _shapes(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    norms = weight.new_empty(weight.shape[0], dtype=torch.float32)
    return norms, weight.new_empty(weight.shape, dtype=dtype)


if not hasattr(_operators, "norms_and_copy"):
    _library.define("norms_and_copy(Tensor weight, ScalarType dtype) -> (Tensor, Tensor)")
    _library.impl("norms_and_copy", _norms_and_copy, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::norms_and_copy", _shapes)


def norms_and_copy(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norms of the rows of `weight`, [F], float32, and a copy in `dtype`, [F, D].

    By a Triton kernel; not differentiable.
    """
    by = _operators.norms_and_copy if is_traced(weight) else _norms_and_copy
    return by(weight, dtype)
