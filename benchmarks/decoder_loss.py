"""Time the decoder losses, forward and backward, beside other implementations and floors.

    python -m benchmarks.decoder_loss                      # all tables, on a CUDA device
    python -m benchmarks.decoder_loss --tables main small  # some; the other results are kept
    python -m benchmarks.decoder_loss --module other.ops   # with another implementation beside
    python -m benchmarks.decoder_loss --plot               # draw the figure from the results

The results go to benchmarks/results/decoder_loss.json, and the figure to benchmarks/figures. A
module has functions `triton_hierarchical_sae_loss` and `triton_topk_sae_loss` of `(indices, weight,
vals, bias, target)`.

Times are of forward plus backward (gradients of weight, vals and bias) on random data: indices
uniform over the latents, or with frequencies that fall with 1 / rank, distinct within a row. `ms`
is the lowest of five medians, `readings_ms`, taken from Python 0.2 s apart: what others do on the
machine only adds. `graph_ms` is the median of replays as a CUDA graph: the device's time, without
the host's. Peak memory is all that is allocated, inputs and gradients included. Every
implementation is first compared with the definition in float64 on a part of the batch.
"""

import argparse
import datetime
import gc
import importlib
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import language as tl
from triton.testing import do_bench

from sae_lens_flex import ops
from sae_lens_flex.ops import by_triton

from .measuring import NothingComputed

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "decoder_loss.json"
PUBLISHED = HERE / "results" / "decoder_loss_published.json"  # measured in another run
FIGURE = HERE / "figures" / "decoder_loss.png"
READINGS, PAUSE_S = 5, 0.2
TURNS = 10  # through the grid
LOSSES = ("hierarchical", "topk")
OURS, COMPILED = "sae_lens_flex", "torch.compile of the definition"

Loss = Callable[..., torch.Tensor]


class Size(NamedTuple):
    """A batch: samples, levels, latents, width."""

    B: int
    K: int
    F: int
    D: int


GEMMA = Size(4096, 128, 65536, 2304)
SMALL = Size(512, 32, 16384, 768)


def random_indices(size: Size, distribution: str, seed: int = 0) -> torch.Tensor:
    """Return [B, K] latents, distinct within a row, the most frequent ones first."""
    generator = torch.Generator("cuda").manual_seed(seed)
    share = torch.ones(size.F, device="cuda")
    if distribution == "zipf":
        share = 1 / torch.arange(1, size.F + 1, device="cuda")
    share = share[torch.randperm(size.F, generator=generator, device="cuda")]
    rows = []
    for start in range(0, size.B, 512):  # K draws without replacement: the largest share / Exp(1)
        n = min(512, size.B - start)
        exponential = torch.empty(n, size.F, device="cuda").exponential_(generator=generator)
        rows.append((share / exponential).topk(size.K, dim=-1).indices)
    return torch.cat(rows)


class Batch:
    """The arguments of a loss; weight, vals and target in `dtype`, bias in float32."""

    def __init__(self, size: Size, distribution: str, dtype: torch.dtype) -> None:
        generator = torch.Generator("cuda").manual_seed(1)
        self.indices = random_indices(size, distribution)
        weight = torch.randn(size.F, size.D, generator=generator, device="cuda")
        vals = torch.rand(size.B, size.K, generator=generator, device="cuda")
        target = torch.randn(size.B, size.D, generator=generator, device="cuda")
        self.target = target.to(dtype)
        self.weight, self.vals = (t.to(dtype).requires_grad_() for t in (weight, vals))
        self.bias = torch.zeros(size.D, device="cuda", requires_grad=True)

    def arguments(self) -> tuple[torch.Tensor, ...]:
        return self.indices, self.weight, self.vals, self.bias, self.target

    def step(self, loss: Loss) -> None:
        loss(*self.arguments()).backward()
        self.weight.grad = self.vals.grad = self.bias.grad = None


def errors(loss: Loss, definition: Loss, batch: Batch) -> dict[str, float]:
    """Return the relative errors of the loss and its gradients on a part of the batch.

    It is large enough, if the batch is, for the kernels that large batches take.
    """
    n = by_triton.FEWEST_ELEMENTS // (batch.vals.shape[1] * batch.target.shape[1]) + 1
    parts = [batch.indices[:n], batch.weight, batch.vals[:n], batch.bias, batch.target[:n]]
    results = []
    for function, dtype in ((definition, torch.float64), (loss, None)):
        inputs = [part.detach().to(dtype).requires_grad_() for part in parts[1:4]]
        value = function(parts[0], *inputs, parts[4].to(dtype))
        results.append([value, *torch.autograd.grad(value, inputs)])
    return {
        name: float((mine.double() - exact).norm() / exact.norm())
        for name, exact, mine in zip(("loss", "weight", "vals", "bias"), *results, strict=True)
    }


def time_ms(function: Callable[[], Any], warmup: int = 25, rep: int = 100) -> float:
    return do_bench(function, warmup=warmup, rep=rep, return_mode="median")


def times_from_python(function: Callable[[], Any]) -> dict[str, Any]:
    """Return the lowest of several medians, and all of them.

    A machine shared with others has a slow host for a second or two now and then: the medians of
    successive twentieths of a second of a small loss were between 0.21 and 0.45 ms.
    """
    readings = []
    for _ in range(READINGS):
        time.sleep(PAUSE_S)
        readings.append(round(time_ms(function), 4))
    return {"ms": min(readings), "readings_ms": readings}


def graph_ms(function: Callable[[], Any], **how_long: int) -> float:
    """Return what a replay as a CUDA graph takes: the device's time, without the host's."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return time_ms(graph.replay, **how_long)


def peak_gib(function: Callable[[], Any]) -> float:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def measure(name: str, loss: Loss, kind: str, batch: Batch, **labels: Any) -> dict[str, Any]:
    row = {"implementation": name, "loss": kind, **labels}
    try:
        row["errors"] = errors(loss, DEFINITIONS[kind], batch)
        step = partial(batch.step, loss)
        step()
        row |= times_from_python(step) | {"peak_gib": peak_gib(step)}
    except torch.OutOfMemoryError:
        row |= {"ms": None, "peak_gib": None}
    print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return row


DEFINITIONS = {"hierarchical": ops.hierarchical_sae_loss, "topk": ops.topk_sae_loss}


def implementations(modules: list[str]) -> dict[str, dict[str, Loss]]:
    """Return the losses to time by implementation."""
    by_name = {OURS: ops, **{name: importlib.import_module(name) for name in modules}}
    return {
        name: {kind: getattr(module, f"triton_{kind}_sae_loss") for kind in LOSSES}
        for name, module in by_name.items()
    }


def labels(size: Size, distribution: str, dtype: torch.dtype) -> dict[str, Any]:
    return {**size._asdict(), "indices": distribution, "weight": str(dtype).split(".")[1]}


def measure_all(
    losses: dict[str, dict[str, Loss]],
    size: Size,
    distribution: str = "uniform",
    dtype: torch.dtype = torch.float32,
    *,
    as_graph: bool = False,
    **more: Any,
) -> list[dict[str, Any]]:
    """Measure every loss of every implementation, and where asked ours also as CUDA graphs."""
    batch = Batch(size, distribution, dtype)
    rows = []
    for name, by_kind in losses.items():
        for kind, loss in by_kind.items():
            cell = {**more, **labels(size, distribution, dtype)}
            if as_graph and name == OURS:
                cell["graph_ms"] = graph_ms(partial(batch.step, loss))
            rows.append(measure(name, loss, kind, batch, **cell))
    return rows


def ours(losses: dict[str, dict[str, Loss]]) -> dict[str, dict[str, Loss]]:
    return {OURS: losses[OURS]}


def table_main(losses: dict[str, dict[str, Loss]]) -> list[dict[str, Any]]:
    """The 12 cells of each loss."""
    rows = []
    for distribution in ("uniform", "zipf"):
        for dtype in (torch.float32, torch.bfloat16):
            for k in (32, 64, 128):
                size = GEMMA._replace(K=k)
                rows += measure_all(losses, size, distribution, dtype, as_graph=True)
    return rows


def table_compiled(losses: dict[str, dict[str, Loss]]) -> list[dict[str, Any]]:
    """torch.compile of the definitions."""
    rows = []
    for kind in LOSSES:
        for k in (32, 128):
            torch.compiler.reset()
            size = GEMMA._replace(K=k)
            batch = Batch(size, "uniform", torch.float32)
            compiled = torch.compile(DEFINITIONS[kind])
            row = {"implementation": COMPILED, "loss": kind}
            row |= labels(size, "uniform", torch.float32)
            step = partial(batch.step, compiled)
            step()
            rows.append(row | times_from_python(step) | {"peak_gib": peak_gib(step)})
            print(rows[-1], flush=True)
            del batch, compiled, step
    return rows


def table_small(losses: dict[str, dict[str, Loss]]) -> list[dict[str, Any]]:
    """Sizes at which launches count, and the host's time for a loss without any."""
    sizes = (SMALL, SMALL._replace(B=1024), Size(4096, 64, 24576, 768))
    rows = [row for size in sizes for row in measure_all(losses, size, as_graph=True)]
    batch = Batch(SMALL, "uniform", torch.float32)
    inputs = batch.weight, batch.vals, batch.bias
    step = partial(batch.step, lambda *_: NothingComputed.apply(*inputs))
    floor = {"floor": "an autograd function that computes nothing"}
    rows.append(floor | times_from_python(step))
    print(rows[-1], flush=True)
    return rows


def table_grid(losses: dict[str, dict[str, Loss]]) -> list[dict[str, Any]]:
    """Sizes at which launches count.

    The implementations take turns, and each turn goes through the whole grid. So a slow second of
    the host meets the implementations alike, and no cell more than once.
    """
    sizes = itertools.product((512, 1024, 2048, 4096), (32, 64), (16384, 24576), (SMALL.D,))
    dtypes = (torch.float32, torch.bfloat16)
    cells = [
        (Batch(Size(*size), distribution, dtype), labels(Size(*size), distribution, dtype))
        for size, distribution, dtype in itertools.product(sizes, ("uniform", "zipf"), dtypes)
    ]
    steps = [
        ({"implementation": name, "loss": kind} | cell, partial(batch.step, losses[name][kind]))
        for batch, cell in cells
        for kind in LOSSES
        for name in losses
    ]
    readings: list[list[float]] = [[] for _ in steps]
    for _ in range(TURNS):
        for (_, step), of_step in zip(steps, readings, strict=True):
            of_step.append(round(time_ms(step, warmup=3, rep=12), 4))
    rows = []
    for (cell, step), of_step in zip(steps, readings, strict=True):
        cell = cell | {"ms": min(of_step), "readings_ms": of_step}
        rows.append(cell | {"graph_ms": graph_ms(step, warmup=3, rep=12)})
        print(rows[-1], flush=True)
    print_ratios(rows)
    return rows


def print_ratios(rows: list[dict[str, Any]]) -> None:
    """Print how many times as long each implementation takes as ours, over the cells of a grid.

    Of the device, from Python by the median of paired readings, and by the lowest readings: the
    geometric mean, and in brackets the lowest cell.
    """
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    for kind, name in itertools.product(LOSSES, names):
        mine, theirs = (
            [row for row in rows if (row["loss"], row["implementation"]) == (kind, each)]
            for each in (OURS, name)
        )
        if name == OURS or not theirs:
            continue
        ratios = {"device": [], "median": [], "lowest": []}
        for a, b in zip(mine, theirs, strict=True):  # The cells come in the same order.
            pairs = zip(a["readings_ms"], b["readings_ms"], strict=True)
            ratios["device"].append(b["graph_ms"] / a["graph_ms"])
            ratios["median"].append(statistics.median(y / x for x, y in pairs))
            ratios["lowest"].append(b["ms"] / a["ms"])
        means = [
            f"{what} {statistics.geometric_mean(values):.2f} ({min(values):.2f})"
            for what, values in ratios.items()
        ]
        print(f"{kind}: {name} beside {OURS}:", ", ".join(means), flush=True)


def table_sweeps(losses: dict[str, dict[str, Loss]]) -> list[dict[str, Any]]:
    """One of B, K and D varied at a time."""
    start = Size(4096, 64, 65536, 1152)
    sizes = [start._replace(B=b) for b in (1024, 2048, 4096, 8192, 16384)]
    sizes += [start._replace(K=k) for k in (16, 32, 128, 256, 1024)]
    sizes += [start._replace(D=d) for d in (288, 576, 2304, 4608)]
    return [row for size in sizes for row in measure_all(ours(losses), size, as_graph=True)]


def table_memory(losses: dict[str, dict[str, Loss]]) -> list[dict[str, Any]]:
    """Many levels."""
    sizes = [GEMMA._replace(K=k) for k in (128, 1024)]
    return [row for size in sizes for row in measure_all(ours(losses), size)]


def table_deterministic(losses: dict[str, dict[str, Loss]]) -> list[dict[str, Any]]:
    """With torch.use_deterministic_algorithms(True)."""
    torch.use_deterministic_algorithms(True)
    rows = []
    for distribution in ("uniform", "zipf"):
        rows += measure_all(ours(losses), GEMMA, distribution, deterministic=True)
    torch.use_deterministic_algorithms(False)
    return rows


@triton.jit
def _gather_kernel(indices, weight, out, K, D, BLOCK: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.range(0, K, loop_unroll_factor=8):
        f = tl.load(indices + b * K + j)
        total += tl.load(weight + f * D + d).to(tl.float32)
    tl.store(out + b * D + d, total)


@triton.jit
def _add_kernel(indices, out, K, D, BLOCK: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for j in tl.range(0, K, loop_unroll_factor=8):
        f = tl.load(indices + b * K + j)
        tl.atomic_add(out + f * D + d, d.to(tl.float32), sem="relaxed")


def table_floors(losses: dict[str, dict[str, Loss]]) -> list[dict[str, Any]]:
    """What the decoder loss cannot do without: a gather, and additions in memory."""
    rows = []
    for distribution in ("uniform", "zipf"):
        for k in (32, 128):
            size = GEMMA._replace(K=k)
            indices = random_indices(size, distribution)
            weight = torch.randn(size.F, size.D, device="cuda")
            out = torch.zeros_like(weight)
            sums = torch.empty(size.B, size.D, device="cuda")
            for dtype in (torch.float32, torch.bfloat16):
                rows_of = weight.to(dtype)
                block = 256 // dtype.itemsize
                gather = partial(
                    _gather_kernel[(size.B, size.D // block)],
                    *(indices, rows_of, sums, size.K, size.D, block),
                    num_warps=1,
                )
                cell = labels(size, distribution, dtype)
                rows.append({"floor": "gather rows once", **cell, "ms": time_ms(gather)})
            add = partial(
                _add_kernel[(size.B, size.D // 64)], indices, out, size.K, size.D, 64, num_warps=1
            )
            cell = labels(size, distribution, torch.float32)
            rows.append({"floor": "atomic additions of B K D floats", **cell, "ms": time_ms(add)})
            rows.append({"floor": "zero the gradient", **cell, "ms": time_ms(out.zero_)})
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    ms = time_ms(lambda: target.copy_(source))
    rows.append({"floor": "copy 1 GiB", "ms": ms, "TB/s": 2**31 / ms / 1e9})
    for row in rows:
        print(row, flush=True)
    return rows


TABLES = {
    "main": table_main,
    "compiled": table_compiled,
    "small": table_small,
    "grid": table_grid,
    "sweeps": table_sweeps,
    "memory": table_memory,
    "deterministic": table_deterministic,
    "floors": table_floors,
}


def machine() -> dict[str, str]:
    return {
        "gpu": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }


def plot(results: dict[str, Any]) -> None:
    """Draw the times of the main table as bars, beside the published kernels'."""
    from plotly.colors import DEFAULT_PLOTLY_COLORS
    from plotly.subplots import make_subplots

    main = results["main"]["rows"]
    sizes = {tuple(row[name] for name in Size._fields) for row in main}
    published = json.loads(PUBLISHED.read_text())["rows"]
    main += [row for row in published if tuple(row[name] for name in Size._fields) in sizes]
    figure = make_subplots(1, 2, shared_yaxes=True, subplot_titles=LOSSES)
    names = list(dict.fromkeys(row["implementation"] for row in main))
    for column, kind in enumerate(LOSSES, 1):
        for name in names:
            mine = [row for row in main if (row["implementation"], row["loss"]) == (name, kind)]
            cells = [f"{row['indices']} {row['weight']} K={row['K']}" for row in mine]
            times = [row["ms"] for row in mine]
            color = DEFAULT_PLOTLY_COLORS[names.index(name)]
            figure.add_bar(
                x=cells,
                y=times,
                name=name,
                marker_color=color,
                showlegend=column == 1,
                row=1,
                col=column,
            )
    gpu = results["main"]["machine"]["gpu"]
    figure.update_layout(
        title=f"Decoder loss, forward and backward, F=65536, D=2304, B=4096, {gpu}",
        yaxis_title="ms",
        template="plotly_white",
        legend={"orientation": "h", "y": 1.2, "x": 1, "xanchor": "right"},
        barmode="group",
        width=1100,
        height=520,
    )
    FIGURE.parent.mkdir(exist_ok=True)
    figure.write_image(FIGURE, scale=2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tables", nargs="+", choices=TABLES, default=list(TABLES), help="what to measure"
    )
    parser.add_argument(
        "--module", action="append", default=[], metavar="MODULE", help="to be timed beside ours"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write, or to draw")
    parser.add_argument(
        "--plot", action="store_true", help="draw the figure, by kaleido; measures nothing"
    )
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    if args.plot:
        if find_spec("kaleido") is None:
            parser.error("the figure needs the package kaleido: pip install kaleido")
        plot(results)
        return
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA device; benchmarks.train_step runs on a CPU, too")
    losses = implementations(args.module)
    for name in args.tables:
        results[name] = {"machine": machine(), "rows": TABLES[name](losses)}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
