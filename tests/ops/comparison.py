"""What the op tests share: the implementations, their inputs, and the comparison in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, settings

from sae_lens_flex.ops import (
    by_triton,
    hierarchical_sae_loss,
    topk_sae_loss,
    triton_hierarchical_sae_loss,
    triton_topk_sae_loss,
)
from sae_lens_flex.ops.losses import differentiable_loss
from sae_lens_flex.ops.requests import Levels

ARGUMENTS = ("weight", "vals", "bias", "target")

# The relative error of a tensor (Frobenius norm). Sums are accumulated in float32, whose rounding
# grows at worst with K * 2^-24 = 2e-6 here; a gradient returned in 16 bits is also rounded once, by
# at most 2^-8 (bfloat16) or 2^-11 (float16) of each element, or of the smallest normal number.
# Terms that cancel leave their rounding behind: 8 times that of their magnitudes is allowed.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2**-8 + 5e-6, torch.float16: 2**-11 + 5e-6}


_NOT_COMPILED = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled where there is a CUDA device"
)
_ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", _ON_GPU]
KERNEL_DEVICES = [pytest.param("cpu", marks=_NOT_COMPILED), _ON_GPU]
BACKENDS = [
    pytest.param(("torch", "cpu"), id="torch-cpu"),
    pytest.param(("triton", "cpu"), id="triton-cpu", marks=_NOT_COMPILED),
    pytest.param(("torch", "cuda"), id="torch-cuda", marks=pytest.mark.gpu),
    pytest.param(("triton", "cuda"), id="triton-cuda", marks=pytest.mark.gpu),
]
every_backend = pytest.mark.parametrize("on", BACKENDS)


@dataclass
class Implementation:
    definition: Callable[..., torch.Tensor]
    loss: Callable[..., torch.Tensor]
    device: str

    def uses_levels(self) -> bool:
        return self.definition is hierarchical_sae_loss

    def is_interpreted(self) -> bool:
        """Whether kernels run in the interpreter, which cuts off what bfloat16 does not hold."""
        return self.device == "cpu" and getattr(self.loss, "__name__", "").startswith("triton")


class Cut(torch.autograd.Function):
    """The identity, whose backward pass gives its input no gradient, not even zeros."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grad_outputs):
        return None


def by_torch(levels: Levels) -> Callable[..., torch.Tensor]:
    def loss(indices, weight, vals, bias, target, level_weights=None) -> torch.Tensor:
        return differentiable_loss(
            *(indices, weight, vals, bias, target),
            levels=levels if level_weights is None else level_weights,
            backend="torch",
        )

    return loss


LOSSES = {
    "triton_hierarchical": (hierarchical_sae_loss, triton_hierarchical_sae_loss),
    # as for more than SMALL_BATCH samples, whose gradient of bias is summed in parts
    "triton_hierarchical_in_parts": (hierarchical_sae_loss, triton_hierarchical_sae_loss),
    # as for large D, whose gradients the forward pass finishes
    "triton_hierarchical_at_once": (hierarchical_sae_loss, triton_hierarchical_sae_loss),
    # as for large batches
    "triton_hierarchical_in_parts_at_once": (hierarchical_sae_loss, triton_hierarchical_sae_loss),
    "triton_topk": (topk_sae_loss, triton_topk_sae_loss),
    "triton_topk_by_latent": (topk_sae_loss, triton_topk_sae_loss),  # as for large batches
    "torch_hierarchical": (hierarchical_sae_loss, by_torch("every")),
    "torch_topk": (topk_sae_loss, by_torch("last")),
}


def implementation_named(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> Implementation:
    if name.endswith("by_latent"):
        monkeypatch.setattr(by_triton, "FEWEST_ELEMENTS", 0)
    if "in_parts" in name:
        monkeypatch.setattr(by_triton, "SMALL_BATCH", 0)
    if name.endswith("at_once"):
        monkeypatch.setattr(by_triton, "MOST_UNFINISHED", 0)
    return Implementation(*LOSSES[name], device)


def random_inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    index_dtype: torch.dtype = torch.int64,
    seed: int = 0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Indices and, by name, the other arguments; vals has zeros and both signs."""
    n_samples, k, n_latents, d_in = shape
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(n_latents, (n_samples, k), generator=generator)
    inputs = {
        "weight": torch.randn(n_latents, d_in, generator=generator),
        "vals": torch.randn(n_samples, k, generator=generator),
        "bias": torch.randn(d_in, generator=generator),
        "target": torch.randn(n_samples, d_in, generator=generator),
    }
    inputs["vals"][:, ::3] = 0
    return indices.to(device, index_dtype), {
        name: value.to(device, dtype).requires_grad_() for name, value in inputs.items()
    }


def in_float64(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: value.detach().cpu().double().requires_grad_(value.requires_grad)
        for name, value in inputs.items()
    }


def relative_error(
    value: torch.Tensor,
    expected: torch.Tensor,
    magnitude: torch.Tensor | None = None,
    computed_in: torch.dtype = torch.float32,
) -> float:
    """The norm of the difference over the expected norm, whose elements count as normal numbers.

    Of the difference, less what rounding may lose of the `magnitude` of what was added up.
    """
    difference = (value.detach().cpu().double() - expected.detach()).norm()
    if magnitude is not None:
        rounding = torch.finfo(computed_in).eps / 2
        difference = (difference - 8 * rounding * magnitude.detach().norm()).clamp_min(0)
    normal = expected.detach().abs().clamp_min(torch.finfo(value.dtype).tiny)
    return float(difference / normal.norm())


def assert_matches_definition(
    implementation: Implementation,
    indices: torch.Tensor,
    inputs: dict[str, torch.Tensor],
    factor: float = 1.0,
    **levels: torch.Tensor,
) -> None:
    exact = in_float64(inputs)
    exact_levels = {name: value.cpu().double() for name, value in levels.items()}
    expected = implementation.definition(indices.cpu().long(), **exact, **exact_levels)
    (factor * expected).backward()
    # The same sums with all terms positive.
    magnitudes = {
        name: (-value.detach().abs() if name == "target" else value.detach().abs()).requires_grad_()
        for name, value in exact.items()
    }
    exact_levels = {name: value.abs() for name, value in exact_levels.items()}
    magnitude = implementation.definition(indices.cpu().long(), **magnitudes, **exact_levels)
    (abs(factor) * magnitude).backward()

    loss = implementation.loss(indices, **inputs, **levels)
    (factor * loss).backward()

    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert relative_error(loss, expected, magnitude) < TOLERANCE[torch.float32]
    for name in ARGUMENTS:
        if not inputs[name].requires_grad:
            assert inputs[name].grad is None
            continue
        gradient, expected_gradient = inputs[name].grad, exact[name].grad
        assert gradient is not None
        assert expected_gradient is not None
        assert gradient.dtype == inputs[name].dtype
        error = relative_error(gradient, expected_gradient, magnitudes[name].grad)
        tolerance = TOLERANCE[inputs[name].dtype]
        if gradient.dtype == torch.bfloat16 and implementation.is_interpreted():
            tolerance += 2**-8
        assert error < tolerance, f"{name}: {error}"


def generated(n_examples: int) -> settings:
    """Settings of a test on generated cases: the same ones in every run, whatever they take."""
    return settings(
        max_examples=n_examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
