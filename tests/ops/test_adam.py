"""Adam's kernels against Adam in float64, and against PyTorch."""

import math
from typing import Any

import pytest
import torch
from torch.nn.utils import get_total_norm

from sae_lens_flex.ops.kernels import adam
from sae_lens_flex.ops.kernels.adam import (
    BLOCK,
    MOST_SQUARES,
    SQUARES_BLOCK,
    Adam,
    Updated,
    adam_,
    squares,
)

from .comparison import KERNEL_DEVICES

SETTINGS: dict[str, Adam] = {
    "defaults": Adam((0.9, 0.999), 1e-8),
    "SAELens's": Adam((0.0, 0.999), 1e-8),
    "other betas": Adam((0.5, 0.9999), 1e-3),
    "no averages": Adam((0.0, 0.0), 1e-6),
    "eps 0": Adam((0.9, 0.999), 0.0),
    "coupled decay": Adam((0.9, 0.99), 1e-8, weight_decay=0.1),
    "decoupled decay": Adam((0.9, 0.99), 1e-8, 0.1, decoupled_weight_decay=True),
    "maximize": Adam((0.9, 0.99), 1e-8, maximize=True),
    "maximize, coupled decay": Adam((0.9, 0.99), 1e-8, 0.1, maximize=True),
    "maximize, decoupled decay": Adam((0.9, 0.99), 1e-8, 0.1, True, True),
    "decoupled decay of 0": Adam((0.9, 0.99), 1e-8, decoupled_weight_decay=True),
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
# Of the interpreter, which also computes what lies beyond a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
on_kernel_devices = pytest.mark.parametrize("device", KERNEL_DEVICES)

# W_enc, stored latent by latent; b_enc; W_dec; b_dec.
SHAPES = [(11, 37), (37,), (37, 11), (11,)]


def weights_of(shapes: Any, device: str) -> list[Updated]:
    """Weights without moments and gradients, the first stored as an SAE's W_enc is."""
    updated = []
    for number, shape in enumerate(shapes):
        made = [torch.zeros(shape) for _ in range(4)]
        made[0].normal_(generator=torch.Generator().manual_seed(number))
        if number == 0 and len(shape) == 2:
            made = [tensor.T.contiguous().T for tensor in made]
        made = [tensor.to(device) for tensor in made]
        updated.append(Updated(*made, torch.zeros((), device=device)))
    return updated


def fill_gradients(updated: list[Updated], seed: int, norm: float) -> None:
    """Draw gradients whose norm, all together, is about `norm`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(each.gradient.shape, generator=generator) for each in updated]
    size = sum(each.numel() for each in drawn)
    for each, gradient in zip(updated, drawn, strict=True):
        each.gradient.copy_(gradient * (norm / math.sqrt(size)))


class Exact:
    """Adam in float64, as the papers write it."""

    def __init__(self, updated: list[Updated], settings: Adam) -> None:
        self.settings = settings
        self.t = [int(each.step) for each in updated]
        self.states = [[t.cpu().double() for t in each[0:4]] for each in updated]

    def step(self, updated: list[Updated], learning_rate: float) -> None:
        s = self.settings
        gradients = [each.gradient.cpu().double() for each in updated]
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        clip = min(1 / (norm + 1e-6), 1)
        for n, (w, _, m, v) in enumerate(self.states):
            self.t[n] += 1
            g = clip * gradients[n] * (-1 if s.maximize else 1)
            if s.decoupled_weight_decay:
                w *= 1 - learning_rate * s.weight_decay
            else:
                g = g + s.weight_decay * w
            m.copy_(s.betas[0] * m + (1 - s.betas[0]) * g)
            v.copy_(s.betas[1] * v + (1 - s.betas[1]) * g**2)
            m_hat = m / (1 - s.betas[0] ** self.t[n])
            v_hat = v / (1 - s.betas[1] ** self.t[n])
            w -= learning_rate * m_hat / (v_hat.sqrt() + s.eps)


def take_step(updated: list[Updated], settings: Adam, learning_rate: float) -> None:
    lr = torch.tensor(learning_rate, device=updated[0].weight.device)
    adam_(updated, squares([each.gradient for each in updated]), lr, settings)


def worst_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference, in units of float32's precision of the largest exact value."""
    if value.numel() == 0:
        return 0.0
    unit = exact.abs().max() * 2**-23
    return float((value.cpu().double() - exact).abs().max() / unit)


@on_kernel_devices
@every_setting
def test_steps_are_those_of_float64(settings, device) -> None:
    updated = weights_of(SHAPES, device)
    exact = Exact(updated, settings)
    n_steps = 20 if settings is SETTINGS["defaults"] else 4
    for step in range(n_steps):
        fill_gradients(updated, step, norm=[0.5, 30][step % 2])  # every other is clipped
        gradients = [each.gradient.clone() for each in updated]
        learning_rate = 1e-2 / (1 + step)
        take_step(updated, settings, learning_rate)
        exact.step(updated, learning_rate)
        for each, gradient in zip(updated, gradients, strict=True):
            assert torch.equal(each.gradient, gradient)
    for each, (w, _, m, v) in zip(updated, exact.states, strict=True):
        assert each.step == n_steps
        # Each of the steps rounds; so do the norm and the clipping, to 3 units.
        assert worst_error(each.exp_avg, m) < 3
        assert worst_error(each.exp_avg_sq, v) < 4
        assert worst_error(each.weight, w) < 4


@on_kernel_devices
def test_a_setting_may_be_an_integer(device) -> None:
    # As torch's weight_decay is, 0. The kernel is compiled once for both.
    first, second = weights_of(SHAPES, device), weights_of(SHAPES, device)
    for updated, zeros in ((first, (0, 0.0)), (second, (0.0, 0))):
        for step, zero in enumerate(zeros):
            fill_gradients(updated, step, norm=1)
            take_step(updated, Adam((0.9, 0.999), 1e-8, weight_decay=zero), 1e-2)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.weight, other.weight)


@on_kernel_devices
def test_averages_of_many_steps_stay_exact(device) -> None:
    # With two factors, 0.999 and 0.001 in float32, the average of equal squares would come out
    # wrong by up to 3e-5 of it.
    updated = weights_of([(3,)], device)
    (each,) = updated
    each.gradient.fill_(0.5)
    each.exp_avg.fill_(0.5)
    each.exp_avg_sq.fill_(0.25)
    before = each.weight.clone()
    for _ in range(15):
        take_step(updated, Adam((0.9, 0.999), 1e-8), 1e-3)
    assert (each.exp_avg == 0.5).all()
    assert (each.exp_avg_sq == 0.25).all()
    expected = sum(1e-3 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) for t in range(1, 16))
    torch.testing.assert_close(before - each.weight, torch.full_like(before, expected))


@on_kernel_devices
@pytest.mark.parametrize("step", [0, 1, 999, 10**6])
def test_step_number_corrects_each_weight_by_itself(step, device) -> None:
    settings = SETTINGS["defaults"]
    updated = weights_of(SHAPES, device)
    updated[2].step.fill_(step)
    exact = Exact(updated, settings)
    fill_gradients(updated, 0, norm=0.9)
    take_step(updated, settings, 0.1)
    exact.step(updated, 0.1)
    for number, (each, (w, *_)) in enumerate(zip(updated, exact.states, strict=True)):
        assert each.step == (1 if number != 2 else step + 1)
        assert worst_error(each.weight, w) < 2


@on_kernel_devices
@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 1)],
        [(3,), (1,)],
        [(0, 5), (0,), (7, 3)],  # a process may hold no latents
        [(2, BLOCK + 1), (BLOCK,)],
        [(1, 1), (2 * SQUARES_BLOCK + 7,), (1,), (0,)],
    ],
    ids=str,
)
def test_weights_of_every_size_take_the_step(shapes, device) -> None:
    settings = SETTINGS["coupled decay"]
    updated = weights_of(shapes, device)
    exact = Exact(updated, settings)
    for step in range(2):
        fill_gradients(updated, step, norm=2)
        take_step(updated, settings, 0.01)
        exact.step(updated, 0.01)
    for each, (w, _, m, v) in zip(updated, exact.states, strict=True):
        for value, expected in ((each.weight, w), (each.exp_avg, m), (each.exp_avg_sq, v)):
            assert worst_error(value, expected) < 4


@on_kernel_devices
def test_programs_that_go_on_to_another_block_miss_nothing(device, monkeypatch) -> None:
    monkeypatch.setattr(adam, "MOST_PROGRAMS", 2)
    monkeypatch.setattr(adam, "MOST_SQUARES", 2)
    settings = SETTINGS["decoupled decay"]
    updated = weights_of([(5, BLOCK - 3), (5 * SQUARES_BLOCK + 1,)], device)
    exact = Exact(updated, settings)
    fill_gradients(updated, 0, norm=3)
    take_step(updated, settings, 0.01)
    exact.step(updated, 0.01)
    for each, (w, *_) in zip(updated, exact.states, strict=True):
        assert worst_error(each.weight, w) < 2


def by_torch(updated: list[Updated], settings: Adam, learning_rate: float) -> torch.optim.Adam:
    """PyTorch's Adam of copies, in the state of ours, after SAELens's clipping and a step."""
    weights = [torch.nn.Parameter(each.weight.clone()) for each in updated]
    optimizer = torch.optim.Adam(
        weights,
        lr=learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        maximize=settings.maximize,
        decoupled_weight_decay=settings.decoupled_weight_decay,
    )
    for weight, each in zip(weights, updated, strict=True):
        weight.grad = each.gradient.clone()
        if each.step > 0:
            optimizer.state[weight] = {
                "exp_avg": each.exp_avg.clone(),
                "exp_avg_sq": each.exp_avg_sq.clone(),
                "step": torch.tensor(float(each.step)),
            }
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    return optimizer


@on_kernel_devices
@every_setting
def test_a_step_is_that_of_pytorch(settings, device) -> None:
    updated = weights_of(SHAPES, device)
    for step in range(3):
        fill_gradients(updated, step, norm=[30, 0.5][step % 2])
        optimizer = by_torch(updated, settings, 0.01)
        take_step(updated, settings, 0.01)
        for weight, each in zip(optimizer.param_groups[0]["params"], updated, strict=True):
            state = optimizer.state[weight]
            assert each.step == state["step"]
            assert worst_error(each.exp_avg, state["exp_avg"].cpu().double()) < 3
            assert worst_error(each.exp_avg_sq, state["exp_avg_sq"].cpu().double()) < 4
            assert worst_error(each.weight, weight.detach().cpu().double()) < 2


@on_kernel_devices
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e30])
def test_gradients_that_are_not_finite_do_what_they_do_by_pytorch(value, device) -> None:
    # The square of 1e30 is infinite in float32, and so is the norm: gradients times 0.
    settings = SETTINGS["defaults"]
    updated = weights_of(SHAPES, device)
    fill_gradients(updated, 0, norm=0.5)
    take_step(updated, settings, 0.01)
    updated[2].gradient[3, 4] = value
    optimizer = by_torch(updated, settings, 0.01)
    take_step(updated, settings, 0.01)
    for weight, each in zip(optimizer.param_groups[0]["params"], updated, strict=True):
        torch.testing.assert_close(each.weight, weight.detach(), equal_nan=True)
        for name in ("exp_avg", "exp_avg_sq"):
            expected = optimizer.state[weight][name]
            torch.testing.assert_close(getattr(each, name), expected, equal_nan=True)
    is_finite = bool(torch.isfinite(updated[2].weight).all())
    assert is_finite == (value == 1e30)


@on_kernel_devices
def test_squares_add_up_to_that_of_the_norm(device) -> None:
    generator = torch.Generator().manual_seed(0)
    n = 300 * SQUARES_BLOCK + 5 if device == "cuda" else 3 * SQUARES_BLOCK + 5
    gradients = [
        torch.randn(size, generator=generator).to(device) for size in (n, 17, 2 * SQUARES_BLOCK)
    ]
    found = squares(gradients)
    assert found.dtype == torch.float32
    assert len(found) <= MOST_SQUARES
    exact = sum(gradient.double().square().sum() for gradient in gradients).cpu()
    error = abs(found.double().sum().cpu() - exact) / exact
    of_torch = abs(get_total_norm(gradients).double().square().cpu() - exact) / exact
    assert error < max(of_torch, 2**-24)
    assert torch.equal(found, squares(gradients))


def test_a_tensor_in_another_layout_is_refused() -> None:
    made = weights_of(SHAPES, "cpu")
    for name in ("gradient", "exp_avg", "exp_avg_sq"):
        transposed = torch.zeros(11, 37)
        wrong = [made[0]._replace(**{name: transposed}), *made[1:]]
        with pytest.raises(ValueError, match=rf"{name} has shape \[11, 37\] and strides \(37, 1"):
            take_step(wrong, SETTINGS["defaults"], 0.1)
        with pytest.raises(ValueError, match=rf"{name} has shape \[11\].*expected.*\[37\]"):
            take_step([made[1]._replace(**{name: torch.zeros(11)})], SETTINGS["defaults"], 0.1)
    with_gaps = Updated(*(torch.zeros(4, 6)[:, :3] for _ in range(4)), torch.zeros(()))
    with pytest.raises(ValueError, match=r"weight has .*strides \(6, 1\), expected a contiguous"):
        take_step([with_gaps], SETTINGS["defaults"], 0.1)


@on_kernel_devices
def test_strides_of_single_rows_and_of_nothing_may_differ(device) -> None:
    for shape, others in (((1, 5), (1, 1)), ((5, 1), (1, 5)), ((0, 5), (1, 7))):
        weight = torch.ones(shape, device=device)
        gradient = torch.ones(5, device=device).as_strided(shape, others)
        state = [torch.zeros(shape, device=device) for _ in range(2)]
        updated = [Updated(weight, gradient, *state, torch.zeros((), device=device))]
        take_step(updated, SETTINGS["defaults"], 0.25)
        torch.testing.assert_close(weight, torch.full_like(weight, 0.75))
