"""The norms of a dictionary's rows and a copy of it in a lower precision, in one pass over it.

    norms[f] = |weight[f]|,     copy[f] = weight[f] rounded

Under autocast SAELens decodes with weights rounded to autocast's dtype. The decoder losses mostly
read rows of W_dec, so reading the copy saves several times what making it costs.
"""

import torch

from .launch import cdiv, launch, tl, triton


@triton.jit
def _norms_and_copy_kernel(weight, norms, copy, F, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    f = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        place = (f * D)[:, None] + d[None, :]
        exists = (f < F)[:, None] & (d < D)[None, :]
        w = tl.load(weight + place, mask=exists, other=0.0).to(tl.float32)
        tl.store(copy + place, w.to(copy.dtype.element_ty), mask=exists)
        total += w * w
    tl.store(norms + f, tl.sqrt(tl.sum(total, axis=1)), mask=f < F)


# Several rows a program: a rank of many has narrow ones, which alone would not fill a program.
ROWS = 8
BLOCK = 256


def norms_and_copy(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norms of the rows of `weight`, [F], float32, and a copy in `dtype`, [F, D]."""
    n_latents, d_in = weight.shape
    norms = weight.new_empty(n_latents, dtype=torch.float32)
    copy = weight.new_empty(weight.shape, dtype=dtype)
    launch(
        _norms_and_copy_kernel,
        (cdiv(n_latents, ROWS),),
        (weight.contiguous(), norms, copy),
        (),
        (n_latents, d_in),
        ROWS=ROWS,
        BLOCK=BLOCK,
    )
    return norms, copy
