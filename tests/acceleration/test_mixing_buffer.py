"""The mixing buffer: its batches are SAELens's, and it takes less memory."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from sae_lens.training import mixing_buffer as saelens
from torch.utils._python_dispatch import TorchDispatchMode

import sae_lens_flex
from sae_lens_flex.acceleration import mixing_buffer as mixing
from sae_lens_flex.acceleration.mixing_buffer import mixing_buffer

CHUNKS = {  # how many activations the loader yields at a time
    "smaller-than-a-batch": (3,) * 40,
    "none-now-and-then": (0, 3, 0, 7, 0, 0, 20, 5, 0, 11),
    "growing": (1, 5, 9, 17, 33, 65, 129),
    "larger-than-the-buffer": (100, 90, 110, 30, 100),
    "too-few": (4, 2),
    "not-any": (),
}


def chunks(sizes: Sequence[int], *width: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Return chunks of activations, each of which is its number in the order of the chunks."""
    numbers = torch.arange(sum(sizes)).to(dtype)
    return [part.view(-1, *(1 for _ in width)).expand(-1, *width) for part in numbers.split(sizes)]


def batches_of(function: Any, *arguments: Any, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [batch.clone() for batch in function(*arguments)]


@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("width", [(), (3, 2)], ids=["1d", "3d"])
def test_batches_are_saelens_bit_for_bit(sizes, width) -> None:
    n_batches = 0
    for buffer_size, batch_size, mix_fraction in itertools.product(
        (8, 40), (3, 8), (0, 0.25, 0.5, 0.9, 1)
    ):
        expected, batches = (
            batches_of(function, buffer_size, batch_size, iter(chunks(sizes, *width)), mix_fraction)
            for function in (saelens.mixing_buffer, mixing_buffer)
        )
        torch.testing.assert_close(batches, expected, rtol=0, atol=0)
        n_batches += len(batches)
    assert n_batches or not sum(sizes)


def test_default_mix_fraction_is_saelens() -> None:
    expected, batches = (
        batches_of(function, 40, 8, iter(chunks([30] * 5, 2)))
        for function in (saelens.mixing_buffer, mixing_buffer)
    )
    assert len(batches) > 10
    torch.testing.assert_close(batches, expected, rtol=0, atol=0)


@pytest.mark.gpu
def test_on_a_gpu_only_the_permutation_is_another(monkeypatch) -> None:
    arguments = (40, 8, chunks([30] * 5, 2), 0.5)
    expected = batches_of(saelens.mixing_buffer, *arguments)
    randperm = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, device, generator: randperm(n).to(device))
    monkeypatch.setattr(mixing, "_new_generator", lambda device: None)
    on_gpu = (40, 8, [chunk.cuda() for chunk in arguments[2]], 0.5)
    batches = batches_of(mixing_buffer, *on_gpu)
    assert batches[0].is_cuda
    torch.testing.assert_close([b.cpu() for b in batches], expected, rtol=0, atol=0)


@pytest.mark.gpu
def test_seed_decides_the_batches_on_a_gpu() -> None:
    arguments = (40, 8, [chunk.cuda() for chunk in chunks([30] * 5, 2)], 0.5)
    of_seeds = [batches_of(mixing_buffer, *arguments, seed=seed) for seed in (1, 1, 2)]
    first, again, other = map(torch.stack, of_seeds)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("mix_fraction", [0, 0.5, 1])
def test_batch_is_never_overwritten(mix_fraction) -> None:
    held, copies = [], []
    for batch in mixing_buffer(40, 8, iter(chunks([30] * 20, 2)), mix_fraction):
        held.append(batch)
        copies.append(batch.clone())
    assert len(held) > 50
    torch.testing.assert_close(held, copies, rtol=0, atol=0)
    assert len({batch.untyped_storage().data_ptr() for batch in held}) == len(held)
    # What a user writes into a batch reaches no other one.
    served = [row for batch in copies for row in batch[:, 0].tolist()]
    assert len(set(served)) == len(served)
    for batch in mixing_buffer(40, 8, iter(chunks([30] * 20, 2)), mix_fraction):
        assert (batch >= 0).all()
        batch.fill_(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dtype_is_that_of_the_activations(dtype) -> None:
    batches = list(mixing_buffer(16, 8, iter(chunks([30] * 2, 2, dtype=dtype))))
    assert batches
    assert {batch.dtype for batch in batches} == {dtype}


def test_activations_of_several_dtypes_get_the_one_that_holds_all() -> None:
    mixed = [torch.arange(10, dtype=torch.half) / 8, torch.full((10,), 1e6)]
    expected, batches = (
        batches_of(function, 20, 5, iter(mixed))
        for function in (saelens.mixing_buffer, mixing_buffer)
    )
    torch.testing.assert_close(batches, expected, rtol=0, atol=0)
    assert max(batch.max().item() for batch in batches) == 1e6


class Allocations(TorchDispatchMode):
    """Notes of how many rows the results of operations are, if they have a second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        is_new = not any(alias.alias_info for alias in func._schema.returns)
        if is_new and isinstance(result, torch.Tensor) and result.ndim == 2:
            self.rows.append(len(result))
        return result


def test_memory_is_allocated_once() -> None:
    with Allocations() as allocations:
        batches = mixing_buffer(400, 8, iter([torch.zeros(32, 4)] * 200))
        first = next(iter(batches))
        assert max(allocations.rows) == 399 + 32
        allocations.rows.clear()
        n_batches = sum(1 for _ in batches)
    assert len(first) == 8
    assert n_batches > 500
    assert set(allocations.rows) == {8}


def test_nothing_waits_for_the_device() -> None:
    # On this device no value exists, so whoever asks for one gets an error.
    chunk = torch.empty(30, 2, device="meta")
    batches = list(mixing_buffer(40, 8, iter([chunk] * 10), 0.5))
    assert len(batches) > 20
    assert {(batch.device.type, batch.shape) for batch in batches} == {("meta", (8, 2))}


@pytest.mark.parametrize(
    ("buffer_size", "batch_size", "mix_fraction", "message"),
    [
        (4, 5, 0.5, "Buffer size must be greater than or equal to batch size"),
        (4, 4, -0.1, r"mix_fraction must be in \[0, 1\]"),
        (4, 4, 1.1, r"mix_fraction must be in \[0, 1\]"),
    ],
)
def test_bad_arguments_raise_as_in_saelens(buffer_size, batch_size, mix_fraction, message) -> None:
    for function in (saelens.mixing_buffer, mixing_buffer):
        batches = function(buffer_size, batch_size, iter(chunks([8])), mix_fraction)
        with pytest.raises(ValueError, match=message):
            next(iter(batches))


@pytest.mark.parametrize("other", [torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, 2, 1)])
def test_activations_of_another_width_raise(other) -> None:
    with pytest.raises(ValueError, match=r"activations_loader .* expected \[n, 2\] on cpu"):
        list(mixing_buffer(40, 8, iter([torch.zeros(3, 2), other])))


def test_loader_that_leaves_inference_mode_on_gets_saelens_batches() -> None:
    def loader() -> Iterator[torch.Tensor]:
        first, *others = chunks([30] * 6, 2)
        with torch.inference_mode():
            yield first + 0  # The mode is on until the loader goes on.
        yield from others

    expected, batches = (
        batches_of(function, 20, 8, loader()) for function in (saelens.mixing_buffer, mixing_buffer)
    )
    assert len(batches) > 15
    torch.testing.assert_close(batches, expected, rtol=0, atol=0)


def test_several_hooks_get_the_same_rows() -> None:
    def activations() -> Iterator[dict[str, torch.Tensor]]:
        for chunk in chunks([30] * 10, 3):
            yield {"a": chunk, "b": -chunk[:, :2]}

    arguments = (40, 8, ["a", "b"])
    torch.manual_seed(0)
    expected = list(
        saelens.multi_hook_concat_split_iter(40, 8, activations(), hook_names=["a", "b"])
    )
    torch.manual_seed(0)
    with sae_lens_flex.accelerate():
        batches = list(
            saelens.multi_hook_concat_split_iter(*arguments[:2], activations(), arguments[2])
        )
    assert len(batches) > 20
    for batch, other in zip(batches, expected, strict=True):
        torch.testing.assert_close(batch, other, rtol=0, atol=0)
        assert torch.equal(batch["a"][:, :2], -batch["b"])
