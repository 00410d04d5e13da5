"""Open an SAE in SAEDashboard and SAEBench, at a budget.

    python examples/run_sae_lens.py
    python examples/open_in_tools.py output/sae --budget 8

It writes SAEDashboard's page of some latents and SAEBench's core results, and checks the results
against `sweep_budgets`. It takes the model and the text of examples/tiny_lm, needs no network and
is done within 2 minutes on 2 CPU cores. A browser that shows the page loads two scripts from the
web.

Both tools need transformer-lens 2, so give them an environment of their own:

    pip install -e . torch==2.13.0 sae-dashboard==0.8.0 sae-bench==0.6.0
    pip uninstall torchvision torchaudio  # unused here; they fail beside a CPU build of torch
"""

import argparse
import copy
import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from sae_bench.evals.core import main as core
from sae_dashboard.data_writing_fns import save_feature_centric_vis
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE, ActivationsStore, HookedSAETransformer
from sae_lens.util import get_special_token_ids
from transformer_lens import loading_from_pretrained as loading

import sae_lens_flex  # registers "hierarchical_topk"

TINY_LM = Path(__file__).parent / "tiny_lm"
TEXT = TINY_LM / "wordnet_glosses"  # run_sae_lens.py left out its first 1000 documents
# The hook point that run_sae_lens.py reads, and its name in a HookedTransformer, which the tools
# need.
HOOK_NAMES = ("transformer.h.1", "blocks.1.hook_resid_post")
BATCH_SIZE_PROMPTS = 16


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sae", type=Path, help="where run_sae_lens.py saved the SAE")
    parser.add_argument("--budget", type=int, default=8, help="latents to keep per activation")
    parser.add_argument(
        "--latents", type=int, nargs="+", help="latents on the page; default: the most active"
    )
    parser.add_argument(
        "--prompts", type=int, default=128, help="prompts of 128 tokens, for the page"
    )
    parser.add_argument("--n-batches", type=int, default=4, help="batches of 16 prompts to measure")
    parser.add_argument("--output", type=Path, default=Path("output/tools"), help="where to write")
    return parser.parse_args()


def load_tiny_lm() -> HookedSAETransformer:
    # `from_pretrained_no_processing` does this for the models that TransformerLens lists by name.
    cfg = loading.get_pretrained_model_config(str(TINY_LM), device="cpu")
    model = HookedSAETransformer(cfg)
    model.load_and_process_state_dict(
        loading.get_pretrained_state_dict(str(TINY_LM), cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model


def load_sae(path: Path) -> sae_lens_flex.HierarchicalTopKSAE:
    sae = SAE.load_from_disk(path)
    if not isinstance(sae, sae_lens_flex.HierarchicalTopKSAE):
        raise SystemExit(f"{path} holds a {type(sae).__name__}, expected a HierarchicalTopKSAE")
    if sae.cfg.metadata.hook_name not in HOOK_NAMES:
        raise SystemExit(
            f"{path} reads {sae.cfg.metadata.hook_name!r}, expected one of {HOOK_NAMES}"
        )
    sae.cfg.metadata.hook_name = HOOK_NAMES[1]
    # SAEBench passes a dtype of its own beside these, and one more is an error.
    sae.cfg.metadata.model_from_pretrained_kwargs = {}
    return sae


def make_page(
    sae: sae_lens_flex.HierarchicalTopKSAE,
    model: HookedSAETransformer,
    tokens: torch.Tensor,
    latents: list[int],
    path: Path,
) -> None:
    """Write SAEDashboard's page of some latents, at the SAE's budget.

    Args:
        tokens: the text on the page, [prompts, context_size].
    """
    cfg = SaeVisConfig(
        hook_point=sae.cfg.metadata.hook_name,
        features=latents,
        ignore_tokens=set(get_special_token_ids(model.tokenizer)),
    )
    # SAEDashboard folds the decoder's norms into the encoder of the SAE that it gets. The copy has
    # the same budget.
    data = SaeVisRunner(cfg).run(copy.deepcopy(sae), model, tokens)
    save_feature_centric_vis(data, path)


def most_active(
    sae: sae_lens_flex.HierarchicalTopKSAE, model: HookedSAETransformer, tokens: torch.Tensor
) -> list[int]:
    """Return the four latents that the most tokens activate."""
    hook_name = sae.cfg.metadata.hook_name
    _, cache = model.run_with_cache(tokens, names_filter=hook_name)
    fired = sae.encode(cache[hook_name]) > 0  # [prompts, context_size, d_sae]
    return fired.sum((0, 1)).topk(4).indices.tolist()


def run_saebench(
    sae: SAE[Any], name: str, model: HookedSAETransformer, n_batches: int, folder: Path
) -> Path:
    """Write SAEBench's core results of an SAE, and return the file's path.

    Args:
        name: what the results are filed under. Without `force_rerun` SAEBench keeps an earlier
            file of that name, whatever the budget was.
    """
    # SAEBench loads a model by its name in TransformerLens's list, where the tiny one is not. For
    # gpt2 and others of that list leave out the `with`.
    with patch.object(core.HookedTransformer, "from_pretrained_no_processing", return_value=model):
        done = core.multiple_evals(
            [(name, sae)],
            n_eval_reconstruction_batches=n_batches,
            n_eval_sparsity_variance_batches=n_batches,
            eval_batch_size_prompts=BATCH_SIZE_PROMPTS,
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
            exclude_special_tokens_from_reconstruction=True,
            dataset=str(TEXT),
            output_folder=str(folder),
            device="cpu",
            force_rerun=True,
        )
    if not done:
        raise SystemExit("SAEBench measured nothing; its error is above")
    return folder / f"{name}_custom_sae_eval_results.json"


def check(results: Path, row: sae_lens_flex.BudgetMetrics) -> None:
    """Print what SAEBench and `sweep_budgets` both measure, and exit if they disagree."""
    contents = json.loads(results.read_text())
    groups = contents["eval_result_metrics"].values()
    metrics = {name: value for group in groups for name, value in group.items()}
    print(f"\nbudget {row.budget:<15}{'SAEBench':>12}{'sweep_budgets':>16}")
    names = ["l0", "ce_loss_score", "ce_loss_with_sae", "kl_div_score", "kl_div_with_sae"]
    for name in names:
        print(f"{name:22}{metrics[name]:12.5f}{getattr(row, name):16.5f}")
    # SAEBench 0.6.0 subtracts the square of the mean square where SAELens subtracts the square of
    # the mean, so its explained variance is another quantity.
    print(f"{'explained_variance':22}{'':12}{row.explained_variance:16.5f}")
    different = [
        name for name in names if not math.isclose(metrics[name], getattr(row, name), rel_tol=1e-3)
    ]
    if different:
        raise SystemExit(f"SAEBench and sweep_budgets disagree on {', '.join(different)}")
    if contents["sae_cfg_dict"]["k"] != row.budget:
        raise SystemExit(f"SAEBench filed the results under k={contents['sae_cfg_dict']['k']}")


def main() -> None:
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    model = load_tiny_lm()
    sae = load_sae(args.sae)

    def make_store() -> ActivationsStore:  # each starts at the text's beginning
        return ActivationsStore.from_sae(model, sae, dataset=str(TEXT), device="cpu")

    # SAEDashboard shows what `encode` keeps: the budget that is set is the page's.
    sae.budget = args.budget
    tokens = make_store().get_batch_tokens(args.prompts)
    latents = args.latents or most_active(sae, model, tokens)
    page = args.output / f"latents_at_{args.budget}.html"
    make_page(sae, model, tokens, latents, page)

    # SAEBench, too, measures what `encode` keeps, but files it under the k of the config. In an
    # export that is the budget.
    name = f"topk_at_{args.budget}"
    topk = SAE.load_from_disk(
        sae_lens_flex.export_topk(sae, args.output / name, budget=args.budget)
    )
    results = run_saebench(topk, name, model, args.n_batches, args.output)

    sweep = sae_lens_flex.sweep_budgets(
        sae,
        make_store(),
        budgets=[args.budget],
        n_batches=args.n_batches,
        batch_size_prompts=BATCH_SIZE_PROMPTS,
        compute_kl=True,
    )
    check(results, sweep.metrics[0])
    print(f"\n{page}: latents {', '.join(map(str, latents))} at budget {args.budget}")
    print(f"{results}: SAEBench's core results")


if __name__ == "__main__":
    main()
