"""The sparse encoder: the K largest pre-activations of each sample.

    h = rows @ W_enc + b_enc,     latents[b] = the K largest of h[b] * norms, descending,
    values[b, t] = h[b, latents[b, t]].

Of equal compared values the smaller latent is kept, and comes first. The pre-activations of the
whole batch never exist at once.
"""

from typing import NamedTuple

import torch

from .chunks import for_each_chunk
from .codes import Code
from .kernels import selection as kernels
from .kernels.launch import cdiv
from .kernels.rows import take_columns
from .policy import is_deterministic

# A chunk of the batch has this many bytes of pre-activations. On a CPU they stay in the caches. A
# GPU wants products that fill it, and enough rows to make it worth reading W_enc once more.
CPU_CHUNK_BYTES = 2**22
GPU_CHUNK_BYTES = 2**28
GPU_CHUNK_ROWS = 512
# More rows than this, 16 of which a program takes, would be too many programs for an axis of a
# grid. `batch_selection` takes two chunks at once.
MOST_CHUNK_ROWS = 2**18
# A dictionary that is too long for the kernels is cut into parts. K of each part are selected from
# once more, which is little work where a part holds at least so many times K latents.
LATENTS_OF_A_PART = 8
# The candidates of so many parts are merged at once. Of millions of latents, the candidates of all
# parts would take more memory than the pre-activations of one.
PARTS_AT_ONCE = 8


class Encoder(NamedTuple):
    """What gives a sample's pre-activations, and compares them.

    Attributes:
        weight: W_enc, [D, F]. It is read fastest where each latent's column is contiguous.
        bias: b_enc, [F].
        norms: what the pre-activations are multiplied by to be compared, [F]; None for 1.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    norms: torch.Tensor | None


class Columns(NamedTuple):
    """Products with W_enc of some latents, which are kept beside the code. Kernels write them.

    Attributes:
        latents: [n], contiguous.
        products: [B, n], contiguous, in the dtype of the products.
    """

    latents: torch.Tensor
    products: torch.Tensor


def chunk_rows(n_samples: int, n_latents: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return of how many samples the pre-activations are held at once."""
    if device.type == "cpu":
        rows = CPU_CHUNK_BYTES // (n_latents * dtype.itemsize)
    else:
        rows = max(GPU_CHUNK_ROWS, GPU_CHUNK_BYTES // (n_latents * dtype.itemsize))
    rows = min(max(1, rows), MOST_CHUNK_ROWS)
    return cdiv(n_samples, cdiv(n_samples, rows))


def select(
    rows: torch.Tensor,
    encoder: Encoder,
    k: int,
    *,
    use_triton: bool,
    columns: Columns | None = None,
) -> Code:
    """Return the code of a batch.

    Args:
        rows: what is multiplied with W_enc, [B, D], contiguous, in the dtype of the products.
        encoder: W_enc is rounded to that dtype.
        k: latents to keep, 1..F.
        use_triton: whether the kernels may be used.
        columns: where to leave products of some latents; None for none.
    """
    n_samples, n_latents = rows.shape[0], encoder.weight.shape[1]
    most = kernels.most_latents(k)
    if use_triton and columns is None and LATENTS_OF_A_PART * k <= most < n_latents:
        return _select_of_parts(rows, encoder, k, most)
    code = empty_code(n_samples, k, rows, encoder.bias)
    n_rows = chunk_rows(n_samples, n_latents, rows.dtype, rows.device)
    weight = encoder.weight.to(rows.dtype)

    def walk(chunk: slice) -> None:
        products = rows[chunk] @ weight  # [b, F]
        if columns is not None:
            take_columns(products, columns.latents, columns.products[chunk])
        part = Code(code.latents[chunk], code.values[chunk])
        select_from(products, encoder, part, use_triton=use_triton)

    for_each_chunk(walk, n_samples, n_rows, rows.device)
    return code


def _select_of_parts(rows: torch.Tensor, encoder: Encoder, k: int, most: int) -> Code:
    """Return the code of a batch. It selects from parts of at most so many latents, one by one."""
    n_latents = encoder.weight.shape[1]
    size = cdiv(n_latents, cdiv(n_latents, most))
    # The kernels compare in float32 before they round, and so are the parts' latents compared.
    bias = encoder.bias.float() if encoder.bias.itemsize < 4 else encoder.bias
    # Each is of one part, or the largest of several parts. Later ones have larger latents.
    codes: list[Code] = []
    for start in range(0, n_latents, size):
        part = slice(start, start + size)
        norms = None if encoder.norms is None else encoder.norms[part]
        of_part = Encoder(encoder.weight[:, part], bias[part], norms)
        code = select(rows, of_part, min(k, len(of_part.bias)), use_triton=True)
        codes.append(Code(code.latents + start, code.values))
        if len(codes) > PARTS_AT_ONCE:
            codes = [_largest_of(codes, encoder.norms, k)]
    code = _largest_of(codes, encoder.norms, k)
    return code.with_values(code.values.to(torch.promote_types(rows.dtype, encoder.bias.dtype)))


def _largest_of(codes: list[Code], norms: torch.Tensor | None, k: int) -> Code:
    """Return the k largest of each sample in any of the codes. A later one has larger latents."""
    latents = torch.cat([code.latents for code in codes], dim=1)
    values = torch.cat([code.values for code in codes], dim=1)
    return largest_candidates(Code(latents, values), norms, k)


def largest_candidates(candidates: Code, norms: torch.Tensor | None, k: int) -> Code:
    """Return the k largest of each sample's candidates, descending: [B, k] each.

    Args:
        candidates: [B, n] each. Of equal ones the smaller latent comes first.
        norms: what the values are multiplied by to be compared, of all latents; None for 1.
        k: latents to keep, at most n.
    """
    latents, compared = candidates.latents, candidates.values
    if norms is not None:
        compared = compared * norms.take(latents.long())
    # Adding 0 makes -0 equal to 0 in every sort.
    order = (compared + 0.0).sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return Code(latents.gather(-1, order), candidates.values.gather(-1, order))


def empty_code(n_samples: int, k: int, rows: torch.Tensor, bias: torch.Tensor) -> Code:
    """Return a code for `select_from` to write: of `rows` and `bias` it takes device and dtypes."""
    dtype = torch.promote_types(rows.dtype, bias.dtype)
    return Code(
        rows.new_empty((n_samples, k), dtype=torch.int64),
        rows.new_empty((n_samples, k), dtype=dtype),
    )


def select_from(
    products: torch.Tensor,
    encoder: Encoder,
    out: Code,
    *,
    use_triton: bool,
    is_sorted: bool = True,
) -> None:
    """Write the code of samples whose products are at hand.

    Args:
        products: rows @ W_enc, [B, F], contiguous. They may be overwritten.
        encoder: its weight is not read.
        out: where the code goes, [B, K] each, contiguous.
        use_triton: whether the kernels may be used.
        is_sorted: False allows any order.
    """
    k = out.latents.shape[1]
    if use_triton and products.shape[1] <= kernels.most_latents(k):
        kernels.largest(
            products,
            encoder.bias,
            encoder.norms,
            latents=out.latents,
            hidden=out.values,
            is_sorted=is_sorted,
        )
        return
    in_place = torch.promote_types(products.dtype, encoder.bias.dtype) == products.dtype
    hidden = products.add_(encoder.bias) if in_place else products + encoder.bias
    compared = hidden if encoder.norms is None else hidden * encoder.norms
    latents = largest(compared, k)
    out.latents.copy_(latents)
    torch.gather(hidden, -1, latents, out=out.values)


def largest(compared: torch.Tensor, k: int) -> torch.Tensor:
    """Return the k largest of each row by PyTorch: [B, k], descending, of equal ones the first.

    Which of equal values `torch.topk` returns, and in which order, is not defined. On a
    CPU the rows that hold no equal values keep its choice, and only the others are computed again.
    """
    if compared.is_cuda and is_deterministic():  # which `cumsum` on a GPU is not
        return compared.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    values, indices = compared.topk(min(k + 1, compared.shape[1]))
    has_equals = ((values[:, 1:] == values[:, :-1]) | values[:, 1:].isnan()).any(-1)
    if compared.device.type == "cpu":
        rows = has_equals.nonzero().squeeze(-1)
        if len(rows) > 0:
            indices[rows, :k] = _first_of_equals(compared[rows], values[rows, k - 1 : k], k)
        return indices[:, :k]
    return _first_of_equals(compared, values[:, k - 1 : k], k)


def _first_of_equals(compared: torch.Tensor, kth: torch.Tensor, k: int) -> torch.Tensor:
    # `kth` is the k-th largest value of each row, [B, 1]. NaN counts as the largest.
    is_nan, kth_is_nan = compared.isnan(), kth.isnan()
    is_above = (compared > kth) | (is_nan & ~kth_is_nan)
    is_equal = (compared == kth) | (is_nan & kth_is_nan)
    n_wanted = k - is_above.sum(-1, keepdim=True)
    place = is_equal.cumsum(-1, dtype=torch.int32)  # F is less than 2^31
    is_kept = is_above | (is_equal & (place <= n_wanted))  # k in each row
    if compared.is_cuda:  # without waiting for the device to count them
        latents = is_kept.nonzero_static(size=len(compared) * k)[:, 1]
    else:
        latents = is_kept.nonzero()[:, 1]
    latents = latents.view(-1, k)  # ascending in each row
    order = compared.gather(-1, latents).sort(dim=-1, descending=True, stable=True).indices
    return latents.gather(-1, order)
