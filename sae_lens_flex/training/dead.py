"""The auxiliary loss on dead latents (AuxK), on their part of the dictionary alone.

    h = rows @ W_enc + b_enc,
    a = h at the K largest of h * norms in each row, 0 elsewhere,
    L = factor / B * sum_b |a[b] @ W_dec - target[b]|^2,     e = a @ W_dec - target

with W_enc, W_dec, b_enc and norms those of the n dead latents, K = min(n, D // 2) and
factor = coefficient * min(n / (D // 2), 1), as in SAELens's `calculate_topk_aux_loss`. K is a large
part of n, so the products are dense, over chunks of the batch. With s = 2 factor / B * e and
g = s @ W_dec.T at the kept latents, 0 elsewhere, the gradients are

    dL/dW_dec = a.T @ s,      dL/dW_enc = rows.T @ g,      dL/db_enc = sum_b g[b],
    dL/dx = g @ W_enc.T,      dL/db_dec = -W_enc @ dL/db_enc.

The target, what the living latents left over, has none.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from ..ops.policy import accumulation_dtype, in_dtype, no_autocast
from ..ops.selection import Encoder, chunk_rows, empty_code, select_from
from .encoder import encoder_rows, minus_product
from .requests import Spec, WantedGradients, Weights


class Dead(NamedTuple):
    """Which latents are dead, and how much the loss on them counts.

    Attributes:
        latents: returns them, [n], ascending. It may wait for the device.
        coefficient: SAELens's `aux_loss_coefficient`.
    """

    latents: Callable[[], torch.Tensor]
    coefficient: float


class DeadGradients(NamedTuple):
    """The gradients of the auxiliary loss, float32 (float64); None where not wanted.

    Attributes:
        latents: the n dead latents, [n].
        own_latents: their numbers in W_enc and b_enc, [n]: all of them in one process, and in one
            of several those of its own, numbered from its first latent on.
        W_enc: of the transpose of the columns of `own_latents`, [n, D].
        b_enc: [n].
        W_dec: of their rows, [n, D].
        b_dec: [D].
        encoder_input: [B, D].
    """

    latents: torch.Tensor
    own_latents: torch.Tensor
    W_enc: torch.Tensor | None
    b_enc: torch.Tensor | None
    W_dec: torch.Tensor | None
    b_dec: torch.Tensor | None
    encoder_input: torch.Tensor | None


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


def auxiliary_loss(
    weights: Weights,
    encoder_input: torch.Tensor,
    target: torch.Tensor,
    *,
    latents: torch.Tensor,
    norms: torch.Tensor | None,
    coefficient: float,
    spec: Spec,
    wanted: WantedGradients,
) -> tuple[torch.Tensor, DeadGradients]:
    """Return the loss, a scalar, and its gradients.

    The memory grows neither with B * n nor with F.

    Args:
        weights: of the whole dictionary.
        encoder_input: [B, D], normalized, before b_dec is subtracted.
        target: what the living latents left over, [B, D].
        latents: the n dead latents, [n], n > 0.
        norms: by which latents are compared, [F], or None for 1.
        coefficient: multiplies the loss.
        spec: settings of the step.
        wanted: which gradients to compute.
    """
    d_in, device = weights.W_dec.shape[1], weights.W_dec.device
    b_enc = weights.b_enc.index_select(0, latents)  # [n]
    norms = None if norms is None else norms[latents]  # [n]
    n_dead, half_width = len(latents), d_in // 2
    k = min(n_dead, half_width)
    factor = coefficient * min(n_dead / half_width, 1.0)
    dtype, sum_dtype = spec.product_dtype, accumulation_dtype(weights.W_dec, target)
    n_samples = len(encoder_input)

    def zeros(is_wanted: bool, *shape: int) -> torch.Tensor | None:
        return torch.zeros(shape, dtype=sum_dtype, device=device) if is_wanted else None

    def rows_of(weight: torch.Tensor) -> torch.Tensor:
        return in_dtype(weight.index_select(0, latents), dtype)  # [n, D]

    wants_encoder = wanted.any_of_encoder(spec)
    through_b_dec = wanted.b_dec and spec.apply_b_dec_to_input
    grad_W_enc, grad_W_dec = zeros(wanted.W_enc, n_dead, d_in), zeros(wanted.W_dec, n_dead, d_in)
    grad_b_enc = zeros(wanted.b_enc or through_b_dec, n_dead)
    grad_x = zeros(wanted.encoder_input, n_samples, d_in)
    loss = target.new_zeros((), dtype=sum_dtype)
    with no_autocast(device):
        rows = encoder_rows(encoder_input, weights.b_dec, spec)  # [B, D]
        encoder, decoder = rows_of(weights.W_enc.T), rows_of(weights.W_dec)  # [n, D]
        n_rows = chunk_rows(n_samples, n_dead, dtype, rows.device)
        for start in range(0, n_samples, n_rows):
            chunk = slice(start, start + n_rows)
            products = rows[chunk] @ encoder.T  # [b, n]
            kept = None
            if k < n_dead:
                kept = empty_code(len(products), k, rows, b_enc)  # [b, k]
                parts = Encoder(encoder.T, b_enc, norms)
                select_from(products, parts, kept, use_triton=spec.use_triton, is_sorted=False)
                acts = torch.zeros_like(products)
                acts.scatter_(-1, kept.latents, in_dtype(kept.values, dtype))
            else:
                acts = (products + b_enc).to(dtype)
            del products  # With tensors of [b, n] the peak of memory is here.
            error = (acts @ decoder).to(sum_dtype) - target[chunk]  # [b, D]
            loss += error.square().sum()
            s = error.mul_(2 * factor / spec.n_samples).to(dtype)
            if grad_W_dec is not None:
                grad_W_dec += acts.T @ s
            del acts
            if not wants_encoder:
                continue
            g = s @ decoder.T  # [b, n]
            if kept is not None:
                g = torch.zeros_like(g).scatter_(-1, kept.latents, g.gather(-1, kept.latents))
            if grad_W_enc is not None:
                grad_W_enc += g.T @ rows[chunk]
            if grad_b_enc is not None:
                grad_b_enc += g.sum(0, dtype=sum_dtype)
            if grad_x is not None:
                grad_x[chunk] = (g @ encoder).to(sum_dtype)
        grad_b_dec = None
        if through_b_dec and grad_b_enc is not None:
            del encoder, decoder
            # Unrounded, since it is a sum over all dead latents.
            W_enc_rows = weights.W_enc.T.index_select(0, latents).to(sum_dtype)
            zero = weights.b_dec.new_zeros(d_in, dtype=sum_dtype)
            grad_b_dec = minus_product(zero, W_enc_rows.T, grad_b_enc)
    gradients = DeadGradients(
        latents=latents,
        own_latents=latents,
        W_enc=grad_W_enc,
        b_enc=grad_b_enc if wanted.b_enc else None,
        W_dec=grad_W_dec,
        b_dec=grad_b_dec,
        encoder_input=grad_x,
    )
    return loss * (factor / spec.n_samples), gradients
