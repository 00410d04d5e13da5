"""A training step's inputs, its definition in float64, and how the two are compared."""

from dataclasses import dataclass
from typing import Any

import torch
from ops.comparison import relative_error

from sae_lens_flex.ops.policy import gradient_dtype
from sae_lens_flex.training.dead import Dead
from sae_lens_flex.training.requests import Gradients, Inputs, Spec, WantedGradients, Weights
from sae_lens_flex.training.step import StepResult, step

B, D, F, K = 5, 8, 21, 4
COEFFICIENT = 1.5

# Of float32 sums over B K or D. In 16 bits pre-activations, activations and the factors of the
# auxiliary loss's products are rounded, too.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float64: 1e-13}
ALL = WantedGradients(*[True] * 7)


@dataclass
class Case:
    """The arguments of a step."""

    weights: Weights
    inputs: Inputs
    spec: Spec
    dead: torch.Tensor  # [n]

    def step(self, wanted: WantedGradients = ALL) -> StepResult:
        dead = Dead(lambda: self.dead, COEFFICIENT)
        return step(self.weights, self.inputs, self.spec, wanted=wanted, dead=dead)


def case(
    on: tuple[str, str] = ("torch", "cpu"),
    *,
    dtype: torch.dtype = torch.float32,
    n_dead: int = 0,
    has_scale: bool = False,
    level_weights: torch.Tensor | None = None,
    latent_major: bool = True,
    n_samples: int = B,
    **settings: Any,
) -> Case:
    """A random step. No dead latent is kept by the main loss."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    W_dec = randn(F, D) * (0.5 + torch.rand(F, 1, generator=generator))
    W_enc = W_dec.T + 0.3 * randn(D, F)
    b_enc, b_dec = 0.5 * randn(F), 0.5 * randn(D)
    dead = torch.arange(F)[1::2][:n_dead]
    b_enc[dead] -= 20  # so they are no sample's largest
    if settings.get("product_dtype", dtype).itemsize < 4:
        b_enc[dead[D // 2 :]] -= 200  # Rounding is not to change which ones the other loss keeps.
    x, target = randn(n_samples, D), randn(n_samples, D)
    scale = 0.5 + torch.rand(n_samples, 1, generator=generator)

    def placed(tensor: torch.Tensor, dtype: torch.dtype = dtype) -> torch.Tensor:
        return tensor.to(on[1], dtype)

    W_enc = placed(W_enc)
    spec = Spec(
        **{
            "k": K,
            "levels": "last",
            "n_samples": n_samples,
            "rescale_acts_by_decoder_norm": True,
            "apply_b_dec_to_input": True,
            "product_dtype": dtype,
            "use_triton": on[0] == "triton",
            "deterministic": False,
            "matmul_precision": "highest",
            **settings,
        }
    )
    loss_dtype = torch.promote_types(dtype, torch.float32)
    return Case(
        weights=Weights(
            W_enc.T.contiguous().T if latent_major else W_enc.contiguous(),
            *map(placed, (b_enc, W_dec, b_dec)),
        ),
        inputs=Inputs(
            encoder_input=placed(x),
            target=placed(target, loss_dtype),
            output_scale=placed(scale) if has_scale else None,
            level_weights=None if level_weights is None else level_weights.to(on[1], loss_dtype),
        ),
        spec=spec,
        dead=dead.to(on[1]),
    )


@dataclass
class Losses:
    """A step's losses, and of each the gradients."""

    mse: torch.Tensor
    auxiliary: torch.Tensor
    residual: torch.Tensor
    hidden: torch.Tensor
    compared: torch.Tensor
    of_mse: Gradients
    of_auxiliary: Gradients


def definition(case: Case, latents: torch.Tensor | None = None, like: Any = None) -> Losses:
    """The step of the formulas, dense, in float64, differentiated by autograd.

    Args:
        case: the step.
        latents: the kept ones, [B, k]; None for the largest.
        like: what the same call returned. With it, all terms are made positive: the result is the
            magnitude of what is added up.
    """
    spec = case.spec
    minus = -1.0 if like is None else 1.0

    def exact(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.detach().cpu().double()
        return (tensor if like is None else tensor.abs()).requires_grad_()

    weights, inputs = Weights(*map(exact, case.weights)), Inputs(*map(exact, case.inputs))
    W_enc, b_enc, W_dec, b_dec = weights
    rows = inputs.encoder_input
    if spec.apply_b_dec_to_input:
        rows = rows + minus * b_dec
    hidden = rows @ W_enc + b_enc
    norms = W_dec.detach().norm(dim=-1) if spec.rescale_acts_by_decoder_norm else 1.0
    compared = (hidden if like is None else like.hidden) * norms
    if latents is None:
        latents = compared.sort(dim=-1, descending=True, stable=True).indices[:, : spec.k]

    # --- mse_loss
    is_open = (hidden if like is None else like.hidden).gather(-1, latents) > 0
    values = hidden.gather(-1, latents) * is_open
    outputs = (values.unsqueeze(-1) * W_dec[latents]).cumsum(1) + b_dec  # [B, k, D]
    if inputs.output_scale is not None:
        outputs = outputs * inputs.output_scale.unsqueeze(-1)
    residuals = outputs + minus * inputs.target.unsqueeze(1)
    level_weights = torch.zeros(spec.k, dtype=torch.float64)
    if inputs.level_weights is not None:
        level_weights = inputs.level_weights.detach()
    elif spec.levels == "every":
        level_weights += 1 / spec.k
    else:
        level_weights[-1] = 1
    mse = (residuals.square().sum(-1) * level_weights).sum() / spec.n_samples
    residual = residuals[:, -1].detach()

    # --- the auxiliary loss
    auxiliary, n_dead = torch.zeros((), dtype=torch.float64), len(case.dead)
    if n_dead > 0:
        dead, half_width = case.dead.cpu(), W_dec.shape[1] // 2
        kept = compared[:, dead].topk(min(n_dead, half_width)).indices
        acts = torch.zeros(len(rows), n_dead, dtype=torch.float64)
        acts = acts.scatter(-1, kept, hidden[:, dead].gather(-1, kept))
        error = acts @ W_dec[dead] - (-residual if like is None else -residual.abs())
        auxiliary = error.square().sum() * min(n_dead / half_width, 1) * COEFFICIENT
        auxiliary = auxiliary / spec.n_samples

    def gradients_of(loss: torch.Tensor) -> Gradients:
        tensors = [*weights, *inputs[:3]]
        some = [tensor for tensor in tensors if tensor is not None]
        if not loss.requires_grad:
            return Gradients()
        found = iter(torch.autograd.grad(loss, some, retain_graph=True, allow_unused=True))
        return Gradients(*(None if tensor is None else next(found) for tensor in tensors))

    return Losses(
        mse=mse.detach(),
        auxiliary=auxiliary.detach(),
        residual=residual,
        hidden=hidden.detach(),
        compared=compared.detach(),
        of_mse=gradients_of(mse),
        of_auxiliary=gradients_of(auxiliary),
    )


@dataclass
class Expected:
    """What a step is to return, and the magnitude of what is added up for it."""

    exact: Losses
    magnitude: Losses


def expected_of(case: Case, latents: torch.Tensor | None = None) -> Expected:
    exact = definition(case, latents)
    return Expected(exact, definition(case, latents, like=exact))


def assert_is_the_definition(
    case: Case,
    wanted: WantedGradients = ALL,
    *,
    tolerance: float | None = None,
    computed_in: torch.dtype | None = None,
    expected: Expected | None = None,
) -> StepResult:
    """Compare a step's losses, code, residual and gradients with the definition.

    Args:
        case: the step.
        wanted: which gradients it is asked for; it must return these alone.
        tolerance: of every relative error, beside the rounding of terms that cancel.
        computed_in: the lowest precision of the terms; None for that of the weights.
        expected: the definition, where it is at hand.
    """
    weights, spec = case.weights, case.spec
    dtype = computed_in or weights.W_dec.dtype
    tolerance = tolerance or TOLERANCE[dtype]
    result = case.step(wanted)
    main = result.main
    latents = main.code.latents.cpu()
    assert latents.shape == main.hidden_pre.shape == (len(case.inputs.target), spec.k)
    assert all(len(set(row)) == spec.k for row in latents.tolist())
    expected = expected or expected_of(case, latents)
    exact, magnitude = expected.exact, expected.magnitude

    def assert_close(name: str, value: torch.Tensor, exact: Any, magnitude: Any) -> None:
        assert value.shape == exact.shape, name
        error = relative_error(value, exact, magnitude, dtype)
        assert error < tolerance, f"{name}: {error}"

    # Where two latents are as good as equal, either may be the one: the values must be the largest.
    largest = exact.compared.topk(spec.k).values
    difference = exact.compared.gather(-1, latents) - largest
    assert difference.abs().max() <= tolerance * exact.hidden.gather(-1, latents).abs().max()

    sum_dtype = torch.promote_types(weights.W_dec.dtype, torch.float32)
    assert main.mse_loss.dtype == sum_dtype
    assert main.mse_loss.shape == ()
    assert_close("mse_loss", main.mse_loss, exact.mse, magnitude.mse)
    assert_close("residual", main.residual, exact.residual, magnitude.residual)
    for name, value, of, sums in (
        ("values", main.code.values, exact.hidden, magnitude.hidden),
        ("hidden_pre", main.hidden_pre, exact.compared, magnitude.compared.abs()),
    ):
        assert_close(name, value, of.gather(-1, latents), sums.gather(-1, latents))
    if spec.rescale_acts_by_decoder_norm:
        norms = weights.W_dec.cpu().double().norm(dim=-1)
        assert_close("norms", main.norms, norms, norms)
    else:
        assert main.norms is None

    tensors = dict(zip(Gradients._fields, (*weights, *case.inputs[:3]), strict=True))
    for name, tensor in tensors.items():
        gradient = getattr(main.gradients, name)
        if tensor is None or not getattr(wanted, name):
            assert gradient is None, name
            continue
        assert gradient.dtype == gradient_dtype(tensor.dtype), name
        assert_close(name, gradient, getattr(exact.of_mse, name), getattr(magnitude.of_mse, name))

    if len(case.dead) == 0:
        assert result.auxiliary_loss is result.auxiliary_gradients is None
        return result
    assert result.auxiliary_loss.shape == ()
    assert result.auxiliary_loss.dtype == sum_dtype
    assert_close("auxiliary", result.auxiliary_loss, exact.auxiliary, magnitude.auxiliary)
    found = result.auxiliary_gradients
    assert torch.equal(found.latents, case.dead)
    for name in tensors:
        if name in ("target", "output_scale"):  # what the living latents left over is a constant
            assert getattr(exact.of_auxiliary, name) is None, name
            continue
        gradient, of = getattr(found, name), getattr(exact.of_auxiliary, name)
        is_wanted = getattr(wanted, name)
        if name == "b_dec":
            is_wanted = is_wanted and spec.apply_b_dec_to_input
        if not is_wanted:
            assert gradient is None, f"auxiliary {name}"
            continue
        assert gradient.dtype == sum_dtype
        sums = getattr(magnitude.of_auxiliary, name)
        if name == "W_enc":
            of, sums = of.T, sums.T
        if name in ("W_enc", "b_enc", "W_dec"):
            rest = torch.ones(F, dtype=torch.bool)
            rest[case.dead.cpu()] = False
            assert of[rest].eq(0).all()
            of, sums = of[case.dead.cpu()], sums[case.dead.cpu()]
        assert_close(f"auxiliary {name}", gradient, of, sums)
    return result
