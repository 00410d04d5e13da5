"""The auxiliary loss on dead latents, on their part of the dictionary alone.

    h = (x - b_dec) @ W_enc + b_enc,
    a = h at the K largest of h * norms in each row, 0 elsewhere,
    L = factor / B * sum_b |a[b] @ W_dec - target[b]|^2,     e = a @ W_dec - target

with W_enc, W_dec, b_enc and norms those of the n dead latents. K is a large part of n, so that the
products are dense ones, over chunks of the batch. With s = 2 factor / B * e and g = s @ W_dec.T at
the kept latents, 0 elsewhere, the gradients are

    dL/dW_dec = a.T @ s,      dL/dW_enc = (x - b_dec).T @ g,      dL/db_enc = sum_b g[b],
    dL/dx = g @ W_enc.T,      dL/db_dec = -W_enc @ dL/db_enc.

The target has none. A scalar's gradients can be produced in the forward pass (see `fused_loss`).
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from .encode import centered, chunk_rows, compute_dtype
from .fused_loss import (
    NAMESPACE,
    _library,
    _operators,
    accumulation_dtype,
    check_is_first_derivative,
    computes_by_triton,
    no_autocast,
    scaled,
)
from .selection import Selection, select


class DeadLatents(NamedTuple):
    """The part of a dictionary that belongs to its n dead latents.

    Attributes:
        W_enc_rows: [n, D], the transpose of their columns of W_enc.
        b_enc: [n].
        W_dec: [n, D].
        norms: by which their pre-activations are compared, [n], or None for 1.
    """

    W_enc_rows: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    norms: torch.Tensor | None


def _compute(
    x: torch.Tensor,
    W_enc_rows: torch.Tensor,
    b_enc: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor | None,
    norms: torch.Tensor | None,
    target: torch.Tensor,
    k: int,
    factor: float,
    dtype: torch.dtype,
    use_triton: bool,
    needs_gradients: bool,
    needs_grad_x: bool,
) -> tuple[torch.Tensor, ...]:
    n_samples, n_dead = x.shape[0], len(b_enc)
    shapes = _shapes(x, W_enc_rows, b_enc, W_dec, b_dec, needs_gradients, needs_grad_x)
    outputs = [tensor.zero_() for tensor in shapes]
    loss, grad_x, grad_enc, grad_b_enc, grad_dec, grad_b_dec = outputs
    n_rows = chunk_rows(n_samples, n_dead, dtype, x.device)
    with no_autocast(x.device):
        rows = centered(x, b_dec, dtype)
        encoder, decoder = W_enc_rows.to(dtype), W_dec.to(dtype)
        for start in range(0, n_samples, n_rows):
            chunk = slice(start, start + n_rows)
            products = rows[chunk] @ encoder.T
            kept = None
            if k < n_dead:
                kept = Selection(
                    x.new_empty((len(products), k), dtype=torch.int64),
                    x.new_empty((len(products), k), dtype=torch.promote_types(dtype, b_enc.dtype)),
                )
                select(products, b_enc, norms, kept, use_triton, is_sorted=False)
                acts = torch.zeros_like(products).scatter_(-1, kept.indices, kept.hidden.to(dtype))
            else:
                acts = (products + b_enc).to(dtype)
            error = (acts @ decoder).to(loss.dtype) - target[chunk]
            loss += error.square().sum()
            if not needs_gradients:
                continue
            s = error.mul_(2 * factor / n_samples).to(dtype)
            grad_dec += acts.T @ s
            g = s @ decoder.T
            if kept is not None:
                g = torch.zeros_like(g).scatter_(-1, kept.indices, g.gather(-1, kept.indices))
            grad_enc += g.T @ rows[chunk]
            grad_b_enc += g.sum(0, dtype=loss.dtype)
            if needs_grad_x:
                grad_x[chunk] = g @ encoder
        if grad_b_dec.numel():
            grad_b_dec -= grad_b_enc @ W_enc_rows.to(loss.dtype)
    return loss * (factor / n_samples), grad_x, grad_enc, grad_b_enc, grad_dec, grad_b_dec


def _shapes(x, W_enc_rows, b_enc, W_dec, b_dec, *others) -> tuple[torch.Tensor, ...]:
    needs_gradients, needs_grad_x = others[-2:]
    dtype = accumulation_dtype(x, W_dec)

    def like(tensor: torch.Tensor | None, is_wanted: bool) -> torch.Tensor:
        shape = tensor.shape if tensor is not None and is_wanted else (0,)
        return x.new_empty(shape, dtype=dtype)

    return (
        x.new_empty((), dtype=dtype),
        like(x, needs_grad_x),
        *(like(tensor, needs_gradients) for tensor in (W_enc_rows, b_enc, W_dec, b_dec)),
    )


def _keep_gradients(ctx, inputs, output) -> None:
    gradients = output[1:]
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:5]]


def _differentiate(ctx, grad_loss, *_):
    check_is_first_derivative("dead_latents_loss")
    gradients = (
        None if gradient is None else gradient.to(dtype)
        for gradient, dtype in zip(scaled(ctx.saved_tensors, grad_loss), ctx.dtypes, strict=True)
    )
    return *gradients, *(None,) * 8


if not hasattr(_operators, "dead_latents_loss"):
    _library.define(
        "dead_latents_loss(Tensor x, Tensor W_enc_rows, Tensor b_enc, Tensor W_dec, Tensor? b_dec, "
        "Tensor? norms, Tensor target, int k, float factor, ScalarType dtype, bool use_triton, "
        "bool needs_gradients, bool needs_grad_x) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    _library.impl("dead_latents_loss", _compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::dead_latents_loss", _shapes)
    torch.library.register_autograd(
        f"{NAMESPACE}::dead_latents_loss", _differentiate, setup_context=_keep_gradients
    )


def dead_latents_loss(
    x: torch.Tensor,
    dead: DeadLatents,
    b_dec: torch.Tensor | None,
    target: torch.Tensor,
    k: int,
    *,
    factor: float = 1.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Return the squared error with which K dead latents reconstruct `target`, averaged over B.

    Products are computed in autocast's dtype where it is on. The memory grows neither with B * n
    nor with F.

    Args:
        x: activations, [B, D].
        dead: the n dead latents.
        b_dec: what is subtracted from x before encoding, [D], or None.
        target: [B, D], not differentiated.
        k: latents to keep of each activation, 1..n.
        factor: multiplies the loss.
        backend: "auto", "triton" or "torch".

    Returns:
        The loss, a scalar, differentiable once in x, the dead latents' weights and b_dec.
    """
    use_triton = computes_by_triton(backend, x, dead.W_dec)
    is_enabled = torch.is_grad_enabled()
    return _operators.dead_latents_loss(
        x,
        dead.W_enc_rows,
        dead.b_enc,
        dead.W_dec,
        b_dec,
        dead.norms,
        target,
        k,
        factor,
        compute_dtype(dead.W_dec),
        use_triton,
        is_enabled and dead.W_dec.requires_grad,
        is_enabled and x.requires_grad,
    )[0]


class _Later(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W_enc: torch.Tensor, W_dec: torch.Tensor, arrived: list[Any]) -> Any:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.arrived = W_dec.shape, arrived
        return W_enc.view_as(W_enc), W_dec.view_as(W_dec), W_dec.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        grad_enc, grad_dec, _ = gradients
        for latents, grad_enc_rows, grad_dec_rows in ctx.arrived:
            if grad_enc is None:
                grad_enc = grad_enc_rows.new_zeros(ctx.shape).T
            if grad_dec is None:
                grad_dec = grad_dec_rows.new_zeros(ctx.shape)
            grad_enc.T.index_add_(0, latents, grad_enc_rows)
            grad_dec.index_add_(0, latents, grad_dec_rows)
        ctx.arrived.clear()
        return grad_enc, grad_dec, None


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        token: torch.Tensor,
        W_enc: torch.Tensor,
        W_dec: torch.Tensor,
        latents: torch.Tensor,
        arrived: list[Any],
    ) -> Any:
        ctx.save_for_backward(latents)
        ctx.arrived = arrived
        return W_enc.T.index_select(0, latents), W_dec.index_select(0, latents)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.arrived.append((*ctx.saved_tensors, *gradients))
        return gradients[0].new_empty(0), None, None, None, None


class DictionaryLater:
    """A dictionary for use at once, and copies of some latents' part of it, chosen later.

    As `W_enc`, `W_dec`, `W_enc.T[latents]` and `W_dec[latents]`, but that the gradients of the
    latter are added to those of the former in place, where autograd would make second [F, D]
    tensors of them. That takes gradients which nothing else holds, as the fused operators' are, and
    latents without repeats.

    Attributes:
        W_enc, W_dec: to be used in place of the dictionary's own.
    """

    def __init__(self, W_enc: torch.Tensor, W_dec: torch.Tensor) -> None:
        self._arrived: list[Any] = []
        # The token makes autograd wait for the later gradients before it passes the others on.
        self.W_enc, self.W_dec, self._token = _Later.apply(W_enc, W_dec, self._arrived)  # pyright: ignore[reportGeneralTypeIssues]

    def take(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the latents' columns of W_enc, transposed, and rows of W_dec: [n, D] each."""
        weights = self.W_enc.detach(), self.W_dec.detach()
        return _TakeRows.apply(self._token, *weights, latents, self._arrived)  # pyright: ignore[reportReturnType]


def nonzero_later(mask: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return a function that returns where `mask`, [F], is set: indices, [n], ascending.

    Only that function waits for the device, and only for what was under way at this call.
    """
    if not mask.is_cuda:
        return cache(lambda: mask.nonzero().squeeze(-1))
    count = mask.sum().to("cpu", non_blocking=True)
    copied = torch.cuda.current_stream(mask.device).record_event()

    @cache
    def wait() -> torch.Tensor:
        copied.synchronize()
        return mask.nonzero_static(size=int(count)).squeeze(-1)

    return wait
