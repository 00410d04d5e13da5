"""The sparse products of a code with dense matrices.

    gather:  out[b] = sum_t values[b, t] weight[latents[b, t]]               the decoder, [B, D]
    scatter: out[f] = sum over the pairs (b, t) of f of values[b, t] rows[b]      gradients, [F, D]

In dense algebra, with the code as a matrix of shape [B, F], they are code @ weight and
code.T @ rows. A third product, dots[b, t] = weight[latents[b, t]] . rows[b], belongs to the decoder
losses alone, which compute it beside another one.

`take_rows`, `add_rows` and `sum_rows` serve the loss on dead latents: they read, change or add up
the rows of some latents. Of these latents those that are used differ from each other.

Whether Triton or PyTorch computes a product is decided here.
"""

import torch

from .chunks import for_each
from .codes import Code, InvertedIndex, Rows
from .kernels import residual as residual_kernel
from .kernels import rows as rows_kernels
from .kernels.sums import sum_by_latent
from .kernels.tiles import Batch
from .policy import accumulation_dtype, in_dtype, no_autocast

# A chunk's [b, K, D] tensors have about this many elements. On a CPU 2^18 (1 MiB in float32) keeps
# the handful of them in the second-level cache; a GPU wants enough work to fill it.
CPU_CHUNK_ELEMENTS = 2**18
GPU_CHUNK_ELEMENTS = 2**24


def chunks_of(code: Code, width: int) -> list[slice]:
    """Return the samples of which the rows of weight, [b, K, width], are held at once."""
    is_cpu = code.latents.device.type == "cpu"
    elements = CPU_CHUNK_ELEMENTS if is_cpu else GPU_CHUNK_ELEMENTS
    return code.chunks(elements // width)


def rows_of_weight(rows: Rows, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the row of weight of each pair, [b, K, D]; zeros where there is no pair."""
    w = weight[rows.latents.long()].to(dtype)
    return w if rows.exists is None else w.masked_fill_(~rows.exists.unsqueeze(-1), 0)


def gather(
    code: Code, weight: torch.Tensor, *, use_triton: bool, target: torch.Tensor | None = None
) -> torch.Tensor:
    """Return sum_t values[b, t] * weight[latents[b, t]], less `target` where there is one.

    Args:
        code: of B samples.
        weight: [F, D].
        use_triton: whether the kernels compute it.
        target: [B, D] or None.

    Returns:
        [B, D], float32; float64 where an input is float64.
    """
    tensors = [weight, code.values] if target is None else [weight, code.values, target]
    dtype = accumulation_dtype(*tensors)
    n_samples, d_in = code.n_samples, weight.shape[1]
    out = weight.new_empty((n_samples, d_in), dtype=dtype)
    if use_triton:
        batch = Batch(
            code.latents.contiguous(),
            code.values.contiguous(),
            weight,
            None,
            None if target is None else target.contiguous(),
            code.starts,
        )
        residual_kernel.residual(batch, residual_kernel.Outputs(residual=out))
        return out

    def walk(chunk: slice) -> None:
        rows = code.rows(chunk)
        w = rows_of_weight(rows, weight, dtype)  # [b, K, D]
        sums = torch.bmm(rows.values.to(dtype).unsqueeze(1), w).squeeze(1)
        out[chunk] = sums if target is None else sums - target[chunk].to(dtype)

    for_each(walk, chunks_of(code, d_in), weight.device)
    return out


def scatter(
    index: InvertedIndex,
    values: torch.Tensor,
    rows: torch.Tensor,
    *,
    out: torch.Tensor,
    use_triton: bool,
) -> None:
    """Write out[f] = sum over the pairs (b, t) that chose f of values[b, t] * rows[b].

    Args:
        index: of a code of B samples and F latents or more. Those from F on are ignored, and none
            is below 0.
        values: one for each pair, [B, K] or [n].
        rows: [B, D], contiguous.
        out: [F, D], contiguous, of any floating dtype.
        use_triton: whether the kernels compute it.
    """
    if use_triton:
        sum_by_latent(index, values.contiguous(), rows, sums=out)
        return
    dtype = accumulation_dtype(rows, values)
    samples, pairs, ends = index.samples, index.pairs, index.starts[1 : len(out) + 2]
    # PyTorch's last bag has all pairs that are left.
    if rows.device.type == "cpu":
        last = int(ends[-1])
        samples, pairs = samples[:last], pairs[:last]
    else:  # One more bag takes them, so that the host need not wait for their number.
        ends = torch.cat((ends, ends.new_full((1,), len(pairs))))
    with no_autocast(rows.device):
        sums = torch.nn.functional.embedding_bag(
            samples.to(ends.dtype),
            rows.to(dtype),
            ends,
            mode="sum",
            per_sample_weights=values.flatten()[pairs].to(dtype),
            include_last_offset=True,
        )
    out.copy_(sums[: len(out)])


def take_rows(
    matrix: torch.Tensor,
    latents: torch.Tensor,
    dtype: torch.dtype,
    *,
    is_used: torch.Tensor | None,
    use_triton: bool,
) -> torch.Tensor:
    """Return rows of a matrix in `dtype`, [n, D]; zeros for those that are not used.

    Args:
        matrix: [F, D].
        latents: [n].
        dtype: floating.
        is_used: which of the latents are, [n], bool; None for all.
        use_triton: whether the kernels take them.
    """
    if use_triton and torch.float64 not in (matrix.dtype, dtype):
        return rows_kernels.take_rows(matrix, latents.contiguous(), is_used, dtype)
    rows = in_dtype(matrix.index_select(0, latents), dtype)
    return rows if is_used is None else rows.masked_fill(~is_used.unsqueeze(-1), 0)


def add_rows(
    matrix: torch.Tensor,
    latents: torch.Tensor,
    rows: torch.Tensor,
    *,
    is_used: torch.Tensor | None,
    use_triton: bool,
    counts_as_zero: torch.Tensor | None = None,
) -> None:
    """Add rows to those of a matrix, in place.

    Args:
        matrix: [F, D] or [F].
        latents: [n]; those that are used differ from each other.
        rows: [n, D] or [n]; zeros where they are not used.
        is_used: which of the latents are, [n], bool; None for all.
        use_triton: whether the kernels add them.
        counts_as_zero: which rows of the matrix count as zeros, [F], bool. By kernels they may
            hold anything, by PyTorch they are zeros.
    """
    is_double = torch.float64 in (matrix.dtype, rows.dtype)
    if use_triton and not is_double and matrix.dim() == 2 and matrix.is_contiguous():
        rows_kernels.add_rows(
            matrix, latents.contiguous(), is_used, rows.contiguous(), counts_as_zero
        )
    else:
        if use_triton and counts_as_zero is not None and matrix.dim() == 2:
            matrix.masked_fill_(counts_as_zero.unsqueeze(-1), 0)
        matrix.index_add_(0, latents, in_dtype(rows, matrix.dtype))


def sum_rows(
    matrix: torch.Tensor,
    latents: torch.Tensor,
    factors: torch.Tensor,
    *,
    is_used: torch.Tensor | None,
    use_triton: bool,
) -> torch.Tensor:
    """Return the sum of rows of a matrix, each times its factor, [D], in the factors' dtype.

    Args:
        matrix: [F, D].
        latents: [n].
        factors: [n], float32 or float64; 0 where they are not used.
        is_used: which of the latents are, [n], bool; None for all.
        use_triton: whether the kernels add them up.
    """
    if use_triton and torch.float64 not in (matrix.dtype, factors.dtype):
        return rows_kernels.sum_rows(matrix, latents.contiguous(), is_used, factors.contiguous())
    rows = take_rows(matrix, latents, factors.dtype, is_used=is_used, use_triton=False)
    return rows.T @ factors
