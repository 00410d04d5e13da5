"""The threshold of a mean number of latents, and sweeps at it."""

import json
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from sae_lens_flex import BudgetSweep, MeanBudget, mean_budget, sweep_budgets
from sae_lens_flex.evals import calibration

from .comparison import D_IN, D_SAE, K, assert_equal_to_run_evals, make_sae


def threshold_by_definition(sae: Any, x: torch.Tensor, mean: float) -> tuple[float, float]:
    """Midway between the int(mean * N) largest activations and the others, and the mean above."""
    x = x.double()
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    acts = (pre * sae.W_dec.norm(dim=-1)).relu().flatten()
    ordered = acts[acts > 0].sort(descending=True).values.tolist()
    n_kept = int(mean * len(x))
    threshold = (ordered[n_kept - 1] + ordered[n_kept]) / 2 if len(ordered) > n_kept else 0.0
    return threshold, sum(value > threshold for value in ordered) / len(x)


@pytest.mark.parametrize("mean", [0.04, 1, 2.5, K])
def test_threshold_is_the_float64_definition(mean, monkeypatch) -> None:
    sae = make_sae().to(dtype=torch.float64)
    x = 0.5 + torch.randn(60, D_IN, dtype=torch.float64)
    expected, mean_above = threshold_by_definition(sae, x, mean)
    sae.budget = 3
    for most_activations in (calibration.MOST_ACTIVATIONS, 7 * D_SAE):
        monkeypatch.setattr(calibration, "MOST_ACTIVATIONS", most_activations)
        for activations in (x, x.view(3, 20, D_IN), x.split(13), iter(x.split(13))):
            budget = mean_budget(sae, activations, mean)
            assert budget.threshold == pytest.approx(expected, rel=1e-12)
            assert budget.mean == pytest.approx(mean_above, rel=1e-12)
            assert budget.mean == pytest.approx(int(mean * 60) / 60)
            with sae.at_budget(budget):
                assert (sae.encode(x) > 0).sum() == round(60 * budget.mean)
    assert sae.budget == 3


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_mean_is_that_of_encode(dtype, normalize) -> None:
    sae = make_sae(normalize_activations=normalize).to(dtype=dtype)
    x = (0.5 + torch.randn(200, D_IN)).to(dtype)
    before = set(vars(sae))
    budget = mean_budget(sae, x, 3)
    assert set(vars(sae)) == before
    sae.budget = budget
    counts = (sae.encode(x) > 0).sum(-1)
    assert counts.sum() == round(budget.mean * 200)
    assert counts.amin() < 3 < counts.amax()
    # Of bfloat16 activations many are equal to the threshold, none of which is kept.
    assert 2.8 <= budget.mean <= 3.0


def test_more_latents_than_k_for_more_than_one_vector_in_a_hundred_is_told() -> None:
    sae = make_sae()
    x = 0.5 + torch.randn(500, D_IN)
    with pytest.warns(UserWarning, match=rf"^at a mean of {K} latents (.*)% of .* than k \({K}\)"):
        budget = mean_budget(sae, x, K)
    with sae.at_budget(budget):
        counts = (sae.encode(x) > 0).sum(-1)
    assert (counts > K).double().mean() > 0.1
    told = f"{(counts > K).double().mean().item():.1%} of"
    with pytest.warns(UserWarning, match=told) as caught:
        mean_budget(sae, x, K)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean_budget(sae, x, 1)


def test_budgets_of_several_means_are_those_of_each() -> None:
    sae, x = make_sae(), 0.5 + torch.randn(80, D_IN)
    means = [3, 0.5, 2]
    together = calibration.mean_budgets(sae, x.split(30), means)
    assert together == [mean_budget(sae, x, mean) for mean in means]


def test_equal_activations_are_all_left_out() -> None:
    sae = make_sae()
    x = torch.randn(1, D_IN).repeat(10, 1)
    one = mean_budget(sae, x, 1.95)
    assert one.mean == 1  # The second latent's are equal in all ten, and only nine may be kept.
    with pytest.raises(ValueError, match=r"^mean is 0.5, .* equally large"):
        mean_budget(sae, x, 0.5)


def test_a_store_leaves_out_special_tokens_and_heads_are_joined(make_store) -> None:
    sae = make_sae(
        hook_name="blocks.1.attn.hook_z", reshape_activations="hook_z", hook_head_index=None
    )
    options: Any = {"n_batches": 2, "exclude_special_tokens": [0, 7, 8]}
    budget = mean_budget(sae, make_store(sae), 2, **options)
    sweep = sweep_budgets(
        sae,
        make_store(sae),
        budgets=[budget],
        show_progress=False,
        compute_ce_loss=False,
        **options,
    )
    assert sweep.metrics[0].l0 == pytest.approx(budget.mean, rel=1e-6)
    assert sae.hook_z_reshaping_mode


def test_run_evals_measures_a_mean_budget_as_a_sweep_does(make_store) -> None:
    sae = make_sae()
    budget = mean_budget(sae, make_store(sae), 3, n_batches=2)
    assert_equal_to_run_evals(sae, make_store, True, budgets=[budget])


@pytest.mark.parametrize("decode", ["own", "replaced"])
def test_a_sweep_takes_mean_budgets_beside_numbers(decode) -> None:
    sae = make_sae()
    if decode == "replaced":
        own = sae.decode
        sae.decode = lambda acts: 0.5 * own(acts)  # type: ignore[method-assign]
    x = 0.5 + torch.randn(80, D_IN)
    means = [mean_budget(sae, x, mean) for mean in (4, 2)]
    saes = {"all": sae, "3": make_sae(TopKSAE, TopKSAEConfig, k=3)}
    sweep = sweep_budgets(saes, x, budgets=[1, 4, *means], n_batches=3, show_progress=False)
    assert [(row.sae, row.budget, row.threshold) for row in sweep.metrics] == [
        ("all", 1, None),
        ("all", 4, None),
        ("all", None, means[0].threshold),
        ("all", None, means[1].threshold),
        ("3", 3, None),
    ]
    variance = (x - x.mean(0)).square().sum(-1).mean()
    for row, budget in zip(sweep.metrics[2:4], means, strict=True):
        with torch.no_grad(), sae.at_budget(budget):
            acts = sae.encode(x)
            mse = (sae.decode(acts) - x).square().sum(-1).mean()
        assert row.l0 == pytest.approx((acts > 0).sum().item() / 80) == pytest.approx(budget.mean)
        assert row.mse == pytest.approx(mse.item(), rel=1e-5)
        assert row.explained_variance == pytest.approx(1 - (mse / variance).item(), rel=1e-4)
        assert row.dead_latents == pytest.approx(1 - (acts > 0).any(0).float().mean().item())
    assert sae.budget == K
    only = sweep_budgets(saes, x, budgets=means, n_batches=3, show_progress=False)
    assert only.metrics == [row for row in sweep.metrics if row.sae == "3" or row.threshold]
    assert BudgetSweep.from_json(sweep.to_json()) == sweep


def test_table_and_figure_tell_mean_budgets_apart() -> None:
    sae = make_sae()
    x = 0.5 + torch.randn(80, D_IN)
    means = [mean_budget(sae, x, mean) for mean in (2, 4)]
    sweep = sweep_budgets(sae, x, budgets=[1, 4, *means], show_progress=False)
    header, *rows, _ = str(sweep).splitlines()
    assert header.split() == ["budget", "explained_variance", "mse", "l0", "not_seen"]
    assert [row.split()[:-4] for row in rows] == [["1"], ["4"], ["mean", "2"], ["mean", "4"]]
    assert [MeanBudget(row.mean, row.threshold) for row in sweep.metrics[2:]] == means
    assert sweep.to_pandas()["threshold"].dropna().tolist() == [b.threshold for b in means]
    traces: dict[str, Any] = {trace["name"]: trace for trace in sweep.plot().data}
    assert list(traces) == ["sae", "sae, one threshold"]
    assert list(traces["sae"].x) == [1, 4]
    assert list(traces["sae, one threshold"].x) == pytest.approx([b.mean for b in means])
    for name in ("threshold", "mean"):
        with pytest.raises(ValueError, match=f"metric is '{name}'"):
            sweep.plot(metric=name)
    old = json.loads(sweep.to_json())
    for row in old["metrics"]:
        row.pop("mean")  # as an earlier version wrote it
    assert f"> {means[0].threshold:.4g} " in str(BudgetSweep.from_json(json.dumps(old)))


def test_sweep_refuses_mean_budgets_of_several_saes_and_twice() -> None:
    x, budget = torch.randn(8, D_IN), MeanBudget(2, 0.5)
    with pytest.raises(ValueError, match=r"^budgets has MeanBudget.* 2 with budgets \(a, b\)"):
        sweep_budgets({"a": make_sae(), "b": make_sae()}, x, budgets=[1, budget])
    with pytest.raises(ValueError, match=r"^budgets has .*twice"):
        sweep_budgets(make_sae(), x, budgets=[budget, budget])
    with pytest.raises(ValueError, match=r"^budget is MeanBudget.*up to k"):
        sweep_budgets(make_sae(), x, budgets=[MeanBudget(K + 1, 0.5)])
    with pytest.raises(ValueError, match=r"^budgets is .*takes a budget"):
        sweep_budgets(make_sae(TopKSAE, TopKSAEConfig), x, budgets=[budget])


@pytest.mark.parametrize(
    ("name", "error", "arguments"),
    [
        ("sae", TypeError, {"sae": make_sae(TopKSAE, TopKSAEConfig)}),
        ("sae", TypeError, {"sae": make_sae(JumpReLUSAE, JumpReLUSAEConfig)}),
        ("mean", ValueError, {"mean": 0}),
        ("mean", ValueError, {"mean": K + 0.5}),
        ("mean", ValueError, {"mean": "3"}),
        ("mean", ValueError, {"mean": 0.01}),
        ("mean", ValueError, {"mean": K, "activations": torch.zeros(8, D_IN)}),
        ("activations", ValueError, {"activations": []}),
        ("activations", ValueError, {"activations": torch.zeros(4, D_IN + 1)}),
        ("activations", ValueError, {"activations": torch.full((4, D_IN), torch.nan)}),
        ("activations", TypeError, {"activations": None}),
        ("n_batches", ValueError, {"n_batches": 0}),
        ("batch_size_prompts", ValueError, {"batch_size_prompts": 0}),
        ("model", ValueError, {"model": torch.nn.Linear(2, 2)}),
    ],
)
def test_impossible_arguments_raise_and_are_named(name, error, arguments) -> None:
    arguments = {"sae": make_sae(), "activations": torch.randn(8, D_IN), "mean": 2} | arguments
    if arguments["activations"] is not None and name == "mean" and arguments["mean"] == K:
        with torch.no_grad():  # No latent is positive.
            arguments["sae"].b_enc.fill_(-10)
    with pytest.raises(error, match=rf"^{name}\b"):
        mean_budget(
            arguments.pop("sae"), arguments.pop("activations"), arguments.pop("mean"), **arguments
        )


def test_a_scalar_of_torch_or_numpy_is_a_mean() -> None:
    sae, x = make_sae(), torch.randn(40, D_IN)
    expected = mean_budget(sae, x, 2)
    for mean in (torch.tensor(2.0), torch.tensor(2), np.float32(2), np.array(2.0)):
        assert mean_budget(sae, x, mean) == expected
        assert MeanBudget(mean, 0.5).mean == 2
    for mean in (torch.tensor(True), torch.tensor([2.0]), torch.tensor(torch.nan)):
        with pytest.raises(ValueError, match=r"^mean is tensor"):
            mean_budget(sae, x, mean)


def test_weights_that_are_not_finite_are_refused() -> None:
    sae = make_sae()
    with torch.no_grad():
        sae.W_dec[3] = torch.inf
    with pytest.raises(ValueError, match=r"^sae has NaN or infinite values in W_dec, expected"):
        mean_budget(sae, torch.randn(8, D_IN), 2)


def test_a_sweep_warns_where_more_latents_explain_less() -> None:
    sae = make_sae(d_sae=D_IN, k=4, rescale_acts_by_decoder_norm=False)
    x = torch.rand(50, D_IN)
    with torch.no_grad():
        sae.b_enc.zero_(), sae.b_dec.zero_()
        sae.W_enc.copy_(torch.eye(D_IN))
        sae.W_dec.copy_(torch.eye(D_IN))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sweep_budgets(sae, x, show_progress=False)
    with torch.no_grad():
        sae.W_dec.mul_(3)  # Every latent takes away three times what it should.
    with pytest.warns(UserWarning, match=r"^explained variance of 'sae' falls .* at 1, .* at 2\."):
        sweep_budgets(sae, x, show_progress=False)
