"""What the architectures share: a training step's paths, hooks, outputs, dtypes."""

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from comparison import (
    BATCH,
    D_IN,
    D_SAE,
    DEVICES,
    EVERY_ARCHITECTURE,
    FEW_DEAD,
    MANY_DEAD,
    STOCK,
    TRAINING_CLASSES,
    K,
    assert_close,
    assert_same_gradients,
    assert_same_losses,
    copy_weights,
    dead_mask,
    random_activations,
    relative_error,
    run_step,
    step_input,
    trained_sae,
    training_config,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch.autograd import forward_ad

HOOK_POINTS = ("hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons")
SKIPPED_HOOK_POINTS = HOOK_POINTS[1:]

every_architecture = pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)


def count_calls(calls: list[Any]) -> Any:
    """A hook that changes nothing and keeps what it is called with."""

    def hook(tensor: torch.Tensor, hook: Any) -> None:
        calls.append((hook.name, tensor.detach().clone()))

    return hook


def skip_unless_stock_trains(
    architecture: str, *, shape: tuple[int, ...] = (), normalization: str = "none"
) -> None:
    """Skip what SAELens's Matryoshka raises on."""
    if architecture == "flex_matryoshka_batchtopk" and (len(shape) > 2 or normalization != "none"):
        pytest.skip("SAELens's matryoshka_batchtopk raises")


# --- the fused and the unfused path


@pytest.mark.parametrize(
    ("architecture", "levels"),
    [
        pytest.param("flex_topk", {}, id="flex_topk"),
        pytest.param("hierarchical_topk", {}, id="hierarchical_topk-every_level"),
        pytest.param(
            "hierarchical_topk", {"budgets": [1, 4, K]}, id="hierarchical_topk-some_levels"
        ),
        pytest.param("hierarchical_topk", {"budgets": [K]}, id="hierarchical_topk-last_level"),
    ],
)
@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "not_rescaled"])
@pytest.mark.parametrize("normalization", ["none", "layer_norm", "constant_norm_rescale"])
def test_both_paths_give_the_same_step(architecture, levels, rescale, normalization) -> None:
    fields = {
        "rescale_acts_by_decoder_norm": rescale,
        "normalize_activations": normalization,
        "aux_loss_coefficient": 1.0 if normalization == "none" else 0.0,
        **levels,
    }
    fused, unfused = trained_sae(architecture, **fields), trained_sae(architecture, **fields)
    unfused.use_fused_path = False
    expected = run_step(unfused, random_activations(), dead_mask(MANY_DEAD))
    output = run_step(fused, random_activations(), dead_mask(MANY_DEAD))
    assert_same_losses(output, expected)
    assert_same_gradients(fused, unfused)
    assert_close(output.sae_out, expected.sae_out, name="sae_out")
    # the fused path has the pre-activations of the kept latents alone
    kept_pre = expected.hidden_pre.topk(K).values
    assert_close(output.hidden_pre, kept_pre, name="hidden_pre")
    assert_close(output.feature_acts.to_dense(), expected.feature_acts, name="feature_acts")


@every_architecture
@pytest.mark.parametrize("use_fused_path", [None, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("coefficient", [-3, float("nan"), float("inf"), "1", None, True], ids=repr)
def test_impossible_auxiliary_coefficient_of_an_edit_is_refused(
    coefficient, use_fused_path, architecture
) -> None:
    sae = trained_sae(architecture)
    sae.use_fused_path = use_fused_path
    sae.cfg.aux_loss_coefficient = coefficient
    with pytest.raises(ValueError, match=r"^aux_loss_coefficient is "):
        run_step(sae, random_activations(), dead_mask(MANY_DEAD))
    assert all(parameter.grad is None for parameter in sae.parameters())
    sae.cfg.aux_loss_coefficient = 0.5
    run_step(sae, random_activations(), dead_mask(MANY_DEAD))


@every_architecture
@pytest.mark.parametrize("use_fused_path", [None, False], ids=["fused", "unfused"])
@pytest.mark.parametrize(
    ("made_with", "edited"),
    [("none", "layer_norm"), ("none", "constant_norm_rescale"), ("layer_norm", "none")],
)
def test_edited_normalization_is_refused_and_what_saelens_folds_is_not(
    made_with, edited, use_fused_path, architecture
) -> None:
    if "matryoshka" in architecture and made_with == "layer_norm":
        pytest.skip("it takes no layer_norm")
    sae = trained_sae(architecture, normalize_activations=made_with, aux_loss_coefficient=0)
    sae.use_fused_path = use_fused_path
    sae.cfg.normalize_activations = edited
    message = rf"^normalize_activations is '{edited}' in the config, expected '{made_with}'"
    with pytest.raises(ValueError, match=message):
        run_step(copy.deepcopy(sae), random_activations(), None)
    # SAELens sets "none" itself when it has folded the scale of the activations into the weights.
    sae = trained_sae(architecture, normalize_activations="expected_average_only_in")
    sae.use_fused_path = use_fused_path
    sae.fold_activation_norm_scaling_factor(2.0)
    run_step(sae, random_activations(), None)


@every_architecture
@pytest.mark.parametrize("sae_in_needs_gradient", [False, True])
def test_fused_outputs_carry_no_gradient(architecture, sae_in_needs_gradient) -> None:
    sae_in = random_activations().requires_grad_(sae_in_needs_gradient)
    output = trained_sae(architecture).training_forward_pass(step_input(sae_in))
    assert output.loss.requires_grad
    assert output.losses["mse_loss"].requires_grad
    for name in ("sae_out", "feature_acts", "hidden_pre"):
        assert not getattr(output, name).requires_grad, name


@every_architecture
def test_unfused_outputs_carry_gradients(architecture) -> None:
    class Unfused(TRAINING_CLASSES[architecture][0]):
        use_fused_path = False

    output = Unfused(trained_sae(architecture).cfg).training_forward_pass(
        step_input(random_activations())
    )
    for name in ("loss", "sae_out", "feature_acts", "hidden_pre"):
        assert getattr(output, name).requires_grad, name


def with_sparsity_loss(architecture: str) -> type[Any]:
    """A subclass with a loss of its own on `feature_acts`."""

    class WithSparsityLoss(TRAINING_CLASSES[architecture][0]):
        use_fused_path = False

        def calculate_aux_loss(self, step_input, feature_acts, hidden_pre, sae_out):
            losses = super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
            losses["l1_loss"] = feature_acts.abs().sum(-1).mean()
            return losses

    return WithSparsityLoss


@every_architecture
def test_loss_of_a_subclass_gets_its_gradient(architecture) -> None:
    def l1_and_its_gradients(name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        plain = trained_sae(name)
        regularized = with_sparsity_loss(name)(plain.cfg)
        copy_weights(plain, regularized)
        run_step(plain, random_activations(), dead_mask(FEW_DEAD))
        output = run_step(regularized, random_activations(), dead_mask(FEW_DEAD))
        assert_close(output.loss, torch.stack(list(output.losses.values())).sum(), name="loss")
        return output.losses["l1_loss"], {
            parameter_name: parameter.grad - plain.get_parameter(parameter_name).grad
            for parameter_name, parameter in regularized.named_parameters()
        }

    expected_loss, expected_gradients = l1_and_its_gradients(STOCK[architecture])
    loss, gradients = l1_and_its_gradients(architecture)
    assert_close(loss, expected_loss, name="l1_loss")
    for name, gradient in expected_gradients.items():
        assert gradient.norm() > 0
        # a difference of two gradients some ten times as large
        assert_close(gradients[name], gradient, 1e-4, name)


@every_architecture
def test_step_without_gradients_has_the_same_losses(architecture) -> None:
    sae = trained_sae(architecture)
    expected = run_step(sae, random_activations(), dead_mask(FEW_DEAD))
    with torch.no_grad():
        output = sae.training_forward_pass(step_input(random_activations(), dead_mask(FEW_DEAD)))
    assert not output.loss.requires_grad
    assert_same_losses(output, expected, 1e-6)


@every_architecture
@pytest.mark.parametrize("n_dead", [0, FEW_DEAD])
def test_three_dimensional_activations_give_the_loss_of_the_flattened(architecture, n_dead) -> None:
    skip_unless_stock_trains(architecture, shape=(2, 5, D_IN))
    flat, nested = trained_sae(architecture), trained_sae(architecture)
    batch = random_activations(2, 5, D_IN)
    expected = run_step(flat, batch.flatten(0, 1), dead_mask(n_dead))
    output = run_step(nested, batch, dead_mask(n_dead))
    assert_same_losses(output, expected)
    assert_same_gradients(nested, flat)
    assert output.sae_out.shape == (2, 5, D_IN)
    assert output.feature_acts.shape == (2, 5, D_SAE)
    stock = trained_sae(STOCK[architecture])
    expected = run_step(stock, batch, dead_mask(n_dead))
    assert_close(output.sae_out, expected.sae_out, name="sae_out")
    if architecture != "hierarchical_topk":
        assert_same_losses(output, expected)
        assert_same_gradients(nested, stock)


@every_architecture
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("device", DEVICES)
def test_training_falls_to_the_loss_of_the_unfused_path(architecture, autocast, device) -> None:
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(256, 32, generator=generator)
    is_active = torch.rand(100, 128, 256, generator=generator) < 6 / 256
    batches = list((is_active.float() @ directions).to(device))
    losses = []
    for use_fused_path in (True, False):
        torch.manual_seed(0)
        sae = TRAINING_CLASSES[architecture][0](
            training_config(architecture, d_in=32, d_sae=256, device=device)
        )
        sae.use_fused_path = use_fused_path
        trainer = SAETrainer(
            SAETrainerConfig(
                total_training_samples=len(batches) * 128,
                train_batch_size_samples=128,
                lr=3e-3,
                lr_end=3e-3,
                device=device,
                autocast=autocast,
                dead_feature_window=5,
            ),
            sae=sae,
            data_provider=iter(()),
        )
        losses.append([trainer.step(batch).losses["mse_loss"].item() for batch in batches])
        assert trainer.dead_neurons.any()
    fused, unfused = losses
    assert sum(unfused[-10:]) < 0.6 * sum(unfused[:10])
    assert sum(fused[-10:]) == pytest.approx(sum(unfused[-10:]), rel=0.02)


# --- hooks


@every_architecture
@pytest.mark.parametrize("shape", [(BATCH, D_IN), (2, 5, D_IN)], ids=["2d", "3d"])
@pytest.mark.parametrize("hook_point", HOOK_POINTS)
def test_forward_hook_fires_once_with_the_tensor_of_stock_topk(
    architecture, hook_point, shape
) -> None:
    skip_unless_stock_trains(architecture, shape=shape)
    recorded = {}
    for name in (STOCK[architecture], architecture):
        sae, recorded[name] = trained_sae(name), []
        without_hook = run_step(sae, random_activations(*shape), dead_mask(FEW_DEAD))
        sae.add_hook(hook_point, count_calls(recorded[name]))
        output = run_step(sae, random_activations(*shape), dead_mask(FEW_DEAD))
        assert_same_losses(output, without_hook)
    assert len(recorded[architecture]) == 1
    (called_for, tensor), (_, expected) = (
        recorded[architecture][0],
        recorded[STOCK[architecture]][0],
    )
    assert called_for == hook_point
    assert_close(tensor, expected, name=hook_point)


@every_architecture
@pytest.mark.parametrize("hook_point", HOOK_POINTS)
def test_backward_hook_fires_once_with_the_gradient_of_stock_topk(architecture, hook_point) -> None:
    recorded = {}
    for name in (STOCK[architecture], architecture):
        # With one level hierarchical_topk is TopK, so that its gradients have a stock counterpart.
        sae, recorded[name] = trained_sae(name, **_one_level(name)), []
        sae.add_hook(hook_point, count_calls(recorded[name]), dir="bwd")
        run_step(sae, random_activations().requires_grad_())
    assert len(recorded[architecture]) == len(recorded[STOCK[architecture]]) == 1
    (called_for, gradient), (_, expected) = (
        recorded[architecture][0],
        recorded[STOCK[architecture]][0],
    )
    assert called_for == hook_point
    assert expected.norm() > 0
    assert_close(gradient, expected, name=hook_point)


def _one_level(architecture: str) -> dict[str, Any]:
    return {"budgets": [K]} if architecture == "hierarchical_topk" else {}


def often_firing_latent() -> int:
    return int((trained_sae("topk").encode(random_activations()) > 0).sum(0).argmax())


def scale(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
    return 1.3 * tensor


def ablate(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
    kept = torch.ones_like(tensor)
    kept[..., often_firing_latent()] = 0
    return tensor * kept


def shift(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
    return tensor + 0.5


EDITS = {
    "hook_sae_input": scale,
    "hook_sae_acts_pre": shift,
    "hook_sae_acts_post": ablate,
    "hook_sae_recons": shift,
}


@pytest.mark.parametrize("hook_point", HOOK_POINTS)
def test_editing_hook_changes_flex_topk_as_it_changes_stock_topk(hook_point) -> None:
    stock, flex = trained_sae("topk"), trained_sae("flex_topk")
    without_hook = run_step(flex, random_activations(), dead_mask(FEW_DEAD))
    for sae in (stock, flex):
        sae.add_hook(hook_point, EDITS[hook_point])
    expected = run_step(stock, random_activations(), dead_mask(FEW_DEAD))
    output = run_step(flex, random_activations(), dead_mask(FEW_DEAD))
    assert relative_error(output.loss, without_hook.loss) > 1e-3
    assert_same_losses(output, expected)
    assert_same_gradients(flex, stock)


@pytest.mark.parametrize("budgets", [None, [1, 4, K]])
@pytest.mark.parametrize("hook_point", HOOK_POINTS)
def test_editing_hook_reaches_the_levels_of_hierarchical_topk(hook_point, budgets) -> None:
    sae = trained_sae("hierarchical_topk", budgets=budgets)
    levels = budgets or list(range(1, K + 1))
    sae_in = random_activations()
    without_hook = run_step(sae, sae_in)
    sae.add_hook(hook_point, EDITS[hook_point])
    output = run_step(sae, sae_in)
    assert relative_error(output.loss, without_hook.loss) > 1e-3

    # Hooks before the choice of latents, and on the activations, reach every level: level j is
    # made of the j largest activations that the hook left. The reconstruction that
    # hook_sae_recons edits is that of level k.
    stock = trained_sae("topk", dtype="float64")
    if hook_point != "hook_sae_recons":
        stock.add_hook(hook_point, EDITS[hook_point])
    feature_acts = stock.encode(sae_in.double())
    losses = []
    for level in levels:
        largest = feature_acts.topk(level)
        acts = torch.zeros_like(feature_acts).scatter(-1, largest.indices, largest.values)
        sae_out = stock.decode(acts)
        if hook_point == "hook_sae_recons" and level == K:
            sae_out = EDITS[hook_point](sae_out, None)
        losses.append(stock.mse_loss_fn(sae_out, sae_in.double()).sum(-1).mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    assert_close(output.losses["mse_loss"], loss, name="mse_loss")
    assert_same_gradients(sae, stock)


@every_architecture
@pytest.mark.parametrize("hook_point", SKIPPED_HOOK_POINTS)
def test_fused_path_is_taken_again_once_the_hook_is_gone(architecture, hook_point) -> None:
    sae, calls = trained_sae(architecture), []
    with sae.hooks(fwd_hooks=[(hook_point, count_calls(calls))]):
        assert run_step(sae, random_activations()).sae_out.requires_grad
    assert not run_step(sae, random_activations()).sae_out.requires_grad
    assert len(calls) == 1


# --- feature_acts


@every_architecture
def test_feature_acts_are_sparse_by_default(architecture) -> None:
    output = run_step(trained_sae(architecture), random_activations())
    assert output.feature_acts.layout == torch.sparse_coo
    assert output.feature_acts._nnz() == BATCH * K


@every_architecture
def test_feature_acts_are_dense_on_request(architecture) -> None:
    output = run_step(trained_sae(architecture, use_sparse_activations=False), random_activations())
    assert output.feature_acts.layout == torch.strided


@every_architecture
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_feature_acts_equal_those_of_stock_topk(architecture, sparse) -> None:
    # so many latents that not every row has k positive ones
    fields = {"k": 30, "use_sparse_activations": sparse}
    stock, sae = trained_sae(STOCK[architecture], **fields), trained_sae(architecture, **fields)
    expected = run_step(stock, random_activations()).feature_acts
    feature_acts = run_step(sae, random_activations()).feature_acts
    assert int((expected > 0).sum(-1).min()) < 30
    assert torch.equal(feature_acts.to_dense(), expected)


@every_architecture
def test_sparse_feature_acts_work_as_the_trainer_uses_them(architecture) -> None:
    fields = {"k": 30}  # so that some kept activations are zero, and count as not firing
    feature_acts = run_step(trained_sae(architecture, **fields), random_activations()).feature_acts
    expected = run_step(
        trained_sae(STOCK[architecture], **fields), random_activations()
    ).feature_acts
    firing, expected_firing = feature_acts.bool().float(), expected.bool().float()
    did_fire = firing.sum(-2).bool()
    assert torch.equal(did_fire.to_dense(), expected_firing.sum(-2).bool())
    assert torch.equal(torch.zeros(D_SAE) + firing.sum(0), expected_firing.sum(0))
    assert torch.equal(firing.sum(-1).to_dense(), expected_firing.sum(-1))


@every_architecture
@pytest.mark.parametrize("shape", [(0, 16), (4, 15)], ids=str)
def test_wrong_shape_is_an_error_that_says_so(architecture, shape) -> None:
    message = f"sae_in has shape {list(shape)}, expected [batch, 16]"
    with pytest.raises(ValueError, match=re.escape(message)):
        run_step(trained_sae(architecture), torch.zeros(shape))


@every_architecture
@pytest.mark.parametrize("n", [D_SAE - 1, D_SAE + 1])
def test_dead_neuron_mask_of_another_length_is_an_error_that_says_so(architecture, n) -> None:
    step = step_input(random_activations(), torch.ones(n, dtype=torch.bool))
    with pytest.raises(ValueError, match=rf"dead_neuron_mask has shape \[{n}\], expected \[48\]"):
        trained_sae(architecture).training_forward_pass(step)


@every_architecture
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32], ids=str)
def test_dead_neuron_mask_of_another_dtype_is_an_error_that_says_so(architecture, dtype) -> None:
    step = step_input(random_activations(), dead_mask(FEW_DEAD).to(dtype) * 3)
    with pytest.raises(TypeError, match=f"dead_neuron_mask has dtype {dtype}, expected torch.bool"):
        trained_sae(architecture).training_forward_pass(step)


@every_architecture
@pytest.mark.parametrize("path", [None, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.bool], ids=str)
def test_activations_that_are_no_real_numbers_are_refused(architecture, path, dtype) -> None:
    sae = trained_sae(architecture)
    sae.use_fused_path = path
    with pytest.raises(TypeError, match=rf"^sae_in has dtype {dtype}, expected one of real"):
        sae.training_forward_pass(step_input(random_activations().to(dtype)))


@every_architecture
@pytest.mark.parametrize("path", [None, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_integer_activations_are_those_numbers(architecture, path, dtype) -> None:
    x, dead = (5 * random_activations()).abs().to(dtype), dead_mask(FEW_DEAD)
    sae, same = trained_sae(architecture), trained_sae(architecture)
    sae.use_fused_path = path
    losses = run_step(sae, x, dead).losses
    assert_close(losses["mse_loss"], run_step(same, x.float(), dead).losses["mse_loss"])
    assert_same_gradients(sae, same)
    stock = trained_sae(STOCK[architecture])
    expected = run_step(stock, x, dead).losses  # SAELens takes them, too
    name = "auxiliary_reconstruction_loss" if architecture == "hierarchical_topk" else "mse_loss"
    assert_close(losses[name], expected[name], name=name)


@every_architecture
@pytest.mark.parametrize("of", ["W_dec", "sae_in"])
@pytest.mark.parametrize("device", DEVICES)
def test_forward_mode_is_refused(architecture, of, device) -> None:
    sae = trained_sae(architecture, use_sparse_activations=False).to(device).requires_grad_(False)
    x = random_activations().to(device)
    with forward_ad.dual_level():
        if of == "sae_in":
            x = forward_ad.make_dual(x, torch.ones_like(x))
        else:
            weight = sae.W_dec.detach()
            del sae.W_dec
            sae.W_dec = forward_ad.make_dual(weight, torch.ones_like(weight))
        with pytest.raises(NotImplementedError, match="training step has no forward-mode"):
            sae.training_forward_pass(step_input(x))


@every_architecture
def test_sae_out_has_the_dtype_of_the_parameters(architecture) -> None:
    sae = trained_sae(architecture).double()  # which leaves `sae.dtype` as it is
    fused = sae.training_forward_pass(step_input(random_activations())).sae_out
    sae.use_fused_path = False
    unfused = sae.training_forward_pass(step_input(random_activations())).sae_out
    assert fused.dtype == unfused.dtype == torch.float64
    assert_close(fused, unfused, 1e-12)


@every_architecture
def test_sparse_feature_acts_are_otherwise_an_ordinary_tensor(architecture) -> None:
    acts = run_step(trained_sae(architecture), random_activations()).feature_acts
    dense = acts.to_dense()
    assert type(dense) is torch.Tensor
    for dim in (0, 1, -1, -2, (0, 1), None):
        torch.testing.assert_close(acts.sum(dim).to_dense(), dense.sum(dim))
    torch.testing.assert_close(acts.sum(dim=0), dense.sum(dim=0))
    torch.testing.assert_close(acts.sum(0, keepdim=True).to_dense(), dense.sum(0, keepdim=True))
    assert torch.equal(acts.bool().sum(0).to_dense(), dense.bool().sum(0))
    assert torch.equal(acts.coalesce().to_dense(), dense)
    assert torch.equal((acts * 2).to_dense(), dense * 2)
    for twin in (copy.deepcopy(acts), pickle.loads(pickle.dumps(acts))):
        assert torch.equal(twin.to_dense(), dense)
    torch.testing.assert_close(acts @ torch.ones(D_SAE, 2), dense @ torch.ones(D_SAE, 2))


@pytest.mark.gpu
@every_architecture
def test_a_step_without_dead_latents_waits_for_nothing_it_launched(architecture) -> None:
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=100 * BATCH,
            train_batch_size_samples=BATCH,
            lr_end=3e-5,
            device="cuda",
        ),
        sae=trained_sae(architecture, device="cuda"),
        data_provider=iter(()),
    )
    batch = random_activations().cuda()
    for _ in range(2):
        trainer.step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_architecture
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_encode_is_dense(architecture, sparse) -> None:
    sae = trained_sae(architecture, use_sparse_activations=sparse)
    feature_acts = sae.encode(random_activations())
    assert feature_acts.layout == torch.strided
    assert torch.equal(feature_acts, trained_sae(STOCK[architecture]).encode(random_activations()))


@every_architecture
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_trainer_counts_and_logs_what_it_does_for_stock_topk(architecture, sparse) -> None:
    trainers = {}
    batches = [random_activations(seed=seed) for seed in range(8)]
    for name in (STOCK[architecture], architecture):
        sae = trained_sae(name, use_sparse_activations=sparse, **_one_level(name))
        trainer = SAETrainer(
            SAETrainerConfig(
                total_training_samples=len(batches) * BATCH,
                train_batch_size_samples=BATCH,
                lr_end=3e-5,
                dead_feature_window=2,
            ),
            sae=sae,
            data_provider=iter(batches),
        )
        for batch in batches:
            output = trainer.step(batch)
        trainers[name] = trainer
        log = trainer.build_train_step_log_dict(output, n_training_samples=0)
        trainers[name, "log"] = log
    trainer, expected = trainers[architecture], trainers[STOCK[architecture]]
    assert expected.dead_neurons.any()
    assert torch.equal(trainer.act_freq_scores, expected.act_freq_scores)
    assert torch.equal(trainer.n_forward_passes_since_fired, expected.n_forward_passes_since_fired)
    assert torch.equal(trainer.dead_neurons, expected.dead_neurons)
    log, expected_log = trainers[architecture, "log"], trainers[STOCK[architecture], "log"]
    assert list(log) == list(expected_log)
    for key, value in expected_log.items():
        assert log[key] == pytest.approx(value, rel=1e-4), key


# --- dtypes, devices, copies


@every_architecture
@pytest.mark.parametrize("normalization", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("device", DEVICES)
def test_autocast_step_stays_close_to_float32(architecture, normalization, device) -> None:
    skip_unless_stock_trains(architecture, normalization=normalization)
    fields = {
        "normalize_activations": normalization,
        "aux_loss_coefficient": 1.0 if normalization == "none" else 0.0,
        "device": device,
    }
    sae = trained_sae(architecture, **fields)
    batch, dead = random_activations().to(device), dead_mask(FEW_DEAD).to(device)
    expected = run_step(sae, batch, dead)
    sae.zero_grad()
    with torch.autocast(device, dtype=torch.bfloat16):
        output = sae.training_forward_pass(step_input(batch, dead))
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert_same_losses(output, expected, 0.02)
    for parameter in sae.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
        assert parameter.grad.norm() > 0


@every_architecture
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("bfloat16", 2e-2), ("float16", 2e-3), ("float64", 1e-12)]
)
@pytest.mark.parametrize("n_dead", [0, FEW_DEAD])
def test_step_in_other_dtypes(architecture, dtype, tolerance, n_dead) -> None:
    torch_dtype = getattr(torch, dtype)
    sae = trained_sae(architecture, dtype=dtype, backend="torch", **_one_level(architecture))
    stock = trained_sae(STOCK[architecture], dtype="float64")
    copy_weights(sae, stock)
    batch = random_activations(dtype=torch_dtype)
    expected = run_step(stock, batch.double(), dead_mask(n_dead))
    output = run_step(sae, batch, dead_mask(n_dead))
    assert_same_losses(output, expected, tolerance)
    assert output.sae_out.dtype == torch_dtype
    assert output.feature_acts.dtype == torch_dtype
    for parameter in sae.parameters():
        assert parameter.grad.dtype == torch_dtype
        assert parameter.grad.isfinite().all()
    if dtype == "float64":
        assert_same_gradients(sae, stock, tolerance)


@every_architecture
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_activations_of_another_dtype_than_the_sae(architecture, dtype) -> None:
    stock, sae = (
        trained_sae(STOCK[architecture]),
        trained_sae(architecture, **_one_level(architecture)),
    )
    batch = random_activations(dtype=dtype)
    # in float32: with torch 2.11 stock's loss has no backward pass for mixed dtypes
    expected = run_step(stock, batch.float(), dead_mask(FEW_DEAD))
    output = run_step(sae, batch, dead_mask(FEW_DEAD))
    assert_same_losses(output, expected)
    assert_same_gradients(sae, stock)
    assert output.sae_out.dtype == expected.sae_out.dtype


@every_architecture
@pytest.mark.parametrize("normalization", ["none", "layer_norm", "constant_norm_rescale"])
def test_deep_copy_takes_the_same_step_and_shares_nothing(architecture, normalization) -> None:
    skip_unless_stock_trains(architecture, normalization=normalization)
    fields = {"normalize_activations": normalization, "aux_loss_coefficient": 0}
    sae = trained_sae(architecture, **fields)
    expected = run_step(sae, random_activations())
    twin = copy.deepcopy(sae)
    attributes = set(vars(sae))
    output = run_step(twin, random_activations())
    assert torch.equal(output.loss, expected.loss)
    assert_same_gradients(twin, sae, 0)
    assert set(vars(sae)) == attributes
    with torch.no_grad():
        twin.W_dec.zero_()
    assert sae.W_dec.norm() > 0


@pytest.mark.parametrize("architecture", ["topk", *EVERY_ARCHITECTURE])
@pytest.mark.parametrize("normalization", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize(
    "name", ["run_time_activation_norm_fn_in", "run_time_activation_norm_fn_out"]
)
def test_deep_copy_keeps_normalization_functions_that_a_user_set(
    architecture, normalization, name
) -> None:
    skip_unless_stock_trains(architecture, normalization=normalization)
    fields = {"normalize_activations": normalization, "aux_loss_coefficient": 0}
    sae, twins = trained_sae(architecture, **fields), []
    plain = sae(random_activations())
    own = getattr(sae, name)
    setattr(sae, name, lambda x: own(x) + 0.5)
    expected = sae(random_activations())
    assert relative_error(expected, plain) > 1e-3
    expected_loss = run_step(sae, random_activations()).loss
    twins.append(copy.deepcopy(sae))
    twins.append(copy.deepcopy(twins[0]))
    for twin in twins:
        assert getattr(twin, name) is getattr(sae, name)
        loss = run_step(twin, random_activations()).loss
        assert relative_error(loss, expected_loss) < 1e-6
        if normalization == "none":  # otherwise the user's function holds the original SAE
            assert torch.equal(twin(random_activations()), expected)


@every_architecture
def test_state_dict_has_the_keys_of_stock_topk(architecture) -> None:
    sae = trained_sae(architecture)
    run_step(sae, random_activations())
    assert list(sae.state_dict()) == list(trained_sae(STOCK[architecture]).state_dict())


@every_architecture
def test_to_moves_the_sae_between_dtypes(architecture) -> None:
    sae, double = trained_sae(architecture), trained_sae(architecture, dtype="float64")
    run_step(sae, random_activations())
    assert sae.to(torch.float64) is sae
    assert sae.cfg.dtype == "float64"
    copy_weights(sae, double)
    batch = random_activations(dtype=torch.float64)
    expected, output = run_step(double, batch), run_step(sae, batch)
    assert output.loss.dtype == torch.float64
    assert torch.equal(output.loss, expected.loss)


@every_architecture
@pytest.mark.gpu
def test_to_moves_the_sae_between_devices(architecture) -> None:
    sae = trained_sae(architecture)
    expected = run_step(sae, random_activations(), dead_mask(FEW_DEAD))
    sae.to("cuda")
    output = run_step(sae, random_activations().cuda(), dead_mask(FEW_DEAD).cuda())
    assert output.loss.device.type == "cuda"
    assert_same_losses(output, expected)
