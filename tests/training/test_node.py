"""The losses of a step as outputs of one autograd node: they behave as SAELens's do.

`flex_topk` is compared with SAELens's `topk`, `hierarchical_topk` with its own unfused path.
"""

import itertools
from typing import Any

import pytest
import torch
from ops.comparison import Cut
from saes.comparison import (
    DEVICES,
    EVERY_ARCHITECTURE,
    FEW_DEAD,
    MANY_DEAD,
    STOCK,
    assert_close,
    copy_weights,
    dead_mask,
    random_activations,
    step_input,
    trained_sae,
)
from torch.utils.checkpoint import checkpoint

every_architecture = pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")
NAMES = (*PARAMETERS, "x")

# A sum of the two losses' gradients may be small beside them.
TOLERANCE = 2e-5


class Model:
    """An SAE and a batch, with or without a gradient of its own."""

    def __init__(self, sae: Any, x_needs_gradient: bool = True, n_dead: int = MANY_DEAD) -> None:
        device = sae.W_dec.device
        self.sae = sae
        self.x = random_activations().to(device, sae.dtype).requires_grad_(x_needs_gradient)
        self.dead = dead_mask(n_dead).to(device)

    def losses(self) -> dict[str, torch.Tensor]:
        output = self.sae.training_forward_pass(step_input(self.x, self.dead))
        return {"loss": output.loss, **output.losses}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {**dict(self.sae.named_parameters()), "x": self.x}

    def gradients(self) -> dict[str, torch.Tensor | None]:
        """The gradients so far, which are then reset."""
        gradients = {name: self.tensors()[name].grad for name in NAMES}
        for tensor in self.tensors().values():
            tensor.grad = None
        return gradients


def models(architecture: str, device: str = "cpu", **options: Any) -> tuple[Model, Model]:
    """The fused SAE and what it is compared with."""
    fused = trained_sae(architecture, device=device)
    other = trained_sae(
        architecture if architecture == "hierarchical_topk" else STOCK[architecture], device=device
    )
    other.use_fused_path = False
    return Model(fused, **options), Model(other, **options)


def assert_same(model: Model, expected: Model) -> None:
    """Compare the gradients so far, and reset them."""
    found = model.gradients()
    for name, gradient in expected.gradients().items():
        if gradient is None:
            assert found[name] is None, name
        else:
            assert found[name] is not None, name
            assert_close(found[name], gradient, TOLERANCE, name)


AUXILIARY = "auxiliary_reconstruction_loss"
WEIGHTS = [  # of loss, mse_loss and the auxiliary loss
    (1, 0, 0),
    (0, 1, 0),
    (0, 0, 1),
    (0, 0.25, 3),
    (0, 3, -0.5),
    (-2, 0, 1),
    (0.5, 2, 0),
    (1, 1, 1),
]


def weighted(losses: dict[str, torch.Tensor], weights: tuple[float, ...]) -> torch.Tensor:
    """The weighted sum, of which a loss of weight 0 is no part."""
    names = ("loss", "mse_loss", AUXILIARY)
    terms = [w * losses[name] for w, name in zip(weights, names, strict=True) if w != 0]
    return torch.stack(terms).sum()


@every_architecture
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_dead", [FEW_DEAD, MANY_DEAD])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_losses_weighted_apart_and_summed(architecture, device, n_dead, weights) -> None:
    model, expected = models(architecture, device, n_dead=n_dead)
    for each in (model, expected):
        weighted(each.losses(), weights).backward()
    assert_same(model, expected)


@every_architecture
def test_without_dead_latents_loss_and_mse_loss_are_one(architecture) -> None:
    model, expected = models(architecture, n_dead=0)
    for each in (model, expected):
        losses = each.losses()
        assert float(losses[AUXILIARY]) == 0
        (2 * losses["loss"] + 0.5 * losses["mse_loss"]).backward()
    assert_same(model, expected)


@every_architecture
@pytest.mark.parametrize("enabled", [True, False])
def test_loss_changed_in_place_leaves_the_reported_ones(architecture, enabled) -> None:
    model, expected = models(architecture, n_dead=0)
    for each in (model, expected):
        with torch.set_grad_enabled(enabled):
            losses = each.losses()
            mse_loss = losses["mse_loss"].item()
            losses["loss"] *= 0.25
        assert losses["mse_loss"].item() == mse_loss
        assert losses["loss"].item() != mse_loss
        if enabled:
            losses["loss"].backward()
    if enabled:
        assert_same(model, expected)


@every_architecture
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "order",
    [
        (("mse_loss", 2.0), (AUXILIARY, 0.5)),
        ((AUXILIARY, 0.5), ("mse_loss", 2.0)),
        (("loss", 1.0), (AUXILIARY, 3.0)),
        (("mse_loss", 1.0), ("loss", -1.0), (AUXILIARY, 2.0)),
        (("loss", 1.0), ("loss", 1.0)),
    ],
    ids=str,
)
def test_losses_differentiated_one_after_the_other(architecture, device, order) -> None:
    model, expected = models(architecture, device)
    losses, expected_losses = model.losses(), expected.losses()
    for name, factor in order:  # Each pass is compared by itself.
        for each in (losses, expected_losses):
            (factor * each[name]).backward(retain_graph=True)
        assert_same(model, expected)


@every_architecture
def test_second_pass_through_the_same_graph_is_the_first_one_again(architecture) -> None:
    model, _ = models(architecture)
    loss, passes = model.losses()["loss"], []
    for _ in range(3):
        loss.backward(retain_graph=True)
        passes.append(model.gradients())
    for name, gradient in passes[0].items():
        for other in passes[1:]:
            assert torch.equal(other[name], gradient), name


@every_architecture
def test_freed_graph_raises_as_torch_does(architecture) -> None:
    model, expected = models(architecture)
    for each in (model, expected):
        loss = each.losses()["loss"]
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
    assert_same(model, expected)


@every_architecture
@pytest.mark.parametrize("name", PARAMETERS)
def test_weight_changed_in_place_before_a_second_pass(architecture, name) -> None:
    model, expected = models(architecture)
    losses, before = model.losses(), expected.losses()
    with torch.no_grad():
        model.tensors()[name].add_(1)
    # The gradients of the first pass were computed by the step.
    losses["loss"].backward(retain_graph=True)
    before["loss"].backward()
    assert_same(model, expected)
    for loss in losses.values():
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward(retain_graph=True)


@every_architecture
@pytest.mark.parametrize("kept", ["loss", "mse_loss", AUXILIARY])
def test_loss_on_which_nothing_depends_gives_no_gradient(architecture, kept) -> None:
    model, expected = models(architecture)
    for each in (model, expected):
        losses = each.losses()
        cut = [Cut.apply(loss) for name, loss in losses.items() if name != kept]
        (losses[kept] + torch.stack(cut).sum()).backward()
    assert_same(model, expected)


@every_architecture
@pytest.mark.parametrize("n_dead", [0, MANY_DEAD])
def test_nothing_depends_on_any_loss(architecture, n_dead) -> None:
    model, _ = models(architecture, n_dead=n_dead)
    losses = model.losses()
    used = model.sae.b_enc.sum()
    (Cut.apply(losses["loss"]) + Cut.apply(losses["mse_loss"]) + used).backward()
    gradients = model.gradients()
    assert gradients.pop("b_enc").eq(1).all()
    assert set(gradients.values()) == {None}


@every_architecture
@pytest.mark.parametrize("name", ["loss", "mse_loss", AUXILIARY])
@pytest.mark.parametrize("n_dead", [0, MANY_DEAD])
def test_second_derivative_raises(architecture, name, n_dead) -> None:
    model, _ = models(architecture, n_dead=n_dead)
    loss = model.losses()[name]
    if n_dead == 0 and name == AUXILIARY:
        assert not loss.requires_grad
        return
    with pytest.raises(RuntimeError, match="a training step has no second derivative"):
        torch.autograd.grad(loss, model.sae.W_dec, create_graph=True)


@every_architecture
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_checkpointed_steps(architecture, use_reentrant, device) -> None:
    model, expected = models(architecture, device)

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        output = model.sae.training_forward_pass(step_input(x, model.dead))
        return output.losses["mse_loss"] + 2 * output.losses[AUXILIARY]

    checkpoint(loss_of, model.x, use_reentrant=use_reentrant).backward()
    losses = expected.losses()
    (losses["mse_loss"] + 2 * losses[AUXILIARY]).backward()
    assert_same(model, expected)


@every_architecture
def test_a_step_of_another_sae_in_between(architecture) -> None:
    model, expected = models(architecture)
    other = trained_sae(architecture)
    copy_weights(model.sae, other)
    losses, expected_losses = model.losses(), expected.losses()
    other.training_forward_pass(step_input(random_activations(seed=5), model.dead)).loss.backward()
    model.losses()["loss"].backward()
    model.gradients()
    for each in (losses, expected_losses):
        weighted(each, (0, 2, 3)).backward()
    assert_same(model, expected)


# --- frozen weights


@every_architecture
@pytest.mark.parametrize("n_dead", [0, FEW_DEAD, MANY_DEAD])
def test_every_subset_of_frozen_weights_and_activations(architecture, n_dead) -> None:
    model, expected = models(architecture, n_dead=n_dead)
    for flags in itertools.product((False, True), repeat=len(NAMES)):
        for each in (model, expected):
            for name, flag in zip(NAMES, flags, strict=True):
                each.tensors()[name].requires_grad_(flag)
        losses, expected_losses = model.losses(), expected.losses()
        for name, loss in expected_losses.items():
            assert_close(losses[name], loss, name=name)
            is_constant = not any(flags) or (name == AUXILIARY and n_dead == 0)
            assert losses[name].requires_grad is not is_constant
            if is_constant:
                continue
            for each in (losses, expected_losses):
                each[name].backward(retain_graph=True)
            assert_same_with_zeros(model, expected, flags)


def assert_same_with_zeros(model: Model, expected: Model, flags: tuple[bool, ...]) -> None:
    """Compare as `assert_same`, where a gradient of zero and none are the same.

    SAELens's auxiliary loss does not depend on b_dec where b_dec is not subtracted, for instance.
    """
    found = model.gradients()
    for (name, gradient), is_wanted in zip(expected.gradients().items(), flags, strict=True):
        if not is_wanted:
            assert found[name] is gradient is None, name
        elif gradient is None or not gradient.any():
            assert found[name] is None or not found[name].any(), name
        else:
            assert found[name] is not None, name
            assert_close(found[name], gradient, TOLERANCE, name)


# --- the device


@pytest.mark.gpu
@every_architecture
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_backward_passes_wait_for_nothing(architecture, weights) -> None:
    model, expected = models(architecture, "cuda")
    for each in (model, expected):  # compiles kernels and fills caches
        for _ in range(2):
            weighted(each.losses(), weights).backward()
            each.gradients()
    total = weighted(model.losses(), weights)
    torch.cuda.set_sync_debug_mode("error")
    try:
        total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    weighted(expected.losses(), weights).backward()
    assert_same(model, expected)
