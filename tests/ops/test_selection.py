"""The sparse encoder and the choice of the K largest against their definitions in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sae_lens_flex.ops import selection
from sae_lens_flex.ops.codes import Code
from sae_lens_flex.ops.kernels import kept, launch
from sae_lens_flex.ops.kernels import selection as kernels
from sae_lens_flex.ops.selection import (
    Columns,
    Encoder,
    chunk_rows,
    empty_code,
    largest,
    select,
    select_from,
)

from .comparison import DEVICES, KERNEL_DEVICES, every_backend, generated, relative_error

# (B, D, F, K): groups that do not divide F, one latent a group, K = F, one of everything.
SHAPES = [
    (1, 1, 1, 1),
    (5, 7, 100, 3),
    (3, 33, 17, 17),
    (4, 20, 70, 30),
    (2, 300, 1000, 16),
]
# Of float32 sums over D; of a pre-activation rounded to 16 bits.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
# The interpreter takes up to a second an example.
N_EXAMPLES = 300 if torch.cuda.is_available() else 8


def shape_id(shape: tuple[int, ...]) -> str:
    return "-".join(f"{name}{size}" for name, size in zip("BDFK", shape, strict=True))


def random_inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    has_norms: bool = True,
) -> tuple[torch.Tensor, Encoder]:
    """Rows and an encoder that is stored latent by latent."""
    n_samples, d_in, n_latents, _ = shape
    generator = torch.Generator().manual_seed(seed)

    def randn(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(device, dtype)

    rows, weight, bias = randn(n_samples, d_in), randn(n_latents, d_in).T, randn(n_latents)
    norms = torch.rand(n_latents, generator=generator) + 0.5
    return rows, Encoder(weight, bias, norms.to(device, dtype) if has_norms else None)


def first_of_equals(compared: torch.Tensor, k: int) -> torch.Tensor:
    """The definition: the k largest of each row, of equal ones the first."""
    return compared.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def assert_selects(
    rows: torch.Tensor, encoder: Encoder, k: int, on: tuple[str, str], tolerance: float = 5e-6
) -> Code:
    code = select(rows, encoder, k, use_triton=on[0] == "triton")
    latents = code.latents.cpu()
    assert latents.shape == code.values.shape == (len(rows), k)
    assert latents.dtype == torch.int64
    assert code.values.dtype == torch.promote_types(rows.dtype, encoder.bias.dtype)
    assert all(len(set(row)) == k for row in latents.tolist())

    exact_rows, weight, bias = (t.cpu().double() for t in (rows, encoder.weight, encoder.bias))
    hidden = exact_rows @ weight + bias
    compared = hidden if encoder.norms is None else hidden * encoder.norms.cpu().double()
    # Where two latents are as good as equal, either may be the one: the values must be the largest.
    difference = compared.gather(-1, latents) - compared.topk(k).values
    assert difference.abs().max() <= tolerance * compared.abs().max()
    magnitude = exact_rows.abs() @ weight.abs() + bias.abs()  # the same sums, all terms positive
    error = relative_error(
        code.values, hidden.gather(-1, latents), magnitude.gather(-1, latents), rows.dtype
    )
    assert error < tolerance
    return code


@pytest.mark.pairs
@every_backend
@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_latents_and_values_match_float64_definition(on, shape, has_norms) -> None:
    rows, encoder = random_inputs(shape, device=on[1], has_norms=has_norms)
    assert_selects(rows, encoder, shape[-1], on)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_columns", [1, 70, 2500])
def test_products_of_some_latents_are_kept(n_columns, dtype, device, monkeypatch) -> None:
    for name in ("CPU_CHUNK_BYTES", "GPU_CHUNK_BYTES", "GPU_CHUNK_ROWS"):
        monkeypatch.setattr(selection, name, 1)  # a chunk of each sample
    rows, encoder = random_inputs((3, 8, 3000, 5), dtype, device)
    latents = torch.randperm(3000, generator=torch.Generator().manual_seed(2))[:n_columns]
    latents = torch.cat((latents, latents[:1])).to(device)  # one of them twice
    columns = Columns(latents, rows.new_full((3, len(latents)), torch.nan))
    code = select(rows, encoder, 5, use_triton=True, columns=columns)
    without = select(rows, encoder, 5, use_triton=True)
    assert torch.equal(code.latents, without.latents)
    assert torch.equal(code.values, without.values)
    exact = rows.cpu().double() @ encoder.weight.cpu().double()[:, latents.cpu()]
    assert relative_error(columns.products, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("device", DEVICES)
def test_float64(device) -> None:
    rows, encoder = random_inputs((5, 40, 100, 3), torch.float64, device)
    assert_selects(rows, encoder, 3, ("torch", device), 1e-14)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights(on, dtype) -> None:
    rows, encoder = random_inputs((5, 40, 100, 3), dtype, on[1])
    assert_selects(rows, encoder, 3, on, TOLERANCE[dtype])


@every_backend
def test_products_in_a_lower_precision_than_the_weights(on) -> None:
    rows, encoder = random_inputs((5, 40, 100, 3), device=on[1])
    rows = rows.bfloat16()  # as under autocast
    code = select(rows, encoder, 3, use_triton=on[0] == "triton")
    hidden = (rows @ encoder.weight.bfloat16()) + encoder.bias
    assert code.values.dtype == torch.float32
    assert relative_error(code.values, hidden.gather(-1, code.latents).cpu().double()) < 1e-7
    assert torch.equal(code.latents, first_of_equals(hidden * encoder.norms, 3))


@every_backend
def test_strided_encoders(on) -> None:
    rows, encoder = random_inputs((3, 8, 100, 3), device=on[1])

    def every_other(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.repeat_interleave(2, dim=-1)[..., ::2]

    expected = select(rows, encoder, 3, use_triton=on[0] == "triton")
    for weight in (encoder.weight.contiguous(), every_other(encoder.weight)):
        strided = Encoder(weight, every_other(encoder.bias), every_other(encoder.norms))
        assert torch.equal(assert_selects(rows, strided, 3, on).latents, expected.latents)


@every_backend
def test_one_latent_of_every_sample(on) -> None:
    rows, encoder = random_inputs((9, 7, 20, 3), device=on[1])
    encoder.bias[5] = 100.0
    assert assert_selects(rows, encoder, 3, on).latents[:, 0].eq(5).all()


@every_backend
def test_no_norms_are_norms_of_one(on) -> None:
    rows, encoder = random_inputs((5, 7, 100, 3), device=on[1], has_norms=False)
    code = select(rows, encoder, 3, use_triton=on[0] == "triton")
    with_ones = encoder._replace(norms=torch.ones_like(encoder.bias))
    expected = select(rows, with_ones, 3, use_triton=on[0] == "triton")
    assert torch.equal(code.latents, expected.latents)
    assert torch.equal(code.values, expected.values)


# --- ties


def assert_takes_the_first_of_equals(
    products: torch.Tensor, encoder: Encoder, k: int, on: tuple[str, str], is_sorted: bool = True
) -> None:
    """Compare with the definition. All sums and products must be exact in the tensors' dtype."""
    compared = products + encoder.bias
    if encoder.norms is not None:
        compared = compared * encoder.norms
    hidden, expected = products + encoder.bias, first_of_equals(compared, k)
    out = empty_code(len(products), k, products, encoder.bias)
    out.latents.fill_(-1)
    out.values.fill_(torch.nan)
    use_triton = on[0] == "triton"
    select_from(products.clone(), encoder, out, use_triton=use_triton, is_sorted=is_sorted)
    if is_sorted:
        assert torch.equal(out.latents, expected)
    assert torch.equal(out.latents.sort().values, expected.sort().values)
    torch.testing.assert_close(  # a NaN equals a NaN
        out.values, hidden.gather(-1, out.latents), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.pairs
@every_backend
@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("n_latents", [64, 1000])
def test_selection_is_exact_among_ties_and_extremes(on, has_norms, is_sorted, n_latents) -> None:
    generator = torch.Generator().manual_seed(0)
    products = torch.randn(9, n_latents, generator=generator).mul(2).round()
    products[1] = 0.0
    products[2] = -products[2].abs()
    products[3, ::2] = -0.0
    products[4, ::9] = torch.inf
    products[5, ::3] = -torch.inf
    products[6] = -torch.inf
    products[7, 1::9] = torch.inf
    products[7, ::30] = torch.nan
    products[8, 2::2] = torch.nan
    bias = torch.randn(n_latents, generator=generator).round().to(on[1])
    norms = torch.rand(n_latents, generator=generator).mul(4).round().add(1).to(on[1])
    encoder = Encoder(bias.new_empty(0), bias, norms if has_norms else None)
    assert_takes_the_first_of_equals(products.to(on[1]), encoder, 24, on, is_sorted)


@every_backend
@pytest.mark.parametrize(
    ("n_latents", "k", "dtype"),
    [
        (1, 1, torch.float32),
        (17, 17, torch.float32),
        (100, 1, torch.bfloat16),
        (257, 16, torch.float16),
        (1000, 24, torch.float32),
        (1000, 24, torch.bfloat16),
    ],
    ids=str,
)
def test_of_equal_latents_the_smaller_is_kept_and_comes_first(on, n_latents, k, dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    products = torch.zeros(6, n_latents)
    products[0] = torch.randint(-2, 3, (n_latents,), generator=generator)
    products[1] = torch.arange(n_latents) % 3
    products[2, n_latents // 2 :] = 1.0  # The k-th value ties with latents of every later group.
    products[3, ::7] = 1.0  # The largest of many groups are equal.
    products[4] = -products[3]
    products[5] = 5.0  # a whole row
    zeros = torch.zeros(n_latents, device=on[1], dtype=dtype)
    products = products.to(on[1], dtype)
    assert_takes_the_first_of_equals(products, Encoder(zeros, zeros, zeros + 2), k, on)


@every_backend
def test_norms_make_unequal_latents_equal(on) -> None:
    products = torch.tensor([[1.0, 2.0, 4.0, 2.0, 1.0, 8.0]], device=on[1])
    norms = torch.tensor([8.0, 4.0, 2.0, 1.0, 4.0, 1.0], device=on[1])
    zeros = torch.zeros(6, device=on[1])
    assert_takes_the_first_of_equals(products, Encoder(zeros, zeros, norms), 3, on)


@every_backend
def test_equal_columns_of_the_encoder_give_the_first_of_them(on) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-3, 4, (4, 5), generator=generator).float().to(on[1])
    columns = torch.randint(-3, 4, (5, 12), generator=generator).float()
    weight = columns.repeat(1, 9)[:, :100].to(on[1])  # Latents 12 apart are the same.
    encoder = Encoder(weight, torch.zeros(100, device=on[1]), torch.ones(100, device=on[1]))
    for dtype in (torch.float32, torch.bfloat16):  # The products are exact in both.
        code = select(rows.to(dtype), encoder, 30, use_triton=on[0] == "triton")
        assert torch.equal(code.latents, first_of_equals(rows @ weight, 30))


@generated(N_EXAMPLES)
@given(
    n_latents=st.integers(1, 700),
    share=st.floats(0, 1),
    n_values=st.integers(1, 40),
    dtype=st.sampled_from(list(TOLERANCE)),
    has_norms=st.booleans(),
    is_sorted=st.booleans(),
    seed=st.integers(0, 2**16),
)
@every_backend
def test_any_ties_are_broken_by_the_smaller_latent(
    on, n_latents, share, n_values, dtype, has_norms, is_sorted, seed
) -> None:
    k = 1 + int(share * (n_latents - 1))
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator).to(on[1], dtype)

    products = integers(-n_values, n_values, 3, n_latents)
    norms = integers(1, 3, n_latents) if has_norms else None
    encoder = Encoder(products, integers(-1, 2, n_latents), norms)
    assert_takes_the_first_of_equals(products, encoder, k, on, is_sorted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_largest_leaves_what_it_compares_as_it_is(device, dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    compared = torch.randint(-3, 4, (7, 50), generator=generator).to(device, dtype)
    compared[3] = torch.randn(50, generator=generator).to(compared)  # a row without equal values
    before = compared.clone()
    for k in (1, 20, 50):
        assert torch.equal(largest(compared, k), first_of_equals(compared, k))
        assert torch.equal(compared, before)


@every_backend
def test_a_nan_is_chosen_as_torch_chooses_it(on) -> None:
    products = torch.arange(64.0, device=on[1]).expand(2, -1).contiguous()
    products[1, 17] = torch.nan
    zeros = torch.zeros(64, device=on[1])
    out = Code(torch.full((2, 3), -1, device=on[1]), torch.full((2, 3), 0.0, device=on[1]))
    select_from(products, Encoder(zeros, zeros, None), out, use_triton=on[0] == "triton")
    assert out.latents.tolist() == [[63, 62, 61], [17, 63, 62]]


# --- memory


class RecordLargest(TorchDispatchMode):
    """Keeps the size of the largest tensor that a torch function returned."""

    n_bytes = 0

    def __torch_dispatch__(self, function, types, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.n_bytes = max(self.n_bytes, tensor.nbytes)
        return result


@every_backend
def test_pre_activations_of_the_whole_batch_never_exist(on, monkeypatch) -> None:
    n_bytes = 4 * 200 * 4  # of the pre-activations of 4 samples
    monkeypatch.setattr(selection, "CPU_CHUNK_BYTES", n_bytes)
    monkeypatch.setattr(selection, "GPU_CHUNK_BYTES", n_bytes)
    monkeypatch.setattr(selection, "GPU_CHUNK_ROWS", 1)
    rows, encoder = random_inputs((10, 4, 200, 3), device=on[1])
    with RecordLargest() as record:
        select(rows, encoder, 3, use_triton=on[0] == "triton")
    assert record.n_bytes <= n_bytes
    assert_selects(rows, encoder, 3, on)


@every_backend
def test_chunks_of_one_sample(on, monkeypatch) -> None:
    rows, encoder = random_inputs((7, 9, 100, 5), device=on[1])
    expected = select(rows, encoder, 5, use_triton=on[0] == "triton")
    monkeypatch.setattr(selection, "CPU_CHUNK_BYTES", 1)
    monkeypatch.setattr(selection, "GPU_CHUNK_BYTES", 1)
    monkeypatch.setattr(selection, "GPU_CHUNK_ROWS", 1)
    assert chunk_rows(7, 100, torch.float32, rows.device) == 1
    assert torch.equal(assert_selects(rows, encoder, 5, on).latents, expected.latents)


@pytest.mark.parametrize("device", DEVICES)
def test_chunks_are_as_equal_as_they_can_be(device) -> None:
    device = torch.device(device)
    n_latents = 2**20  # 4 MiB of float32 a sample
    most = max(selection.GPU_CHUNK_ROWS, 64) if device.type == "cuda" else 1
    assert chunk_rows(5 * most, n_latents, torch.float32, device) == most
    assert chunk_rows(most + 1, n_latents, torch.float32, device) == (most + 2) // 2
    assert chunk_rows(1, 2**40, torch.float32, device) == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rows_of_a_chunk_fit_an_axis_of_a_grid(device) -> None:
    # A narrow dictionary's chunk could have more rows than a grid's second axis takes programs.
    for n_latents in (1, 8, 100, 1000):
        rows = 2 * chunk_rows(10**8, n_latents, torch.bfloat16, torch.device(device))
        assert rows / kernels.MAXIMA_ROWS <= launch.MOST_PROGRAMS[1]
        assert rows / kept.ROWS <= launch.MOST_PROGRAMS[1]


@every_backend
def test_more_candidates_than_registers_hold_are_left_to_torch(on, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "MAX_BLOCK", 16)
    assert kernels.most_latents(3) < 100
    monkeypatch.setattr(kernels, "largest", None)
    monkeypatch.setattr(selection, "LATENTS_OF_A_PART", 17)
    rows, encoder = random_inputs((5, 7, 100, 3), device=on[1])
    assert_selects(rows, encoder, 3, on)


@pytest.mark.parametrize("max_block", [1, 7, 16, 64])
def test_registers_hold_what_the_kernels_need(max_block, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "MAX_BLOCK", max_block)
    for k in range(1, 70):
        for n_latents in range(k, 1500):
            group = kernels._group_size(n_latents, k)
            fits = max(k * group, -(-n_latents // group)) <= max_block
            assert fits == (n_latents <= kernels.most_latents(k))


@pytest.fixture
def in_parts(monkeypatch) -> None:
    """64 latents and more are too many for the kernels, for K = 3, 4 and 5."""
    monkeypatch.setattr(kernels, "MAX_BLOCK", 16)
    monkeypatch.setattr(selection, "LATENTS_OF_A_PART", 2)
    assert [kernels.most_latents(k) for k in (3, 4, 5)] == [48, 64, 20]


def choice(rows, encoder, k, *, whole: bool) -> Code:
    """Return what the kernels choose of all latents at once, or of parts."""
    with pytest.MonkeyPatch.context() as patch:
        if whole:
            patch.setattr(kernels, "MAX_BLOCK", 16384)
        return select(rows, encoder, k, use_triton=True)


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize(("n_latents", "k"), [(70, 3), (97, 5), (200, 4)])
def test_parts_of_the_latents_give_what_all_give(n_latents, k, has_norms, dtype, device) -> None:
    rows, encoder = random_inputs((5, 9, n_latents, k), dtype, device, has_norms=has_norms)
    # Equal latents in several parts, some of them smaller and some larger than the rest.
    encoder.weight[:, ::7] = encoder.weight[:, 1:2]
    encoder.bias[::7] = 1 + encoder.bias.max()
    if encoder.norms is not None:
        encoder.norms[::7] = 1
    found = choice(rows, encoder, k, whole=False)
    expected = choice(rows, encoder, k, whole=True)
    assert torch.equal(found.latents, expected.latents)
    # The interpreter cuts bfloat16 off where PyTorch and a GPU round.
    is_cut = dtype == torch.bfloat16 and device == "cpu"
    torch.testing.assert_close(found.values, expected.values, rtol=2**-7 if is_cut else 0, atol=0)
    assert_selects(rows, encoder, k, ("triton", device), TOLERANCE[dtype])


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_parts_choose_among_zeros_of_both_signs_and_nans_as_all_do(device) -> None:
    rows, encoder = random_inputs((5, 9, 200, 4), device=device)
    encoder.weight.zero_()
    encoder.bias.fill_(-1.0)
    encoder.bias[[20, 90, 130, 131, 199]] = torch.tensor([0.0, -0.0, 0.0, -0.0, 0.0]).to(device)
    found, expected = (choice(rows, encoder, 4, whole=whole) for whole in (False, True))
    assert torch.equal(expected.latents[0].cpu(), torch.tensor([20, 90, 130, 131]))
    assert torch.equal(found.latents, expected.latents)
    encoder.bias[[60, 180]] = torch.nan
    found, expected = (choice(rows, encoder, 4, whole=whole) for whole in (False, True))
    assert torch.equal(expected.latents[0].cpu(), torch.tensor([60, 180, 20, 90]))
    assert torch.equal(found.latents, expected.latents)


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("is_whole_numbers", [True, False])
def test_candidates_of_many_parts_are_merged_as_they_come(
    is_whole_numbers, device, monkeypatch
) -> None:
    rows, encoder = random_inputs((5, 9, 600, 5), device=device, has_norms=not is_whole_numbers)
    if is_whole_numbers:  # Many are then equal.
        rows, weight, bias = rows.round(), encoder.weight.round().clamp(-1, 1), encoder.bias.round()
        encoder = Encoder(weight, bias, None)
    n_candidates = []
    merge = selection.largest_candidates

    def record(candidates, norms, k):
        n_candidates.append(candidates.latents.shape[1])
        return merge(candidates, norms, k)

    monkeypatch.setattr(selection, "largest_candidates", record)
    monkeypatch.setattr(selection, "PARTS_AT_ONCE", 3)
    found = choice(rows, encoder, 5, whole=False)
    assert len(n_candidates) > 5
    assert max(n_candidates) <= (3 + 1) * 5
    expected = choice(rows, encoder, 5, whole=True)
    assert torch.equal(found.latents, expected.latents)
    assert torch.equal(found.values, expected.values)


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_parts_are_encoded_one_by_one(device) -> None:
    rows, encoder = random_inputs((5, 9, 200, 4), device=device)
    with RecordLargest() as record:
        select(rows, encoder, 4, use_triton=True)
    assert record.n_bytes < 5 * 200 * 4  # the pre-activations of all latents


@generated(N_EXAMPLES)
@given(
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 140), st.integers(1, 200)),
    share=st.floats(0, 1),
    dtype=st.sampled_from(list(TOLERANCE)),
    is_latent_major=st.booleans(),
    has_norms=st.booleans(),
    seed=st.integers(0, 2**16),
)
@every_backend
def test_any_input_matches_the_definition(
    on, sizes, share, dtype, is_latent_major, has_norms, seed
) -> None:
    n_samples, d_in, n_latents = sizes
    k = 1 + int(share * (n_latents - 1))
    shape = (n_samples, d_in, n_latents, k)
    rows, encoder = random_inputs(shape, dtype, on[1], seed, has_norms)
    if not is_latent_major:
        encoder = encoder._replace(weight=encoder.weight.contiguous())
    assert_selects(rows, encoder, k, on, TOLERANCE[dtype])
