"""Train the tiny language model of this directory: a GPT-2 of four layers on WordNet's glosses.

It writes a model directory. transformers, TransformerLens and SAELens load it by its path. In it,
`training.json` has the held-out loss and the settings of the run.

    python examples/tiny_lm/train.py --device cuda --out examples/tiny_lm

The documents are concatenated and cut at arbitrary places. Every training sequence is
<|endoftext|> and then such a piece. SAELens gives a model the same kind of sequence with
`prepend_bos=True`.
"""

import argparse
import datetime
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

HERE = Path(__file__).parent
TEXT_DIR = HERE / "wordnet_glosses"
END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 4096
CONTEXT_SIZE = 128
N_LAYERS, D_MODEL, N_HEADS = 4, 192, 6


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--steps", type=int, help="stop after this many steps (for a quick try)")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences of 128 tokens")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="bfloat16 autocast, for hardware that multiplies matrices faster in it",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE)
    return parser.parse_args()


def load_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Load the tokenizer next to this file, or train a byte-level BPE if there is none yet."""
    path = HERE / "tokenizer.json"
    if path.exists():
        tokenizer = Tokenizer.from_file(str(path))
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT_SIZE,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Save a tokenizer that transformers 4 and 5 load."""
    tokenizer.save_pretrained(path)
    # transformers 5 writes its own name of the class, which transformers 4 does not know.
    config_path = path / "tokenizer_config.json"
    config = json.loads(config_path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config_path.write_text(json.dumps(config, indent=2) + "\n")


def tokenize(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Concatenate the tokens of all documents, each followed by <|endoftext|>."""
    end = tokenizer.eos_token_id
    encodings = tokenizer.backend_tokenizer.encode_batch(documents)
    return torch.tensor([token for encoding in encodings for token in (*encoding.ids, end)])


def make_model(tokenizer: PreTrainedTokenizerFast, dropout: float) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=CONTEXT_SIZE,
        n_ctx=CONTEXT_SIZE,  # TransformerLens reads the context size under this name
        n_embd=D_MODEL,
        n_layer=N_LAYERS,
        n_head=N_HEADS,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return GPT2LMHeadModel(config)


def make_optimizer(model: GPT2LMHeadModel, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW. Its weight decay acts on matrices, not on biases and layer norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def learning_rate_factor(step: int, n_steps: int) -> float:
    """Return the factor of a step: a linear warmup over the first 3%, then a cosine to zero."""
    n_warmup = max(1, round(0.03 * n_steps))
    if step < n_warmup:
        return (step + 1) / n_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / max(1, n_steps - n_warmup)))


def cut_rows(tokens: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """Cut the stream into rows, [rows, 128]. Tokens that do not fill a row are dropped."""
    n_rows = (len(tokens) - offset) // CONTEXT_SIZE
    return tokens[offset : offset + n_rows * CONTEXT_SIZE].view(n_rows, CONTEXT_SIZE)


def training_batches(tokens: torch.Tensor, epochs: int, batch_size: int) -> Iterator[torch.Tensor]:
    """Yield batches, [batch, 128]. Each epoch cuts the rows at another offset and shuffles them."""
    for _ in range(epochs):
        rows = cut_rows(tokens, offset=int(torch.randint(CONTEXT_SIZE, ())))
        n_batches = len(rows) // batch_size
        order = torch.randperm(len(rows))[: n_batches * batch_size].to(rows.device)
        for indices in order.split(batch_size):
            yield rows[indices]


def token_losses(model: GPT2LMHeadModel, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss of every token in nats, [rows * 128]. Each row follows <|endoftext|>."""
    begin = torch.full_like(targets[:, :1], model.config.bos_token_id)
    inputs = torch.cat([begin, targets[:, :-1]], dim=1)
    logits = model(inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="none"
    )


@torch.no_grad()
def evaluate(model: GPT2LMHeadModel, tokens: torch.Tensor) -> float:
    """Return the total loss of a token stream in nats, read in rows of 128 without overlap."""
    model.eval()
    rows = cut_rows(tokens)
    last_row = tokens[rows.numel() :][None]
    batches = [*rows.split(64), *([last_row] if last_row.numel() else [])]
    nats = sum(token_losses(model, batch).double().sum() for batch in batches)
    model.train()
    return float(nats)


def half_precision_weights(model: GPT2LMHeadModel) -> dict[str, torch.Tensor]:
    """Copy the weights to the CPU in float16.

    The output matrix is left out, because it is the same as that of the embedding.
    """
    return {
        name: weight.to("cpu", torch.float16, copy=True)
        for name, weight in model.state_dict().items()
        if name != "lm_head.weight"
    }


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    start = time.time()
    on_gpu = torch.device(args.device).type == "cuda"

    train_documents = pd.read_parquet(TEXT_DIR / "train.parquet")["text"].tolist()
    held_out_documents = pd.read_parquet(TEXT_DIR / "validation.parquet")["text"].tolist()
    tokenizer = load_tokenizer(train_documents)
    train_tokens = tokenize(train_documents, tokenizer).to(args.device)
    held_out_tokens = tokenize(held_out_documents, tokenizer).to(args.device)
    held_out_bytes = sum(len(document.encode()) for document in held_out_documents)
    print(f"{len(train_tokens)} training tokens, {len(held_out_tokens)} held out", flush=True)

    model = make_model(tokenizer, args.dropout).to(args.device).train()
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    # An epoch with an offset may have one row less than the whole stream. Counting on one row less,
    # every epoch has enough batches.
    steps_per_epoch = (len(train_tokens) // CONTEXT_SIZE - 1) // args.batch_size
    n_steps = args.epochs * steps_per_epoch
    if args.steps is not None:
        n_steps = min(n_steps, args.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, n_steps)
    )

    best_nats, best_step, best_weights = math.inf, 0, half_precision_weights(model)
    losses: list[torch.Tensor] = []
    batches = training_batches(train_tokens, args.epochs, args.batch_size)
    for step, batch in zip(range(1, n_steps + 1), batches, strict=False):
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=args.bf16):
            loss = token_losses(model, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
        if step % steps_per_epoch == 0 or step == n_steps:
            nats = evaluate(model, held_out_tokens)
            if nats < best_nats:
                best_nats, best_step, best_weights = nats, step, half_precision_weights(model)
            print(
                f"step {step}/{n_steps}  train loss {torch.stack(losses).mean():.4f}  "
                f"held-out loss {nats / len(held_out_tokens):.4f}  {time.time() - start:.0f} s",
                flush=True,
            )
            losses.clear()

    # The config says float32, the dtype of `model`, so the float16 weights load as float32.
    model.save_pretrained(args.out, state_dict=best_weights)
    save_tokenizer(tokenizer, args.out)

    # The saved weights are rounded, and the recorded loss is theirs.
    saved_model = GPT2LMHeadModel.from_pretrained(args.out).to(args.device)
    held_out_nats = evaluate(saved_model, held_out_tokens)
    options = {name.replace("_", "-"): value for name, value in vars(args).items()}
    options = {
        name: "" if value is True else f" {value}"
        for name, value in options.items()
        if value is not None and value is not False
    }
    options = [f"--{name}{v}" for name, v in options.items() if name != "out"]
    record = {
        "held_out_loss_nats_per_token": held_out_nats / len(held_out_tokens),
        "held_out_bits_per_byte": held_out_nats / math.log(2) / held_out_bytes,
        "held_out_documents": len(held_out_documents),
        "held_out_bytes": held_out_bytes,
        "held_out_tokens": len(held_out_tokens),
        "train_documents": len(train_documents),
        "train_tokens": len(train_tokens),
        "tokens_seen": n_steps * args.batch_size * CONTEXT_SIZE,
        "epochs": round(n_steps / steps_per_epoch, 2),
        "steps": n_steps,
        "best_step": best_step,
        "parameters": sum(p.numel() for p in model.parameters()),
        "wall_time_seconds": round(time.time() - start, 1),
        "machine": (
            torch.cuda.get_device_name(args.device)
            if on_gpu
            else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
        ),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python examples/tiny_lm/train.py", *options]),
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
