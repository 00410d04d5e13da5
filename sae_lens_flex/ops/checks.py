"""What the losses check of their arguments."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from .policy import is_traced

INDEX_DTYPES = (torch.int32, torch.int64)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ARGUMENTS = ("indices", "weight", "vals", "bias", "target")
INTEGERS = ("indices", "starts")
TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))  # A subclass takes a longer check.


class Form(NamedTuple):
    """What is checked of a tensor."""

    dtype: torch.dtype
    layout: torch.layout
    device: torch.device
    shape: torch.Size


def check_arguments(
    indices: torch.Tensor,
    weight: torch.Tensor,
    vals: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
    level_weights: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    float_dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES,
) -> None:
    """Raise a ValueError or TypeError that names the first argument that does not fit."""
    names, tensors = ARGUMENTS, [indices, weight, vals, bias, target]
    if level_weights is not None:
        names, tensors = (*names, "level_weights"), [*tensors, level_weights]
    if starts is not None:
        names, tensors = (*names, "starts"), [*tensors, starts]
    if not TENSORS.issuperset(map(type, tensors)):
        for name, tensor in zip(names, tensors, strict=True):
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
    forms = tuple([(t.dtype, t.layout, t.device, t.shape) for t in tensors])
    if is_traced(*tensors):  # A shape may then be unknown yet.
        _check_forms(names, forms, float_dtypes)
    else:
        _check_new_forms(names, forms, float_dtypes)


def _check_forms(
    names: tuple[str, ...],
    forms: tuple[tuple[Any, ...], ...],
    float_dtypes: tuple[torch.dtype, ...],
) -> None:
    named = {name: Form(*form) for name, form in zip(names, forms, strict=True)}
    indices, weight, bias, target = (named[n] for n in ("indices", "weight", "bias", "target"))
    is_ragged = "starts" in named
    for name in INTEGERS:
        if name in named and named[name].dtype not in INDEX_DTYPES:
            dtype = named[name].dtype
            raise TypeError(f"{name} has dtype {dtype}, expected torch.int32 or torch.int64")
    for name, form in named.items():
        if name not in INTEGERS and form.dtype not in float_dtypes:
            *others, last = map(str, float_dtypes)
            raise TypeError(
                f"{name} has dtype {form.dtype}, expected {', '.join(others)} or {last}"
            )
        if form.layout != torch.strided:
            raise TypeError(f"{name} has layout {form.layout}, expected torch.strided")
        if form.device != indices.device:
            raise ValueError(
                f"{name} is on {str(form.device)!r}, expected indices' {str(indices.device)!r}"
            )
    if is_ragged and len(indices.shape) != 1:
        raise ValueError(f"indices has shape {list(indices.shape)}, expected [n] with starts")
    for name, shape in (("indices", "[B, K]"), ("weight", "[F, D]"), ("target", "[B, D]")):
        form = named[name]
        if name == "indices" and is_ragged:
            continue
        if len(form.shape) != 2 or 0 in form.shape:
            raise ValueError(
                f"{name} has shape {list(form.shape)}, expected {shape} with no empty dimension"
            )
    n_samples, k = target.shape[0] if is_ragged else indices.shape[0], indices.shape[-1]
    n_latents, d_in = weight.shape
    if n_latents >= 2**31:
        raise ValueError(f"weight has {n_latents} latents, expected fewer than 2^31")
    if bias.shape == target.shape[1:] != weight.shape[1:]:
        raise ValueError(
            f"weight has shape {list(weight.shape)}, expected [F, {bias.shape[0]}], as wide as "
            "bias and target"
        )
    for name, shape, source in (
        ("vals", indices.shape, "indices'"),
        ("bias", (d_in,), "weight's last dimension"),
        ("target", (n_samples, d_in), "indices' and weight's"),
        ("starts", (n_samples + 1,), "one more than target's first dimension,"),
    ):
        if name in named and named[name].shape != shape:
            raise ValueError(
                f"{name} has shape {list(named[name].shape)}, expected {source} {list(shape)}"
            )
    if "level_weights" in named:
        _check_level_weights(list(named["level_weights"].shape), n_samples, k, is_ragged=is_ragged)


def _check_level_weights(shape: list[int], n_samples: int, k: int, *, is_ragged: bool) -> None:
    if is_ragged:
        expected = f"a number for each pair and each sample, {[k + n_samples]}"
        fits = shape == [k + n_samples]
    else:
        expected = f"indices' last dimension {[k]}, or those of each sample, {[n_samples, k + 1]}"
        fits = shape in ([k], [n_samples, k + 1])
    if not fits:
        raise ValueError(f"level_weights has shape {shape}, expected {expected}")


# Forms that fit are not checked again: the checks take a small loss's host a tenth of its time.
_check_new_forms = lru_cache(1024)(_check_forms)


def check_range(indices: torch.Tensor, n_latents: int) -> None:
    """Raise an IndexError for a latent outside [0, F)."""
    lowest, highest = indices.aminmax()
    if lowest < 0 or highest >= n_latents:
        raise IndexError(
            f"indices reaches from {int(lowest)} to {int(highest)}, expected latents in "
            f"[0, {n_latents})"
        )


def check_starts(starts: torch.Tensor, n_pairs: int) -> None:
    """Raise a ValueError unless `starts` ascends from 0 within the pairs. Waits for the device."""
    bounds = starts.tolist()
    if bounds[0] != 0 or bounds != sorted(bounds) or bounds[-1] > n_pairs:
        raise ValueError(
            f"starts goes from {bounds[0]} to {bounds[-1]}, expected ascending numbers from 0 to "
            f"at most the number of pairs, {n_pairs}"
        )
