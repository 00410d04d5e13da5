"""Time whole training steps of SAELens's `SAETrainer`: ours beside SAELens's own.

    python -m benchmarks.train_step                        # every case of this machine's device
    python -m benchmarks.train_step --cases gemma gpt2     # some; the other results are kept
    python -m benchmarks.train_step --quick                # small, on a CPU; writes no file

But for the quick ones, the results go to benchmarks/results/train_step_<device>.json, a case at a
time, and the figure to benchmarks/figures beside it.

A step is `SAETrainer.step` on a batch that lies on the device, one step after the other; its time
is the median distance between the ends of steps. Activations are normally distributed. With "zipf"
the encoder's biases make latent number r fire on a share of the activations that falls with 1 / r,
as in trained dictionaries, where a few latents fire on most activations. The stages are timed by
themselves, and beside each stands its floor: the bytes that it has to move over the speed of a
copy, which is measured in the same run, or the matrix product alone.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAETrainer, TrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE

import sae_lens_flex
from sae_lens_flex.ops.codes import Code
from sae_lens_flex.ops.kernels.adam import Adam, Updated, adam_, squares
from sae_lens_flex.ops.kernels.norms import norms_and_copy
from sae_lens_flex.ops.losses import decoder_loss
from sae_lens_flex.ops.products import scatter
from sae_lens_flex.ops.requests import DecoderLoss, Levels, Wanted
from sae_lens_flex.ops.selection import Encoder, chunk_rows, empty_code, select, select_from
from sae_lens_flex.saes.budgets import doubling_budgets
from sae_lens_flex.training.firing import feature_acts
from sae_lens_flex.training.graph import ORDINARY_CALLS

from .measuring import (
    describe_host,
    description,
    device_ms,
    kind,
    median_ms,
    peak_memory,
)

HERE = Path(__file__).parent
N_BATCHES = 4
STOCK, BATCHTOPK, MATRYOSHKA = "topk", "batchtopk", "matryoshka_batchtopk"
OURS = ("hierarchical_topk", "flex_topk")
# Of ours SAELens's, to which a speedup is relative. Those of SAELens's are to a case's first.
COUNTERPARTS = {
    "hierarchical_topk": STOCK,
    "flex_topk": STOCK,
    "flex_batchtopk": BATCHTOPK,
    "flex_matryoshka_batchtopk": MATRYOSHKA,
}
BLOCKS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "": nullcontext,
    "fused_adam": sae_lens_flex.fused_adam,
    "accelerate": sae_lens_flex.accelerate,
}


@dataclass(frozen=True)
class Case:
    """A size and setting, and what is trained at it."""

    name: str
    d_in: int
    d_sae: int
    k: int
    batch: int
    autocast: bool = True
    n_dead: int = 0
    firing: str = "uniform"
    device: str = "cuda"
    competitors: tuple[str, ...] = (STOCK,)
    ours: tuple[str, ...] = OURS
    within: tuple[str, ...] = ()  # blocks of ours around the trainer, beside none
    use_cuda_graph: bool = True  # in ours, where the size is small enough
    doubling_budgets: bool = False  # in ours: level weights in place of equal ones
    deterministic: bool = False
    with_stages: bool = False
    n_busy: int = 0  # processes beside it that keep a core busy each
    n_steps: int = 30


ADAM, ACCELERATE = ("fused_adam",), ("accelerate",)
BATCH: dict[str, Any] = {
    "competitors": (STOCK, BATCHTOPK, MATRYOSHKA),
    "ours": ("flex_topk", "flex_batchtopk", "flex_matryoshka_batchtopk"),
    "within": ACCELERATE,
}
GEMMA = {"d_in": 2304, "d_sae": 65536, "k": 128, "batch": 4096}
GPT2 = {"d_in": 768, "d_sae": 24576, "k": 64, "batch": 4096}
SMOLLM2 = {"d_in": 576, "d_sae": 16384, "k": 64, "batch": 4096}
SENTENCES = {"d_in": 384, "d_sae": 4096, "k": 32, "batch": 4096}
SMALL = {"d_in": 256, "d_sae": 8192, "k": 32, "batch": 1024}
GPU_CASES = [
    Case(
        "gemma",
        **GEMMA,
        competitors=(STOCK, MATRYOSHKA),
        within=ADAM + ACCELERATE,
        with_stages=True,
    ),
    Case("gemma_zipf", **GEMMA, firing="zipf", within=ADAM, with_stages=True),
    Case("gemma_fp32", **GEMMA, autocast=False, within=ADAM, with_stages=True),
    Case("gemma_dead", **GEMMA, n_dead=20_000, within=ACCELERATE),
    Case("gemma_budgets", **GEMMA, doubling_budgets=True, competitors=()),
    Case("gemma_deterministic", **GEMMA, deterministic=True, competitors=(), n_steps=10),
    Case("gemma_batch", **GEMMA, **BATCH, n_steps=20),
    Case("gemma_batch_fp32", **GEMMA, **BATCH, autocast=False, n_steps=6),
    Case("gpt2_batch", **GPT2, **BATCH, n_steps=100),
    # The host's time, which varies, is a good part of these steps': more of them.
    Case("gpt2", **GPT2, within=ADAM + ACCELERATE, with_stages=True, n_steps=300),
    Case("gpt2_no_graph", **GPT2, use_cuda_graph=False, competitors=(), n_steps=300),
    Case("gpt2_budgets", **GPT2, doubling_budgets=True, competitors=(), n_steps=300),
    Case("gpt2_fp32", **GPT2, autocast=False, within=ADAM, n_steps=100),
    Case("gpt2_dead", **GPT2, n_dead=2000, within=ACCELERATE, n_steps=300),
    Case("smollm2", **SMOLLM2, within=ACCELERATE, n_steps=300),
    Case("smollm2_dead", **SMOLLM2, n_dead=2000, within=ACCELERATE, n_steps=300),
    Case("small", **SENTENCES, within=ACCELERATE, n_steps=300),
    Case("small_dead", **SENTENCES, n_dead=2000, within=ACCELERATE, n_steps=300),
    Case("million", d_in=2304, d_sae=2**20, k=64, batch=4096, n_steps=10),
]
CPU_CASES = [
    Case("cpu", **SMALL, autocast=False, device="cpu", n_steps=5),
    Case(
        "cpu_zipf",
        **SMALL,
        autocast=False,
        firing="zipf",
        device="cpu",
        with_stages=True,
        n_steps=5,
    ),
    Case(
        "cpu_busy",
        **SMALL,
        autocast=False,
        device="cpu",
        n_busy=2,
        n_steps=15,
    ),
]
QUICK_CASES = [
    Case(
        "quick",
        d_in=64,
        d_sae=2048,
        k=16,
        batch=256,
        autocast=False,
        device="cpu",
        competitors=(STOCK, MATRYOSHKA),
        within=ADAM + ACCELERATE,
        with_stages=True,
    ),
    Case("quick_dead", d_in=64, d_sae=2048, k=16, batch=256, n_dead=500, device="cpu"),
    Case("quick_batch", d_in=64, d_sae=512, k=8, batch=128, device="cpu", **BATCH, n_steps=3),
]


def config(case: Case, architecture: str) -> TrainingSAEConfig:
    fields: dict[str, Any] = {
        "architecture": architecture,
        "d_in": case.d_in,
        "d_sae": case.d_sae,
        "k": case.k,
        "device": case.device,
    }
    if case.doubling_budgets and architecture == OURS[0]:
        fields["budgets"] = doubling_budgets(case.k)
    if "matryoshka" in architecture:
        fields["matryoshka_widths"] = [case.d_sae // 2**n for n in (4, 3, 2, 1, 0)]
    return TrainingSAEConfig.from_dict(fields)


def firing_biases(case: Case) -> torch.Tensor:
    """Return biases with which latents fire as `case.firing` says on normal activations.

    At initialization a pre-activation is normal with the decoder's initial norm, 0.1, as its
    deviation.
    """
    rank = torch.arange(1, case.d_sae + 1, dtype=torch.float64)
    low, high = 0.0, float(case.d_sae)
    for _ in range(60):  # the scale with which k of them fire on average
        scale = (low + high) / 2
        is_more = (scale / rank).clamp(max=0.95).sum() > case.k
        low, high = (low, scale) if is_more else (scale, high)
    share = (low / rank).clamp(max=0.95)
    order = torch.randperm(case.d_sae, generator=torch.Generator().manual_seed(0))
    return (0.1 * (2 + torch.special.ndtri(share)))[order].float()


def new_sae(case: Case, architecture: str) -> TrainingSAE[Any]:
    torch.manual_seed(0)
    sae = TrainingSAE.from_dict(config(case, architecture).to_dict())
    if architecture in COUNTERPARTS:
        sae.use_cuda_graph = case.use_cuda_graph
    if case.firing == "zipf":
        with torch.no_grad():
            sae.get_parameter("b_enc").copy_(firing_biases(case))
    return sae


def new_batches(case: Case) -> list[torch.Tensor]:
    generator = torch.Generator(case.device).manual_seed(1)
    return [
        torch.randn(case.batch, case.d_in, generator=generator, device=case.device)
        for _ in range(N_BATCHES)
    ]


def new_trainer(case: Case, sae: TrainingSAE[Any]) -> SAETrainer[Any, Any]:
    cfg = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=case.batch,
        lr=1e-5,
        lr_end=1e-5,
        device=case.device,
        autocast=case.autocast,
    )
    trainer = SAETrainer(cfg=cfg, sae=sae, data_provider=iter(()))
    if case.n_dead > 0:
        # They do not fire again, so nobody has to mark them as dead anew in every step.
        with torch.no_grad():
            sae.get_parameter("b_enc")[: case.n_dead] -= 100
        trainer.n_forward_passes_since_fired[: case.n_dead] = cfg.dead_feature_window + 1
    return trainer


def steps(case: Case, trainer: SAETrainer[Any, Any]) -> Callable[[], None]:
    """Return a function that takes one step."""
    batches = new_batches(case)

    def step() -> None:
        trainer.step(batches[trainer.n_training_steps % N_BATCHES])
        trainer.n_training_steps += 1

    return step


@contextmanager
def busy_processes(n: int) -> Iterator[None]:
    """Keep n processes busy that do nothing but count."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(case: Case, architecture: str, within: str) -> dict[str, Any]:
    """Train, and return the step's time and memory; None for them where memory does not suffice.

    Args:
        within: a key of `BLOCKS`.
    """
    result: dict[str, Any] = {"architecture": architecture, "within": within}
    with peak_memory(case.device) as peaks, BLOCKS[within]():
        try:
            torch.use_deterministic_algorithms(case.deterministic)
            trainer = new_trainer(case, new_sae(case, architecture))
            step = steps(case, trainer)
            with busy_processes(case.n_busy):
                result["ms"] = median_ms(step, case.device, ORDINARY_CALLS + 2, case.n_steps)
            result |= peaks()
            result["device_ms"] = device_ms(step) if case.device == "cuda" else None
            firing = trainer.act_freq_scores.sort(descending=True).values
            result["share_of_top_percent"] = float(firing[: case.d_sae // 100].sum() / firing.sum())
        except torch.OutOfMemoryError:
            result |= {"ms": None, "peak_gib": None}
        finally:
            torch.use_deterministic_algorithms(False)
    return result


def copy_speed(device: str) -> float:
    """Return the bytes read and written by a large copy, in GB/s."""
    n = 2**30 if device == "cuda" else 2**26
    source, target = (torch.ones(n, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * n / median_ms(lambda: target.copy_(source), device) / 1e6


def measure_stages(case: Case, gb_per_s: float) -> list[dict[str, Any]]:
    """Time the parts of a step; floors are in ms, or None where there is no simple one."""
    sae: Any = new_sae(case, OURS[0])
    trainer = new_trainer(case, sae)
    x = new_batches(case)[0]
    dtype = torch.bfloat16 if case.autocast else torch.float32
    n_weight = case.d_in * case.d_sae
    n_pre = case.batch * case.d_sae
    rows = []

    def add(stage: str, function: Callable[[], Any], n_bytes: float | None = None) -> float:
        ms = median_ms(function, case.device)
        floor = None if n_bytes is None else n_bytes / gb_per_s / 1e6
        rows.append({"stage": stage, "ms": ms, "floor_ms": floor})
        return ms

    use_triton = case.device == "cuda"
    with torch.no_grad():
        W_enc, W_dec = sae.W_enc.detach(), sae.W_dec.detach()
        norms, read = W_dec.norm(dim=-1), W_dec
        low_x, low_weight = (x - sae.b_dec).to(dtype), W_enc.to(dtype)
        if dtype != W_enc.dtype:
            cast_bytes = n_weight * (4 + dtype.itemsize)
            add("W_enc cast", lambda: W_enc.to(dtype), cast_bytes)
        if use_triton and dtype.itemsize < W_dec.itemsize:
            norms, read = norms_and_copy(W_dec, dtype)
            n_bytes = n_weight * (4 + dtype.itemsize)
            add("decoder norms and copy", lambda: norms_and_copy(W_dec, dtype), n_bytes)
        else:
            add("decoder norms", lambda: W_dec.norm(dim=-1), 4 * n_weight)
        encoder = Encoder(W_enc, sae.b_enc.detach(), norms)
        n_rows = chunk_rows(case.batch, case.d_sae, dtype, x.device)

        def products() -> None:
            for start in range(0, case.batch, n_rows):
                low_x[start : start + n_rows] @ low_weight

        product_ms = median_ms(lambda: low_x @ low_weight, case.device)
        add("encoder product", products)
        rows[-1]["floor_ms"] = product_ms
        part = low_x[:n_rows] @ low_weight
        out = empty_code(len(part), case.k, low_x, encoder.bias)

        def selection() -> None:
            for _ in range(0, case.batch, n_rows):
                select_from(part, encoder, out, use_triton=use_triton)

        add("selection", selection, n_pre * dtype.itemsize)
        by_topk = (part.float() + sae.b_enc) * norms
        rows[-1]["torch_topk_ms"] = median_ms(lambda: by_topk.topk(case.k), case.device) * (
            case.batch / len(part)
        )
        code = select(low_x, encoder, case.k, use_triton=use_triton)
        index_by = {"n_latents": case.d_sae, "use_triton": use_triton, "deterministic": False}
        add("inverted index", lambda: code.by_latent(**index_by))
        index = code.by_latent(**index_by)
        acts = code.with_values(code.values.float().relu())

        def decode(levels: Levels) -> None:
            decoder_loss(
                DecoderLoss(
                    code=acts,
                    weight=read,
                    bias=None,
                    target=x - sae.b_dec,
                    levels=levels,
                    scale=1 / case.batch,
                    wanted=Wanted(True, torch.float32, torch.float32),
                    index=index,
                ),
                use_triton=use_triton,
            )

        add("decoder loss, every level", lambda: decode("every"), 8 * n_weight)
        add("decoder loss, last level", lambda: decode("last"), 8 * n_weight)
        gradient, out_enc = torch.randn_like(acts.values), torch.empty_like(W_dec)

        def encoder_gradients() -> None:
            scatter(index, gradient, low_x, out=out_enc, use_triton=use_triton)
            sums = gradient.new_zeros(case.d_sae)
            sums.index_add_(0, code.latents.flatten(), gradient.flatten())
            torch.mv(W_enc, sums)

        # The gradient is written, and W_enc read for that of b_dec.
        add("encoder gradients", encoder_gradients, 8 * n_weight)
    fired = feature_acts(Code(code.latents, acts.values), case.d_sae, is_sparse=True)

    @torch.no_grad()
    def statistics_of_firing() -> None:  # as in SAETrainer
        firing = fired.bool().float()
        did_fire = firing.sum(-2).bool()
        did_fire = did_fire.to_dense() if did_fire.is_sparse else did_fire
        trainer.n_forward_passes_since_fired += 1
        trainer.n_forward_passes_since_fired[did_fire] = 0
        trainer.act_freq_scores += firing.sum(0)

    add("firing statistics", statistics_of_firing)
    for parameter in sae.parameters():
        parameter.grad = torch.randn_like(parameter)
    n_parameters = sum(parameter.numel() for parameter in sae.parameters())
    add(
        "clipping",
        lambda: torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0),
        4 * 3 * n_parameters,
    )
    adam_bytes = 4 * 7 * n_parameters
    add("Adam", trainer.optimizer.step, adam_bytes)
    trainer.optimizer = None
    with sae_lens_flex.fused_adam():
        trainer = new_trainer(case, sae)
    add("Adam, fused", trainer.optimizer.step, adam_bytes)
    if use_triton:
        # As in a whole step: the gradients are read twice.
        names = ("exp_avg", "exp_avg_sq", "step")
        updated = [
            Updated(p.detach(), p.grad, *(trainer.optimizer.state[p][name] for name in names))
            for p in sae.parameters()
        ]
        learning_rate = torch.full((), 1e-3, device=case.device)

        def clip_and_adam() -> None:
            of_gradients = squares([each.gradient for each in updated])
            adam_(updated, of_gradients, learning_rate, Adam((0.9, 0.999), 1e-8))

        add("clip and Adam", clip_and_adam, adam_bytes + 4 * n_parameters)
    return rows


def measure_case(case: Case, gb_per_s: float) -> dict[str, Any]:
    results = []
    for architecture in (*case.competitors, *case.ours):
        # Stock is SAELens as it is; with another optimizer it shows what else that does.
        within = case.within if architecture in case.ours else [b for b in case.within if b in ADAM]
        for block in ("", *within):
            result = measure(case, architecture, block)
            results.append(result)
            against = COUNTERPARTS.get(architecture, results[0]["architecture"])
            stock_ms = next((r["ms"] for r in results if r["architecture"] == against), None)
            if stock_ms is not None and result["ms"] is not None:
                result["speedup"] = stock_ms / result["ms"]
            print_result(case, result)
    record: dict[str, Any] = {**asdict(case), "results": results}
    if case.with_stages:
        record["stages"] = measure_stages(case, gb_per_s)
        print_stages(case, record["stages"])
    return record


def name_of(result: dict[str, Any]) -> str:
    within = result.get("within", "")
    if result.get("fused_adam"):  # of results before `accelerate`
        within = "fused_adam"
    return f"{result['architecture']} + {within}" if within else result["architecture"]


def print_result(case: Case, result: dict[str, Any]) -> None:
    name = name_of(result)
    if result["ms"] is None:
        print(f"{case.name:12} {name:34} out of memory", flush=True)
        return
    peak = "" if result["peak_gib"] is None else f"{result['peak_gib']:7.2f} GiB"
    speedup = f"{result['speedup']:6.2f}x" if "speedup" in result else ""
    device = f" (device {result['device_ms']:.2f})" if result.get("device_ms") else ""
    line = f"{case.name:12} {name:34} {result['ms']:9.2f} ms{device} {speedup} {peak}"
    print(line, flush=True)


def print_stages(case: Case, stages: list[dict[str, Any]]) -> None:
    for row in stages:
        floor = "" if row["floor_ms"] is None else f"floor {row['floor_ms']:8.3f} ms"
        topk = f"  torch.topk {row['torch_topk_ms']:.3f} ms" if "torch_topk_ms" in row else ""
        print(f"{case.name:12}   {row['stage']:32} {row['ms']:9.3f} ms  {floor}{topk}", flush=True)


def run(cases: list[Case], path: Path | None) -> None:
    device = cases[0].device
    gb_per_s = copy_speed(device)
    now = description(device)
    host = describe_host(now["host_ms"])
    print(f"{now['machine']}, copy {gb_per_s:.0f} GB/s, {host}", flush=True)
    record = json.loads(path.read_text()) if path is not None and path.exists() else {"cases": {}}
    record |= now | {"copy_gb_per_s": gb_per_s}
    for case in cases:
        measured = measure_case(case, gb_per_s)
        record["cases"][case.name] = {"date": now["date"], "host_ms": now["host_ms"], **measured}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    is_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small, on a CPU")
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="NAME",
        help="by default all of this device's: "
        + ", ".join(case.name for case in (GPU_CASES if is_gpu else CPU_CASES)),
    )
    parser.add_argument("--results", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    cases = QUICK_CASES if arguments.quick else GPU_CASES if is_gpu else CPU_CASES
    if arguments.cases:
        names = [case.name for case in cases]
        for name in arguments.cases:
            if name not in names:
                parser.error(f"--cases has {name!r}, expected some of {', '.join(names)}")
        cases = [case for case in cases if case.name in arguments.cases]
    name = f"train_step_{kind('cuda' if is_gpu else 'cpu')}.json"
    path = arguments.results or HERE / "results" / name
    run(cases, arguments.results if arguments.quick else path)


if __name__ == "__main__":
    main()
