"""Sweeps: the same tokens for every budget, SAELens's metrics, and clear errors."""

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import (
    TopK,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.transcoder import Transcoder, TranscoderConfig

from sae_lens_flex import (
    BudgetSweep,
    FlexBatchTopKTrainingSAE,
    FlexBatchTopKTrainingSAEConfig,
    HierarchicalTopKSAE,
    mean_budget,
    sweep_budgets,
)

from .comparison import (
    BATCH_SIZE_PROMPTS,
    CE_METRICS,
    CONTEXT_SIZE,
    D_IN,
    D_SAE,
    KL_METRICS,
    N_BATCHES,
    RECONSTRUCTION_METRICS,
    K,
    assert_equal_to_run_evals,
    make_sae,
    saelens_metrics,
)

TRANSCODER = TranscoderConfig(d_in=D_IN, d_sae=D_SAE, d_out=D_IN, apply_b_dec_to_input=False)


@pytest.mark.parametrize("exclude", [True, False, [0, 7, 8]], ids=repr)
def test_metrics_are_those_of_run_evals_on_the_same_tokens(exclude, make_store) -> None:
    sweep = assert_equal_to_run_evals(make_sae(), make_store, exclude)
    n_tokens = N_BATCHES * BATCH_SIZE_PROMPTS * CONTEXT_SIZE
    if exclude is False:
        assert sweep.n_tokens == n_tokens
    else:
        assert 0 < sweep.n_tokens < n_tokens


@pytest.mark.parametrize("head", [None, 1], ids=["all-heads", "one-head"])
def test_metrics_are_those_of_run_evals_at_hook_z(head, make_store) -> None:
    sae = make_sae(
        hook_name="blocks.1.attn.hook_z",
        hook_head_index=head,
        d_in=D_IN if head is None else D_IN // 2,
        reshape_activations="hook_z" if head is None else "none",
    )
    assert_equal_to_run_evals(sae, make_store, True)
    assert sae.hook_z_reshaping_mode == (head is None)


def test_metrics_of_other_architectures_are_those_of_run_evals(make_store) -> None:
    saes: dict[str, Any] = {
        "topk": make_sae(TopKSAE, TopKSAEConfig, k=5),
        "jumprelu": make_sae(JumpReLUSAE, JumpReLUSAEConfig),
        "standard": make_sae(StandardSAE, StandardSAEConfig),
        "sparse": make_sae(TopKTrainingSAE, TopKTrainingSAEConfig, use_sparse_activations=True),
        "hierarchical": make_sae(),
    }
    sweep = sweep_budgets(
        saes, make_store(saes["topk"]), n_batches=N_BATCHES, compute_kl=True, show_progress=False
    )
    rows = {row.sae: row for row in sweep.metrics}
    assert {name: row.budget for name, row in rows.items()} == {
        "topk": 5,
        "jumprelu": None,
        "standard": None,
        "sparse": K,
        "hierarchical": K,  # the last of 1, 2, 4, 8
    }
    for name, sae in saes.items():
        expected = saelens_metrics(sae, make_store, True)
        for metric in RECONSTRUCTION_METRICS + CE_METRICS + KL_METRICS:
            assert getattr(rows[name], metric) == pytest.approx(
                expected[metric], rel=1e-4, abs=1e-5
            ), (name, metric)


def test_metrics_of_a_hierarchical_sae_at_k_are_those_of_the_topk_sae_of_its_weights() -> None:
    hierarchical = make_sae()
    x = torch.randn(64, D_IN)
    topk = make_sae(TopKSAE, TopKSAEConfig, k=3)
    sweep = sweep_budgets({"all": hierarchical, "3": topk}, x, budgets=[3], show_progress=False)
    ours, theirs = sweep.metrics
    for name in [*RECONSTRUCTION_METRICS, "dead_latents"]:
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-5)


def test_every_sae_and_budget_sees_the_same_tokens(make_store, monkeypatch) -> None:
    saes = {"a": make_sae(), "b": make_sae(TopKSAE, TopKSAEConfig), "c": make_sae()}
    store = make_store(saes["a"])
    drawn = []
    draw = store.get_batch_tokens
    monkeypatch.setattr(
        store, "get_batch_tokens", lambda *args: drawn.append(draw(*args)) or drawn[-1]
    )
    sweep = sweep_budgets(saes, store, n_batches=2, show_progress=False)
    assert len(drawn) == 2
    by_name = [[row for row in sweep.metrics if row.sae == name] for name in saes]
    assert [replace(row, sae="c") for row in by_name[0]] == by_name[2]
    assert by_name[1][0].mse == pytest.approx(by_name[0][-1].mse, rel=1e-5)


def test_one_encode_a_batch_and_one_model_pass_a_budget(make_store, monkeypatch) -> None:
    sae = make_sae()
    store = make_store(sae)
    calls = {"encode": 0, "model": 0}
    # Every encode calls it. A replaced `encode` would be called for each budget.
    encode, forward = sae.process_sae_in, store.model.forward

    def count(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return counted

    monkeypatch.setattr(sae, "process_sae_in", count("encode", encode))
    monkeypatch.setattr(store.model, "forward", count("model", forward))
    budgets = list(range(1, K + 1))
    sweep_budgets(
        sae, store, budgets=budgets, n_batches=3, compute_ce_loss=False, show_progress=False
    )
    assert calls == {"encode": 3, "model": 3}
    calls.update(encode=0, model=0)
    sweep_budgets(sae, store, budgets=budgets, n_batches=3, compute_kl=True, show_progress=False)
    # Per batch: once as it is, once ablated, once for each budget.
    assert calls == {"encode": 3, "model": 3 * (1 + 1 + len(budgets))}


def test_eight_budgets_cost_less_than_two_single_evaluations() -> None:
    sae = make_sae(d_in=128, d_sae=4096, k=128)
    x = torch.randn(2048, 128)

    def evaluate_once() -> None:
        with torch.no_grad():
            acts = sae.encode(x)
            variance = ExplainedVarianceCalculator()
            variance.add_batch(sae.decode(acts), x)
            variance.compute()
            (acts != 0).sum(-1).float().mean().item()

    def sweep() -> None:
        assert len(sweep_budgets(sae, x, n_batches=1, show_progress=False).metrics) == 8

    def seconds(function: Callable[[], None]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    once, eight = [], []
    # Other load on the machine only adds time, so the smallest of several counts.
    for _ in range(8):
        once.append(seconds(evaluate_once))
        eight.append(seconds(sweep))
        if len(once) >= 3 and min(eight) < 2 * min(once):
            return
    pytest.fail(f"8 budgets took {min(eight):.3f} s, one evaluation {min(once):.3f} s")


def reconstruction_rows(sweep: BudgetSweep) -> list[tuple[float, ...]]:
    return [(row.explained_variance, row.mse, row.l0, row.dead_latents) for row in sweep.metrics]


def test_tensor_iterable_and_generator_of_the_same_activations_agree() -> None:
    sae = make_sae()
    x = torch.randn(100, D_IN)
    batches = list(x.split(30))
    sweeps = [
        sweep_budgets(sae, activations, show_progress=False, **fields)
        for activations, fields in (
            (x, {}),
            (x, {"n_batches": 1}),
            (batches, {}),
            (iter(batches), {"n_batches": 4}),
            ((batch for batch in batches), {"n_batches": 99}),
            ([x[:0], *batches], {}),
        )
    ]
    assert all(sweep.n_tokens == 100 for sweep in sweeps)
    for sweep in sweeps[1:]:
        for row, expected in zip(
            reconstruction_rows(sweep), reconstruction_rows(sweeps[0]), strict=True
        ):
            assert row == pytest.approx(expected, rel=1e-5)
    assert sweep_budgets(sae, batches, n_batches=2, show_progress=False).n_tokens == 60


def test_all_of_a_list_is_measured_and_ten_batches_of_what_has_no_length() -> None:
    batches = [torch.randn(2, D_IN) for _ in range(25)]
    for given, n_tokens in ((batches, 50), (tuple(batches), 50), (iter(batches), 20)):
        sweep = sweep_budgets(make_sae(), given, show_progress=False)
        assert sweep.n_tokens == n_tokens
        assert f"(of {n_tokens} tokens; " in str(sweep)


def test_leading_dimensions_are_tokens() -> None:
    sae = make_sae()
    x = torch.randn(4, 5, D_IN)
    flat, *others = (
        sweep_budgets(sae, activations, n_batches=1, show_progress=False)
        for activations in (x.flatten(0, 1), x, [x], x.view(2, 2, 5, D_IN))
    )
    assert flat.n_tokens == 20
    assert all(other == flat for other in others)


@pytest.mark.parametrize("shape", [(4, 3, D_IN + 1), (D_IN,), (0, D_IN), ()], ids=str)
def test_wrong_shape_is_told_as_it_came_and_before_the_bar(shape, capsys) -> None:
    with pytest.raises(ValueError, match=r"^activations has shape ") as raised:
        sweep_budgets(make_sae(), torch.zeros(shape), n_batches=2)
    assert str(list(shape)) in str(raised.value)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(value) -> None:
    x = torch.randn(20, D_IN)
    x[13, 2] = value
    with pytest.raises(ValueError, match=r"^activations has NaN or infinite values"):
        sweep_budgets(make_sae(), x, show_progress=False)


@pytest.mark.parametrize("decode", ["own", "replaced"])
@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
def test_metrics_match_a_plain_count(normalize, decode) -> None:
    sae = make_sae(normalize_activations=normalize)
    if decode == "replaced":
        own = sae.decode
        sae.decode = lambda acts: 0.5 * own(acts)  # type: ignore[method-assign]
    x = 0.5 + torch.randn(40, D_IN)
    sweep = sweep_budgets(sae, x, n_batches=3, show_progress=False)
    assert [row.budget for row in sweep.metrics] == [1, 2, 4, K]
    for row in sweep.metrics:
        with torch.no_grad(), sae.at_budget(row.budget or 0):
            acts = sae.encode(x)
            mse = (sae.decode(acts) - x).square().sum(-1).mean()
        n_dead = sum(
            all(acts[token, latent] == 0 for token in range(40)) for latent in range(D_SAE)
        )
        assert row.dead_latents == pytest.approx(n_dead / D_SAE)
        assert row.l0 == pytest.approx((acts > 0).sum().item() / 40)
        assert row.mse == pytest.approx(mse.item(), rel=1e-5)
        variance = (x - x.mean(0)).square().sum(-1).mean()
        assert row.explained_variance == pytest.approx(1 - (mse / variance).item(), rel=1e-4)
    assert 0 < sweep.metrics[-1].dead_latents < sweep.metrics[0].dead_latents < 1


def without_some(acts: torch.Tensor, hook: Any = None) -> torch.Tensor:
    return acts.index_fill(-1, torch.arange(D_SAE // 2), 0)


class WithoutSome(HierarchicalTopKSAE):
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return without_some(super().encode(x))


class TopKWithoutSome(TopK):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return without_some(super().forward(x))


@pytest.mark.parametrize("how", ["hook", "subclass", "object", "activation_fn"])
def test_what_edits_the_kept_latents_does_so_at_every_budget(how) -> None:
    sae = make_sae(WithoutSome if how == "subclass" else HierarchicalTopKSAE)
    if how == "hook":
        sae.hook_sae_acts_post.add_hook(without_some)
    elif how == "object":
        own = sae.encode
        sae.encode = lambda x: without_some(own(x))  # type: ignore[method-assign]
    elif how == "activation_fn":
        sae.activation_fn = TopKWithoutSome(K)
    x = torch.randn(40, D_IN)
    sweep = sweep_budgets(sae, x, show_progress=False)
    for row in sweep.metrics:
        with torch.no_grad(), sae.at_budget(row.budget or 0):
            acts = sae.encode(x)
            mse = (sae.decode(acts) - x).square().sum(-1).mean()
        assert row.l0 == pytest.approx((acts != 0).sum().item() / 40)
        assert row.mse == pytest.approx(mse.item(), rel=1e-5)
    assert 0 < sweep.metrics[0].l0 < 1


def test_an_sae_stands_at_the_number_of_latents_that_it_keeps() -> None:
    saes: dict[str, Any] = {
        "topk": make_sae(TopKSAE, TopKSAEConfig),
        "batchtopk": make_sae(BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
        "flex_batchtopk": make_sae(FlexBatchTopKTrainingSAE, FlexBatchTopKTrainingSAEConfig),
    }
    saes["topk"].activation_fn.k = 3
    rows = sweep_budgets(saes, torch.randn(40, D_IN), show_progress=False).metrics
    assert [(row.sae, row.budget) for row in rows] == [
        ("topk", 3),
        ("batchtopk", None),
        ("flex_batchtopk", None),
    ]
    assert rows[0].l0 == 3


@pytest.mark.parametrize("make", [np.array, torch.tensor, tuple])
def test_budgets_may_be_an_array(make) -> None:
    x = torch.randn(9, D_IN)
    sweep = sweep_budgets(make_sae(), x, budgets=make([1, 3]), show_progress=False)
    assert [row.budget for row in sweep.metrics] == [1, 3]


def test_budgets_above_an_saes_k_are_left_out_for_it() -> None:
    saes = {"small": make_sae(k=4), "large": make_sae()}
    sweep = sweep_budgets(saes, torch.randn(20, D_IN), budgets=[2, 6], show_progress=False)
    assert [(row.sae, row.budget) for row in sweep.metrics] == [
        ("small", 2),
        ("large", 2),
        ("large", 6),
    ]


def test_sweep_leaves_the_saes_as_they_were() -> None:
    sae = make_sae()
    sae.budget = 3
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    sweep_budgets(sae, torch.randn(20, D_IN), show_progress=False)
    assert sae.budget == 3
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
    assert all(parameter.grad is None for parameter in sae.parameters())


def test_bfloat16_sae_and_activations_are_measured_in_float32() -> None:
    x = torch.randn(64, D_IN).bfloat16()
    sae = make_sae().to(dtype=torch.bfloat16)
    sweep = sweep_budgets(sae, x, show_progress=False)
    exact = sweep_budgets(sae.to(dtype=torch.float32), x.float(), show_progress=False)
    for row, expected in zip(sweep.metrics, exact.metrics, strict=True):
        assert row.explained_variance == pytest.approx(expected.explained_variance, abs=0.02)


@pytest.mark.parametrize("show", [True, False])
def test_progress_bar_can_be_turned_off(show, capsys) -> None:
    sweep_budgets(make_sae(), torch.randn(20, D_IN), n_batches=2, show_progress=show)
    captured = capsys.readouterr()
    assert ("Sweeping budgets" in captured.err) == show
    assert captured.out == ""


@pytest.mark.parametrize(
    ("name", "error", "arguments"),
    [
        ("saes", ValueError, {"saes": {}}),
        ("saes", TypeError, {"saes": torch.nn.Linear(2, 2)}),
        ("saes", TypeError, {"saes": {"sae": "path"}}),
        ("saes has the name 16", TypeError, {"saes": {16: make_sae()}}),
        ("activations", TypeError, {"activations": None}),
        ("activations", ValueError, {"activations": []}),
        ("activations", ValueError, {"activations": torch.zeros(0, D_IN)}),
        ("activations", ValueError, {"activations": torch.zeros(D_IN)}),
        ("activations", ValueError, {"activations": [torch.zeros(D_IN)]}),
        ("activations", ValueError, {"activations": torch.zeros(4, D_IN + 1)}),
        ("activations", ValueError, {"activations": [[1.0, 2.0]]}),
        ("budgets", ValueError, {"budgets": []}),
        ("budgets", ValueError, {"budgets": [2, 1]}),
        ("budgets", ValueError, {"budgets": [0]}),
        ("budgets", ValueError, {"budgets": [1, K + 1]}),
        ("budgets", ValueError, {"budgets": [1.5]}),
        ("budgets", ValueError, {"budgets": 4}),
        ("budgets", ValueError, {"budgets": [6], "saes": {"a": make_sae(), "b": make_sae(k=4)}}),
        ("budgets", ValueError, {"budgets": [1], "saes": make_sae(TopKSAE, TopKSAEConfig)}),
        ("n_batches", ValueError, {"n_batches": 0}),
        ("n_batches", ValueError, {"n_batches": 2.5}),
        ("batch_size_prompts", ValueError, {"batch_size_prompts": 0}),
        ("compute_ce_loss", ValueError, {"compute_ce_loss": True}),
        ("compute_kl", ValueError, {"compute_kl": True}),
        ("model", ValueError, {"model": torch.nn.Linear(2, 2)}),
        ("batch_size_prompts", ValueError, {"batch_size_prompts": 4}),
        ("exclude_special_tokens", ValueError, {"exclude_special_tokens": [0]}),
        ("model_kwargs", ValueError, {"model_kwargs": {"stop_at_layer": 1}}),
        ("activations", TypeError, {"activations": torch.randn(8, D_IN).to(torch.complex64)}),
        ("activations", TypeError, {"activations": [torch.ones(8, D_IN, dtype=torch.bool)]}),
        ("compute_ce_loss", ValueError, {"compute_ce_loss": "no"}),
        ("compute_kl", ValueError, {"compute_kl": "yes"}),
        ("show_progress", ValueError, {"show_progress": "off"}),
        ("Transcoder", TypeError, {"saes": Transcoder(TRANSCODER)}),
    ],
)
def test_impossible_arguments_raise_and_are_named(name, error, arguments) -> None:
    arguments = {
        "saes": make_sae(),
        "activations": torch.randn(8, D_IN),
        "show_progress": False,
    } | arguments
    with pytest.raises(error, match=rf"\b{name}\b"):
        sweep_budgets(arguments.pop("saes"), arguments.pop("activations"), **arguments)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("model", "gpt2"), ("model", 3), ("model_kwargs", "no"), ("model_kwargs", 3)],
)
def test_impossible_arguments_beside_a_store_raise_and_are_named(name, wrong, make_store) -> None:
    sae = make_sae()
    options: Any = {name: wrong, "n_batches": 1}
    with pytest.raises(TypeError, match=rf"^{name} is "):
        sweep_budgets(sae, make_store(sae), show_progress=False, **options)
    with pytest.raises(TypeError, match=rf"^{name} is "):
        mean_budget(sae, make_store(sae), 2, **options)


def test_switches_may_be_bools_of_numpy_integers_or_none() -> None:
    sae, x = make_sae(), torch.randn(8, D_IN)
    switches: Any = {"compute_ce_loss": np.bool_(False), "compute_kl": 0, "show_progress": None}
    assert sweep_budgets(sae, x, **switches) == sweep_budgets(sae, x, show_progress=False)


def test_sae_without_a_hook_name_raises(make_store) -> None:
    sae = make_sae()
    store = make_store(sae)
    sae.cfg.metadata.hook_name = None
    with pytest.raises(ValueError, match="hook_name"):
        sweep_budgets(sae, store, show_progress=False)


def test_model_without_a_tokenizer_raises_unless_tokens_are_given(
    make_store, language_model, monkeypatch
) -> None:
    sae = make_sae()
    store = make_store(sae)
    monkeypatch.setattr(language_model, "tokenizer", None)
    with pytest.raises(ValueError, match="exclude_special_tokens"):
        sweep_budgets(sae, store, show_progress=False)
    sweep = sweep_budgets(sae, store, n_batches=1, exclude_special_tokens=[0], show_progress=False)
    assert sweep.n_tokens < BATCH_SIZE_PROMPTS * CONTEXT_SIZE


@pytest.mark.parametrize("names", [["W_dec"], ["W_enc", "W_dec", "b_enc", "b_dec"]], ids=str)
def test_a_diverged_sae_is_told(names) -> None:
    sae = make_sae()
    with torch.no_grad():
        for name in names:
            getattr(sae, name)[0] = torch.nan
    saes = {"good": make_sae(), "bad": sae}
    message = rf"^the weights of 'bad' \(.*{names[-1]}.*\) hold NaN or infinity"
    with pytest.warns(UserWarning, match=message) as caught:
        sweep_budgets(saes, torch.randn(30, D_IN), show_progress=False)
    told = [warning for warning in caught if "'bad'" in str(warning.message)]
    assert [warning.filename for warning in told] == [__file__]


@pytest.mark.parametrize(
    ("factor", "words"),
    [(1.3, r"keeps [89].* here, and more than its k \(8\)"), (0.3, "keeps 0.*here:")],
)
def test_a_threshold_carried_to_unlike_activations_is_told(factor, words) -> None:
    sae, x = make_sae(), torch.randn(400, D_IN)
    budget = mean_budget(sae, x, 6)
    assert budget.mean == 6
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the threshold")
        sweep_budgets(sae, torch.randn(400, D_IN), budgets=[budget], show_progress=False)
    with pytest.warns(
        UserWarning, match=f"^the threshold of 'sae' for a mean of 6 .*{words}"
    ) as got:
        sweep_budgets(sae, factor * x, budgets=[budget], show_progress=False)
    assert got[0].filename == __file__


def test_reconstructions_that_are_not_finite_are_told() -> None:
    sae = make_sae()
    own = sae.decode
    sae.decode = lambda acts: own(acts) / 0  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=r"^the reconstructions of 'sae' hold NaN or infinity"):
        sweep_budgets(sae, torch.randn(30, D_IN), show_progress=False)


@pytest.mark.parametrize("value", [0.0, 0.7, -300.0])
@pytest.mark.parametrize("n", [1, 30])
def test_activations_without_variance_are_told(value, n) -> None:
    sae = make_sae()
    x = torch.full((n, D_IN), value) + torch.arange(D_IN) * value
    with pytest.warns(UserWarning, match=r"^the activations of 'sae' have no variance") as caught:
        sweep_budgets(sae, x, show_progress=False)
    assert len(caught) == 1
    x[0] = 1 - x[0]
    if n > 1:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*no variance")
            sweep_budgets(sae, x, show_progress=False)
