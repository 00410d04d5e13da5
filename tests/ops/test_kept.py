"""The K largest in their places, gradients there, and rows of a matrix, against definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_flex.ops.kernels import kept as kernels
from sae_lens_flex.ops.kernels import launch
from sae_lens_flex.ops.kernels import rows as rows_kernels
from sae_lens_flex.ops.kernels.error import scaled_error
from sae_lens_flex.ops.kernels.kept import at_kept, keep_largest
from sae_lens_flex.ops.products import add_rows, sum_rows, take_rows

from .comparison import KERNEL_DEVICES, every_backend, generated
from .comparison import relative_error as relative_error_on_cpu
from .test_selection import N_EXAMPLES, TOLERANCE

on_each_device = pytest.mark.parametrize("device", KERNEL_DEVICES)
EIGHT = torch.arange(8)


def relative_error(value: torch.Tensor, *expected: torch.Tensor) -> float:
    return relative_error_on_cpu(value, *(tensor.cpu() for tensor in expected))


def definition(
    products: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor | None,
    is_allowed: torch.Tensor | None,
    k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pre-activations in float64, and which are kept: of equal ones the first.

    They are sorted on the CPU: on a GPU PyTorch sorts a NaN whose sign is set as the smallest.
    """
    products, bias = products.cpu(), bias.cpu()
    norms, is_allowed = (None if each is None else each.cpu() for each in (norms, is_allowed))
    hidden = products.double() + bias.double()
    compared = (hidden if norms is None else hidden * norms.double()) + 0.0
    allowed = torch.arange(products.shape[1], device=products.device)
    if is_allowed is not None:
        allowed = allowed[is_allowed]
    order = compared[:, allowed].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    is_kept = torch.zeros_like(hidden, dtype=torch.bool).scatter_(-1, allowed[order], True)
    return hidden, is_kept


def as_bits(is_kept: torch.Tensor) -> torch.Tensor:
    """Latent f of a row is bit f % 8 of byte f // 8."""
    padded = torch.nn.functional.pad(is_kept, (0, -is_kept.shape[1] % 8))
    return (padded.unflatten(-1, (-1, 8)).int() << EIGHT.to(is_kept.device)).sum(-1).to(torch.uint8)


def assert_keeps(
    products: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor | None,
    is_allowed: torch.Tensor | None,
    k: int,
) -> None:
    """Compare with the definition. All sums and products must be exact in float32."""
    hidden, is_kept = definition(products, bias, norms, is_allowed, k)
    written = products.clone()
    kept = keep_largest(written, bias, norms, is_allowed, k)
    written = written.cpu()
    assert torch.equal(kept.cpu(), as_bits(is_kept))
    expected = torch.where(is_kept, hidden, 0.0)
    tolerance = 0.0 if products.dtype == torch.float32 else TOLERANCE[products.dtype]
    torch.testing.assert_close(written.double(), expected, rtol=tolerance, atol=0, equal_nan=True)


def integers(
    generator: torch.Generator, low: int, high: int, *shape: int, device: str = "cpu"
) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=generator).float().to(device)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("n_latents", "k"), [(1, 1), (17, 17), (100, 30), (257, 1), (5003, 1152)], ids=str
)
def test_what_is_kept_is_exact_among_ties_and_extremes(device, dtype, n_latents, k) -> None:
    generator = torch.Generator().manual_seed(0)
    products = torch.randn(8, n_latents, generator=generator)
    products[1] = 0.0
    products[2] = integers(generator, -3, 4, n_latents)
    products[3, ::7] = torch.nan
    products[3, 1::5] = torch.inf
    products[4] = -torch.inf
    products[4, ::9] = -1.0
    products[5, : n_latents // 2] = -0.0
    products[6] = -products[6].abs() - 4  # All are negative.
    products[7] = torch.nan
    bias = integers(generator, -1, 2, n_latents, device=device)
    norms = integers(generator, 1, 4, n_latents, device=device)
    is_allowed = torch.rand(n_latents, generator=generator).to(device) < 0.5
    few = torch.arange(n_latents, device=device) == n_latents // 2
    products = products.mul(64).round().div(64).to(device, dtype)  # so that all sums are exact
    for scale, allowed in ((None, None), (norms, is_allowed), (None, few)):
        assert_keeps(products, bias, scale, allowed, k)


@on_each_device
def test_one_block_and_several_blocks_keep_the_same(device, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    products = integers(generator, -40, 40, 5, 150, device=device)
    bias = torch.zeros(150, device=device)
    assert_keeps(products, bias, None, None, 60)
    monkeypatch.setattr(kernels, "BLOCK", 16)
    assert_keeps(products, bias, None, None, 60)
    for ties in (0.0, 1.0, torch.nan):
        assert_keeps(torch.full_like(products, ties), bias, None, None, 60)


@on_each_device
def test_the_bound_may_lie_many_octaves_below_the_largest(device) -> None:
    exponents = torch.arange(-126.0, 127.0, device=device)
    products = torch.stack((exponents.exp2(), -exponents.exp2()))
    products[1, 0] = torch.inf
    bias = torch.zeros(len(exponents), device=device)
    for k in (1, 2, 100, 252):
        assert_keeps(products, bias, None, None, k)


@on_each_device
def test_a_kept_value_that_is_rounded_to_zero_has_a_gradient(device) -> None:
    products = torch.tensor([[2.0**-14, -1.0, 2.0, -9.0]], device=device).half()
    bias = torch.tensor([-(2.0**-14) + 2.0**-30, 1.0, -1.0, 0.0], device=device)
    # The first h is 2^-30, too small for float16.
    kept = keep_largest(products, bias, None, None, 3)
    assert products.tolist() == [[0, 0, 1, 0]]
    gradients = torch.ones(1, 4, device=device, dtype=torch.float16)
    sums = at_kept(gradients, kept, wants_sums=True)
    assert gradients.tolist() == [[1, 1, 1, 0]]
    assert sums is not None
    assert sums.tolist() == [1, 1, 1, 0]


@generated(N_EXAMPLES)
@given(
    n_latents=st.integers(1, 700),
    share=st.floats(0, 1),
    n_values=st.integers(1, 40),
    dtype=st.sampled_from(list(TOLERANCE)),
    has_norms=st.booleans(),
    share_allowed=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
@on_each_device
def test_any_ties_are_broken_by_the_smaller_latent(
    device, n_latents, share, n_values, dtype, has_norms, share_allowed, seed
) -> None:
    generator = torch.Generator().manual_seed(seed)
    products = integers(generator, -n_values, n_values, 3, n_latents, device=device).to(dtype)
    bias = integers(generator, -1, 2, n_latents, device=device)
    norms = integers(generator, 1, 3, n_latents, device=device) if has_norms else None
    is_allowed = torch.rand(n_latents, generator=generator).to(device) < share_allowed
    assert_keeps(products, bias, norms, is_allowed, 1 + int(share * (n_latents - 1)))


@on_each_device
@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (33, 257), (70, 17)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_zero_where_nothing_is_kept(device, shape, dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(*shape, generator=generator).to(device, dtype)
    gradients[0, 0] = torch.nan  # where nothing is kept
    is_kept = torch.rand(*shape, generator=generator).to(device) < 0.5
    is_kept[0, 0] = False
    expected = torch.where(is_kept, gradients, 0)
    assert at_kept(gradients.clone(), as_bits(is_kept), wants_sums=False) is None
    sums = at_kept(gradients, as_bits(is_kept), wants_sums=True)
    assert torch.equal(gradients, expected)
    assert sums is not None
    assert relative_error(sums, expected.double().sum(0), expected.double().abs().sum(0)) < 1e-6


# --- rows


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("latent_major", [True, False])
@pytest.mark.parametrize("d_in", [1, 70, 1030])
def test_rows_that_are_not_used_are_neither_read_nor_written(on, dtype, latent_major, d_in) -> None:
    use_triton, device = on[0] == "triton", on[1]
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    matrix = randn(150, d_in).to(dtype)
    matrix = matrix if latent_major else matrix.T.contiguous().T
    latents = torch.randperm(150, generator=generator)[:90].to(device)
    is_used = (torch.rand(90, generator=generator) < 0.7).to(device)
    latents[~is_used] = latents[is_used][0]  # which is used, too
    used = latents[is_used]

    taken = take_rows(matrix, latents, torch.bfloat16, is_used=is_used, use_triton=use_triton)
    assert taken.dtype == torch.bfloat16
    assert not taken[~is_used].any()
    # The interpreter cuts off what bfloat16 does not hold.
    assert relative_error(taken[is_used], matrix[used].double()) < 2**-7

    factors = randn(90).masked_fill(~is_used, 0)
    summed = sum_rows(matrix, latents, factors, is_used=is_used, use_triton=use_triton)
    terms = matrix[used].double() * factors[is_used].double().unsqueeze(-1)
    assert summed.dtype == torch.float32
    tolerance = 5e-6 if dtype == torch.float32 or use_triton else 2**-7
    assert relative_error(summed, terms.sum(0), terms.abs().sum(0)) < tolerance

    rows = randn(90, d_in).masked_fill(~is_used.unsqueeze(-1), 0)
    into = matrix.contiguous()
    expected = into.double().index_add(0, used, rows[is_used].double())
    before = into.clone()
    add_rows(into, latents, rows, is_used=is_used, use_triton=use_triton)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-6
    assert relative_error(into, expected) < tolerance
    others = torch.ones(150, dtype=torch.bool, device=device)
    others[used] = False
    assert torch.equal(into[others], before[others])


@every_backend
def test_all_rows_are_used_where_nothing_says_otherwise(on) -> None:
    use_triton = on[0] == "triton"
    matrix = torch.arange(12.0, device=on[1]).view(4, 3)
    latents = torch.tensor([3, 0], device=on[1])
    factors = torch.tensor([2.0, 1.0], device=on[1])
    by = {"is_used": None, "use_triton": use_triton}
    assert take_rows(matrix, latents, torch.float32, **by).tolist() == [[9, 10, 11], [0, 1, 2]]
    assert sum_rows(matrix, latents, factors, **by).tolist() == [18, 21, 24]
    add_rows(matrix, latents, torch.ones(2, 3, device=on[1]), **by)
    assert matrix[[0, 1, 3]].tolist() == [[1, 2, 3], [3, 4, 5], [10, 11, 12]]


def test_rows_of_six_million_latents_fit_a_grid(monkeypatch) -> None:
    # So many latents of one of four processes were too many programs for a grid's second axis.
    n, matrix = 6_000_000, torch.zeros(1, 8)
    latents, factors = torch.zeros(n, dtype=torch.int64), torch.zeros(n)
    grids = []

    def check(kernel, grid, *arguments, **options):
        launch.Launch(kernel, grid)
        grids.append(grid)

    monkeypatch.setattr(rows_kernels, "launch", check)
    by = {"is_used": None, "use_triton": True}
    sum_rows(matrix.expand(n, 8), latents, factors, **by)
    take_rows(matrix.expand(n, 8), latents, torch.bfloat16, **by)
    add_rows(torch.zeros(n, 1), latents, torch.zeros(n, 1), **by)
    assert len(grids) == 2 + 1 + 1


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("has_unused", [True, False])
def test_rows_of_several_launches_are_all_summed(device, has_unused, monkeypatch) -> None:
    monkeypatch.setattr(rows_kernels, "MOST_PROGRAMS", (1, 2))
    n = 5 * rows_kernels.SUM_STEPS * rows_kernels.SUM_ROWS + 3
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(500, 20, generator=generator)
    latents = torch.randint(500, (n,), generator=generator)
    factors = torch.randn(n, generator=generator)
    is_used = torch.rand(n, generator=generator) < 0.5 if has_unused else None
    inputs = [matrix, latents, is_used, factors]
    found = rows_kernels.sum_rows(*[None if x is None else x.to(device) for x in inputs])
    if is_used is not None:
        factors = factors * is_used
    exact = matrix[latents].double().T @ factors.double()
    assert relative_error(found.cpu(), exact) < 1e-6


@pytest.mark.parametrize(("grid", "axis"), [((2**31,), 0), ((1, 65536), 1), ((1, 1, 65536), 2)])
def test_more_programs_than_a_grid_takes_are_refused_by_name(grid, axis) -> None:
    message = rf"_sum_rows_kernel would take {grid[axis]} programs along axis {axis}, expected at"
    with pytest.raises(ValueError, match=message):
        launch.launch(rows_kernels._sum_rows_kernel, grid, [torch.zeros(1)])


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_are_added_to_what_counts_as_zero(on, dtype) -> None:
    matrix = torch.arange(12.0, device=on[1], dtype=dtype).view(4, 3)
    matrix[1] = torch.nan if on[0] == "triton" else 0.0
    latents = torch.tensor([3, 1, 0], device=on[1])
    is_used = torch.tensor([True, True, False], device=on[1])
    counts_as_zero = torch.tensor([False, True, False, False], device=on[1])
    rows = torch.tensor([[1.0], [2.0], [0.0]], device=on[1]).expand(3, 3)
    add_rows(
        matrix,
        latents,
        rows,
        is_used=is_used,
        counts_as_zero=counts_as_zero,
        use_triton=on[0] == "triton",
    )
    assert matrix.tolist() == [[0, 1, 2], [2, 2, 2], [6, 7, 8], [10, 11, 12]]


@every_backend
def test_living_rows_may_hold_anything(on) -> None:
    matrix = torch.full((4, 3), torch.nan, device=on[1])
    matrix[1] = 1.0
    latents = torch.tensor([0, 1], device=on[1])
    is_used = torch.tensor([False, True], device=on[1])
    by = {"is_used": is_used, "use_triton": on[0] == "triton"}
    assert take_rows(matrix, latents, torch.float32, **by).tolist() == [[0, 0, 0], [1, 1, 1]]
    factors = torch.tensor([0.0, 2.0], device=on[1])
    assert sum_rows(matrix, latents, factors, **by).tolist() == [2, 2, 2]


# --- the error


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_error_is_squared_and_scaled(device, dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    decoded = torch.randn(70, 130, generator=generator).to(device, dtype)
    residual = torch.randn(70, 130, generator=generator).to(device)
    error = decoded.double() + residual.double()
    scale = torch.tensor(0.37, device=device)
    loss = scaled_error(decoded, residual, scale)
    assert relative_error(loss, error.square().sum()) < 1e-6
    assert relative_error(decoded, 0.37 * error) < (1e-6 if dtype == torch.float32 else 2**-7)
    residual[3, 5] = torch.inf
    assert scaled_error(decoded, residual, scale) == torch.inf
