"""The largest pre-activations of a whole batch, against a sort of all of them."""

import pytest
import torch

from sae_lens_flex.ops import batch_selection, selection
from sae_lens_flex.ops.batch_selection import select_over_batch
from sae_lens_flex.ops.codes import Code
from sae_lens_flex.ops.kernels import candidates as kernels
from sae_lens_flex.ops.selection import Encoder

from .comparison import every_backend

B, D, F = 7, 6, 41


def encode(
    hidden: torch.Tensor, n_kept: int, on, *, norms: torch.Tensor | None = None, bias=None
) -> Code:
    """The code of a batch whose products with the encoder are `hidden`."""
    n_samples, n_latents = hidden.shape
    device = on[1]
    rows = torch.eye(n_samples, dtype=hidden.dtype, device=device)
    bias = hidden.new_zeros(n_latents) if bias is None else bias
    norms = None if norms is None else norms.to(device)
    encoder = Encoder(hidden.to(device), bias.to(device), norms)
    return select_over_batch(rows, encoder, n_kept, use_triton=on[0] == "triton")


def assert_keeps_the_first_largest(code: Code, hidden: torch.Tensor, norms, n_kept: int) -> None:
    compared = hidden if norms is None else hidden * norms
    order = compared.flatten().sort(descending=True, stable=True).indices[:n_kept]
    order = order[~(compared.flatten()[order] <= 0)].sort().values
    n_kept, n_latents = len(order), hidden.shape[1]
    assert code.starts is not None
    assert code.starts.dtype == torch.int64
    samples = order // n_latents
    expected = torch.searchsorted(samples, torch.arange(len(hidden) + 1))
    assert torch.equal(code.starts.cpu(), expected)
    assert torch.equal(code.latents[:n_kept].cpu().long(), order % n_latents)
    values = code.values[:n_kept].cpu()
    torch.testing.assert_close(values, hidden.flatten()[order], rtol=0, atol=0, equal_nan=True)
    assert not code.latents[n_kept:].any()
    assert not code.values[n_kept:].any()


def random_hidden(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["one_chunk", "chunks", "blocks"])
def chunks(request, monkeypatch) -> None:
    if request.param == "blocks":  # of which a kernel takes one after the other
        monkeypatch.setattr(kernels, "BLOCK", 2)
    if request.param == "chunks":
        monkeypatch.setattr(selection, "CPU_CHUNK_BYTES", 2 * F * 4)
        monkeypatch.setattr(selection, "GPU_CHUNK_BYTES", 2 * F * 4)
        monkeypatch.setattr(selection, "GPU_CHUNK_ROWS", 1)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("n_kept", [0, 1, 70, B * F])
@pytest.mark.parametrize("has_norms", [False, True])
@every_backend
def test_largest_are_kept(on, n_kept, has_norms) -> None:
    hidden = random_hidden(B, F)
    norms = 0.5 + torch.rand(F, generator=torch.Generator().manual_seed(1)) if has_norms else None
    code = encode(hidden, n_kept, on, norms=norms)
    assert_keeps_the_first_largest(code, hidden, norms, n_kept)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("n_kept", [1, 30, 100])
@every_backend
def test_of_equal_ones_the_first_are_kept(on, n_kept) -> None:
    hidden = random_hidden(B, F).mul(2).round().div(2)
    assert_keeps_the_first_largest(encode(hidden, n_kept, on), hidden, None, n_kept)
    hidden = torch.full((B, F), 0.5)
    assert_keeps_the_first_largest(encode(hidden, n_kept, on), hidden, None, n_kept)


@pytest.mark.usefixtures("chunks")
@every_backend
def test_only_positive_ones_are_kept(on) -> None:
    hidden = random_hidden(B, F) - 1.5
    assert 0 < int((hidden > 0).sum()) < 60
    assert_keeps_the_first_largest(encode(hidden, 60, on), hidden, None, 60)
    for hidden in (-random_hidden(B, F).abs(), torch.zeros(B, F)):
        code = encode(hidden, 60, on)
        assert_keeps_the_first_largest(code, hidden, None, 60)
        assert code.starts is not None
        assert not code.starts.any()


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("row", [0, 3, B - 1])
@every_backend
def test_a_sample_may_have_all_of_them(on, row) -> None:
    hidden = random_hidden(B, F)
    hidden[row] = hidden[row].abs() + 10
    assert_keeps_the_first_largest(encode(hidden, F, on), hidden, None, F)
    assert_keeps_the_first_largest(encode(hidden, F + 2, on), hidden, None, F + 2)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("n_kept", [1, 2, 40])
@every_backend
def test_nan_and_infinity_are_kept(on, n_kept) -> None:
    hidden = torch.zeros(B, F)
    hidden[0, 3:30] = random_hidden(27).abs()
    bias = torch.zeros(F)
    bias[7], bias[9] = torch.nan, torch.inf
    hidden_and_bias = hidden + bias
    code = encode(hidden, n_kept, on, bias=bias)
    assert_keeps_the_first_largest(code, hidden_and_bias, None, n_kept)


def test_of_many_candidates_few_are_held(monkeypatch) -> None:
    monkeypatch.setattr(selection, "CPU_CHUNK_BYTES", F * 4)
    n_held, first_largest = [], batch_selection.first_largest

    def counted(candidates, n):
        n_held.append(len(candidates.latents))
        return first_largest(candidates, n)

    monkeypatch.setattr(batch_selection, "first_largest", counted)
    hidden = random_hidden(60, F).abs()
    assert_keeps_the_first_largest(encode(hidden, 50, ("torch", "cpu")), hidden, None, 50)
    assert 2 <= len(n_held) <= 20
    assert max(n_held) <= 2 * 50 + F
