"""What the kernels that walk the levels share: reading a few levels at a time."""

from ._triton import tl, triton


@triton.jit
def gather_levels(
    first,
    indices,  # [BLOCK_B]: pointers to the samples' first levels
    vals,  # [BLOCK_B]: the same
    weight_slice,  # [1, BLOCK_D]: pointers to the columns of weight
    b,  # [BLOCK_B]: the samples
    in_slice,  # [1, BLOCK_D]
    B,
    K,
    F,
    stride_wf,
    LEVELS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Return the latents, values and rows of weight of the levels first..first + LEVELS.

    Four tuples of a tensor a level: [BLOCK_B] the latents, whether they are latents at all, and the
    values; [BLOCK_B, BLOCK_D] the rows, float32. All rows are on their way before the first is
    used. What is no latent, or beyond the batch or K, has a row of zeros.

    With EVEN all samples, levels and columns exist, and nothing is spent on asking.
    """
    latents = ()
    are_latents = ()
    level_vals = ()
    rows = ()
    for t in tl.static_range(LEVELS):
        if EVEN:
            f = tl.load(indices + (first + t))
            v = tl.load(vals + (first + t))
        else:
            exists = b < tl.where(first + t < K, B, 0)
            f = tl.load(indices + (first + t), mask=exists, other=-1)
            v = tl.load(vals + (first + t), mask=exists, other=0.0)
        is_latent = f.to(tl.int64).to(tl.uint64) < F.to(tl.uint64)  # nor is a negative one
        f = f.to(tl.int32)  # there are fewer than 2^31
        row_mask = is_latent[:, None]
        if not EVEN:
            row_mask &= in_slice
        row = weight_slice + f.to(tl.int64)[:, None] * stride_wf
        latents += (f,)
        are_latents += (is_latent,)
        level_vals += (v.to(tl.float32),)
        rows += (tl.load(row, mask=row_mask, other=0.0).to(tl.float32),)
    return latents, are_latents, level_vals, rows
