# %% [markdown]
# # One SAE, every budget: from training to choosing k
#
# This trains one `hierarchical_topk` SAE. On the same activations it trains a TopK SAE for each of
# several k. It measures all of them on the same held-out tokens. Then it picks a budget and uses
# it.
# Run the cells in order in a notebook editor that knows `# %%`, or all of them as a script:
#
#     python examples/choose_a_budget.py
#
# The language model and the text are those of `examples/tiny_lm`, so no network is needed. It takes
# about 7 minutes on 2 CPU cores. With `--tokens 100000` it takes one minute, but the SAEs are
# worse.

# %%
import argparse
import builtins
from pathlib import Path

import torch
from datasets import load_dataset
from sae_lens import (
    SAE,
    ActivationsStore,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.load_model import load_model

import sae_lens_flex

parser = argparse.ArgumentParser(description="Train SAEs, compare their budgets, choose one.")
parser.add_argument("--tokens", type=int, default=1_500_000, help="tokens to train on")
parser.add_argument("--n-batches", type=int, default=16, help="batches of 16 prompts to measure on")
parser.add_argument("--output", type=Path, default=Path("output/budgets"), help="where to write")
# In a notebook the process's arguments are not meant for this file.
args = parser.parse_args([] if hasattr(builtins, "__IPYTHON__") else None)

# A notebook has no `__file__`. It runs in the directory of its file.
TINY_LM = (Path(__file__).parent if "__file__" in globals() else Path.cwd()) / "tiny_lm"
HOOK = "transformer.h.1"  # the residual stream after the second of four layers
D_IN, D_SAE, K = 192, 2048, 32

# %% [markdown]
# ## Train
#
# SAELens's `MultiSAETrainingRunner` gives every SAE the same batches. `flex_topk` is SAELens's own
# TopK, but trains faster.

# %%
text = load_dataset(str(TINY_LM / "wordnet_glosses"), streaming=True)

cfg = MultiSAETrainingRunnerConfig(
    saes={
        "hierarchical": sae_lens_flex.HierarchicalTopKTrainingSAEConfig(
            d_in=D_IN, d_sae=D_SAE, k=K
        ),
        **{
            f"topk_{k}": sae_lens_flex.FlexTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=k)
            for k in (1, 2, 4, 8, 16, 32)
        },
    },
    hook_names=HOOK,
    model_name=str(TINY_LM),
    model_class_name="AutoModelForCausalLM",
    training_tokens=args.tokens,
    train_batch_size_tokens=1024,
    lr=6e-3,
    lr_warm_up_steps=args.tokens // 1024 // 20,
    lr_decay_steps=args.tokens // 1024 // 5,
    logger=LoggingConfig(log_to_wandb=False),
    checkpoint_path=None,
    output_path=str(args.output / "saes"),
)
print(
    f"Training {len(cfg.saes)} SAEs on {args.tokens:,} tokens; "
    "on 2 CPU cores 1.5 million take about 6 minutes."
)
MultiSAETrainingRunner(cfg, override_dataset=text["train"]).run()

# %% [markdown]
# ## Compare
#
# One call measures every SAE at each of its budgets, all on the same tokens. Neither the SAEs nor
# the language model were trained on this text.

# %%
saes = {name: SAE.load_from_disk(args.output / "saes" / name) for name in cfg.saes}
model = load_model("AutoModelForCausalLM", str(TINY_LM), device="cpu", hook_names=[HOOK])
store = ActivationsStore.from_sae(model, saes["hierarchical"], dataset=text["validation"])

sweep = sae_lens_flex.sweep_budgets(saes, store, n_batches=args.n_batches, batch_size_prompts=16)
sweep.to_json(args.output / "sweep.json")
sweep.plot(args.output / "sweep.html")
print(sweep)
print(f"The figure is {args.output / 'sweep.html'}")

# %% [markdown]
# ## Choose
#
# `smallest_budget` returns the smallest budget that explains the share of the variance that you ask
# for. Here that is nine tenths of what the largest budget explains:

# %%
sae = saes["hierarchical"]
best = max(row.explained_variance for row in sweep.metrics if row.sae == "hierarchical")
budget = sae_lens_flex.smallest_budget(sweep, explained_variance=0.9 * best, sae="hierarchical")
print(f"{budget} of {K} latents explain 0.9 of the variance that {K} do")

# %% [markdown]
# Use it within a `with` block, or for good with `sae.budget = budget`. `mean_budget` makes another
# kind of budget of the same size: one threshold on the latents' activations, chosen so that an
# activation vector gets as many latents on average. Vectors that need more latents get more, so it
# mostly explains more of the variance:

# %%
batches = {"n_batches": 4, "batch_size_prompts": 16}
threshold = sae_lens_flex.mean_budget(sae, store, budget, **batches)
print(sae_lens_flex.sweep_budgets(sae, store, budgets=[budget, threshold], **batches))

activations = store.get_activations(store.get_batch_tokens(8)).flatten(0, -2)
with sae.at_budget(threshold):
    n_latents = (sae.encode(activations) > 0).sum(-1)
print(
    f"latents per token above the threshold, {threshold.mean:.1f} on average:",
    *(f"{q:.0%}: {torch.quantile(n_latents.float(), q):.0f}" for q in (0.1, 0.5, 0.9)),
)

# %% [markdown]
# Where each vector must be reconstructed to a given error, `encode_adaptive` keeps as few latents
# as reach it. At the same number of latents that explains less of the variance, because hard
# vectors take most of them:

# %%
adaptive = (sae.encode_adaptive(activations, tolerance=0.3) > 0).sum(-1)
print(
    f"latents per token where a residual of 0.3 may be left, {adaptive.float().mean():.1f} on "
    f"average, with {(adaptive == K).float().mean():.1%} at {K}:",
    *(f"{q:.0%}: {torch.quantile(adaptive.float(), q):.0f}" for q in (0.1, 0.5, 0.9)),
)

# %% [markdown]
# ## Share
#
# `export_topk` saves the SAE at a fixed budget, as an ordinary TopK SAE of SAELens, and
# `export_jumprelu` at a threshold, as an ordinary JumpReLU SAE. Both load without this package:

# %%
for path in (
    sae_lens_flex.export_topk(sae, args.output / f"topk_at_{budget}", budget=budget),
    sae_lens_flex.export_jumprelu(sae, args.output / f"mean_{budget}", budget=threshold),
):
    print(f"SAE.load_from_disk({str(path)!r}) gives a {type(SAE.load_from_disk(path)).__name__}")
