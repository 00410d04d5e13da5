"""What the losses check of their arguments."""

import torch

INDEX_DTYPES = (torch.int32, torch.int64)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    floats = [("weight", weight), ("vals", vals), ("bias", bias), ("target", target)]
    if level_weights is not None:
        floats.append(("level_weights", level_weights))
    for name, tensor in (("indices", indices), *floats):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
    if indices.dtype not in INDEX_DTYPES:
        raise TypeError(f"indices has dtype {indices.dtype}, expected torch.int32 or torch.int64")
    if indices.layout != torch.strided:
        raise TypeError(f"indices has layout {indices.layout}, expected torch.strided")
    device = indices.device
    for name, tensor in floats:
        if tensor.dtype not in float_dtypes:
            *others, last = map(str, float_dtypes)
            raise TypeError(
                f"{name} has dtype {tensor.dtype}, expected {', '.join(others)} or {last}"
            )
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} has layout {tensor.layout}, expected torch.strided")
        if tensor.device != device:
            raise ValueError(
                f"{name} is on {str(tensor.device)!r}, expected indices' {str(device)!r}"
            )
    for name, tensor, shape in (
        ("indices", indices, "[B, K]"),
        ("weight", weight, "[F, D]"),
        ("target", target, "[B, D]"),
    ):
        if tensor.ndim != 2 or tensor.numel() == 0:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, expected {shape} with no empty dimension"
            )
    n_samples, k = indices.shape
    n_latents, d_in = weight.shape
    if n_latents >= 2**31:
        raise ValueError(f"weight has {n_latents} latents, expected fewer than 2^31")
    if bias.shape == target.shape[1:] != weight.shape[1:]:
        raise ValueError(
            f"weight has shape {list(weight.shape)}, expected [F, {len(bias)}], as wide as bias "
            "and target"
        )
    for name, tensor, shape, source in (
        ("vals", vals, (n_samples, k), "indices'"),
        ("bias", bias, (d_in,), "weight's last dimension"),
        ("target", target, (n_samples, d_in), "indices' and weight's"),
        ("level_weights", level_weights, (k,), "indices' last dimension"),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, expected {source} {list(shape)}"
            )


def check_range(indices: torch.Tensor, n_latents: int) -> None:
    """Raise an IndexError for a latent outside [0, F)."""
    lowest, highest = indices.aminmax()
    if lowest < 0 or highest >= n_latents:
        raise IndexError(
            f"indices reaches from {int(lowest)} to {int(highest)}, expected latents in "
            f"[0, {n_latents})"
        )
