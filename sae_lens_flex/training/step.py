"""A training step: losses and all gradients of a TopK or HierarchicalTopK SAE.

    rows = x - b_dec                                        what is encoded (x alone without
                                                            `apply_b_dec_to_input`)
    h = rows @ W_enc + b_enc
    latents[b] = the k largest of h[b] * norms              norms = |W_dec[f]|, or 1; or those of
                                                            the largest of the whole batch
    v = relu(h[b, latents[b]])                              decode coefficients
    mse_loss = 1 / B sum_b sum_j c_j |x_hat_j[b] - target[b]|^2
    x_hat_j = output_scale (sum_{i <= j} v_i W_dec[latents_i] + b_dec)

SAELens reports latents as h * norms and divides by the norms again to decode, so in the product the
norms cancel, in the value and in the gradient. The output scale, of each sample, comes from a
normalization of the input; without one it is 1. Only the kept pre-activations have a gradient,

    g[b, t] = dL/dv[b, t] where h[b, latents[b, t]] > 0, else 0,

so with the products of `ops.products`

    dL/dW_enc = scatter(g, rows).T,     dL/db_enc[f] = sum of g over the pairs of f,
    dL/dx = gather(g, W_enc.T),         dL/db_dec = that of the decoder - W_enc @ dL/db_enc.

Nothing of shape [B, F] outlives a chunk of the batch. The auxiliary loss on dead latents is added
in `dead`, and autograd in `node`.

Of several processes each holds a part of the weights and brings a part of the samples; `shards`
says which, and what they exchange. Shapes below are a rank's: it has F_r latents in its encoder,
the part D_r of the width in its decoder, and brings B_r samples. In one process F_r = F, D_r = D
and B_r = B.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..ops.batch_selection import select_over_batch
from ..ops.codes import Code
from ..ops.kernels.norms import norms_and_copy
from ..ops.losses import decoder_loss
from ..ops.policy import accumulation_dtype, gradient_dtype, in_dtype, no_autocast
from ..ops.products import gather, scatter
from ..ops.requests import DecoderLoss, Wanted
from ..ops.selection import Encoder, select
from .dead import Dead, DeadGradients, DeadLatents, KnownDead, auxiliary_loss, columns_for_loss
from .encoder import encoder_rows, minus_product
from .matryoshka import DeadOfWidth, auxiliary_loss_by_width, dead_of_widths, widths_on
from .requests import Gradients, Inputs, Spec, WantedGradients, Weights
from .shards import WHOLE, Whole


class Reconstruction(NamedTuple):
    """What a step computes before it looks at the dead latents.

    Attributes:
        mse_loss: scalar.
        gradients: of `mse_loss`.
        residual: output minus input at level k, [B, D_r].
        rows: what was multiplied with W_enc, [B, D].
        code: the kept latents and their pre-activations h, [B, k] each, in the order of the levels;
            in rows of different length with `over_batch`.
        hidden_pre: h * norms of the kept latents, in the shape of the code.
        norms: [F], or None for 1.
        width_losses: with the spec's `widths`, the mean squared error of each, [n], whatever its
            weight. `mse_loss` is their weighted sum.
        index_starts: the `starts` of the inverted index of the code; None where there is none that
            is of all latents, as in several processes.
        products_of_dead: rows @ W_enc of the latents of the loss on dead ones, [B, n], where
            `columns_for_loss` asks for them; else None.
    """

    mse_loss: torch.Tensor
    gradients: Gradients
    residual: torch.Tensor
    rows: torch.Tensor
    code: Code
    hidden_pre: torch.Tensor
    norms: torch.Tensor | None
    width_losses: torch.Tensor | None = None
    index_starts: torch.Tensor | None = None
    products_of_dead: torch.Tensor | None = None

    @property
    def is_absent(self) -> torch.Tensor | None:
        """The latents that no sample chose, [F], bool, or None where `index_starts` is.

        Their rows of the gradients of W_enc and W_dec are zeros, but those of known dead latents
        may hold anything.
        """
        starts = self.index_starts
        return None if starts is None else starts[1:-1] == starts[2:]


class StepResult(NamedTuple):
    """What a step computes.

    Attributes:
        main: the reconstruction, `mse_loss` and its gradients.
        auxiliary_loss: scalar, or None where no latent is dead.
        auxiliary_gradients: of that loss.
    """

    main: Reconstruction
    auxiliary_loss: torch.Tensor | None
    auxiliary_gradients: DeadGradients | None


Reconstruct = Callable[[Weights, Inputs, Spec, WantedGradients], Reconstruction]


def step(
    weights: Weights,
    inputs: Inputs,
    spec: Spec,
    *,
    wanted: WantedGradients,
    dead: Dead | None = None,
    shards: Whole = WHOLE,
) -> StepResult:
    """Compute a training step.

    Args:
        weights: the parameters, which are only read.
        inputs: a batch of B samples.
        spec: the settings.
        wanted: which gradients to compute.
        dead: the dead latents and the auxiliary loss's coefficient; None for no such loss.
        shards: of which process the weights and samples are. The losses are those of the whole
            batch.
    """
    main = begin_step(weights, inputs, spec, wanted=wanted, shards=shards)
    return finish_step(main, weights, inputs, spec, wanted=wanted, dead=dead, shards=shards)


@torch.no_grad()
def begin_step(
    weights: Weights,
    inputs: Inputs,
    spec: Spec,
    *,
    wanted: WantedGradients,
    by: Reconstruct | None = None,
    shards: Whole = WHOLE,
) -> Reconstruction:
    """Launch the part of a step that does not depend on the number of dead latents.

    Args:
        weights, inputs, spec, wanted, shards: as in `step`.
        by: calls `reconstruct` in one process, or replays a recording of it. None calls it.
    """
    if by is not None:
        return by(weights, inputs, spec, wanted)
    return reconstruct(weights, inputs, spec, wanted, shards)


@torch.no_grad()
def finish_step(
    main: Reconstruction,
    weights: Weights,
    inputs: Inputs,
    spec: Spec,
    *,
    wanted: WantedGradients,
    dead: Dead | None,
    shards: Whole = WHOLE,
) -> StepResult:
    """Add the auxiliary loss. The host waits here for the number of dead latents.

    What the caller launches between `begin_step` and this keeps the device busy meanwhile.

    Args:
        main: what `begin_step` returned for the other arguments.
        weights, inputs, spec, wanted, dead, shards: as in `step`.
    """
    latents = None if dead is None else dead.latents()
    if dead is None or latents is None or len(latents) == 0:
        return StepResult(main, None, None)
    if dead.below is not None:
        found = dead_of_widths(latents, dead.below(), spec.widths)
    else:
        found = DeadLatents(latents, None, None if dead.split is None else dead.split())
    loss, gradients = loss_on_dead(
        *(main, weights, inputs, spec, wanted, found), coefficient=dead.coefficient, shards=shards
    )
    return StepResult(main, loss, gradients)


def loss_on_dead(
    main: Reconstruction,
    weights: Weights,
    inputs: Inputs,
    spec: Spec,
    wanted: WantedGradients,
    found: DeadLatents | Sequence[DeadOfWidth],
    *,
    coefficient: float,
    shards: Whole = WHOLE,
) -> tuple[torch.Tensor, DeadGradients]:
    """Return the auxiliary loss, a scalar, and its gradients.

    Args:
        main: what `begin_step` returned for the other arguments.
        weights, inputs, spec, wanted, shards: as in `step`.
        found: the dead latents. A sequence has those that each width adds, and a loss for each.
        coefficient: multiplies the loss.
    """
    if not isinstance(found, DeadLatents):
        return auxiliary_loss_by_width(
            *(weights, main.rows, main.code, inputs, found),
            coefficient=coefficient,
            norms=main.norms,
            spec=spec,
            wanted=wanted,
        )
    return auxiliary_loss(
        weights,
        main.rows,
        main.residual,
        latents=found.latents,
        is_dead=found.is_dead,
        norms=main.norms,
        coefficient=coefficient,
        spec=spec,
        wanted=wanted,
        shards=shards,
        split=found.split,
        known_products=main.products_of_dead,
    )


def reconstruct(
    weights: Weights,
    inputs: Inputs,
    spec: Spec,
    wanted: WantedGradients,
    shards: Whole = WHOLE,
    *,
    known: KnownDead | None = None,
) -> Reconstruction:
    """Encode a batch, reconstruct it and differentiate the error.

    It waits for nothing and asks nothing of the device, so it can be recorded as a CUDA graph.

    Args:
        weights, inputs, spec, wanted, shards: as in `step`.
        known: the dead latents; only in one process. Of their rows of the gradients of W_enc and
            W_dec the caller writes those that `is_absent` names. They may hold anything.
    """
    with no_autocast(weights.W_dec.device):  # `spec` says in which dtype products are computed
        return _reconstruct(weights, inputs, spec, wanted, shards, known)


def _reconstruct(
    weights: Weights,
    inputs: Inputs,
    spec: Spec,
    wanted: WantedGradients,
    shards: Whole,
    known: KnownDead | None,
) -> Reconstruction:
    W_enc, b_enc, W_dec, b_dec = weights  # [D, F_r], [F_r], [F, D_r], [D]
    x, target, scale, level_weights = inputs  # [B_r, D], [B_r, D], [B_r, 1], [k]
    n_latents, n_own, use_triton = W_dec.shape[0], W_enc.shape[1], spec.use_triton
    own_latents, own_width = shards.own_latents(n_latents), shards.own_width(len(b_dec))
    sum_dtype = accumulation_dtype(W_dec, target)

    # --- encode
    norms, read = _norms_and_copy(W_dec, spec, shards)  # [F] or None, [F, D_r]
    rows = shards.all_samples(encoder_rows(x, b_dec, spec))  # [B, D]
    bias = shards.bias_to_compare(b_enc, use_triton=use_triton)
    encoder = Encoder(W_enc, bias, None if norms is None else norms[own_latents])
    columns = None
    if spec.over_batch:
        # in rows of different length
        code = select_over_batch(rows, encoder, spec.k, use_triton=use_triton)
    else:
        if known is not None:
            columns = columns_for_loss(rows, known, spec)
        n_kept = min(spec.k, n_own)
        code = select(rows, encoder, n_kept, use_triton=use_triton, columns=columns)  # of F_r
        dtype = torch.promote_types(rows.dtype, b_enc.dtype)
        code = shards.merge(code, norms, spec.k, dtype=dtype)  # [B, k], of F
    index = None
    if wanted.W_enc:
        index = shards.by_own_latent(
            code, n_latents, deterministic=spec.deterministic, use_triton=use_triton
        )
        if known is not None:
            index = index._replace(written_later=known.mask)
    hidden_pre = code.values if norms is None else code.values * norms.take(code.latents)

    # --- decode: vals @ W_dec[latents] + bias is to be the target
    acts = code.values.relu()  # [B, k]
    vals, bias = acts, b_dec[own_width]
    target = shards.by_width(target)  # [B, D_r]
    if scale is not None:
        scale = shards.all_samples(scale)  # [B, 1]
        target = target - scale * bias.to(target.dtype)
        vals, bias = acts * code.of_pairs(scale), None
    wants_encoder = wanted.any_of_encoder(spec)
    wants_scaled = scale is not None and (wanted.b_dec or wanted.output_scale)
    levels = spec.levels if level_weights is None else level_weights
    widths = widths_on(spec.widths, target.device) if spec.widths else None  # [n]
    if widths is not None and level_weights is None:
        levels = target.new_ones(len(widths), dtype=sum_dtype)
    decoded = decoder_loss(
        DecoderLoss(
            code=code.with_values(vals),
            weight=read,
            bias=bias,
            target=target,
            levels=levels,
            scale=1 / spec.n_samples,  # SAELens sums over D and averages over samples
            wanted=Wanted(
                residual=True,
                weight=gradient_dtype(W_dec.dtype) if wanted.W_dec else None,
                values=sum_dtype if wants_encoder or wanted.output_scale else None,
                bias=sum_dtype if wanted.b_dec and scale is None else None,
                target=target.dtype if wanted.target or wants_scaled else None,
            ),
            widths=widths,
            index=None if shards.is_sharded else index,
            deterministic=spec.deterministic,
        ),
        use_triton=use_triton,
    )
    # They may be copies, which would add to the encoder's gradient at the peak of memory.
    del read, target
    grad_vals, grad_b_dec, grad_scale = decoded.values, decoded.bias, None
    if grad_vals is not None:
        grad_vals = shards.sum(grad_vals)  # [B, k]
    if scale is not None:
        scale = scale.to(sum_dtype)
        if wanted.b_dec and decoded.target is not None:
            grad_b_dec = -(scale * decoded.target).sum(0)  # [D_r]
        if wanted.output_scale and grad_vals is not None and decoded.target is not None:
            grad_scale = code.sum_by_sample(grad_vals * acts)  # [B, 1]
            grad_scale -= (decoded.target * b_dec).sum(-1, keepdim=True)
        grad_vals = None if grad_vals is None else grad_vals * code.of_pairs(scale)

    if grad_b_dec is not None:
        grad_b_dec = shards.all_width(grad_b_dec)  # [D]

    # --- back through the encoder
    grad_W_enc = grad_b_enc = grad_x = None
    if wants_encoder and grad_vals is not None:
        # `masked_fill` leaves a NaN where h is NaN, as the gradient of relu does.
        g = code.with_values(grad_vals.masked_fill(code.values <= 0, 0))  # [B, k]
        if index is not None:
            grad_W_enc = W_enc.new_empty(W_enc.shape[::-1], dtype=gradient_dtype(W_enc.dtype))
            scatter(index, g.values, rows, out=grad_W_enc, use_triton=use_triton)  # [F_r, D]
            grad_W_enc = grad_W_enc.T  # [D, F_r]
        if wanted.b_enc or (wanted.b_dec and spec.apply_b_dec_to_input):
            grad_b_enc = b_enc.new_zeros(n_latents, dtype=sum_dtype)
            grad_b_enc.index_add_(0, g.latents.flatten(), g.values.flatten())
            grad_b_enc = grad_b_enc[own_latents]  # [F_r]
        if grad_b_dec is not None and grad_b_enc is not None and spec.apply_b_dec_to_input:
            grad_b_dec = minus_product(grad_b_dec, W_enc, grad_b_enc)
        if wanted.encoder_input:
            grad_x = gather(g, W_enc.T, use_triton=use_triton)  # [B, D]
    assert decoded.residual is not None
    loss, grad_b_dec = shards.sum_both(decoded.loss, grad_b_dec)
    width_losses = None
    if decoded.width_errors is not None:
        width_losses = decoded.width_errors / spec.n_samples
    index_starts = None if index is None or shards.is_sharded else index.starts
    return Reconstruction(
        mse_loss=loss,
        gradients=Gradients(
            W_enc=grad_W_enc,
            b_enc=_kept(grad_b_enc, b_enc) if wanted.b_enc else None,
            W_dec=decoded.weight,
            b_dec=_kept(grad_b_dec, b_dec),
            encoder_input=_kept(grad_x, x),
            target=_kept(decoded.target, inputs.target) if wanted.target else None,
            output_scale=_kept(grad_scale, inputs.output_scale),
        ),
        residual=decoded.residual,
        rows=rows,
        code=code,
        hidden_pre=hidden_pre,
        norms=norms,
        width_losses=width_losses,
        index_starts=index_starts,
        products_of_dead=None if columns is None else columns.products,
    )


def _norms_and_copy(
    W_dec: torch.Tensor, spec: Spec, shards: Whole
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return the norms by which latents are compared, or None, and what is read of W_dec.

    SAELens decodes in autocast's dtype. Where that is lower than the weight's, the kernels read a
    rounded copy. By PyTorch reading a copy would gain nothing.
    """
    rescales = spec.rescale_acts_by_decoder_norm
    if spec.use_triton and spec.product_dtype.itemsize < W_dec.itemsize:
        norms, copy = norms_and_copy(W_dec, spec.product_dtype)
        return shards.norms(W_dec, norms) if rescales else None, copy
    return shards.norms(W_dec) if rescales else None, W_dec


def _kept(gradient: torch.Tensor | None, of: torch.Tensor | None) -> torch.Tensor | None:
    """Return the gradient of a tensor in the dtype in which it is kept until the backward pass."""
    if gradient is None or of is None:
        return None
    return in_dtype(gradient, gradient_dtype(of.dtype))
