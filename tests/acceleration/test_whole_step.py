"""A whole step by kernels against one by PyTorch, as functions of tensors."""

from dataclasses import replace

import pytest
import torch
from ops.comparison import KERNEL_DEVICES
from training.comparison import B, F, K, case

from sae_lens_flex.acceleration.whole_step import (
    Moments,
    Settings,
    Trained,
    WholeStep,
    _update,
    whole_step,
)
from sae_lens_flex.ops.kernels.adam import Adam
from sae_lens_flex.training.requests import Gradients, WantedGradients, Weights
from sae_lens_flex.training.shards import WHOLE, Whole

SETTINGS = {
    "defaults": Adam((0.9, 0.999), 1e-8),
    "coupled": Adam((0.0, 0.9), 1e-6, weight_decay=0.1, maximize=True),
    "decoupled": Adam((0.9, 0.99), 1e-4, weight_decay=0.1, decoupled_weight_decay=True),
}
WANTED = WantedGradients(*[True] * 4, *[False] * 3)
on_kernel_devices = pytest.mark.parametrize("device", KERNEL_DEVICES)


class OneOfTwo(Whole):
    """A process beside another one that has the same tensors."""

    is_sharded = True

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 2


def trained(weights: Weights, wanted: tuple[bool, ...]) -> Trained:
    generator = torch.Generator().manual_seed(3)

    def moments(weight: torch.Tensor) -> Moments:
        state = [torch.empty_like(weight, device="cpu") for _ in range(2)]
        for each in state:
            each.uniform_(1e-4, 1e-2, generator=generator)
        return Moments(*(each.to(weight.device) for each in state), weight.new_full((), 5.0))

    weights = Weights(*(torch.empty_like(weight).copy_(weight) for weight in weights))
    each = zip(weights, wanted, strict=True)
    return Trained(
        weights,
        tuple(moments(weight) if is_wanted else None for weight, is_wanted in each),
        weights.b_enc.new_zeros(F),
        weights.b_enc.new_full((), 0.01),
    )


def assert_same(found: Trained, expected: Trained, *, tolerance: float) -> None:
    """Compare what a step writes; differences are relative to a tensor's largest element."""

    def compare(tensor: torch.Tensor, other: torch.Tensor) -> None:
        assert (tensor - other).abs().max() <= tolerance * other.abs().max()

    for weight, other in zip(found.weights, expected.weights, strict=True):
        compare(weight, other)
    for state, other in zip(found.moments, expected.moments, strict=True):
        assert (state is None) == (other is None)
        if state is not None and other is not None:
            assert state.step == other.step == 6
            compare(state.exp_avg, other.exp_avg)
            compare(state.exp_avg_sq, other.exp_avg_sq)


@on_kernel_devices
@pytest.mark.parametrize("shards", [WHOLE, OneOfTwo()], ids=["alone", "of two"])
@pytest.mark.parametrize(
    "wanted",
    [
        (True, True, True, True),
        (True, False, True, False),
        (False, False, False, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("adam", SETTINGS.values(), ids=SETTINGS)
def test_update_by_kernels_is_that_by_pytorch(adam, wanted, shards, device) -> None:
    made = case(("torch", device))
    generator = torch.Generator().manual_seed(1)
    for norm in (0.1, 10.0):
        gradients = Gradients(
            *(
                torch.empty_like(weight).copy_(torch.randn(weight.shape, generator=generator))
                * (norm / 10)
                if is_wanted
                else None
                for weight, is_wanted in zip(made.weights, wanted, strict=True)
            )
        )
        both = []
        for use_triton in (True, False):
            both.append(trained(made.weights, wanted))
            spec = replace(made.spec, use_triton=use_triton)
            _update(both[-1], Gradients(*map(cloned, gradients)), spec, adam, shards)
        # The two clip and average in other ways, which round differently.
        assert_same(*both, tolerance=4 * 2**-23)


def cloned(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else torch.empty_like(tensor).copy_(tensor)


@on_kernel_devices
@pytest.mark.parametrize(
    "kind",
    [
        {"levels": "every"},
        {"levels": "last"},
        {"levels": "last", "over_batch": True, "k": K * B},
    ],
    ids=["hierarchical", "topk", "batchtopk"],
)
@pytest.mark.parametrize("most_dead", [0, 2, F])  # None are dead, more than asked for, or fewer.
def test_whole_step_by_kernels_is_that_by_pytorch(most_dead, kind, device, monkeypatch) -> None:
    adam = SETTINGS["decoupled"]
    new_empty = torch.Tensor.new_empty
    results: list[tuple[Trained, WholeStep]] = []
    for backend in ("triton", "torch"):
        made = case((backend, device), n_dead=3, **kind)
        start = trained(made.weights, (True,) * 4)
        if most_dead > 0:
            # Some of them fire in this step, so the reconstruction has a gradient of their rows.
            start.since_fired[::2] = start.since_fired[made.dead] = 9
        settings = Settings(adam, dead_feature_window=3, aux_loss_coefficient=0.5)
        if backend == "triton":  # What is left as it was is seen.
            monkeypatch.setattr(
                torch.Tensor, "new_empty", lambda *a, **b: unlike_any(new_empty(*a, **b))
            )
        results.append(
            (start, whole_step(start, made.inputs, made.spec, WANTED, settings, most_dead))
        )
        monkeypatch.undo()
    (by_kernels, step), (by_torch, expected) = results
    assert_same(by_kernels, by_torch, tolerance=1e-5)
    torch.testing.assert_close(step.losses, expected.losses)
    assert (step.losses[2] > 0) == (most_dead > 0)
    assert torch.equal(step.counts, expected.counts)


def unlike_any(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor
