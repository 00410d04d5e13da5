"""The losses at sizes and in settings that only a GPU has."""

import gc

import pytest
import torch

from .comparison import (
    LOSSES,
    TOLERANCE,
    Implementation,
    assert_matches_definition,
    implementation_named,
    random_inputs,
)
from .comparison import relative_error as error_of

pytestmark = pytest.mark.gpu


@pytest.fixture(params=[name for name in LOSSES if name.startswith("triton")])
def on_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Implementation:
    return implementation_named(request.param, "cuda", monkeypatch)


def frequent_indices(n_samples: int, k: int, n_latents: int) -> torch.Tensor:
    """Latents whose frequencies fall with 1 / rank, distinct within a row."""
    generator = torch.Generator().manual_seed(0)
    share = 1 / torch.arange(1, n_latents + 1)
    exponential = torch.empty(n_samples, n_latents).exponential_(generator=generator)
    return (share / exponential).topk(k).indices


def test_frequent_latents_of_a_large_batch(on_gpu) -> None:
    _, inputs = random_inputs((4096, 32, 4096, 70), device="cuda")
    assert_matches_definition(on_gpu, frequent_indices(4096, 32, 4096).cuda(), inputs)


def test_4096_levels(on_gpu) -> None:
    indices, inputs = random_inputs((3, 4096, 5000, 70), device="cuda")
    # Rounding grows with the levels; a latent's value is of the size of its share.
    inputs["vals"] = (inputs["vals"].detach() / 64).requires_grad_()
    assert_matches_definition(on_gpu, indices, inputs)


def test_weight_of_more_than_2_to_the_31_elements(on_gpu) -> None:
    n_latents, d_in = 2**31 // 2304 + 1000, 2304
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(n_latents - 2000, n_latents, (32, 8), generator=generator).cuda()
    indices[0, 0] = 0
    weight = torch.zeros(n_latents, d_in, dtype=torch.bfloat16, device="cuda")
    chosen = indices.unique()
    weight[chosen] = torch.randn(len(chosen), d_in, device="cuda").bfloat16()
    _, inputs = random_inputs((32, 8, 1, d_in), device="cuda")
    inputs["weight"] = weight.requires_grad_()
    on_gpu.loss(indices, **inputs).backward()

    exact = {
        name: value.detach().double().requires_grad_()
        for name, value in inputs.items()
        if name != "weight"
    }
    rows = weight.detach()[chosen].double().requires_grad_()
    on_gpu.definition(torch.searchsorted(chosen, indices), weight=rows, **exact).backward()
    gradient = weight.grad
    assert gradient is not None
    assert error_of(gradient[chosen], rows.grad.cpu()) < TOLERANCE[torch.bfloat16]
    assert error_of(inputs["vals"].grad, exact["vals"].grad.cpu()) < TOLERANCE[torch.float32]
    gradient[chosen] = 0
    assert all(not part.any() for part in gradient.split(2**16))


def test_target_of_more_than_2_to_the_31_elements(on_gpu) -> None:
    n_samples, d_in = 2**31 // 2304 + 1000, 2304
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = {
        "weight": torch.randn(50, d_in, generator=generator, device="cuda"),
        "vals": torch.randn(n_samples, 2, generator=generator, device="cuda"),
        "bias": torch.zeros(d_in, device="cuda"),
        "target": torch.randn(n_samples, d_in, generator=generator, device="cuda"),
    }
    indices = torch.randint(50, (n_samples, 2), generator=generator, device="cuda")
    vals = inputs["vals"].requires_grad_()
    on_gpu.loss(indices, **inputs).backward()
    last = {
        name: value[-100:] if len(value) == n_samples else value for name, value in inputs.items()
    }
    last = {name: value.detach().double().requires_grad_() for name, value in last.items()}
    (on_gpu.definition(indices[-100:], **last) * (100 / n_samples)).backward()
    assert vals.grad is not None
    assert error_of(vals.grad[-100:], last["vals"].grad.cpu()) < TOLERANCE[torch.float32]


def test_captured_in_a_graph(on_gpu) -> None:
    shape = (4096, 16, 300, 70)
    indices, inputs = random_inputs(shape, device="cuda")

    def step() -> torch.Tensor:
        loss = on_gpu.loss(indices, **inputs)
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    for value in inputs.values():
        value.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    other_indices, other_inputs = random_inputs(shape, device="cuda", seed=1)
    with torch.no_grad():
        indices.copy_(other_indices)
        for name, value in inputs.items():
            value.copy_(other_inputs[name])
    graph.replay()
    exact = {name: value.detach().cpu().double().requires_grad_() for name, value in inputs.items()}
    expected = on_gpu.definition(indices.cpu(), **exact)
    expected.backward()
    assert error_of(loss, expected) < TOLERANCE[torch.float32]
    for name, value in inputs.items():
        assert error_of(value.grad, exact[name].grad) < TOLERANCE[torch.float32]


def test_nothing_waits_for_the_device(on_gpu) -> None:
    indices, inputs = random_inputs((4096, 16, 300, 70), device="cuda")
    on_gpu.loss(indices, **inputs).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (2 * on_gpu.loss(indices, **inputs)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_same_sizes_again(on_gpu) -> None:
    """What is kept of a launch are types and sizes, neither values nor addresses."""
    for seed in range(3):
        indices, inputs = random_inputs((6, 16, 20, 64), device="cuda", seed=seed)
        assert_matches_definition(on_gpu, indices, inputs)
        unaligned = {
            name: torch.cat([value.new_zeros(1), value.detach().flatten()])[1:]
            .view(value.shape)
            .requires_grad_()
            for name, value in inputs.items()
        }
        assert unaligned["weight"].data_ptr() % 16 == 4
        assert_matches_definition(on_gpu, indices, unaligned)


@pytest.mark.parametrize(("k", "limit"), [(128, 1.30), (1024, 1.45)])
def test_peak_memory(on_gpu, k, limit) -> None:
    gc.collect()
    held_by_others = torch.cuda.memory_allocated()  # such as the tracebacks of failed tests
    indices, inputs = random_inputs((4096, k, 65536, 2304), device="cuda")
    inputs["target"].requires_grad_(False)
    torch.cuda.reset_peak_memory_stats()
    on_gpu.loss(indices, **inputs).backward()
    peak = torch.cuda.max_memory_allocated() - held_by_others
    del indices, inputs
    torch.cuda.empty_cache()
    assert peak / 2**30 <= limit


def test_deterministic_for_frequent_latents(on_gpu) -> None:
    _, inputs = random_inputs((4096, 32, 4096, 130), device="cuda")
    indices = frequent_indices(4096, 32, 4096).cuda()
    torch.use_deterministic_algorithms(True)
    try:
        gradients = []
        for _ in range(3):
            for value in inputs.values():
                value.grad = None
            on_gpu.loss(indices, **inputs).backward()
            gradients.append([value.grad.clone() for value in inputs.values()])
    finally:
        torch.use_deterministic_algorithms(False)
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))
