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
    starts: torch.Tensor | None = None,
    float_dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES,
) -> None:
    """Raise a ValueError or TypeError that names the first argument that does not fit."""
    integers = (
        [("indices", indices)] if starts is None else [("indices", indices), ("starts", starts)]
    )
    floats = [("weight", weight), ("vals", vals), ("bias", bias), ("target", target)]
    if level_weights is not None:
        floats.append(("level_weights", level_weights))
    for name, tensor in (*integers, *floats):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
    for name, tensor in integers:
        if tensor.dtype not in INDEX_DTYPES:
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected torch.int32 or torch.int64")
    device = indices.device
    for name, tensor in floats:
        if tensor.dtype not in float_dtypes:
            *others, last = map(str, float_dtypes)
            raise TypeError(
                f"{name} has dtype {tensor.dtype}, expected {', '.join(others)} or {last}"
            )
    for name, tensor in (*integers, *floats):
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} has layout {tensor.layout}, expected torch.strided")
        if tensor.device != device:
            raise ValueError(
                f"{name} is on {str(tensor.device)!r}, expected indices' {str(device)!r}"
            )
    matrices = [("weight", weight, "[F, D]"), ("target", target, "[B, D]")]
    if starts is None:
        matrices.insert(0, ("indices", indices, "[B, K]"))
    elif indices.ndim != 1:
        raise ValueError(f"indices has shape {list(indices.shape)}, expected [n] with starts")
    for name, tensor, shape in matrices:
        if tensor.ndim != 2 or tensor.numel() == 0:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, expected {shape} with no empty dimension"
            )
    n_samples = len(indices) if starts is None else len(target)
    n_latents, d_in = weight.shape
    if n_latents >= 2**31:
        raise ValueError(f"weight has {n_latents} latents, expected fewer than 2^31")
    if bias.shape == target.shape[1:] != weight.shape[1:]:
        raise ValueError(
            f"weight has shape {list(weight.shape)}, expected [F, {len(bias)}], as wide as bias "
            "and target"
        )
    for name, tensor, shape, source in (
        ("vals", vals, indices.shape, "indices'"),
        ("bias", bias, (d_in,), "weight's last dimension"),
        ("target", target, (n_samples, d_in), "indices' and weight's"),
        ("starts", starts, (n_samples + 1,), "one more than target's first dimension,"),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, expected {source} {list(shape)}"
            )
    if level_weights is not None:
        _check_level_weights(level_weights, indices, n_samples, is_ragged=starts is not None)


def _check_level_weights(
    level_weights: torch.Tensor, indices: torch.Tensor, n_samples: int, *, is_ragged: bool
) -> None:
    shape, k = list(level_weights.shape), indices.shape[-1]
    if is_ragged:
        expected = f"a number for each pair and each sample, {[k + n_samples]}"
        fits = shape == [k + n_samples]
    else:
        expected = f"indices' last dimension {[k]}, or those of each sample, {[n_samples, k + 1]}"
        fits = shape in ([k], [n_samples, k + 1])
    if not fits:
        raise ValueError(f"level_weights has shape {shape}, expected {expected}")


def check_starts(starts: torch.Tensor, n_pairs: int) -> None:
    """Raise a ValueError unless `starts` ascends from 0 within the pairs. Waits for the device."""
    bounds = starts.tolist()
    if bounds[0] != 0 or bounds != sorted(bounds) or bounds[-1] > n_pairs:
        raise ValueError(
            f"starts goes from {bounds[0]} to {bounds[-1]}, expected ascending numbers from 0 to "
            f"at most the number of pairs, {n_pairs}"
        )


def check_range(indices: torch.Tensor, n_latents: int) -> None:
    """Raise an IndexError for a latent outside [0, F)."""
    lowest, highest = indices.aminmax()
    if lowest < 0 or highest >= n_latents:
        raise IndexError(
            f"indices reaches from {int(lowest)} to {int(highest)}, expected latents in "
            f"[0, {n_latents})"
        )
