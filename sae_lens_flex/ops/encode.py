"""The sparse encoder: the K largest pre-activations of each activation, and their gradients.

    h = (x - b_dec) @ W_enc + b_enc,     indices[b] = the K largest of h[b] * norms, descending,
    hidden[b, t] = h[b, indices[b, t]].

Only the kept pre-activations have a gradient, g = dL/dhidden, so the backward pass touches only the
latents that were kept:

    dL/dW_enc[:, f] = sum over the pairs (b, t) that chose f of g[b, t] (x[b] - b_dec),
    dL/db_enc[f] = sum over these pairs of g[b, t],
    dL/dx[b] = sum_t g[b, t] W_enc[:, indices[b, t]],      dL/db_dec = -W_enc @ dL/db_enc.

No gradient flows through the norms: where they are divided out again in decoding, there is none.
The pre-activations of the whole batch never exist at once.

W_enc, [D, F], is fastest where a latent's column is contiguous, as its gradient's is: see
`latent_major`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from . import inverted_index
from ._triton import cdiv
from .fused_loss import (
    NAMESPACE,
    _library,
    _operators,
    accumulation_dtype,
    check_is_first_derivative,
    computes_by_triton,
    fused_loss,
    is_traced,
    no_autocast,
)
from .inverted_index import InvertedIndex, invert, sum_by_latent
from .selection import Selection, select

# A chunk of the batch has this many bytes of x @ W_enc. On a CPU they stay in the caches; a GPU
# wants products that fill it, and rows enough to make W_enc worth reading once more.
CPU_CHUNK_BYTES = 2**22
GPU_CHUNK_BYTES = 2**28
GPU_CHUNK_ROWS = 512


class Encoded(NamedTuple):
    """The kept latents of a batch.

    Attributes:
        indices: [B, K], int64, in the order of descending h * norms.
        hidden: their pre-activations h, [B, K], differentiable.
        inverted: the inverted index of `indices`, where a gradient is wanted.
    """

    indices: torch.Tensor
    hidden: torch.Tensor
    inverted: InvertedIndex | None


def _sum_by_latent_by_torch(
    index: InvertedIndex, grad_hidden: torch.Tensor, rows: torch.Tensor, grad_weight: torch.Tensor
) -> None:
    dtype = accumulation_dtype(rows)
    sums = torch.nn.functional.embedding_bag(
        index.samples.to(index.starts.dtype),
        rows.to(dtype),
        index.starts[1:],
        mode="sum",
        per_sample_weights=grad_hidden.flatten()[index.pairs].to(dtype),
        include_last_offset=True,
    )
    grad_weight.copy_(sums)


def centered(x: torch.Tensor, b_dec: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return what is multiplied with W_enc: x - b_dec in `dtype`, contiguous, [B, D]."""
    return (x if b_dec is None else x - b_dec).to(dtype).contiguous()


def chunk_rows(n_samples: int, n_latents: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return how many activations' pre-activations are held at once."""
    if device.type == "cpu":
        rows = CPU_CHUNK_BYTES // (n_latents * dtype.itemsize)
    else:
        rows = max(GPU_CHUNK_ROWS, GPU_CHUNK_BYTES // (n_latents * dtype.itemsize))
    return cdiv(n_samples, cdiv(n_samples, max(1, rows)))


def _encode_and_keep_rows(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    b_dec: torch.Tensor | None,
    norms: torch.Tensor | None,
    k: int,
    dtype: torch.dtype,
    use_triton: bool,
    needs_index: bool,
) -> tuple[torch.Tensor, ...]:
    n_samples, n_latents = x.shape[0], W_enc.shape[1]
    out = Selection(
        x.new_empty((n_samples, k), dtype=torch.int64),
        x.new_empty((n_samples, k), dtype=torch.promote_types(dtype, b_enc.dtype)),
    )
    n_rows = chunk_rows(n_samples, n_latents, dtype, x.device)
    # Autocast, where it is on, leaves products of its own dtype and of float64 as they are.
    rows, weight = centered(x, b_dec, dtype), W_enc.to(dtype)
    for start in range(0, n_samples, n_rows):
        chunk = slice(start, start + n_rows)
        select(
            rows[chunk] @ weight,
            b_enc,
            norms,
            Selection(out.indices[chunk], out.hidden[chunk]),
            use_triton,
        )
    if needs_index:
        index = invert(out.indices, n_latents, use_triton)
    else:
        index = (out.indices.new_empty(0) for _ in InvertedIndex._fields)
    return rows, out.hidden, out.indices, *index


def _encode(*inputs: Any) -> tuple[torch.Tensor, ...]:
    return _encode_and_keep_rows(*inputs)[1:]


def _encode_shapes(x, W_enc, b_enc, b_dec, norms, k, dtype, use_triton, needs_index):
    n_samples = x.shape[0]
    if needs_index:
        index = inverted_index.shapes_only(x, n_samples * k, W_enc.shape[1])
    else:
        index = (x.new_empty(0, dtype=torch.int64) for _ in InvertedIndex._fields)
    return (
        x.new_empty((n_samples, k), dtype=torch.promote_types(dtype, b_enc.dtype)),
        x.new_empty((n_samples, k), dtype=torch.int64),
        *index,
    )


def _gradients(
    grad_hidden: torch.Tensor,
    indices: torch.Tensor,
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    b_dec: torch.Tensor | None,
    index: Sequence[torch.Tensor],
    dtype: torch.dtype,
    use_triton: bool,
    wanted: list[bool],
    rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, ...]:
    wants_x, wants_weight, wants_b_enc, wants_b_dec = wanted
    grad_hidden = grad_hidden.contiguous()
    grad_x = grad_weight = grad_b_enc = grad_b_dec = None
    with no_autocast(x.device):
        if wants_weight:
            if rows is None:
                rows = centered(x, b_dec, dtype)
            grad_weight = W_enc.new_empty(W_enc.T.shape)
            by = sum_by_latent if use_triton else _sum_by_latent_by_torch
            by(InvertedIndex(*index), grad_hidden, rows, grad_weight)
        if wants_b_enc or wants_b_dec:
            sums = grad_hidden.new_zeros(W_enc.shape[1], dtype=accumulation_dtype(x, W_enc))
            sums.index_add_(0, indices.flatten(), grad_hidden.flatten().to(sums.dtype))
            if wants_b_enc:
                grad_b_enc = sums.to(b_enc.dtype)
            if b_dec is not None and wants_b_dec:
                sums = sums.to(W_enc.dtype)
                like_b_dec = b_dec.to(W_enc.dtype)  # is not read, with beta=0
                grad_b_dec = torch.addmv(like_b_dec, W_enc, sums, beta=0, alpha=-1).to(b_dec.dtype)
        if wants_x:
            _, grad_x = fused_loss(
                "topk_loss",
                indices,
                W_enc.T,
                grad_hidden,
                None,
                torch.zeros_like(x),
                backend="triton" if use_triton else "torch",
                needs_residual=True,
            )
            grad_x = grad_x.to(x.dtype)
    return grad_x, grad_weight, grad_b_enc, grad_b_dec


def _encode_backward(grad_hidden: torch.Tensor, *others: Any) -> tuple[torch.Tensor, ...]:
    gradients = _gradients(grad_hidden, *others)
    return tuple(grad_hidden.new_empty(0) if each is None else each for each in gradients)


def _encode_backward_shapes(
    grad_hidden, indices, x, W_enc, b_enc, b_dec, index, dtype, use_triton, wanted
):
    tensors = x, W_enc.T, b_enc, b_dec
    return tuple(
        tensor.new_empty(tensor.shape) if tensor is not None and is_wanted else x.new_empty(0)
        for tensor, is_wanted in zip(tensors, wanted, strict=True)
    )


def _keep_inputs(ctx, inputs: Sequence[Any], output: Sequence[torch.Tensor]) -> None:
    x, W_enc, b_enc, b_dec, _, _, dtype, use_triton, _ = inputs
    _, indices, *index = output
    ctx.mark_non_differentiable(indices, *index)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(indices, x, W_enc, b_enc, b_dec, *index)
    ctx.settings = dtype, use_triton


def _differentiate(
    ctx, by: Callable[..., Any], grad_hidden: torch.Tensor | None
) -> tuple[Any, ...]:
    check_is_first_derivative("encode")
    if grad_hidden is None:  # nothing depends on it
        return (None,) * 9
    wanted = list(ctx.needs_input_grad[:4])
    tensors, index = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
    gradients = by(grad_hidden, *tensors, index, *ctx.settings, wanted)
    grad_x, grad_weight, grad_b_enc, grad_b_dec = (
        gradient if is_wanted else None
        for gradient, is_wanted in zip(gradients, wanted, strict=True)
    )
    if grad_weight is not None:
        grad_weight = grad_weight.T
    return grad_x, grad_weight, grad_b_enc, grad_b_dec, None, None, None, None, None


class _Encode(torch.autograd.Function):
    """The operator without PyTorch's dispatcher, which takes a tenth of a small step's time."""

    @staticmethod
    def forward(ctx, *inputs):
        rows, *output = _encode_and_keep_rows(*inputs)
        _keep_inputs(ctx, inputs, output)
        ctx.rows = rows if inputs[-1] else None
        return tuple(output)

    @staticmethod
    def backward(ctx, *grad_outputs):
        return _differentiate(ctx, partial(_gradients, rows=ctx.rows), grad_outputs[0])


def _differentiate_operator(ctx, *grad_outputs):
    return _differentiate(ctx, _operators.encode_backward, grad_outputs[0])


if not hasattr(_operators, "encode"):
    _library.define(
        "encode(Tensor x, Tensor W_enc, Tensor b_enc, Tensor? b_dec, Tensor? norms, int k, "
        "ScalarType dtype, bool use_triton, bool needs_index) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    _library.define(
        "encode_backward(Tensor grad_hidden, Tensor indices, Tensor x, Tensor W_enc, Tensor b_enc, "
        "Tensor? b_dec, Tensor[] index, ScalarType dtype, bool use_triton, bool[] wanted) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    )
    _library.impl("encode", _encode, "CompositeExplicitAutograd")
    _library.impl("encode_backward", _encode_backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::encode", _encode_shapes)
    torch.library.register_fake(f"{NAMESPACE}::encode_backward", _encode_backward_shapes)
    torch.library.register_autograd(
        f"{NAMESPACE}::encode", _differentiate_operator, setup_context=_keep_inputs
    )


def compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return what products with `weight` are computed in: autocast's dtype where it is on."""
    device_type = weight.device.type
    if torch.is_autocast_enabled(device_type) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return weight.dtype


def latent_major(W_enc: torch.Tensor) -> torch.Tensor:
    """Return W_enc, [D, F], with every latent's column contiguous."""
    return W_enc.T.contiguous().T


def encode(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    b_dec: torch.Tensor | None,
    norms: torch.Tensor | None,
    k: int,
    *,
    backend: str = "auto",
) -> Encoded:
    """Encode a batch; products are computed in autocast's dtype where it is on.

    Args:
        x: activations, [B, D].
        W_enc: [D, F].
        b_enc: [F].
        b_dec: what is subtracted from x first, [D], or None.
        norms: by which the pre-activations are compared, [F], not differentiated; None for 1.
        k: latents to keep, 1..F.
        backend: "auto", "triton" or "torch".

    Returns:
        The kept latents; `hidden` is differentiable once, in x, W_enc, b_enc and b_dec.
    """
    use_triton = computes_by_triton(backend, x, W_enc)
    needs_index = torch.is_grad_enabled() and W_enc.requires_grad
    arguments = (
        *(x, W_enc, b_enc, b_dec, norms),
        *(k, compute_dtype(W_enc), use_triton, needs_index),
    )
    by = _operators.encode if is_traced(x, W_enc, b_enc, b_dec, norms) else _Encode.apply
    hidden, indices, *index = by(*arguments)  # pyright: ignore[reportGeneralTypeIssues]
    return Encoded(indices, hidden, InvertedIndex(*index) if needs_index else None)
