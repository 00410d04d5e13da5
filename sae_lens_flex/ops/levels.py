"""What the kernels that walk the levels share: reading a few levels at a time."""

from ._triton import tl, triton


@triton.jit
def gather_levels(
    first,
    indices,
    vals,
    weight_slice,  # [1, BLOCK_D]: pointers to the columns of weight
    b,  # [BLOCK_B]: the samples
    in_slice,  # [1, BLOCK_D]
    B,
    K,
    F,
    stride_wf,
    LEVELS: tl.constexpr,
):
    """Return the latents, values and rows of weight of the levels first..first + LEVELS.

    Three tuples of a tensor a level ([BLOCK_B], [BLOCK_B] and [BLOCK_B, BLOCK_D], float32). All
    their rows are on their way before the first is used. A latent that is to be ignored is -1, with
    a row of zeros.
    """
    latents = ()
    level_vals = ()
    rows = ()
    for t in tl.static_range(LEVELS):
        j = first + t
        exists = b < tl.where(j < K, B, 0)
        f = tl.load(indices + b * K + j, mask=exists, other=-1).to(tl.int64)
        f = tl.where((f >= 0) & (f < F), f, -1)
        v = tl.load(vals + b * K + j, mask=exists, other=0.0)
        w = tl.load(
            weight_slice + f[:, None] * stride_wf, mask=(f >= 0)[:, None] & in_slice, other=0.0
        )
        latents += (f,)
        level_vals += (v.to(tl.float32),)
        rows += (w.to(tl.float32),)
    return latents, level_vals, rows
