"""The sparse products against dense products in float64."""

import pytest
import torch

from sae_lens_flex.ops import products
from sae_lens_flex.ops.codes import Code
from sae_lens_flex.ops.kernels import sums
from sae_lens_flex.ops.products import gather, scatter

from .comparison import DEVICES, KERNEL_DEVICES, TOLERANCE, every_backend, relative_error

# (B, K, F, D): odd ones, more pairs than latents, more latents than pairs, one of everything.
SHAPES = [(1, 1, 1, 1), (5, 3, 100, 7), (33, 9, 4, 40), (2, 17, 500, 300)]


def shape_id(shape: tuple[int, ...]) -> str:
    return "-".join(f"{name}{size}" for name, size in zip("BKFD", shape, strict=True))


def random_code(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Code:
    """A code that keeps each latent of a sample once where there are enough; values have zeros."""
    n_samples, k, n_latents, _ = shape
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(n_samples, max(k, n_latents), generator=generator).argsort(-1)
    values = torch.randn(n_samples, k, generator=generator)
    values[:, ::3] = 0
    return Code((order[:, :k] % n_latents).to(device), values.to(device, dtype))


def random_matrix(
    *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 1
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def as_matrix(code: Code, n_latents: int) -> torch.Tensor:
    """The code as a dense matrix, [B, F], float64 on the CPU."""
    latents, values = code.latents.cpu().long(), code.values.cpu().double()
    dense = torch.zeros(len(latents), n_latents, dtype=torch.float64)
    return dense.scatter_add_(-1, latents, values)


def assert_gathers(
    code: Code, weight: torch.Tensor, on: tuple[str, str], target: torch.Tensor | None = None
) -> None:
    matrix, exact = as_matrix(code, len(weight)), weight.cpu().double()
    expected, magnitude = matrix @ exact, matrix.abs() @ exact.abs()
    if target is not None:
        expected = expected - target.cpu().double()
        magnitude = magnitude + target.cpu().double().abs()
    out = gather(code, weight, use_triton=on[0] == "triton", target=target)
    is_double = torch.float64 in (weight.dtype, code.values.dtype)
    assert out.dtype == (torch.float64 if is_double else torch.float32)
    assert out.shape == expected.shape
    assert relative_error(out, expected, magnitude, out.dtype) < (1e-14 if is_double else 5e-6)


def assert_scatters(
    code: Code,
    rows: torch.Tensor,
    n_latents: int,
    on: tuple[str, str],
    dtype: torch.dtype = torch.float32,
    deterministic: bool = False,
) -> torch.Tensor:
    use_triton = on[0] == "triton"
    matrix, exact = as_matrix(code, n_latents).T, rows.cpu().double()
    expected, magnitude = matrix @ exact, matrix.abs() @ exact.abs()
    index = code.by_latent(n_latents, use_triton=use_triton, deterministic=deterministic)
    out = torch.full((n_latents, rows.shape[1]), torch.nan, dtype=dtype, device=on[1])
    scatter(index, code.values, rows, out=out, use_triton=use_triton)
    if dtype == torch.float64:
        assert relative_error(out, expected, magnitude, dtype) < 1e-14
    else:
        assert relative_error(out, expected, magnitude) < TOLERANCE[dtype]
    absent = code.latents.cpu().flatten().bincount(minlength=n_latents) == 0
    assert out[absent].eq(0).all()
    return out


# --- gather


@every_backend
@pytest.mark.parametrize("has_target", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_gather_is_the_dense_product(on, shape, has_target) -> None:
    n_samples, _, n_latents, d_in = shape
    weight = random_matrix(n_latents, d_in, device=on[1])
    target = random_matrix(n_samples, d_in, device=on[1], seed=2) if has_target else None
    assert_gathers(random_code(shape, device=on[1]), weight, on, target)


@every_backend
@pytest.mark.parametrize("value_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gather_of_16_bit_weights_adds_up_in_float32(on, dtype, value_dtype) -> None:
    shape = (5, 9, 40, 70)
    weight = random_matrix(40, 70, dtype=dtype, device=on[1])
    target = random_matrix(5, 70, dtype=dtype, device=on[1], seed=2)
    assert_gathers(random_code(shape, value_dtype, on[1]), weight, on, target)


@pytest.mark.parametrize("device", DEVICES)
def test_gather_of_float64(device) -> None:
    shape, on = (5, 9, 40, 70), ("torch", device)
    weight = random_matrix(40, 70, dtype=torch.float64, device=device)
    assert_gathers(random_code(shape, torch.float64, device), weight, on)
    assert_gathers(random_code(shape, torch.float32, device), weight, on)


@every_backend
def test_gather_from_strided_tensors(on) -> None:
    shape = (5, 9, 40, 70)
    code = random_code(shape, device=on[1])
    strided = Code(code.latents.T.contiguous().T, code.values.T.contiguous().T)
    target = random_matrix(70, 5, device=on[1], seed=2).T
    for weight in (
        random_matrix(70, 40, device=on[1]).T,  # as the columns of an ordinary W_enc
        random_matrix(40, 140, device=on[1])[:, ::2],
    ):
        assert_gathers(strided, weight, on, target)


@every_backend
def test_gather_takes_int32_latents(on) -> None:
    code = random_code((5, 9, 40, 70), device=on[1])
    code = Code(code.latents.int(), code.values)
    assert_gathers(code, random_matrix(40, 70, device=on[1]), on)


@every_backend
@pytest.mark.parametrize("has_target", [True, False])
def test_gather_of_no_samples_is_empty(on, has_target) -> None:
    weight = random_matrix(40, 70, device=on[1])
    code = Code(torch.empty(0, 9, dtype=torch.int64, device=on[1]), torch.empty(0, 9, device=on[1]))
    target = torch.empty(0, 70, device=on[1]) if has_target else None
    out = gather(code, weight, use_triton=on[0] == "triton", target=target)
    assert out.shape == (0, 70)
    assert out.dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
def test_gather_in_chunks(device, monkeypatch) -> None:
    monkeypatch.setattr(products, "CPU_CHUNK_ELEMENTS", 2 * 9 * 70)
    monkeypatch.setattr(products, "GPU_CHUNK_ELEMENTS", 2 * 9 * 70)
    code = random_code((5, 9, 40, 70), device=device)
    assert products.chunks_of(code, 70) == [slice(0, 2), slice(2, 4), slice(4, 6)]
    target = random_matrix(5, 70, device=device, seed=2)
    assert_gathers(code, random_matrix(40, 70, device=device), ("torch", device), target)


@every_backend
def test_gather_does_not_heed_autocast(on) -> None:
    code, weight = random_code((5, 9, 40, 70), device=on[1]), random_matrix(40, 70, device=on[1])
    with torch.autocast(on[1], torch.bfloat16):
        assert_gathers(code, weight, on)


# --- scatter


@every_backend
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_scatter_is_the_dense_product(on, shape) -> None:
    rows = random_matrix(shape[0], shape[3], device=on[1])
    assert_scatters(random_code(shape, device=on[1]), rows, shape[2], on)


@every_backend
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scatter_of_16_bit_rows_adds_up_in_float32(on, dtype, out_dtype) -> None:
    rows = random_matrix(9, 70, dtype=dtype, device=on[1])
    assert_scatters(random_code((9, 9, 20, 70), dtype, on[1]), rows, 20, on, out_dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_scatter_of_float64(device) -> None:
    rows = random_matrix(9, 70, dtype=torch.float64, device=device)
    code = random_code((9, 9, 20, 70), torch.float64, device)
    assert_scatters(code, rows, 20, ("torch", device), torch.float64)


@every_backend
def test_scatter_ignores_latents_beyond_the_last(on) -> None:
    n_latents, dtype = 30, torch.float32 if on[0] == "triton" else torch.float64
    code = random_code((20, 5, 2 * n_latents, 7), dtype, on[1])
    rows = random_matrix(20, 7, dtype=dtype, device=on[1])
    expected = as_matrix(code, 2 * n_latents).T[:n_latents] @ rows.cpu().double()
    for n_grouped in (n_latents, n_latents + 7, 2 * n_latents):
        index = code.by_latent(n_grouped, use_triton=on[0] == "triton", deterministic=False)
        out = torch.full((n_latents, 7), torch.nan, dtype=dtype, device=on[1])
        scatter(index, code.values, rows, out=out, use_triton=on[0] == "triton")
        assert relative_error(out, expected) < (1e-14 if dtype == torch.float64 else 5e-6)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_sums_that_are_written_later_are_left_where_there_is_no_pair(device) -> None:
    n_latents, d_in = 70, 300
    code = random_code((9, 3, n_latents, d_in), device=device)
    rows = random_matrix(9, d_in, device=device)
    expected = assert_scatters(code, rows, n_latents, ("triton", device))
    index = code.by_latent(n_latents, use_triton=True, deterministic=False)
    later = torch.arange(n_latents, device=device) % 3 == 0
    out = torch.full_like(expected, torch.nan)
    scatter(index._replace(written_later=later), code.values, rows, out=out, use_triton=True)
    is_left = later & ~torch.isin(torch.arange(n_latents, device=device), code.latents)
    assert 0 < is_left.sum() < later.sum()
    assert out[is_left].isnan().all()
    torch.testing.assert_close(out[~is_left], expected[~is_left], rtol=0, atol=1e-5)


@every_backend
def test_scatter_takes_strided_values(on) -> None:
    code = random_code((9, 9, 20, 70), device=on[1])
    strided = Code(code.latents, code.values.T.contiguous().T)
    assert_scatters(strided, random_matrix(9, 70, device=on[1]), 20, on)


@every_backend
def test_a_latent_with_all_pairs(on) -> None:
    # Its pairs take several runs of the inverted index.
    code = random_code((40, 3, 1, 7), device=on[1])
    latents = torch.full_like(code.latents, 11)
    rows = random_matrix(40, 7, device=on[1])
    out = assert_scatters(Code(latents, code.values), rows, 20, on)
    assert out.abs().sum(-1).ne(0).nonzero().tolist() == [[11]]


@every_backend
def test_a_latent_of_every_sample_among_others(on) -> None:
    code = random_code((70, 4, 20, 7), device=on[1])
    code.latents[:, 1] = 11
    assert_scatters(code, random_matrix(70, 7, device=on[1]), 20, on)


@every_backend
@pytest.mark.parametrize("n_own", [1, 3, 7, 8, 59])
def test_latents_from_some_one_on_are_ignored(on, n_own) -> None:
    # Their pairs fill runs of the inverted index, and part of one.
    code, rows = random_code((40, 9, 60, 7), device=on[1]), random_matrix(40, 7, device=on[1])
    whole = assert_scatters(code, rows, 60, on)
    use_triton = on[0] == "triton"
    index = code.by_latent(60, use_triton=use_triton, deterministic=False)
    out = torch.full((n_own, 7), torch.nan, device=on[1])
    scatter(index, code.values, rows, out=out, use_triton=use_triton)
    torch.testing.assert_close(out, whole[:n_own], rtol=0, atol=1e-5)


@every_backend
def test_values_in_the_order_of_the_index(on, monkeypatch) -> None:
    monkeypatch.setattr(sums, "MOST_SCATTERED", 0)  # as for many pairs
    code = random_code((9, 9, 20, 70), device=on[1])
    assert_scatters(code, random_matrix(9, 70, device=on[1]), 20, on)


@every_backend
def test_deterministic_sums_are_equal_from_run_to_run(on) -> None:
    code = random_code((30, 5, 10, 33), device=on[1])
    rows = random_matrix(30, 33, device=on[1])
    first, *others = [assert_scatters(code, rows, 10, on, deterministic=True) for _ in range(3)]
    for other in others:
        assert torch.equal(first, other)


@every_backend
def test_scatter_does_not_heed_autocast(on) -> None:
    code, rows = random_code((9, 9, 20, 70), device=on[1]), random_matrix(9, 70, device=on[1])
    with torch.autocast(on[1], torch.bfloat16):
        assert_scatters(code, rows, 20, on)
