"""The auxiliary loss on dead latents (AuxK), on their part of the dictionary alone.

    h = rows @ W_enc + b_enc,
    a = h at the K largest of h * norms in each row, 0 elsewhere,
    L = factor / B * sum_b |e[b]|^2,     e = a @ W_dec + residual

with W_enc, W_dec, b_enc and norms those of the n dead latents, K = min(n, D // 2) and
factor = coefficient * min(n / (D // 2), 1), as in SAELens's `calculate_topk_aux_loss`. K is a large
part of n, so the products are dense, over chunks of the batch. With s = 2 factor / B * e and
g = s @ W_dec.T at the kept latents, 0 elsewhere, the gradients are

    dL/dW_dec = a.T @ s,      dL/dW_enc = rows.T @ g,      dL/db_enc = sum_b g[b],
    dL/dx = g @ W_enc.T,      dL/db_dec = -W_enc @ dL/db_enc.

The residual, the output of the living latents minus the input, has none.

The kernels write the kept h into their places (`ops.kernels.kept`). The K largest are listed first
by PyTorch, in float64, where n is more than a kernel's registers hold, and where several processes
choose together.

Where the host is not to wait for n, the loss takes a fixed number of latents of which only n, known
to the device, are dead. The others have zeros for weights. Where K are chosen, the kernels keep
none of the others, and a list has 0 for their h. So nothing comes from them.

Of several processes each has the n_r dead latents of its encoder, and the part D_r of the width.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from ..ops.kernels import kept as places
from ..ops.kernels.error import scaled_error
from ..ops.policy import accumulation_dtype, gradient_dtype, in_dtype, no_autocast
from ..ops.products import add_rows, sum_rows, take_rows
from ..ops.selection import Columns, Encoder, chunk_rows, empty_code, select_from
from .requests import Gradients, Spec, WantedGradients, Weights
from .shards import WHOLE, Split, Whole


class Dead(NamedTuple):
    """Which latents are dead, and how much the loss on them counts.

    Attributes:
        latents: returns them, [n], ascending. It may wait for the device.
        coefficient: SAELens's `aux_loss_coefficient`.
        split: returns by which the ranks hold them; None in one process.
        below: returns how many of them are below each of the spec's `widths`. There is then a loss
            for each width, on the latents that it adds to the one before. None for one loss.
    """

    latents: Callable[[], torch.Tensor]
    coefficient: float
    split: Callable[[], Split] | None = None
    below: Callable[[], list[int]] | None = None


class DeadLatents(NamedTuple):
    """The dead latents of each rank's encoder, perhaps with others up to a fixed number of them.

    Attributes:
        latents: [n]; those that are not dead may come twice.
        is_dead: which of them are dead, [n]; None where all are.
        split: by which the ranks hold them; not read in one process.
    """

    latents: torch.Tensor
    is_dead: torch.Tensor | None
    split: Split | None


class KnownDead(NamedTuple):
    """Dead latents that are known before the batch is encoded.

    Attributes:
        mask: which latents they are, [F], bool. `of_loss` has all of them.
        of_loss: those that the loss takes, as from `padded`.
    """

    mask: torch.Tensor
    of_loss: DeadLatents


class DeadGradients(NamedTuple):
    """The gradients of the auxiliary loss, float32 (float64); None where not wanted.

    Attributes:
        latents: the n dead latents, [n].
        own_latents: the n_r of them in this rank's encoder, numbered from its first latent, [n_r].
        is_dead: which of `latents` are dead, [n]; None where all are. The gradients of the others
            are zeros.
        own_is_dead: which of `own_latents` are, [n_r], or None.
        use_triton: whether the kernels add them to other gradients.
        W_enc: of the transpose of the encoder's columns, [n_r, D].
        b_enc: [n_r].
        W_dec: of the decoder's rows, [n, D_r].
        b_dec: [D].
        encoder_input: [B, D].
    """

    latents: torch.Tensor
    own_latents: torch.Tensor
    is_dead: torch.Tensor | None
    own_is_dead: torch.Tensor | None
    use_triton: bool
    W_enc: torch.Tensor | None
    b_enc: torch.Tensor | None
    W_dec: torch.Tensor | None
    b_dec: torch.Tensor | None
    encoder_input: torch.Tensor | None

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients alone."""
        return self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.encoder_input

    def added_to(
        self,
        gradients: Gradients,
        weights: Weights,
        x: torch.Tensor,
        is_absent: torch.Tensor | None = None,
    ) -> Gradients:
        """Return the sum of these and of other gradients, which is added in place.

        Args:
            gradients: a gradient of them is None where it is not wanted, or zero.
            weights: of the step.
            x: its `encoder_input`.
            is_absent: the latents whose rows of the other gradients count as zeros, as in
                `Reconstruction`.
        """
        W_enc, b_enc, W_dec, b_dec = weights

        def add_to_rows(
            gradient: torch.Tensor | None,
            is_of_encoder: bool,
            rows: torch.Tensor | None,
            like: torch.Tensor,
        ) -> torch.Tensor | None:
            if rows is None:
                return gradient
            if gradient is None:
                gradient = like.new_zeros(like.shape, dtype=gradient_dtype(like.dtype))
            latents = self.own_latents if is_of_encoder else self.latents
            is_dead = self.own_is_dead if is_of_encoder else self.is_dead
            add_rows(
                gradient,
                latents,
                rows,
                is_used=is_dead,
                use_triton=self.use_triton,
                counts_as_zero=is_absent,
            )
            return gradient

        def add(
            gradient: torch.Tensor | None, other: torch.Tensor | None, like: torch.Tensor
        ) -> torch.Tensor | None:
            if other is None:
                return gradient
            if gradient is None:
                return in_dtype(other, gradient_dtype(like.dtype))
            return gradient.add_(other)

        by_latent = None if gradients.W_enc is None else gradients.W_enc.T
        by_latent = add_to_rows(by_latent, True, self.W_enc, W_enc.T)
        return gradients._replace(
            W_enc=None if by_latent is None else by_latent.T,
            b_enc=add_to_rows(gradients.b_enc, True, self.b_enc, b_enc),
            W_dec=add_to_rows(gradients.W_dec, False, self.W_dec, W_dec),
            b_dec=add(gradients.b_dec, self.b_dec, b_dec),
            encoder_input=add(gradients.encoder_input, self.encoder_input, x),
        )


def padded(mask: torch.Tensor, capacity: int, shards: Whole = WHOLE) -> DeadLatents:
    """Return where `mask`, [F], is set, without waiting for the device.

    Args:
        mask: the dead latents.
        capacity: how many of them a rank's encoder has at most; all of its latents where it has
            fewer.
        shards: which has the ranks.
    """
    latents, are_dead = [], []
    for part in shards.latents_of_all(len(mask)):
        n = min(capacity, part.stop - part.start)
        found = mask[part].nonzero_static(size=n, fill_value=-1).squeeze(-1)
        # The rest is spread, because adding many zeros to the gradient of one latent takes long.
        rest = torch.arange(n, device=mask.device)
        latents.append(found.where(found >= 0, rest) + part.start)
        are_dead.append(found >= 0)
    return DeadLatents(torch.cat(latents), torch.cat(are_dead), Split(tuple(map(len, latents))))


def columns_for_loss(rows: torch.Tensor, known: KnownDead, spec: Spec) -> Columns | None:
    """Return where the encoder is to leave products that the loss then need not compute.

    It is None where the loss cannot take them: where kernels do not write places, and where the
    loss walks the batch in chunks.

    Args:
        rows: what is multiplied with W_enc, [B, D].
        known: the dead latents.
        spec: settings of the step.
    """
    latents, (n_samples, d_in) = known.of_loss.latents, rows.shape
    is_one_chunk = chunk_rows(n_samples, len(latents), rows.dtype, rows.device) >= n_samples
    if not is_one_chunk or not _writes_places(len(latents), d_in, spec, WHOLE):
        return None
    return Columns(latents, rows.new_empty((n_samples, len(latents))))


def _writes_places(n_latents: int, d_in: int, spec: Spec, shards: Whole) -> bool:
    """Return whether kernels write the kept pre-activations of n latents into their places."""
    chooses = n_latents > d_in // 2
    fits = places.fits(n_latents, spec.product_dtype)
    return chooses and fits and spec.use_triton and not shards.is_sharded


def nonzero_later(mask: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return a function that returns where `mask`, [F], is set: indices, [n], ascending.

    Only that function waits for the device, and only for what was under way at this call.
    """
    if not mask.is_cuda:
        return cache(lambda: mask.nonzero().squeeze(-1))
    count = _numbers_later(mask.sum())
    return cache(lambda: mask.nonzero_static(size=count()).squeeze(-1))


def counts_below_later(mask: torch.Tensor, widths: Sequence[int]) -> Callable[[], list[int]]:
    """Return a function that returns how often `mask`, [F], is set below each width.

    As with `nonzero_later`, only that function waits.
    """
    return _numbers_later(torch.stack([mask[:width].sum() for width in widths]))


def dead_counts_later(mask: torch.Tensor, split: Split) -> Callable[[], list[int]]:
    """Return a function that returns how many latents of each part of `mask`, [F], are set.

    The sum of their numbers comes last. As with `nonzero_later`, only that function waits.
    """
    numbers = torch.arange(len(mask), device=mask.device)
    return _numbers_later(
        torch.stack([*(mask[part].sum() for part in split.parts), (numbers * mask).sum()])
    )


def _numbers_later(numbers: torch.Tensor) -> Callable[[], Any]:
    """Return a function that returns a tensor's numbers, and waits until they are on the host."""
    if not numbers.is_cuda:
        return cache(numbers.tolist)
    device, numbers = numbers.device, numbers.to("cpu", non_blocking=True)
    copied = torch.cuda.current_stream(device).record_event()

    @cache
    def wait() -> Any:
        copied.synchronize()
        return numbers.tolist()

    return wait


def auxiliary_loss(
    weights: Weights,
    rows: torch.Tensor,
    residual: torch.Tensor,
    *,
    latents: torch.Tensor,
    is_dead: torch.Tensor | None = None,
    norms: torch.Tensor | None,
    coefficient: float,
    spec: Spec,
    wanted: WantedGradients,
    shards: Whole = WHOLE,
    split: Split | None = None,
    known_products: torch.Tensor | None = None,
) -> tuple[torch.Tensor, DeadGradients]:
    """Return the loss, a scalar, and its gradients.

    The memory grows neither with B * n nor with F.

    Args:
        weights: of the whole dictionary, or this rank's shards of them.
        rows: what is multiplied with W_enc, [B, D].
        residual: what the living latents left over, negated: output minus input, [B, D_r].
        latents: the n dead latents, [n], n > 0.
        is_dead: which of the latents are dead, [n], where not all of them are. None of them need
            be.
        norms: by which latents are compared, [F], or None for 1.
        coefficient: multiplies the loss.
        spec: settings of the step.
        wanted: which gradients to compute.
        shards: of which process the weights are.
        split: by which the ranks hold the dead latents; not read in one process.
        known_products: rows @ W_enc of the latents, [B, n], where the encoder left them in what
            `columns_for_loss` returned. They are overwritten.
    """
    d_in, device = len(weights.b_dec), weights.W_dec.device
    n_latents, half_width = len(latents), d_in // 2
    sum_dtype = accumulation_dtype(weights.W_dec, residual)
    n_dead = n_latents if is_dead is None else is_dead.sum(dtype=sum_dtype)
    own = shards.own(split, n_latents)
    own_latents = latents[own]  # [n_r]
    if shards.is_sharded:
        own_latents = own_latents - shards.own_latents(len(weights.W_dec)).start
    n_own = len(own_latents)
    own_is_dead = None if is_dead is None else is_dead[own]  # [n_r]
    b_enc = weights.b_enc.index_select(0, own_latents)  # [n_r]
    bias = shards.bias_to_compare(b_enc, use_triton=spec.use_triton)
    kept_dtype = torch.promote_types(rows.dtype, b_enc.dtype)
    norms = None if norms is None else norms[latents]  # [n]
    k, dtype, n_samples = min(n_latents, half_width), spec.product_dtype, len(rows)
    share = n_dead / half_width
    share = share.clamp(max=1) if isinstance(share, torch.Tensor) else min(share, 1.0)
    factor = coefficient * share

    wants_encoder = wanted.any_of_encoder(spec)
    through_b_dec = wanted.b_dec and spec.apply_b_dec_to_input
    wants_b_enc = wanted.b_enc or through_b_dec
    grad_W_enc = grad_W_dec = grad_b_enc = grad_x = grad_b_dec = None
    if wanted.encoder_input:
        grad_x = rows.new_empty((n_samples, d_in), dtype=sum_dtype)
    loss = residual.new_zeros((), dtype=sum_dtype)
    scale = torch.full_like(loss, 2 / spec.n_samples) * factor
    chooses, in_places = k < n_latents, _writes_places(n_latents, d_in, spec, shards)
    use_triton = spec.use_triton

    @cache
    def encoder() -> torch.Tensor:  # [n_r, D]; with known products mostly not needed
        return take_rows(
            weights.W_enc.T, own_latents, dtype, is_used=own_is_dead, use_triton=use_triton
        )

    with no_autocast(device):
        decoder = take_rows(
            weights.W_dec, latents, dtype, is_used=is_dead, use_triton=use_triton
        )  # [n, D_r]
        if is_dead is not None and own_is_dead is not None and not in_places:
            fill = -torch.inf if chooses else 0
            bias, b_enc = (b.masked_fill(~own_is_dead, fill) for b in (bias, b_enc))
            norms = None if norms is None else norms.masked_fill(~is_dead, 1)
        n_rows = chunk_rows(n_samples, n_latents, dtype, rows.device)
        for start in range(0, n_samples, n_rows):
            chunk = slice(start, start + n_rows)
            if known_products is not None:
                products = known_products[chunk]
            else:
                products = rows[chunk] @ encoder().T  # [b, n_r]
            listed = kept = None
            if in_places:
                kept = places.keep_largest(products, b_enc, norms, is_dead, k)
                acts = products  # [b, n]
            elif chooses:
                listed = empty_code(len(products), min(k, n_own), rows, bias)
                if n_own > 0:
                    select_from(
                        products,
                        Encoder(encoder().T, bias, None if norms is None else norms[own]),
                        listed,
                        use_triton=use_triton,
                        is_sorted=shards.is_sharded,  # as merging expects
                    )
                listed = shards.merge(listed, norms, k, dtype=kept_dtype, split=split)  # [b, k]
                if is_dead is not None:
                    listed = listed.with_values(listed.values.where(is_dead[listed.latents], 0))
                acts = products.new_zeros((len(products), n_latents))
                acts.scatter_(-1, listed.latents, in_dtype(listed.values, dtype))
            else:
                acts = shards.all_columns((products + b_enc).to(dtype), split)  # [b, n]
            del products  # Tensors of [b, n] are most of the memory.
            s = acts @ decoder  # [b, D_r], the reconstruction at first
            if use_triton and sum_dtype == torch.float32:
                loss += scaled_error(s, residual[chunk].contiguous(), scale)
            else:
                error = s.to(sum_dtype) + residual[chunk]
                loss += error.square().sum()
                s = error.mul_(scale).to(dtype)
            if wanted.W_dec:
                grad_W_dec = _plus_product(grad_W_dec, acts.T, s, sum_dtype)
            if not wants_encoder:
                continue
            g, sums = torch.mm(s, decoder.T, out=acts), None  # [b, n], in place of the activations
            if kept is not None:
                sums = places.at_kept(g, kept, wants_sums=wants_b_enc)
            elif listed is not None:
                of_kept = shards.sum(g.gather(-1, listed.latents))  # [b, k]
                g = torch.zeros_like(g).scatter_(-1, listed.latents, of_kept)
            else:
                g = shards.sum(g)
            g = g[:, own]  # [b, n_r]
            if wanted.W_enc:
                grad_W_enc = _plus_product(grad_W_enc, g.T, rows[chunk], sum_dtype)
            if wants_b_enc:
                sums = g.sum(0, dtype=sum_dtype) if sums is None else sums
                grad_b_enc = sums if grad_b_enc is None else grad_b_enc.add_(sums)
            if grad_x is not None:
                grad_x[chunk] = (g @ encoder()).to(sum_dtype)
        if through_b_dec and grad_b_enc is not None:
            encoder.cache_clear()
            del decoder
            # Unrounded, since it is a sum over all dead latents.
            grad_b_dec = -sum_rows(
                weights.W_enc.T, own_latents, grad_b_enc, is_used=own_is_dead, use_triton=use_triton
            )
    loss, grad_b_dec = shards.sum_both(loss, grad_b_dec)
    gradients = DeadGradients(
        latents=latents,
        own_latents=own_latents,
        is_dead=is_dead,
        own_is_dead=own_is_dead,
        use_triton=use_triton,
        W_enc=grad_W_enc,
        b_enc=grad_b_enc if wanted.b_enc else None,
        W_dec=grad_W_dec,
        b_dec=grad_b_dec,
        encoder_input=grad_x,
    )
    loss = loss * (factor / spec.n_samples)
    if is_dead is not None:  # A sum that overflows, times 0, is not 0.
        loss = loss.where(is_dead.any(), 0)
    return loss, gradients


def _plus_product(
    total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return total + a @ b in `dtype`. The total is changed in place, and None is 0."""
    if a.is_cuda and a.itemsize == 2 and dtype == torch.float32:
        product = torch.mm(a, b, out_dtype=dtype)  # not rounded to 16 bits
    else:
        product = in_dtype(a @ b, dtype)
    return product if total is None else total.add_(product)
