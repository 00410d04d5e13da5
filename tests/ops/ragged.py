"""Codes with rows of different length, and the losses over them in float64, sample by sample."""

from typing import Any

import torch

from sae_lens_flex.ops.codes import Code
from sae_lens_flex.ops.requests import DecoderLoss, Wanted

# Lengths of the rows: of no sample with a latent, of one with nearly all of them, of odd numbers.
LENGTHS = {
    "mixed": (3, 0, 9, 1, 0, 5, 17),
    "empty": (0, 0, 0),
    "one_row": (0, 23, 0, 0),
    "first_and_last_empty": (0, 2, 8, 0),
    "even": (16, 16, 16, 16),
    "a_sample": (11,),
    "an_empty_sample": (0,),
}


def ragged_code(
    lengths: tuple[int, ...],
    n_latents: int,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    n_spare: int = 0,
    seed: int = 0,
) -> Code:
    """Random latents and values, and `n_spare` pairs of no sample; some values are 0."""
    generator = torch.Generator().manual_seed(seed)
    n_pairs = sum(lengths)
    latents = torch.randint(n_latents, (n_pairs,), generator=generator)
    values = torch.randn(n_pairs, generator=generator)
    values[::4] = 0
    spare = torch.zeros(n_spare)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return Code(
        torch.cat((latents, spare.long())).to(device),
        torch.cat((values, spare)).to(device, dtype),
        starts.to(device),
    )


def ascending(code: Code) -> Code:
    """The code with the latents of each row sorted."""
    latents, first = code.latents.clone(), 0
    for length in lengths_of(code):
        pairs = slice(first, first + length)
        latents[pairs] = latents[pairs].sort().values
        first += length
    return Code(latents, code.values, code.starts)


def lengths_of(code: Code) -> list[int]:
    assert code.starts is not None
    return code.starts.diff().tolist()


def ragged_request(
    code: Code,
    *,
    n_latents: int,
    d_in: int,
    levels: Any = "last",
    widths: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    has_bias: bool = True,
    scale: float = 0.7,
    deterministic: bool = False,
    **wanted: Any,
) -> DecoderLoss:
    """A request of all gradients, with random weights and targets."""
    generator = torch.Generator().manual_seed(1)
    device = code.latents.device

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    weight, bias, target = randn(n_latents, d_in), randn(d_in), randn(code.n_samples, d_in)
    sums = torch.promote_types(dtype, torch.float32)
    fields = {"residual": True, "weight": sums, "values": sums, "bias": sums, "target": sums}
    fields.update(wanted)
    return DecoderLoss(
        code=code,
        weight=weight,
        bias=bias if has_bias else None,
        target=target,
        levels=levels,
        scale=scale,
        wanted=Wanted(**fields),
        deterministic=deterministic,
        widths=widths,
    )


def random_level_weights(code: Code, seed: int = 2) -> torch.Tensor:
    """Weights of each sample's levels, [n + B], a third of them 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(code.latents.numel() + code.n_samples, generator=generator)
    weights[::3] = 0
    return weights.to(code.latents.device)


def exact(request: DecoderLoss, *, magnitude: bool = False) -> dict[str, torch.Tensor | None]:
    """What a request asks for, by autograd, in float64.

    With `magnitude` all terms are made positive.
    """

    def double(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.detach().cpu().double()
        return (tensor.abs() if magnitude else tensor).requires_grad_()

    code = request.code
    latents, weight, bias = code.latents.cpu(), double(request.weight), double(request.bias)
    values, target = double(code.values), double(request.target)
    assert weight is not None
    assert values is not None
    assert target is not None
    levels = request.levels
    if isinstance(levels, torch.Tensor):
        levels = levels.detach().cpu().double().flatten()
    loss = (0 * (weight.sum() + values.sum() + target.sum())).squeeze()
    widths = None if request.widths is None else request.widths.cpu()
    errors = None if widths is None else target.new_zeros(len(widths))
    residuals, first = [], 0
    for b, length in enumerate(lengths_of(code)):
        pairs = slice(first, first + length)
        terms = values[pairs].unsqueeze(-1) * weight[latents[pairs]]
        start = target[b] if magnitude else -target[b]
        if bias is not None:
            start = start + bias
        r = torch.cat((start.unsqueeze(0), start + terms.cumsum(0)))  # from level 0 on
        squares = r.square().sum(-1)
        if isinstance(levels, str):
            loss = loss + squares[-1]
        elif widths is not None:
            below = latents[pairs].unsqueeze(-1) < widths
            of_widths = squares[below.sum(0)]
            loss = loss + (levels * of_widths).sum()
            errors = errors + of_widths
        else:
            c = levels[first + b : first + b + length + 1]
            loss = loss + (c * squares).sum()
        residuals.append(r[-1])
        first += length
    loss = request.scale * loss
    inputs = {"weight": weight, "values": values, "bias": bias, "target": target}
    some = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    gradients = torch.autograd.grad(loss, list(some.values()))
    return {
        "loss": loss.detach(),
        "residual": torch.stack(residuals).detach(),
        "width_errors": None if errors is None else errors.detach(),
        **dict(zip(some, gradients, strict=True)),
    }
