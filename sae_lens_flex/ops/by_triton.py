"""The decoder losses by Triton kernels.

The loss over levels takes the one kernel of `kernels/hierarchical.py`, whose gradient of weight
comes by atomic additions.

In the loss of level K alone every level shares one S, 2 scale r_K. So its gradients

    dL/dweight[f] = sum over the pairs (b, t) that chose f of v_t S[b],
    dL/dvalues[b, t] = w_t . S[b]

can be summed latent by latent: one kernel gathers rows of weight and stores r, and another walks
the inverted index and gathers rows of r, once for both gradients. Launches of a small batch without
an index take longer than the device needs, so it takes the one kernel of the loss over levels.
"""

from typing import Any

import torch

from .checks import check_range
from .kernels import copies, counting, hierarchical, residual
from .kernels.launch import cdiv
from .kernels.sums import sum_by_latent
from .kernels.tiles import Batch
from .policy import CHECKS_INDICES, in_dtype
from .requests import DecoderLoss, Levels, LossAndGradients, are_of_samples

# B K D from which an index is worth its launches. To the device alone it mostly is from 2^24 on: at
# B=4096, K=64, F=24576, D=768 an H200 takes 0.29 ms with it, and 0.36 with the one kernel (with
# bfloat16 and Zipf-distributed indices 0.24 and 0.40).
FEWEST_ELEMENTS = 2**27
# Atomic additions to dL/dbias wait for each other, so the programs of a large batch take this many
# rows in turn. Up to SMALL_BATCH samples share one row, and the kernel itself adds up the parts of
# the loss. That spares two launches, and a small batch waits for the host.
BIAS_ROWS = 64
SMALL_BATCH = 1024


def decoder_loss(request: DecoderLoss) -> LossAndGradients:
    """Compute what a request asks for. A latent outside [0, F) is ignored.

    Raises:
        IndexError: for such a latent, where SAE_LENS_FLEX_CHECK_INDICES is 1.
    """
    if CHECKS_INDICES and request.code.latents.numel() > 0:
        check_range(request.code.latents, request.weight.shape[0])
    code = request.code
    n_elements = code.latents.numel() * request.weight.shape[1]
    is_last_level = isinstance(request.levels, str) and request.levels == "last"
    by_index = (
        n_elements >= FEWEST_ELEMENTS
        or request.index is not None
        or request.deterministic
        or code.starts is not None  # the walk has no last level of each sample
    )
    return _by_latent(request) if is_last_level and by_index else _by_walk(request)


def _batch(request: DecoderLoss) -> Batch:
    code = request.code
    return Batch(
        code.latents.contiguous(),
        code.values.contiguous(),
        request.weight,
        None if request.bias is None else request.bias.contiguous(),
        request.target.contiguous(),
        code.starts,
    )


def _by_walk(request: DecoderLoss) -> LossAndGradients:
    batch, wanted = _batch(request), request.wanted
    n_samples, k, n_latents, d_in = batch.sizes()
    n_pairs = batch.latents.numel()
    new = request.target.new_empty
    levels, of_samples = request.levels, are_of_samples(request.levels, request.code)
    if isinstance(levels, torch.Tensor):
        levels = levels.contiguous()

    n_rows, copied = n_latents, None
    outputs: dict[str, Any] = {}
    if wanted.weight:
        # It comes first: zeroing it keeps the device busy while the host prepares the rest.
        has_copies = not request.deterministic and copies.is_worth_copies(batch.latents)
        if not request.deterministic:
            n_rows += (copies.SLOTS * copies.COPIES if has_copies else 0) + 1
        grad_weight = new((n_rows, d_in), dtype=torch.float32).zero_()
        outputs["grad_weight"] = grad_weight
        if has_copies:
            counts = counting.count(batch.latents, n_latents)
            copied = copies.assign_copies(batch.latents, counts, k)
    if wanted.residual:
        outputs["residual"] = new((n_samples, d_in), dtype=torch.float32)
    if wanted.target:
        outputs["grad_target"] = new((n_samples, d_in), dtype=wanted.target)
    is_small = n_samples <= SMALL_BATCH and not request.deterministic
    n_programs, n_slices = cdiv(n_samples, 2), cdiv(d_in, hierarchical.BLOCK_D)
    bias_rows = 1 if n_samples <= SMALL_BATCH else BIAS_ROWS
    if request.deterministic:
        bias_rows = n_programs  # No row is then added to twice.
    outputs["loss"] = new(() if is_small else (n_slices, n_samples), dtype=torch.float32)
    # One tensor for all else that is added to, zeroed at once. Each part begins at a multiple of 16
    # bytes, because the host takes longer to launch with unaligned tensors.
    sizes = [
        hierarchical.LOSS_SUMS + 4 if is_small else 0,  # the count and three to spare
        n_pairs if wanted.values else 0,
        -n_pairs % 4,
        bias_rows * d_in if wanted.bias else 0,
    ]
    zeros = new((sum(sizes),), dtype=torch.float32).zero_()
    loss_sums, grad_values, _, grad_bias = zeros.split_with_sizes(sizes)
    if is_small:
        outputs["loss_sums"] = loss_sums
    if wanted.values:
        outputs["grad_values"] = grad_values.view(request.code.values.shape)
    if wanted.bias:
        outputs["grad_bias"] = grad_bias.view(bias_rows, d_in)
    if request.wants_level_errors and of_samples and isinstance(levels, torch.Tensor):
        outputs["level_errors"] = torch.zeros_like(levels, dtype=torch.float32)
    if request.deterministic:
        _walk_slice_by_slice(request, batch, outputs, levels)
    else:
        hierarchical.walk(
            batch,
            hierarchical.Outputs(**outputs),
            levels,
            scale=request.scale,
            of_samples=of_samples,
            rows=None if copied is None else copied.rows,
            n_copied=None if copied is None else copied.n_copied,
        )
    if copied is not None:
        copies.add_up_copies(copied, outputs["grad_weight"], n_latents)
    loss, bias = outputs["loss"], outputs.get("grad_bias")
    weight, values = outputs.get("grad_weight"), outputs.get("grad_values")
    if bias is not None:
        bias = bias.sum(0) if bias_rows > 1 else grad_bias  # which is flat
    return LossAndGradients(
        loss=loss if is_small else loss.sum(),
        residual=outputs.get("residual"),
        weight=None if weight is None else in_dtype(weight[:n_latents], wanted.weight),
        values=None if values is None else in_dtype(values, wanted.values),
        bias=None if bias is None else in_dtype(bias, wanted.bias),
        target=outputs.get("grad_target"),
        level_errors=outputs.get("level_errors"),
    )


def _walk_slice_by_slice(
    request: DecoderLoss, batch: Batch, outputs: dict[str, Any], levels: Levels
) -> None:
    """Walk without an addition whose order varies.

    The slices all add to the gradient of the values, so they are launched one after another. The S
    of a slice are stored, and then added up latent by latent.
    """
    _, _, n_latents, d_in = batch.sizes()
    grad_weight = outputs.pop("grad_weight", None)
    index = values_in_order = None
    if grad_weight is not None:
        index = request.index or request.code.by_latent(
            n_latents, use_triton=True, deterministic=True
        )
        values_in_order = batch.values.flatten()[index.pairs]
        shape = (batch.latents.numel(), hierarchical.BLOCK_D)
        # A pair of no sample has none; with zeros it adds nothing.
        outputs["suffix_sums"] = request.target.new_zeros(shape, dtype=torch.float32)
    for slice_ in range(cdiv(d_in, hierarchical.BLOCK_D)):
        hierarchical.walk(
            batch,
            hierarchical.Outputs(**outputs),
            levels,
            scale=request.scale,
            of_samples=are_of_samples(request.levels, request.code),
            slices=range(slice_, slice_ + 1),
        )
        if index is not None and values_in_order is not None:
            first = slice_ * hierarchical.BLOCK_D
            n_columns = min(hierarchical.BLOCK_D, d_in - first)
            sum_by_latent(
                index,
                values_in_order,
                outputs["suffix_sums"][:, :n_columns].contiguous(),
                sums=grad_weight,
                in_order=True,
                rows_of_pairs=True,
                first_column=first,
                zero_absent=False,
            )
    if grad_weight is not None:
        outputs["grad_weight"] = grad_weight


def _by_latent(request: DecoderLoss) -> LossAndGradients:
    batch, wanted, scale = _batch(request), request.wanted, request.scale
    n_samples, _, n_latents, d_in = batch.sizes()
    new = request.target.new_empty
    n_programs = cdiv(n_samples, 2)
    bias_rows = n_programs if request.deterministic else min(n_programs, BIAS_ROWS)
    # The second kernel gathers rows of the residual. Where the residual is not wanted, the gradient
    # of the target, -2 scale times the residual, saves a [B, D] tensor if it is as precise.
    gathers = wanted.weight is not None or wanted.values is not None
    by_target = wanted.target == torch.float32 and not wanted.residual
    n_slices = cdiv(d_in, residual.slice_width(batch.weight))
    loss_parts = new((n_slices, n_samples), dtype=torch.float32)
    r = grad_bias = grad_target = None
    if wanted.bias:
        grad_bias = new((bias_rows, d_in), dtype=torch.float32).zero_()
    if wanted.residual or (gathers and not by_target):
        r = new((n_samples, d_in), dtype=torch.float32)
    if wanted.target:
        grad_target = new((n_samples, d_in), dtype=wanted.target)
    residual.residual(batch, residual.Outputs(loss_parts, r, grad_bias, grad_target), scale=scale)
    grad_weight = grad_values = None
    if gathers:
        rows, scale_of_rows = (grad_target, -1.0) if r is None else (r, 2 * scale)
        assert rows is not None
        if wanted.weight:
            grad_weight = new((n_latents, d_in), dtype=wanted.weight)
        index = request.index or request.code.by_latent(
            n_latents, use_triton=True, deterministic=request.deterministic
        )
        grad_values = sum_by_latent(
            index,
            batch.values,
            rows,
            sums=grad_weight,
            weight=batch.weight if wanted.values else None,
            scale=scale_of_rows,
        )
        starts = request.code.starts
        if grad_values is not None and starts is not None:
            pairs = torch.arange(len(grad_values), device=grad_values.device)
            grad_values.masked_fill_(pairs >= starts[-1], 0)  # those of no sample
    return LossAndGradients(
        loss=loss_parts.sum(),
        residual=r if wanted.residual else None,
        weight=grad_weight,
        values=None if grad_values is None else in_dtype(grad_values, wanted.values),
        bias=None if grad_bias is None else in_dtype(grad_bias.sum(0), wanted.bias),
        target=grad_target,
    )
