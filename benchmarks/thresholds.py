"""Compare three rules of one SAE at the same mean number of latents.

    python examples/run_sae_lens.py
    python -m benchmarks.thresholds output/sae

- a fixed number of latents, `sae.budget = k`;
- one threshold on their activations, `sae.budget = mean_budget(sae, activations, k)`;
- a tolerance for each activation vector, `sae.encode_adaptive(x, tolerance)`.

Threshold and tolerance are chosen for a mean of k on the first tokens of the validation text of
examples/tiny_lm, and all three rules are measured on the tokens after them. Neither the SAE nor the
language model was trained on that text. It prints the table of README and keeps the figures in
benchmarks/results/thresholds_tiny_lm.json. It takes some minutes on two CPU cores.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from sae_lens import SAE, ActivationsStore
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.load_model import load_model
from sae_lens.util import get_special_token_ids

import sae_lens_flex

from .measuring import description

ROOT = Path(__file__).parents[1]
TINY_LM = ROOT / "examples" / "tiny_lm"
RESULT = ROOT / "benchmarks" / "results" / "thresholds_tiny_lm.json"
MEANS = (2, 4, 8, 16)
N_CALIBRATION, N_TEST, BATCH = 16384, 32768, 2048
RULES = ("fixed", "threshold", "tolerance")


def held_out_activations(sae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return activations to choose on and activations to measure on, [n, d_in] each."""
    hook_name = sae.cfg.metadata.hook_name
    model = load_model("AutoModelForCausalLM", str(TINY_LM), device="cpu", hook_names=[hook_name])
    text = load_dataset(str(TINY_LM / "wordnet_glosses"), split="validation", streaming=True)
    store = ActivationsStore.from_sae(model, sae, dataset=text)
    special = torch.tensor(get_special_token_ids(model.tokenizer))
    parts, n = [], 0
    while n < N_CALIBRATION + N_TEST:
        tokens = store.get_batch_tokens(16)  # [prompts, context]
        x = store.get_activations(tokens).view(*tokens.shape, -1)
        parts.append(x[~torch.isin(tokens, special)])
        n += len(parts[-1])
    x = torch.cat(parts)
    return x[:N_CALIBRATION], x[N_CALIBRATION : N_CALIBRATION + N_TEST]


def left_over(sae: Any, x: torch.Tensor, x_hat: torch.Tensor) -> torch.Tensor:
    """Return |x - x_hat|^2 / |x - b_dec|^2 of each activation vector, [n]."""
    return (x - x_hat).square().sum(-1) / (x - sae.b_dec).square().sum(-1)


def choose_tolerances(sae: Any, x: torch.Tensor) -> dict[int, float]:
    """Return for each mean the tolerance with which `encode_adaptive` keeps as many latents."""
    k = sae.cfg.k
    at_level = torch.cat(
        [
            torch.stack(
                [
                    left_over(sae, rows, x_hat)
                    for _, x_hat in sae.decode_levels(*sae.encode_levels(rows), range(1, k + 1))
                ],
                dim=-1,
            )
            for rows in x.split(BATCH)
        ]
    )  # [n, k]
    tolerances = {}
    for mean in MEANS:
        low, high = 0.0, 4.0
        for _ in range(30):
            middle = (low + high) / 2
            # Levels before the first that reaches the tolerance, and that one; at most k.
            n_before = (at_level <= middle).cumsum(-1).eq(0).sum(-1)
            n_kept = (n_before + 1).clamp(max=k).double().mean().item()
            low, high = (middle, high) if n_kept > mean else (low, middle)
        tolerances[mean] = high
    return tolerances


def measure(sae: Any, x: torch.Tensor, encode: Any, tolerance: float) -> dict[str, float]:
    variance, counts, rest = ExplainedVarianceCalculator(), [], []
    for rows in x.split(BATCH):
        acts = encode(rows)
        sae.process_sae_in(rows)  # `encode_adaptive` leaves nothing for `decode` to undo
        x_hat = sae.decode(acts)
        variance.add_batch(x_hat, rows)
        counts.append((acts > 0).sum(-1))
        rest.append(left_over(sae, rows, x_hat))
    n_kept, remaining = torch.cat(counts), torch.cat(rest)
    return {
        "l0": n_kept.double().mean().item(),
        "explained_variance": variance.compute(),
        "above_tolerance": (remaining > tolerance).double().mean().item(),
        "at_k": (n_kept == sae.cfg.k).double().mean().item(),
        "above_k": (n_kept > sae.cfg.k).double().mean().item(),
        "with_none": (n_kept == 0).double().mean().item(),
    }


@torch.no_grad()
def compare(sae: Any) -> list[dict[str, Any]]:
    """Return a row for each mean and rule."""
    calibration, test = held_out_activations(sae)
    tolerances = choose_tolerances(sae, calibration)
    rows = []
    for mean, tolerance in tolerances.items():
        chosen = sae_lens_flex.mean_budget(sae, calibration, mean)
        for rule in RULES:
            if rule == "tolerance":
                encode = partial(sae.encode_adaptive, tolerance=tolerance)
                found = measure(sae, test, encode, tolerance)
            else:
                with sae.at_budget(mean if rule == "fixed" else chosen):
                    found = measure(sae, test, sae.encode, tolerance)
            rows.append({"mean": mean, "rule": rule, "tolerance": tolerance, **found})
        rows[-2]["threshold"] = chosen.threshold
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return README's table, in Markdown."""
    lines = [
        "| latents on average | explained variance, a fixed k | one threshold | a tolerance | "
        "tolerance | beyond it, a fixed k | one threshold | a tolerance |",
        "|" + "---|" * 8,
    ]
    for mean in MEANS:
        of = {row["rule"]: row for row in rows if row["mean"] == mean}
        explained = [of[rule]["explained_variance"] for rule in RULES]
        cells = [f"**{v:.3f}**" if v == max(explained) else f"{v:.3f}" for v in explained]
        cells += [f"{of['fixed']['tolerance']:.2f}"]
        cells += [f"{100 * of[rule]['above_tolerance']:.1f} %" for rule in RULES]
        lines.append(f"| {mean} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sae",
        type=Path,
        nargs="?",
        help="a hierarchical_topk SAE of examples/tiny_lm; left out: print what was kept",
    )
    args = parser.parse_args()
    if args.sae is None:
        print(table(json.loads(RESULT.read_text())["rows"]))
        return
    rows = compare(SAE.load_from_disk(args.sae))
    record = {
        **description("cpu", "sae-lens-flex"),
        "commands": [line.strip() for line in (__doc__ or "").splitlines()[2:4]],
        "n_calibration": N_CALIBRATION,
        "n_test": N_TEST,
        "rows": rows,
    }
    RESULT.write_text(json.dumps(record, indent=2) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
