"""What the losses check of their arguments."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from .policy import is_traced

INDEX_DTYPES = (torch.int32, torch.int64)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ARGUMENTS = ("indices", "weight", "vals", "bias", "target", "level_weights")


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
    float_dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES,
) -> None:
    """Raise a ValueError or TypeError that names the first argument that does not fit."""
    tensors = [indices, weight, vals, bias, target]
    if level_weights is not None:
        tensors.append(level_weights)
    for name, tensor in zip(ARGUMENTS, tensors, strict=False):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
    forms = tuple([(t.dtype, t.layout, t.device, t.shape) for t in tensors])
    if is_traced(*tensors):  # A shape may then be unknown yet.
        _check_forms(forms, float_dtypes)
    else:
        _check_new_forms(forms, float_dtypes)


def _check_forms(forms: tuple[tuple[Any, ...], ...], float_dtypes: tuple[torch.dtype, ...]) -> None:
    named = {name: Form(*form) for name, form in zip(ARGUMENTS, forms, strict=False)}
    indices, weight, bias, target = (named[n] for n in ("indices", "weight", "bias", "target"))
    if indices.dtype not in INDEX_DTYPES:
        raise TypeError(f"indices has dtype {indices.dtype}, expected torch.int32 or torch.int64")
    for name, form in named.items():
        if name != "indices" and form.dtype not in float_dtypes:
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
    for name, shape in (("indices", "[B, K]"), ("weight", "[F, D]"), ("target", "[B, D]")):
        form = named[name]
        if len(form.shape) != 2 or 0 in form.shape:
            raise ValueError(
                f"{name} has shape {list(form.shape)}, expected {shape} with no empty dimension"
            )
    n_samples, k = indices.shape
    n_latents, d_in = weight.shape
    if n_latents >= 2**31:
        raise ValueError(f"weight has {n_latents} latents, expected fewer than 2^31")
    if bias.shape == target.shape[1:] != weight.shape[1:]:
        raise ValueError(
            f"weight has shape {list(weight.shape)}, expected [F, {bias.shape[0]}], as wide as "
            "bias and target"
        )
    for name, shape, source in (
        ("vals", (n_samples, k), "indices'"),
        ("bias", (d_in,), "weight's last dimension"),
        ("target", (n_samples, d_in), "indices' and weight's"),
        ("level_weights", (k,), "indices' last dimension"),
    ):
        if name in named and named[name].shape != shape:
            raise ValueError(
                f"{name} has shape {list(named[name].shape)}, expected {source} {list(shape)}"
            )


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
