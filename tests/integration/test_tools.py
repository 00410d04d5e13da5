"""SAEDashboard and SAEBench show and measure an SAE at its budget.

They need transformer-lens 2: without them, as in most environments, these tests are skipped.
"""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, ActivationsStore, HookedSAETransformer
from sae_lens.saes.topk_sae import TopKTrainingSAE

import sae_lens_flex
from sae_lens_flex import BudgetMetrics, HierarchicalTopKSAE, sweep_budgets

from .flows import CONTEXT_SIZE, D_SAE, HOOK_NAME, K, training_sae_config

BUDGETS = (1, 3, K)
END_OF_TEXT = 0


@pytest.fixture(params=["returned by the runner", "loaded for inference"])
def sae(request: pytest.FixtureRequest, trained: dict[str, SimpleNamespace]) -> SAE[Any]:
    run = trained["hierarchical_topk"]
    if request.param == "loaded for inference":
        return SAE.load_from_disk(run.output)
    return copy.deepcopy(run.sae)


# --- SAEDashboard


@pytest.fixture
def tokens(token_dataset: Dataset) -> torch.Tensor:
    return torch.as_tensor(token_dataset[:64]["tokens"])


def page_data(
    sae: SAE[Any], model: HookedSAETransformer, tokens: torch.Tensor, latents: list[int]
) -> Any:
    pytest.importorskip("sae_dashboard")
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner

    cfg = SaeVisConfig(hook_point=HOOK_NAME, features=latents, ignore_tokens={END_OF_TEXT})
    return SaeVisRunner(cfg).run(sae, model, tokens)


@torch.no_grad()
def activations_of(
    sae: SAE[Any], model: HookedSAETransformer, tokens: torch.Tensor
) -> torch.Tensor:
    """What `encode` keeps of the text, without that of special tokens, [..., context, d_sae]."""
    _, cache = model.run_with_cache(tokens, names_filter=HOOK_NAME)
    return sae.encode(cache[HOOK_NAME]) * (tokens != END_OF_TEXT).unsqueeze(-1)


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_feature_page_shows_the_activations_at_the_budget(
    sae: SAE[Any],
    budget: int,
    language_model: HookedSAETransformer,
    tokens: torch.Tensor,
    tmp_path: Path,
) -> None:
    sae.budget = budget
    acts = activations_of(sae, language_model, tokens)
    latents = (acts > 0).sum((0, 1)).topk(3).indices.tolist()
    state = {name: value.clone() for name, value in sae.state_dict().items()}

    data = page_data(copy.deepcopy(sae), language_model, tokens, latents)
    assert list(data.feature_data_dict) == latents
    for latent, shown in data.feature_data_dict.items():
        density = (acts[..., latent] > 0).float().mean()
        assert 0 < density < 1
        assert shown.acts_histogram_data.title.endswith(f"DENSITY = {density:.3%}")
        top = shown.sequence_data.seq_group_data[0]
        assert f"MAX = {acts[..., latent].max():.3f}" in top.title
        for sequence in top.seq_data:
            # Five tokens on either side of the one that SAEDashboard chose.
            position = sequence.qualifying_token_index
            window = acts[sequence.original_index, position - 5 : position + 6, latent]
            assert sequence.feat_acts == pytest.approx(window.tolist(), abs=1e-4)
        assert top.seq_data[0].feat_acts[5] > 0

    assert sae.budget == budget
    assert all(torch.equal(value, state[name]) for name, value in sae.state_dict().items())

    from sae_dashboard.data_writing_fns import save_feature_centric_vis

    path = tmp_path / "page.html"
    save_feature_centric_vis(data, path)
    page = path.read_text()
    for latent, shown in data.feature_data_dict.items():
        assert f'"{latent}": ' in page
        assert shown.acts_histogram_data.title in page


def test_a_smaller_budget_shows_fewer_activations_of_a_latent(
    trained: dict[str, SimpleNamespace], language_model: HookedSAETransformer, tokens: torch.Tensor
) -> None:
    sae = SAE.load_from_disk(trained["hierarchical_topk"].output)
    titles = []
    for budget in BUDGETS:
        sae.budget = budget
        data = page_data(sae, language_model, tokens, [_most_active(sae, language_model, tokens)])
        (shown,) = data.feature_data_dict.values()
        titles.append(float(shown.acts_histogram_data.title.split("= ")[1].rstrip("%")))
    assert titles == sorted(set(titles))


def _most_active(sae: SAE[Any], model: HookedSAETransformer, tokens: torch.Tensor) -> int:
    with sae.at_budget(1):
        return int((activations_of(sae, model, tokens) > 0).sum((0, 1)).argmax())


@pytest.mark.parametrize("architecture", ["hierarchical_topk", "topk"])
def test_sae_dashboard_refuses_saes_that_do_not_rescale(
    architecture: str, language_model: HookedSAETransformer, tokens: torch.Tensor
) -> None:
    cfg = training_sae_config(architecture, rescale_acts_by_decoder_norm=False)
    sae = TopKTrainingSAE.from_dict(cfg.to_dict())
    with pytest.raises(NotImplementedError, match="rescale_acts_by_decoder_norm"):
        page_data(sae, language_model, tokens, [0])


# --- SAEBench


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch, language_model: HookedSAETransformer) -> Any:
    """SAEBench's module, which gets this directory's language model under its name."""
    core = pytest.importorskip("sae_bench.evals.core.main")

    def load(name: str, **kwargs: Any) -> HookedSAETransformer:
        assert name == "random-weights"
        return language_model

    monkeypatch.setattr(core.HookedTransformer, "from_pretrained_no_processing", load)
    return core


def run_core(core: Any, sae: SAE[Any], text_dir: Path, folder: Path) -> tuple[dict, dict]:
    """Return SAEBench's metrics, and the config that its results name."""
    done = core.multiple_evals(
        [("toy", sae)],
        n_eval_reconstruction_batches=2,
        n_eval_sparsity_variance_batches=2,
        eval_batch_size_prompts=8,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        exclude_special_tokens_from_reconstruction=True,
        dataset=str(text_dir),
        context_size=CONTEXT_SIZE,
        output_folder=str(folder),
        device="cpu",
    )
    assert len(done) == 1
    results = json.loads((folder / "toy_custom_sae_eval_results.json").read_text())
    groups = results["eval_result_metrics"].values()
    assert len(results["eval_result_details"]) == D_SAE
    return {k: v for group in groups for k, v in group.items()}, results["sae_cfg_dict"]


def sweep(
    sae: SAE[Any], model: HookedSAETransformer, text_dir: Path, budget: int, n_batches: int
) -> tuple[BudgetMetrics, int]:
    """Return what `sweep_budgets` measures, and on how many tokens."""
    store = ActivationsStore.from_sae(
        model, sae, dataset=str(text_dir), context_size=CONTEXT_SIZE, device="cpu"
    )
    result = sweep_budgets(
        sae,
        store,
        budgets=[budget],
        n_batches=n_batches,
        batch_size_prompts=8,
        compute_kl=True,
        show_progress=False,
    )
    (row,) = result.metrics
    return row, result.n_tokens


@pytest.mark.parametrize("budget", BUDGETS)
def test_sae_bench_measures_the_budget(
    sae: SAE[Any],
    budget: int,
    core: Any,
    language_model: HookedSAETransformer,
    text_dir: Path,
    tmp_path: Path,
) -> None:
    sae.budget = budget
    metrics, named = run_core(core, sae, text_dir, tmp_path)
    row, _ = sweep(sae, language_model, text_dir, budget, n_batches=2)
    assert metrics["l0"] == row.l0 == budget
    for name in (
        *("ce_loss_score", "ce_loss_with_sae", "ce_loss_without_sae", "ce_loss_with_ablation"),
        *("kl_div_score", "kl_div_with_sae", "kl_div_with_ablation"),
    ):
        assert metrics[name] == pytest.approx(getattr(row, name), rel=1e-3), name
    assert sae.budget == budget
    assert named["k"] == K  # The budget is not in the config.


def test_sae_bench_reconstructs_as_the_sweep_does(
    sae: SAE[Any],
    core: Any,
    language_model: HookedSAETransformer,
    text_dir: Path,
) -> None:
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae

    sae.budget = 3
    store = ActivationsStore.from_sae(
        language_model, sae, dataset=str(text_dir), context_size=CONTEXT_SIZE, device="cpu"
    )
    load_and_format_sae("toy", sae, "cpu")  # SAEBench reads fields that this adds to the config.
    cfg = CoreEvalConfig(
        batch_size_prompts=8,
        n_eval_sparsity_variance_batches=1,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
    )
    groups, latents = core.run_evals(sae, store, language_model, cfg, ignore_tokens={END_OF_TEXT})
    row, n_tokens = sweep(sae, language_model, text_dir, 3, n_batches=1)
    # SAEBench divides the squared error of a token by the number of tokens in its batch.
    assert groups["reconstruction_quality"]["mse"] * n_tokens == pytest.approx(row.mse, rel=1e-4)
    density = torch.tensor(latents["feature_density"])
    assert 0 < row.dead_latents < 1
    assert row.dead_latents == pytest.approx((density == 0).float().mean().item())


def test_sae_bench_names_the_budget_of_an_export(
    trained: dict[str, SimpleNamespace],
    core: Any,
    language_model: HookedSAETransformer,
    text_dir: Path,
    tmp_path: Path,
) -> None:
    sae = SAE.load_from_disk(trained["hierarchical_topk"].output)
    assert isinstance(sae, HierarchicalTopKSAE)
    export = SAE.load_from_disk(sae_lens_flex.export_topk(sae, tmp_path / "export", budget=3))
    metrics, named = run_core(core, export, text_dir, tmp_path / "export results")
    assert named["k"] == metrics["l0"] == 3
    sae.budget = 3
    at_budget, _ = run_core(core, sae, text_dir, tmp_path / "results")
    assert metrics == pytest.approx(at_budget, rel=1e-5)
