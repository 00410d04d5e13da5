"""Every implementation of the losses against the definitions in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sae_lens_flex.ops import (
    hierarchical_sae_loss,
    topk_sae_loss,
    torch_backend,
    triton_hierarchical_sae_loss,
    triton_topk_sae_loss,
)
from sae_lens_flex.ops.fused_loss import fused_loss, subtract_bias

ARGUMENTS = ("weight", "vals", "bias", "target")

# (B, K, F, D): nothing is a multiple of a tile; K > F repeats latents within a row.
SHAPES = [
    (1, 1, 1, 1),
    (5, 3, 17, 70),
    (7, 4, 9, 5),
    (3, 16, 50, 300),
    (33, 9, 65, 129),
    (2, 40, 8, 64),
]


def shape_id(shape: tuple[int, ...]) -> str:
    return "-".join(f"{name}{size}" for name, size in zip("BKFD", shape, strict=True))


# The relative error of a tensor (Frobenius norm). Sums are accumulated in float32, whose rounding
# grows at worst with K * 2^-24 = 2e-6 here; a gradient returned in 16 bits is also rounded once, by
# at most 2^-8 (bfloat16) or 2^-11 (float16) of each element.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2**-8 + 5e-6, torch.float16: 2**-11 + 5e-6}


@dataclass
class Implementation:
    definition: Callable[..., torch.Tensor]
    loss: Callable[..., torch.Tensor]
    device: str

    def uses_levels(self) -> bool:
        return self.definition is hierarchical_sae_loss


def by_torch(name: str) -> Callable[..., torch.Tensor]:
    def loss(indices, weight, vals, bias, target, **levels) -> torch.Tensor:
        target = subtract_bias(target, bias)
        return fused_loss(name, indices, weight, vals, target, backend="torch", **levels)[0]

    return loss


LOSSES = {
    "triton_hierarchical": (hierarchical_sae_loss, triton_hierarchical_sae_loss),
    "triton_topk": (topk_sae_loss, triton_topk_sae_loss),
    "torch_hierarchical": (hierarchical_sae_loss, by_torch("hierarchical_loss")),
    "torch_topk": (topk_sae_loss, by_torch("topk_loss")),
}


@pytest.fixture(
    params=[
        pytest.param((name, device), id=f"{name}-{device}", marks=marks)
        for name in LOSSES
        for device, marks in (("cpu", ()), ("cuda", pytest.mark.gpu))
    ]
)
def implementation(request: pytest.FixtureRequest) -> Implementation:
    name, device = request.param
    if name.startswith("triton") and device == "cpu" and torch.cuda.is_available():
        pytest.skip("the kernels are compiled where there is a CUDA device")
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


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    difference = value.detach().cpu().double() - expected.detach()
    return float(difference.norm() / expected.detach().norm().clamp_min(1e-30))


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

    loss = implementation.loss(indices, **inputs, **levels)
    (factor * loss).backward()

    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert relative_error(loss, expected) < TOLERANCE[torch.float32]
    for name in ARGUMENTS:
        if not inputs[name].requires_grad:
            assert inputs[name].grad is None
            continue
        gradient, expected_gradient = inputs[name].grad, exact[name].grad
        assert gradient is not None
        assert expected_gradient is not None
        assert gradient.dtype == inputs[name].dtype
        error = relative_error(gradient, expected_gradient)
        assert error < TOLERANCE[inputs[name].dtype], f"{name}: {error}"


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).split(".")[1])
def test_loss_and_gradients_match_float64_definition(implementation, shape, dtype) -> None:
    indices, inputs = random_inputs(shape, dtype, implementation.device)
    assert_matches_definition(implementation, indices, inputs)


def test_int32_indices(implementation) -> None:
    indices, inputs = random_inputs(
        (6, 5, 20, 33), device=implementation.device, index_dtype=torch.int32
    )
    assert_matches_definition(implementation, indices, inputs)


def test_mixed_dtypes(implementation) -> None:
    indices, inputs = random_inputs((6, 5, 20, 33), device=implementation.device)
    for name, dtype in (("vals", torch.bfloat16), ("target", torch.float16)):
        inputs[name] = inputs[name].detach().to(dtype).requires_grad_()
    assert_matches_definition(implementation, indices, inputs)


def test_strided_inputs(implementation) -> None:
    indices, inputs = random_inputs((6, 5, 20, 34), device=implementation.device)
    strided = {
        name: value.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_()
        for name, value in inputs.items()
    }
    strided["weight"] = inputs["weight"].detach().T.contiguous().T.requires_grad_()
    assert not strided["weight"].is_contiguous()
    indices = indices.repeat_interleave(2, dim=-1)[..., ::2]
    for name in strided:
        strided[name].retain_grad()
    assert_matches_definition(implementation, indices, strided)


def test_one_latent_takes_every_pair(implementation) -> None:
    indices, inputs = random_inputs((40, 6, 3, 20), device=implementation.device)
    assert_matches_definition(implementation, torch.ones_like(indices), inputs)


@pytest.mark.parametrize("wanted", ARGUMENTS)
def test_only_the_gradient_asked_for_is_returned(implementation, wanted) -> None:
    indices, inputs = random_inputs((6, 5, 20, 33), device=implementation.device)
    for name, value in inputs.items():
        value.requires_grad_(name == wanted)
    assert_matches_definition(implementation, indices, inputs)


def test_no_grad_returns_the_loss_alone(implementation) -> None:
    indices, inputs = random_inputs((6, 5, 20, 33), device=implementation.device)
    with torch.no_grad():
        loss = implementation.loss(indices, **inputs)
    assert not loss.requires_grad
    expected = implementation.definition(indices.cpu(), **in_float64(inputs))
    assert relative_error(loss, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("factor", [0.0, 1.0, -2.5])
def test_backward_multiplies_by_the_incoming_gradient(implementation, factor) -> None:
    indices, inputs = random_inputs((6, 5, 20, 33), device=implementation.device)
    assert_matches_definition(implementation, indices, inputs, factor)


def test_level_weights(implementation) -> None:
    if not implementation.uses_levels():
        pytest.skip("TopK has one level")
    indices, inputs = random_inputs((6, 5, 20, 33), device=implementation.device)
    level_weights = torch.tensor([0.5, 0.0, 0.25, 0.0, 2.0], device=implementation.device)
    assert_matches_definition(implementation, indices, inputs, level_weights=level_weights)


def test_second_backward_with_a_factor_raises(implementation) -> None:
    indices, inputs = random_inputs((6, 5, 20, 33), device=implementation.device)
    loss = 2 * implementation.loss(indices, **inputs)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivative_raises(implementation) -> None:
    indices, inputs = random_inputs((6, 5, 20, 33), device=implementation.device)
    loss = implementation.loss(indices, **inputs)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, inputs["weight"], create_graph=True)


@pytest.mark.parametrize("latent", [-1, 20, 2**32 + 3])
def test_index_out_of_range(implementation, latent) -> None:
    indices, inputs = random_inputs((6, 5, 20, 33), device=implementation.device)
    indices[2, 3] = latent
    if implementation.loss not in (triton_hierarchical_sae_loss, triton_topk_sae_loss):
        with pytest.raises(IndexError, match=r"expected latents in \[0, 20\)"):
            implementation.loss(indices, **inputs)
        return
    # The kernels ignore the latent, as if its value were 0.
    loss = implementation.loss(indices, **inputs)
    loss.backward()
    exact = in_float64(inputs)
    kept = torch.ones(6, 5).index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(0.0))
    indices[2, 3] = 0
    expected = implementation.definition(
        indices.cpu(), exact["weight"], exact["vals"] * kept, exact["bias"], exact["target"]
    )
    expected.backward()
    assert relative_error(loss, expected) < TOLERANCE[torch.float32]
    for name in ARGUMENTS:
        assert relative_error(inputs[name].grad, exact[name].grad) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", ["hierarchical_loss", "topk_loss"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_residual_is_that_of_the_last_level(name, device) -> None:
    indices, inputs = random_inputs((6, 5, 20, 33), device=device)
    weight, vals, target = inputs["weight"], inputs["vals"], inputs["target"]
    for backend in ("torch", "auto"):
        _, residual = fused_loss(
            name, indices, weight, vals, target, backend=backend, needs_residual=True
        )
        expected = (vals.unsqueeze(-1) * weight[indices]).sum(1) - target
        assert relative_error(residual, expected.cpu().double()) < TOLERANCE[torch.float32]
        assert not residual.requires_grad


@pytest.mark.parametrize("name", ["hierarchical_loss", "topk_loss"])
def test_torch_backend_never_builds_all_levels(name, monkeypatch) -> None:
    monkeypatch.setattr(torch_backend, "CPU_CHUNK_ELEMENTS", 4 * 16 * 32)
    indices, inputs = random_inputs((64, 16, 24, 32))
    largest = 0

    class RecordLargest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    with RecordLargest():
        by_torch(name)(indices, **inputs).backward()
    assert largest == 4 * 16 * 32
    for value in inputs.values():
        value.grad = None
    definition = hierarchical_sae_loss if name == "hierarchical_loss" else topk_sae_loss
    assert_matches_definition(Implementation(definition, by_torch(name), "cpu"), indices, inputs)


@pytest.mark.parametrize("name", ["hierarchical_loss", "topk_loss"])
@pytest.mark.parametrize(
    ("device", "use_triton"),
    [("cpu", False), pytest.param("cuda", True, marks=pytest.mark.gpu)],
)
def test_operator_passes_opcheck(name, device, use_triton) -> None:
    indices, inputs = random_inputs((6, 5, 20, 33), device=device)
    arguments = (indices, inputs["weight"], inputs["vals"], inputs["target"], None, 3.0, use_triton)
    operator = getattr(torch.ops.sae_lens_flex, name).default
    torch.library.opcheck(operator, (*arguments, [True, True, True, True]))
    with torch.no_grad():
        torch.library.opcheck(operator, (*arguments, [False, False, False, False]))


def test_compiles_without_a_graph_break(implementation) -> None:
    if implementation.device == "cpu" and "triton" in implementation.loss.__name__:
        pytest.skip("torch.compile does not call the interpreter")
    indices, inputs = random_inputs((6, 5, 20, 33), device=implementation.device)
    compiled = Implementation(
        implementation.definition,
        torch.compile(implementation.loss, fullgraph=True),
        implementation.device,
    )
    assert_matches_definition(compiled, indices, inputs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"vals": torch.zeros(6, 4)},
            ValueError,
            r"vals has shape \[6, 4\], expected indices' \[6, 5\]",
        ),
        (
            {"target": torch.zeros(6, 32)},
            ValueError,
            r"target has shape \[6, 32\], expected .* \[6, 33\]",
        ),
        ({"bias": torch.zeros(1)}, ValueError, r"bias has shape \[1\], expected .* \[33\]"),
        ({"weight": torch.zeros(33)}, ValueError, r"weight has shape \[33\], expected \[F, D\]"),
        (
            {"indices": torch.zeros(0, 5, dtype=torch.int64)},
            ValueError,
            r"indices has shape \[0, 5\]",
        ),
        (
            {"indices": torch.zeros(6, 5)},
            TypeError,
            "indices has dtype torch.float32, expected torch.int32",
        ),
        (
            {"weight": torch.zeros(20, 33, dtype=torch.int8)},
            TypeError,
            "weight has dtype torch.int8",
        ),
        ({"vals": [[1.0]]}, TypeError, "vals is a list, expected a torch.Tensor"),
        (
            {"bias": torch.zeros(33, device="meta")},
            ValueError,
            "bias is on 'meta', expected indices' 'cpu'",
        ),
    ],
)
@pytest.mark.parametrize("loss", [triton_hierarchical_sae_loss, triton_topk_sae_loss])
def test_wrong_arguments_are_named(loss, change, error, message) -> None:
    indices, inputs = random_inputs((6, 5, 20, 33))
    with pytest.raises(error, match=message):
        loss(**{"indices": indices, **inputs, **change})
