"""hierarchical_topk against the mean of SAELens's own TopK losses over the budgets."""

import re
from typing import Any

import pytest
import torch
from comparison import (
    BATCH,
    D_IN,
    D_SAE,
    DEVICES,
    FEW_DEAD,
    MANY_DEAD,
    K,
    assert_close,
    assert_same_gradients,
    assert_same_losses,
    copy_weights,
    dead_mask,
    random_activations,
    run_step,
    step_input,
    trained_sae,
)
from sae_lens import SAE
from sae_lens.saes.topk_sae import TopKTrainingSAE

from sae_lens_flex import HierarchicalTopKSAE, HierarchicalTopKTrainingSAE

ALL_LEVELS: list[Any] = [
    pytest.param({}, id="every_level"),
    pytest.param({"budgets": [1, 4, K]}, id="some_levels"),
    pytest.param({"budgets": [K]}, id="last_level"),
    pytest.param({"level_weights": [*range(1, K), 40]}, id="every_level_weighted"),
    pytest.param({"budgets": [1, 4, K], "level_weights": [0.3, 0, 2]}, id="some_levels_weighted"),
]
NORMALIZATIONS = [
    "none",
    "expected_average_only_in",
    "covariance_whitening",
    "constant_norm_rescale",
    "layer_norm",
]
BACKENDS = [
    pytest.param("torch", "cpu", id="torch-cpu"),
    pytest.param(
        "triton",
        "cpu",
        id="triton-cpu",
        marks=pytest.mark.skipif(
            torch.cuda.is_available(), reason="kernels are compiled where there is a CUDA device"
        ),
    ),
    pytest.param("triton", "cuda", id="triton-cuda", marks=pytest.mark.gpu),
]


def stock_in_float64(sae: HierarchicalTopKTrainingSAE) -> TopKTrainingSAE:
    """SAELens's topk with the weights and the options of `sae`."""
    options = ("k", "normalize_activations", "rescale_acts_by_decoder_norm", "apply_b_dec_to_input")
    fields: dict[str, Any] = {name: getattr(sae.cfg, name) for name in options}
    fields["aux_loss_coefficient"] = sae.cfg.aux_loss_coefficient
    stock = trained_sae("topk", **fields, dtype="float64")
    copy_weights(sae, stock)
    return stock


def backward_by_definition(
    stock: TopKTrainingSAE,
    sae_in: torch.Tensor,
    budgets: list[int] | None = None,
    level_weights: list[float] | None = None,
    dead: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Leave the gradients of the defined loss on `stock` and return its terms.

    The weighted mean over the budgets j of the MSE of a stock topk that keeps j latents, and the
    auxiliary loss of the one that keeps k.
    """
    k = stock.cfg.k
    budgets = budgets or list(range(1, k + 1))
    weights = torch.tensor(level_weights or [1.0] * len(budgets), dtype=torch.float64)
    mse_losses = []
    for budget in budgets:
        stock.activation_fn = type(stock.activation_fn)(budget)
        output = stock.training_forward_pass(step_input(sae_in.double(), dead))
        mse_losses.append(output.losses["mse_loss"])
    assert budgets[-1] == k
    losses = {**output.losses, "mse_loss": torch.stack(mse_losses) @ (weights / weights.sum())}
    stock.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    return losses


def assert_matches_definition(
    sae: HierarchicalTopKTrainingSAE,
    sae_in: torch.Tensor,
    dead: torch.Tensor | None = None,
    tolerance: float = 1e-5,
) -> None:
    stock = stock_in_float64(sae)
    losses = backward_by_definition(stock, sae_in, sae.cfg.budgets, sae.cfg.level_weights, dead)
    device = sae.W_dec.device
    output = run_step(sae, sae_in.to(device), None if dead is None else dead.to(device))
    assert list(output.losses) == list(losses)
    for name, loss in losses.items():
        assert_close(output.losses[name], loss, tolerance, name)
    assert_close(output.loss, torch.stack(list(losses.values())).sum(), tolerance, "loss")
    assert_same_gradients(sae, stock, tolerance)


@pytest.mark.parametrize("levels", ALL_LEVELS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "not_rescaled"])
@pytest.mark.parametrize("apply_b_dec", [True, False], ids=["b_dec_applied", "b_dec_not_applied"])
def test_mse_loss_is_the_mean_of_stock_mse_over_the_budgets(
    levels, normalization, rescale, apply_b_dec
) -> None:
    sae = trained_sae(
        "hierarchical_topk",
        **levels,
        normalize_activations=normalization,
        rescale_acts_by_decoder_norm=rescale,
        apply_b_dec_to_input=apply_b_dec,
        aux_loss_coefficient=0,
    )
    attributes = set(vars(sae))
    assert_matches_definition(sae, random_activations())
    assert attributes <= set(vars(sae))
    assert not {"ln_mu", "ln_std", "x_norm_coeff"} & set(vars(sae))


@pytest.mark.parametrize("levels", ALL_LEVELS)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_every_backend_matches_the_definition(levels, backend, device) -> None:
    sae = trained_sae("hierarchical_topk", **levels, backend=backend, device=device)
    assert_matches_definition(sae, random_activations(), dead_mask(FEW_DEAD))


@pytest.mark.parametrize("n_dead", [0, 1, FEW_DEAD, MANY_DEAD])
@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "not_rescaled"])
def test_auxiliary_loss_is_that_of_stock_topk_at_k(n_dead, rescale) -> None:
    sae = trained_sae("hierarchical_topk", rescale_acts_by_decoder_norm=rescale)
    assert_matches_definition(sae, random_activations(), dead_mask(n_dead))
    auxiliary_loss = run_step(sae, random_activations(), dead_mask(n_dead)).losses[
        "auxiliary_reconstruction_loss"
    ]
    assert (auxiliary_loss > 0) == (n_dead > 0)


@pytest.mark.parametrize("use_fused_path", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("weights", [None, [0.1, 0.7, 3]], ids=["alike", "weighted"])
@pytest.mark.parametrize("budgets", [None, [2, K], [1, 3, K]])
@pytest.mark.parametrize("k", [K, 7])
@pytest.mark.parametrize("device", DEVICES)
def test_in_float64_it_is_exact_to_float64(budgets, weights, k, device, use_fused_path) -> None:
    budgets = budgets and [*budgets[:-1], k]
    fields = {"k": k, "budgets": budgets, "dtype": "float64", "device": device}
    n_budgets = len(budgets or range(k))
    fields["level_weights"] = weights and (weights * k)[:n_budgets]
    sae = trained_sae("hierarchical_topk", **fields)
    sae.use_fused_path = use_fused_path
    sae_in = random_activations(dtype=torch.float64)
    assert_matches_definition(sae, sae_in, dead_mask(FEW_DEAD), tolerance=1e-12)


@pytest.mark.parametrize("architecture", ["hierarchical_topk", "flex_topk"])
def test_decoder_rows_of_norm_zero_count_for_nothing(architecture) -> None:
    sae, tiny, stock = (trained_sae(name) for name in (architecture, architecture, "topk"))
    n_left = K // 2  # so that some of the K kept latents are among the others
    with torch.no_grad():
        sae.W_dec[n_left:] = stock.W_dec[n_left:] = 0
        tiny.W_dec[n_left:] *= 1e-6
    x = random_activations()
    dead = torch.arange(D_SAE).sub(n_left).abs() <= 2
    for mask in (None, dead):
        assert_same_losses(run_step(sae, x, mask), run_step(tiny, x, mask))
        assert all(parameter.grad.isfinite().all() for parameter in sae.parameters())
        assert run_step(stock, x, mask).loss.isnan()


@pytest.mark.parametrize("other", ["topk", "flex_topk"])
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"budgets": [K]}, id="only_k"),
        pytest.param({"k": 1}, id="k1"),
        pytest.param({"k": 1, "budgets": [1]}, id="k1_budgets1"),
        pytest.param({"k": D_SAE, "budgets": [D_SAE]}, id="k_is_d_sae"),
    ],
)
def test_with_one_level_it_is_topk(other, fields) -> None:
    sae, topk = trained_sae("hierarchical_topk", **fields), trained_sae(other, k=fields.get("k", K))
    expected = run_step(topk, random_activations(), dead_mask(FEW_DEAD))
    output = run_step(sae, random_activations(), dead_mask(FEW_DEAD))
    assert_same_losses(output, expected)
    assert_same_gradients(sae, topk)


def test_step_reports_level_k_whatever_the_budgets() -> None:
    sae, topk = trained_sae("hierarchical_topk", budgets=[1, K]), trained_sae("topk")
    output, expected = (run_step(each, random_activations()) for each in (sae, topk))
    assert_close(output.sae_out, expected.sae_out, name="sae_out")
    assert_close(output.feature_acts.to_dense(), expected.feature_acts, name="feature_acts")


@pytest.mark.parametrize("use_fused_path", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize(
    "weights", [[1e308] * K, [5e-324] * K, [7] * K], ids=["large", "tiny", "7"]
)
def test_only_the_ratio_of_the_level_weights_counts(weights, use_fused_path) -> None:
    sae = trained_sae("hierarchical_topk", level_weights=weights)
    sae.use_fused_path = use_fused_path
    alike = trained_sae("hierarchical_topk")
    assert_same_losses(run_step(sae, random_activations()), run_step(alike, random_activations()))
    assert_same_gradients(sae, alike)


@pytest.mark.parametrize("use_fused_path", [True, False], ids=["fused", "unfused"])
def test_level_weights_edited_between_steps_act_at_once(use_fused_path) -> None:
    sae = trained_sae("hierarchical_topk", budgets=[1, 4, K])
    sae.use_fused_path = use_fused_path
    run_step(sae, random_activations())
    for weights in ([1, 2, 3], [0, 1, 0], None):
        sae.cfg.level_weights = weights
        assert_matches_definition(sae, random_activations())
    sae.cfg.level_weights = [1.0, 1.0, 1.0]
    sae.cfg.level_weights[0] = 5.0
    assert_matches_definition(sae, random_activations())
    sae.cfg.budgets = [2, K]
    with pytest.raises(ValueError, match=r"level_weights is \[5.0, 1.0, 1.0\], of 3, expected 2 "):
        run_step(sae, random_activations())


def test_unfused_level_weights_are_not_rounded_to_16_bits() -> None:
    # 1 / 48 in bfloat16 is 0.2 % too large, and so would the loss be.
    sae = trained_sae("hierarchical_topk", k=48, dtype="bfloat16")
    fused = run_step(sae, random_activations())
    unfused = run_step(sae, random_activations().unsqueeze(0))
    assert_close(unfused.loss, fused.loss, 1e-3)


@pytest.mark.parametrize("use_fused_path", [True, False], ids=["fused", "unfused"])
def test_a_step_in_inference_mode_leaves_later_steps_differentiable(use_fused_path) -> None:
    # Level weights that no other test has: those of a step are kept for later ones.
    weights = [0.3, 0.17, 0.53 + use_fused_path]
    sae = trained_sae("hierarchical_topk", budgets=[1, 4, K], level_weights=weights)
    sae.use_fused_path = use_fused_path
    with torch.inference_mode():
        sae.training_forward_pass(step_input(random_activations()))
    sae.use_fused_path = False
    assert_matches_definition(sae, random_activations())


@pytest.mark.parametrize("use_fused_path", [True, False], ids=["fused", "unfused"])
def test_training_step_ignores_the_run_time_budget(use_fused_path) -> None:
    sae = trained_sae("hierarchical_topk")
    sae.use_fused_path = use_fused_path
    expected = run_step(sae, random_activations(), dead_mask(FEW_DEAD))
    sae.budget = 2
    output = run_step(sae, random_activations(), dead_mask(FEW_DEAD))
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(output.sae_out, expected.sae_out)
    assert sae.budget == 2


def training_and_inference_sae(tmp_path) -> list[Any]:
    sae = trained_sae("hierarchical_topk")
    sae.save_inference_model(tmp_path)
    inference = SAE.load_from_disk(tmp_path)
    assert type(inference) is HierarchicalTopKSAE
    return [sae, inference]


def test_budget_limits_encode_and_forward(tmp_path) -> None:
    batch = random_activations()
    for sae in training_and_inference_sae(tmp_path):
        assert sae.budget == K
        for budget in range(1, K + 1):
            stock = trained_sae("topk", k=budget)
            sae.budget = budget
            assert sae.budget == budget
            assert int((sae.encode(batch) != 0).sum(-1).max()) == budget
            assert_close(sae.encode(batch), stock.encode(batch), name="feature_acts")
            assert_close(sae(batch), stock(batch), name="output")


def test_at_budget_restores_what_was_set_before(tmp_path) -> None:
    for sae in training_and_inference_sae(tmp_path):
        sae.budget = 5
        with sae.at_budget(3):
            assert sae.budget == 3
            with sae.at_budget(K):
                assert sae.budget == K
            assert sae.budget == 3
        with pytest.raises(ZeroDivisionError), sae.at_budget(2):
            raise ZeroDivisionError
        assert sae.budget == 5


@pytest.mark.parametrize("budget", [0, -1, K + 1, 2.0, "4", True, None, [4], float("nan")])
def test_impossible_budgets_are_refused(tmp_path, budget) -> None:
    for sae in training_and_inference_sae(tmp_path):
        sae.budget = 5
        expected = re.escape(
            f"budget is {budget!r}, expected an integer within 1..k ({K}) or a Mean"
        )
        with pytest.raises(ValueError, match=f"^{expected}"):
            sae.budget = budget
        with pytest.raises(ValueError, match="budget"), sae.at_budget(budget):
            pass
        assert sae.budget == 5


def test_budget_is_no_part_of_a_saved_sae(tmp_path) -> None:
    for i, sae in enumerate(training_and_inference_sae(tmp_path)):
        cfg, state = sae.cfg.to_dict(), sae.state_dict()
        sae.budget = 3
        assert sae.cfg.to_dict() == cfg
        assert sae.state_dict().keys() == state.keys()
        sae.save_model(tmp_path / str(i))
        assert SAE.load_from_disk(tmp_path / str(i)).budget == K


def test_error_falls_with_the_budget_after_training() -> None:
    torch.manual_seed(0)
    sae = trained_sae("hierarchical_topk")
    directions = torch.randn(D_SAE, D_IN)
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    batch = torch.empty(0)
    for _ in range(150):
        batch = (torch.rand(4 * BATCH, D_SAE) - 0.9).relu() * 10 @ directions
        run_step(sae, batch)
        optimizer.step()
    errors = []
    for budget in range(1, K + 1):
        with sae.at_budget(budget):
            errors.append(float((sae(batch) - batch).pow(2).sum(-1).mean().detach()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]
