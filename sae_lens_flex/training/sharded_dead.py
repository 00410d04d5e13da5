"""The auxiliary loss of `dead`, on a dictionary that is cut among several processes.

A rank compares the dead latents of its own part. The winners of each sample are merged, so that
every rank knows them. It then decodes them in its columns of the decoder. What it finds for the
gradients of their values is a part of a sum over the model's width, which the ranks add up.
"""

import torch

from ..ops.codes import Code
from ..ops.policy import accumulation_dtype, in_dtype, no_autocast
from ..ops.selection import Encoder, chunk_rows, empty_code, select_from
from .dead import DeadGradients
from .encoder import encoder_rows, minus_product
from .requests import Spec, WantedGradients, Weights
from .shards import Shards


def sharded_auxiliary_loss(
    weights: Weights,
    encoder_input: torch.Tensor,
    target: torch.Tensor,
    *,
    latents: torch.Tensor,
    norms: torch.Tensor | None,
    coefficient: float,
    spec: Spec,
    wanted: WantedGradients,
    shards: Shards,
) -> tuple[torch.Tensor, DeadGradients]:
    """Return the loss of the whole batch, a scalar, and the gradients of the rank's weights.

    Args:
        weights: of the rank: F_r latents of the encoder, D_r columns of the decoder.
        encoder_input: of the rank's samples, [B_r, D], normalized, before b_dec is subtracted.
        target: what the living latents left over, [B, D_r].
        latents: the n dead latents of the dictionary, [n], ascending, n > 0.
        norms, coefficient, spec, wanted: as in `auxiliary_loss`.
        shards: of this step.
    """
    d_in, n_dead, device = shards.width[-1], len(latents), latents.device
    half_width = d_in // 2
    k = min(n_dead, half_width)
    factor = coefficient * min(n_dead / half_width, 1.0)
    dtype, sum_dtype = spec.product_dtype, accumulation_dtype(weights.W_dec, target)

    # The dead latents are cut like the dictionary: `starts` says where each rank's begin among
    # them, and `cut` merges and numbers among them.
    borders = torch.tensor(shards.latents, device=device)
    starts = torch.searchsorted(latents, borders).tolist()
    cut = shards.with_latents(tuple(starts))
    own = cut.own_latents(latents) - shards.latents[shards.rank]  # [n_r]
    norms = None if norms is None else norms[latents]  # [n]
    b_enc = weights.b_enc.index_select(0, own)  # [n_r]

    wants_encoder = wanted.any_of_encoder(spec)
    through_b_dec = wanted.b_dec and spec.apply_b_dec_to_input
    with no_autocast(device):
        rows = shards.gather_samples(encoder_rows(encoder_input, weights.b_dec, spec))  # [B, D]
        encoder = in_dtype(weights.W_enc.T.index_select(0, own), dtype)  # [n_r, D]
        decoder = in_dtype(weights.W_dec.index_select(0, latents), dtype)  # [n, D_r]
        n_samples, n_rows = len(rows), chunk_rows(len(rows), n_dead, dtype, device)
        chunks = [slice(start, start + n_rows) for start in range(0, n_samples, n_rows)]

        # --- encode
        offered = empty_code(n_samples, min(k, len(own)), rows, b_enc)
        parts = Encoder(encoder.T, b_enc, None if norms is None else cut.own_latents(norms))
        for chunk in chunks:
            products = rows[chunk] @ encoder.T  # [b, n_r]
            part = Code(offered.latents[chunk], offered.values[chunk])
            if k < len(own):
                select_from(products, parts, part, use_triton=spec.use_triton)
            else:
                part.latents.copy_(torch.arange(len(own), device=device).expand_as(products))
                part.values.copy_(products + b_enc)
        kept = cut.merge(offered, norms, k)  # [B, k]

        # --- decode
        loss = target.new_zeros((), dtype=sum_dtype)
        grad_W_dec = None
        if wanted.W_dec:
            grad_W_dec = torch.zeros(decoder.shape, dtype=sum_dtype, device=device)
        g = kept.values.new_zeros(kept.values.shape, dtype=sum_dtype)  # [B, k]
        for chunk in chunks:
            places = kept.latents[chunk]
            acts = decoder.new_zeros(len(places), n_dead)
            acts.scatter_(-1, places, in_dtype(kept.values[chunk], dtype))
            error = (acts @ decoder).to(sum_dtype) - target[chunk]  # [b, D_r]
            loss += error.square().sum()
            s = error.mul_(2 * factor / spec.n_samples).to(dtype)
            if grad_W_dec is not None:
                grad_W_dec += acts.T @ s
            if wants_encoder:
                g[chunk] = (s @ decoder.T).gather(-1, places).to(sum_dtype)
        loss = shards.sum(loss)

        # --- back through the encoder
        grad_W_enc = grad_b_enc = grad_b_dec = None
        if wants_encoder:
            g = in_dtype(shards.sum(g), dtype)
            grad_b_enc = torch.zeros(n_dead, dtype=sum_dtype, device=device)
            if wanted.W_enc:
                grad_W_enc = torch.zeros(encoder.shape, dtype=sum_dtype, device=device)
            for chunk in chunks:
                dense = g.new_zeros(len(g[chunk]), n_dead)
                dense.scatter_(-1, kept.latents[chunk], g[chunk])  # [b, n]
                grad_b_enc += dense.sum(0, dtype=sum_dtype)
                if grad_W_enc is not None:
                    grad_W_enc += dense[:, starts[cut.rank] : starts[cut.rank + 1]].T @ rows[chunk]
            grad_b_enc = cut.own_latents(grad_b_enc)  # [n_r]
            if through_b_dec:
                # Unrounded, since it is a sum over all dead latents.
                W_enc_rows = weights.W_enc.T.index_select(0, own).to(sum_dtype)
                zero = weights.b_dec.new_zeros(d_in, dtype=sum_dtype)
                grad_b_dec = shards.sum(minus_product(zero, W_enc_rows.T, grad_b_enc))
    gradients = DeadGradients(
        latents=latents,
        own_latents=own,
        W_enc=grad_W_enc,
        b_enc=grad_b_enc if wanted.b_enc else None,
        W_dec=grad_W_dec,
        b_dec=grad_b_dec,
        encoder_input=None,
    )
    return loss * (factor / spec.n_samples), gradients
