"""The sparse encoder and the loss on dead latents against their definitions in float64."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sae_lens_flex.ops import encode as encode_module
from sae_lens_flex.ops import reference
from sae_lens_flex.ops.dead_latents import (
    DeadLatents,
    DictionaryLater,
    dead_latents_loss,
    nonzero_later,
)
from sae_lens_flex.ops.encode import encode, latent_major
from sae_lens_flex.ops.selection import Selection, select

from .comparison import DEVICES, Cut, every_backend, relative_error

# (B, D, F, K): groups that do not divide F, one latent a group, K = F, one of everything.
SHAPES = [
    (1, 1, 1, 1),
    (5, 7, 100, 3),
    (3, 33, 17, 17),
    (4, 20, 70, 30),
    (2, 300, 1000, 16),
]
# Of float32 sums over D or B * K; of a gradient or pre-activation rounded to 16 bits.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
ARGUMENTS = ("x", "W_enc", "b_enc", "b_dec")
N_EXAMPLES = 300 if torch.cuda.is_available() else 12


def shape_id(shape: tuple[int, ...]) -> str:
    return "-".join(f"{name}{size}" for name, size in zip("BDFK", shape, strict=True))


def random_inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    n_samples, d_in, n_latents, _ = shape
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "x": torch.randn(n_samples, d_in, generator=generator),
        "W_enc": latent_major(torch.randn(d_in, n_latents, generator=generator)),
        "b_enc": torch.randn(n_latents, generator=generator),
        "b_dec": torch.randn(d_in, generator=generator),
        "norms": torch.rand(n_latents, generator=generator) + 0.5,
    }
    return {
        name: value.to(device, dtype).requires_grad_(name != "norms")
        for name, value in inputs.items()
    }


def in_float64(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: value.detach().cpu().double().requires_grad_(value.requires_grad)
        for name, value in inputs.items()
    }


def assert_same_gradients(
    inputs: dict[str, torch.Tensor],
    exact: dict[str, torch.Tensor],
    tolerance: float,
    magnitudes: dict[str, torch.Tensor] | None = None,
) -> None:
    for name, value in inputs.items():
        if not value.requires_grad:
            assert value.grad is None
            continue
        gradient, expected = value.grad, exact[name].grad
        assert gradient is not None
        assert expected is not None
        assert gradient.dtype == value.dtype
        magnitude = None if magnitudes is None else magnitudes[name].grad
        error = relative_error(gradient, expected, magnitude, value.dtype)
        assert error < tolerance, f"{name}: {error}"


def assert_encodes(
    inputs: dict[str, torch.Tensor], k: int, backend: str, tolerance: float = 5e-6
) -> None:
    exact = in_float64(inputs)
    kept = encode(**inputs, k=k, backend=backend)
    indices = kept.indices.cpu()
    assert indices.shape == (len(inputs["x"]), k)
    assert all(len(set(row)) == k for row in indices.tolist())

    hidden = (exact["x"] - exact["b_dec"]) @ exact["W_enc"] + exact["b_enc"]
    compared = (hidden * exact["norms"]).detach()
    expected, _ = reference.encode(**exact, k=k)
    # Where two latents are as good as equal, either may be the one: the values must be the largest.
    scale = compared.abs().max()
    difference = compared.gather(-1, indices) - compared.gather(-1, expected)
    assert difference.abs().max() <= tolerance * scale

    kept_hidden = hidden.gather(-1, indices)
    # The same sums with all terms positive: b_dec is subtracted.
    terms = {
        name: (-value.detach().abs() if name == "b_dec" else value.detach().abs()).requires_grad_()
        for name, value in exact.items()
    }
    magnitude = (terms["x"] - terms["b_dec"]) @ terms["W_enc"] + terms["b_enc"]
    magnitude = magnitude.gather(-1, indices)
    dtype = inputs["x"].dtype
    assert relative_error(kept.hidden, kept_hidden, magnitude, dtype) < tolerance
    factors = torch.randn(indices.shape, generator=torch.Generator().manual_seed(1))
    factors[:, ::3] = 0
    (kept_hidden * factors.double()).sum().backward()
    (magnitude * factors.double().abs()).sum().backward()
    (kept.hidden * factors.to(kept.hidden)).sum().backward()
    assert_same_gradients(inputs, exact, tolerance, terms)


@every_backend
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_latents_and_gradients_match_float64_definition(on, shape) -> None:
    backend, device = on
    assert_encodes(random_inputs(shape, device=device), shape[-1], backend)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights(on, dtype) -> None:
    backend, device = on
    inputs = random_inputs((5, 40, 100, 3), dtype, device)
    assert_encodes(inputs, 3, backend, TOLERANCE[dtype])


@every_backend
@pytest.mark.parametrize("wanted", ARGUMENTS)
def test_only_the_gradient_asked_for_is_returned(on, wanted) -> None:
    backend, device = on
    inputs = random_inputs((5, 7, 100, 3), device=device)
    for name, value in inputs.items():
        value.requires_grad_(name == wanted)
    assert_encodes(inputs, 3, backend)


@every_backend
def test_strided_inputs(on) -> None:
    backend, device = on
    inputs = random_inputs((5, 8, 100, 3), device=device)
    strided = {
        name: value.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_(name != "norms")
        for name, value in inputs.items()
    }
    for name in ARGUMENTS:
        strided[name].retain_grad()
    strided["norms"] = strided["norms"].contiguous()
    assert_encodes(strided, 3, backend)


@every_backend
def test_one_latent_of_every_activation(on) -> None:
    backend, device = on
    inputs = random_inputs((70, 7, 20, 3), device=device)
    with torch.no_grad():
        inputs["b_enc"][5] = 100.0  # fires on all of them, over several runs of the inverted index
    assert_encodes(inputs, 3, backend)


@every_backend
def test_without_norms_or_decoder_bias(on) -> None:
    backend, device = on
    inputs = random_inputs((5, 7, 100, 3), device=device)
    expected = encode(
        inputs["x"],
        inputs["W_enc"],
        inputs["b_enc"],
        torch.zeros_like(inputs["b_dec"]),
        torch.ones_like(inputs["norms"]),
        3,
        backend=backend,
    )
    kept = encode(inputs["x"], inputs["W_enc"], inputs["b_enc"], None, None, 3, backend=backend)
    assert torch.equal(kept.indices, expected.indices)
    assert torch.equal(kept.hidden, expected.hidden)
    gradients = [
        torch.autograd.grad(encoded.hidden.square().sum(), [inputs[n] for n in ARGUMENTS[:3]])
        for encoded in (kept, expected)
    ]
    for gradient, expected_gradient in zip(*gradients, strict=True):
        assert torch.equal(gradient, expected_gradient)


@every_backend
@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("n_latents", [64, 1000])
def test_selection_is_exact_among_ties_and_extremes(on, has_norms, is_sorted, n_latents) -> None:
    backend, device = on
    k = 24
    generator = torch.Generator().manual_seed(0)
    products = torch.randn(6, n_latents, generator=generator).mul(2).round()
    products[1] = 0.0
    products[2] = -products[2].abs()
    products[3, ::2] = -0.0
    products[4, ::9] = torch.inf
    products[5, ::3] = -torch.inf
    products = products.to(device)
    b_enc = torch.randn(n_latents, generator=generator).round().to(device)
    norms = torch.rand(n_latents, generator=generator).mul(4).round().add(1).to(device)
    compared = (products + b_enc) * (norms if has_norms else 1)
    expected = compared.topk(k).values
    hidden = products + b_enc
    out = Selection(
        torch.full((6, k), -1, device=device), torch.full((6, k), torch.nan, device=device)
    )
    select(products, b_enc, norms if has_norms else None, out, backend == "triton", is_sorted)
    assert all(len(set(row)) == k for row in out.indices.tolist())
    values = compared.gather(-1, out.indices)
    assert torch.equal(values if is_sorted else values.sort(descending=True).values, expected)
    assert torch.equal(out.hidden, hidden.gather(-1, out.indices))


@every_backend
def test_a_nan_is_chosen_as_torch_chooses_it(on) -> None:
    backend, device = on
    products = torch.arange(64.0, device=device).expand(2, -1).contiguous()
    products[1, 17] = torch.nan
    out = Selection(torch.full((2, 3), -1, device=device), torch.full((2, 3), 0.0, device=device))
    select(products, torch.zeros(64, device=device), None, out, backend == "triton")
    assert out.indices.tolist() == [[63, 62, 61], [17, 63, 62]]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_autocast_computes_products_in_its_dtype(on, dtype) -> None:
    backend, device = on
    inputs = random_inputs((5, 40, 100, 3), dtype, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        kept = encode(**inputs, k=3, backend="torch" if dtype == torch.float64 else backend)
    low = torch.float64 if dtype == torch.float64 else torch.bfloat16
    x, weight = (inputs["x"] - inputs["b_dec"]).to(low), inputs["W_enc"].to(low)
    hidden = (x @ weight) + inputs["b_enc"]
    assert kept.hidden.dtype == hidden.dtype
    expected = hidden.gather(-1, kept.indices).cpu().double()
    assert relative_error(kept.hidden, expected) < (0 if dtype == torch.float32 else 2**-7) + 1e-7
    kept.hidden.sum().backward()
    for name in ARGUMENTS:
        assert inputs[name].grad.dtype == dtype


@every_backend
def test_pre_activations_of_the_whole_batch_never_exist(on, monkeypatch) -> None:
    backend, device = on
    monkeypatch.setattr(encode_module, "CPU_CHUNK_BYTES", 8 * 200 * 4)
    monkeypatch.setattr(encode_module, "GPU_CHUNK_BYTES", 8 * 200 * 4)
    monkeypatch.setattr(encode_module, "GPU_CHUNK_ROWS", 1)
    inputs = random_inputs((50, 4, 200, 3), device=device)
    largest = 0

    class RecordLargest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.nbytes)
            return result

    with RecordLargest():
        encode(**inputs, k=3, backend=backend).hidden.sum().backward()
    assert largest <= 8 * 200 * 4
    for value in inputs.values():
        value.grad = None
    assert_encodes(inputs, 3, backend)


def test_no_grad_makes_no_inverted_index() -> None:
    inputs = random_inputs((5, 7, 100, 3))
    assert encode(**inputs, k=3).inverted is not None
    with torch.no_grad():
        kept = encode(**inputs, k=3)
    assert kept.inverted is None
    assert not kept.hidden.requires_grad


def test_second_derivative_raises() -> None:
    inputs = random_inputs((5, 7, 100, 3))
    hidden = encode(**inputs, k=3).hidden
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(hidden.sum(), inputs["W_enc"], create_graph=True)


def test_what_nothing_depends_on_gives_no_gradient() -> None:
    inputs = dead_inputs((5, 7, 30, 5))
    dead = DeadLatents(inputs["W_enc"].T, inputs["b_enc"], inputs["W_dec"], None)
    loss = dead_latents_loss(inputs["x"], dead, None, inputs["target"], 5)
    hidden = encode(*(inputs[name] for name in ("x", "W_enc", "b_enc", "b_dec")), None, 3).hidden
    used = inputs["b_enc"].sum()
    (Cut.apply(loss) + Cut.apply(hidden).sum() + used).backward()
    assert inputs["W_enc"].grad is inputs["W_dec"].grad is None
    assert inputs["b_enc"].grad.eq(1).all()


@every_backend
def test_deterministic_algorithms_give_equal_results(on) -> None:
    backend, device = on
    gradients = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            inputs = random_inputs((40, 7, 20, 6), device=device)
            assert_encodes(inputs, 6, backend)
            gradients.append([inputs[name].grad for name in ARGUMENTS])
    finally:
        torch.use_deterministic_algorithms(False)
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


@settings(
    max_examples=N_EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 140), st.integers(1, 200)),
    share=st.floats(0, 1),
    dtype=st.sampled_from(list(TOLERANCE)),
    is_strided=st.booleans(),
    seed=st.integers(0, 2**16),
)
@every_backend
def test_any_input_matches_the_definition(on, sizes, share, dtype, is_strided, seed) -> None:
    backend, device = on
    n_samples, d_in, n_latents = sizes
    k = 1 + int(share * (n_latents - 1))
    inputs = random_inputs((n_samples, d_in, n_latents, k), dtype, device, seed)
    if is_strided:
        for name in ("x", "W_enc"):
            inputs[name] = inputs[name].detach().T.contiguous().T.requires_grad_()
    assert_encodes(inputs, k, backend, TOLERANCE[dtype])


# --- dead latents


def dead_inputs(shape: tuple[int, int, int, int], **options: Any) -> dict[str, torch.Tensor]:
    inputs = random_inputs(shape, **options)
    generator = torch.Generator().manual_seed(9)
    like = inputs["x"].detach()
    weight = torch.randn(shape[2], shape[1], generator=generator)
    target = torch.randn(shape[0], shape[1], generator=generator)
    return {**inputs, "W_dec": weight.to(like).requires_grad_(), "target": target.to(like)}


def assert_dead_latents_loss(
    inputs: dict[str, torch.Tensor], k: int, backend: str, tolerance: float = 5e-6
) -> None:
    exact = in_float64(inputs)
    expected = 3 * reference.dead_latents_loss(**exact, k=k)
    expected.backward()
    dead = DeadLatents(inputs["W_enc"].T, inputs["b_enc"], inputs["W_dec"], inputs["norms"])
    loss = dead_latents_loss(
        inputs["x"], dead, inputs["b_dec"], inputs["target"], k, factor=1.5, backend=backend
    )
    (2 * loss).backward()
    assert relative_error(2 * loss, expected) < tolerance
    assert_same_gradients(inputs, exact, tolerance)


@every_backend
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_loss_on_dead_latents_matches_float64_definition(on, shape) -> None:
    backend, device = on
    assert_dead_latents_loss(dead_inputs(shape, device=device), shape[-1], backend)


@every_backend
def test_loss_on_dead_latents_in_chunks(on, monkeypatch) -> None:
    backend, device = on
    monkeypatch.setattr(encode_module, "CPU_CHUNK_BYTES", 3 * 30 * 4)
    monkeypatch.setattr(encode_module, "GPU_CHUNK_BYTES", 3 * 30 * 4)
    monkeypatch.setattr(encode_module, "GPU_CHUNK_ROWS", 1)
    assert_dead_latents_loss(dead_inputs((10, 7, 30, 5), device=device), 5, backend)


@every_backend
def test_frozen_input_gets_no_gradient_from_dead_latents(on) -> None:
    backend, device = on
    inputs = dead_inputs((5, 7, 30, 5), device=device)
    inputs["x"].requires_grad_(False)
    assert_dead_latents_loss(inputs, 5, backend)


def test_loss_on_dead_latents_has_no_second_derivative() -> None:
    inputs = dead_inputs((5, 7, 30, 5))
    dead = DeadLatents(inputs["W_enc"].T, inputs["b_enc"], inputs["W_dec"], None)
    loss = dead_latents_loss(inputs["x"], dead, None, inputs["target"], 5)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, inputs["W_dec"], create_graph=True)


@pytest.mark.parametrize("used", [(True, False), (False, True), (True, True)])
def test_gradients_of_what_is_taken_later_are_added(used) -> None:
    weights = [torch.randn(4, 9, requires_grad=True), torch.randn(9, 4, requires_grad=True)]
    latents = torch.tensor([7, 2])
    later = DictionaryLater(*weights)
    gradients = []
    for (encoder, decoder), (encoder_rows, decoder_rows) in (
        ((later.W_enc, later.W_dec), later.take(latents)),
        (weights, (weights[0].T[latents], weights[1][latents])),
    ):
        loss = used[0] * (encoder.square().sum() + decoder.cos().sum())
        loss = loss + used[1] * (encoder_rows.sin().sum() + decoder_rows.exp().sum())
        gradients.append(torch.autograd.grad(loss, weights))
    for mine, expected in zip(*gradients, strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_set", [0, 1, 1000])
def test_nonzero_later_is_nonzero(device, n_set) -> None:
    mask = torch.arange(1000, device=device) < n_set
    mask = mask[torch.randperm(1000, device=device)]
    wait = nonzero_later(mask)
    assert torch.equal(wait(), mask.nonzero().squeeze(-1))


# --- operators


@every_backend
def test_operators_pass_opcheck(on) -> None:
    backend, device = on
    use_triton = backend == "triton"
    operators = torch.ops.sae_lens_flex
    inputs = dead_inputs((5, 7, 30, 5), device=device)
    x, weight, b_enc, b_dec, norms = (inputs[name] for name in (*ARGUMENTS, "norms"))
    torch.library.opcheck(
        operators.encode.default,
        (x, weight, b_enc, b_dec, norms, 5, torch.float32, use_triton, True),
    )
    torch.library.opcheck(
        operators.dead_latents_loss.default,
        (
            x,
            weight.T,
            b_enc,
            inputs["W_dec"],
            b_dec,
            norms,
            inputs["target"],
            5,
            2.0,
            torch.float32,
            use_triton,
            True,
            True,
        ),
    )


def test_compiles_without_a_graph_break() -> None:
    inputs = random_inputs((5, 7, 100, 3))
    compiled = torch.compile(lambda: encode(**inputs, k=3).hidden.square().sum(), fullgraph=True)
    expected = encode(**inputs, k=3).hidden.square().sum()
    gradients = [
        torch.autograd.grad(loss, [inputs[name] for name in ARGUMENTS])
        for loss in (compiled(), expected)
    ]
    for gradient, expected_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)
