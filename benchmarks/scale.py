"""Time training steps of one SAE on several processes: sharded, and with whole copies.

    python -m benchmarks.scale                         # every case, on one GPU and on all of them
    python -m benchmarks.scale --ranks 1 2 4           # on so many
    python -m benchmarks.scale --cases quarter_million
    python -m benchmarks.scale --largest 768           # the largest dictionary of this width
    python -m benchmarks.scale --quick --ranks 1 2 4   # small, gloo processes on a CPU; no file

The results go to benchmarks/results/scale_<device>.json, one after the other. Each number of
processes is a run of `torchrun`. It first takes a small step sharded and compares it with the step
of one process: `error` is the largest relative difference of losses and gradients. A time is the
median of the distances between the ends of steps, on the slowest rank. A step is `SAETrainer.step`
within `accelerate()`, on a batch of the case's size in all, whatever the number of processes.

"sharded" is `sae_lens_flex.shard`. "copies" is what DistributedDataParallel does: a whole SAE on
every process, and gradients that are averaged. "communication" is the time that the device spends
in collectives, where they do not overlap with computing; `collectives_ms` has it by kind.
"""

import argparse
import copy
import datetime
import gc
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sae_lens import SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import sae_lens_flex
from sae_lens_flex.training.graph import ORDINARY_CALLS

from .measuring import device_ms, kind, machine, median_ms, peak_memory

HERE = Path(__file__).parent
RESULT = "result of benchmarks.scale: "


@dataclass(frozen=True)
class Case:
    """A size of SAE and batch, of all processes together."""

    name: str
    d_in: int
    d_sae: int
    k: int
    batch: int
    autocast: bool = True
    has_copies: bool = True  # whether whole copies are timed, too
    n_steps: int = 20


CASES = [
    Case("gemma", 2304, 65536, 128, 8192),
    Case("gemma_32768", 2304, 65536, 128, 32768),
    Case("gpt2", 768, 24576, 64, 4096, n_steps=100),
    Case("quarter_million", 2304, 2**18, 64, 4096),
    Case("million", 2304, 2**20, 64, 4096, has_copies=False, n_steps=10),
]
# The search for the largest dictionary halves this range: what a GPU has, in bytes, for each weight
# that it holds. The weight, its gradient and Adam's moments take 16. It begins with the most.
BYTES_PER_WEIGHT = (16.2, 17.4)
N_HALVINGS = 3
# A gradient takes an eighth of the memory, in one piece. PyTorch's allocator does not find that
# among what it has freed in smaller pieces, unless it is told to join them.
ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
QUICK_CASES = [Case("quick", 48, 515, 8, 130, autocast=False, n_steps=3)]


# --- a process of a run


def new_sae(case: Case, device: str) -> TrainingSAE[Any]:
    torch.manual_seed(0)
    return TrainingSAE.from_dict(
        {
            "architecture": "hierarchical_topk",
            "d_in": case.d_in,
            "d_sae": case.d_sae,
            "k": case.k,
            "device": device,
        }
    )


def own_share(batch: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    return batch.tensor_split(mesh.size())[mesh.get_local_rank()]


def error_against_one_process(mesh: DeviceMesh, device: str) -> float:
    """Return the largest relative difference of a sharded step from that of one process."""
    case = Case("check", 96, 517, 8, 67)
    sae: Any = new_sae(case, device)
    sharded = sae_lens_flex.shard(copy.deepcopy(sae), mesh)
    x = torch.randn(case.batch, case.d_in, generator=torch.Generator().manual_seed(1)).to(device)
    dead = torch.arange(case.d_sae, device=device) % 3 == 0
    outputs = []
    for each, samples in ((sae, x), (sharded, own_share(x, mesh))):
        output = each.training_forward_pass(
            TrainStepInput(
                sae_in=samples,
                coefficients={},
                dead_neuron_mask=dead,
                n_training_steps=0,
                is_logging_step=False,
            )
        )
        output.loss.backward()
        outputs.append(output.losses)
    pairs = [(outputs[1][name], loss) for name, loss in outputs[0].items()]
    for name, parameter in sae.named_parameters():
        gradient: Any = sharded.get_parameter(name).grad
        pairs.append((gradient.full_tensor(), parameter.grad))
    return max(float((value - expected).norm() / expected.norm()) for value, expected in pairs)


def train(case: Case, mode: str, mesh: DeviceMesh, device: str) -> dict[str, Any]:
    """Time steps, and return what they took on the slowest rank."""
    sae: Any = new_sae(case, "meta" if mode == "sharded" else device)
    if mode == "sharded":
        sae = sae_lens_flex.shard(sae, mesh)
    if mode == "copies":
        average_gradients(sae, mesh)
    generator = torch.Generator(device).manual_seed(mesh.get_local_rank())
    n_samples = case.batch if mode == "one" else len(own_share(torch.empty(case.batch), mesh))
    x = torch.randn(n_samples, case.d_in, generator=generator, device=device)
    cfg = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=case.batch,
        lr=1e-5,
        lr_end=1e-5,
        device=device,
        autocast=case.autocast,
    )
    with peak_memory(device) as peaks, sae_lens_flex.accelerate():
        trainer = SAETrainer(cfg=cfg, sae=sae, data_provider=iter(()))

        def step() -> None:
            trainer.step(x)
            trainer.n_training_steps += 1

        ms = median_ms(step, device, ORDINARY_CALLS + 2, case.n_steps)
        peak = peaks()["peak_gib"]
        result = {"ms": ms, "peak_gib": peak, **device_times(step, device)}
    return {name: of_slowest(value) for name, value in result.items()}


def average_gradients(sae: TrainingSAE[Any], mesh: DeviceMesh) -> None:
    """Average gradients among the ranks as soon as a backward pass has them."""
    group, size = mesh.get_group(), mesh.size()

    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        # In the order of memory: W_enc is latent-major, and so is its gradient.
        gradient = parameter.grad if parameter.grad.is_contiguous() else parameter.grad.T
        dist.all_reduce(gradient.div_(size), group=group)

    for parameter in sae.parameters():
        parameter.register_post_accumulate_grad_hook(hook)


def device_times(step: Callable[[], None], device: str) -> dict[str, Any]:
    """Return how long the device works in a step, and how long in collectives, in ms."""
    if device == "cpu":
        return {"device_ms": None, "communication_ms": None, "collectives_ms": {}}
    total = device_ms(step)
    n = 5
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(n):
            step()
        torch.cuda.synchronize()
    by_kind: dict[str, float] = {}
    for event in profile.key_averages():
        # Such as ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>).
        if name := re.match(r"nccl\w*Kernel_([A-Za-z]+)", event.key):
            ms = event.self_device_time_total / 1e3 / n
            by_kind[name[1]] = by_kind.get(name[1], 0) + ms
    communication = sum(by_kind.values())
    return {"device_ms": total, "communication_ms": communication, "collectives_ms": by_kind}


def of_slowest(value: Any) -> Any:
    """Return the largest of the ranks' values; of dictionaries, the largest of each key."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return largest(values)


def largest(values: list[Any]) -> Any:
    """Return the largest of numbers, or of each key's numbers; None where all are."""
    values = [each for each in values if each is not None]
    if values and isinstance(values[0], dict):
        keys = dict.fromkeys(key for each in values for key in each)
        return {key: largest([each.get(key) for each in values]) for key in keys}
    return max(values, default=None)


def work(works: list[tuple[Case, str]], quick: bool) -> None:
    """Be one process of a run; the first prints each result."""
    is_gpu = torch.cuda.is_available() and not quick
    if is_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(1)
    device = "cuda" if is_gpu else "cpu"
    limit = datetime.timedelta(minutes=2)
    dist.init_process_group("cpu:gloo,cuda:nccl" if is_gpu else "gloo", timeout=limit)
    try:
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        error = None
        if dist.get_world_size() > 1:
            error = error_against_one_process(mesh, device)
        for case, mode in works:
            result: dict[str, Any] = {"error": error if mode == "sharded" else None}
            try:
                result |= train(case, mode, mesh, device)
            except torch.OutOfMemoryError:
                if dist.get_world_size() > 1:
                    raise  # The others wait: the run ends.
                result |= {"ms": None, "peak_gib": None}
            if dist.get_rank() == 0:
                print(RESULT + json.dumps(result), flush=True)
            gc.collect()
            if is_gpu:
                torch.cuda.empty_cache()
    finally:
        dist.destroy_process_group()


# --- the runs


def launch(
    works: list[tuple[Case, str]],
    n_ranks: int,
    quick: bool,
    environment: dict[str, str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the result of each case and mode.

    Its times are None where memory was short, or where it `failed`. The rest is then started anew.
    """
    environment = os.environ | (environment or {})
    while works:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(n_ranks), "-m", "benchmarks.scale"]
        command += [*(["--quick"] if quick else []), "--work"]
        command += [json.dumps([(asdict(case), mode) for case, mode in works])]
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                command,
                cwd=HERE.parent,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(RESULT):
                    works = works[1:]
                    yield json.loads(line.removeprefix(RESULT))
            if process.wait() == 0:
                continue
            errors.seek(0)
            text = errors.read()
        memory_error = re.search("OutOfMemoryError: .*", text)
        print(memory_error[0] if memory_error else text[-3000:], file=sys.stderr)
        if works:
            works = works[1:]
            failure = {} if memory_error else {"failed": process.returncode}
            yield {"error": None, "ms": None, "peak_gib": None, **failure}


def modes(case: Case, n_ranks: int) -> list[str]:
    if n_ranks == 1:
        return ["one"]
    return ["sharded", "copies"] if case.has_copies else ["sharded"]


def run(cases: list[Case], ranks: list[int], path: Path | None, quick: bool) -> bool:
    """Measure, print and write every result. Return whether none failed."""
    record = new_record("cpu" if quick else "cuda")
    is_whole = True
    of_one: dict[str, float | None] = {}
    for n_ranks in ranks:
        works = [(case, mode) for case in cases for mode in modes(case, n_ranks)]
        for (case, mode), found in zip(works, launch(works, n_ranks, quick), strict=True):
            if mode == "one":
                of_one[case.name] = found["ms"]
            result = with_rates(case, mode, n_ranks, found, of_one.get(case.name))
            is_whole &= "failed" not in result
            keep(result, record, path)
    return is_whole


def find_largest(d_in: int, ranks: list[int], path: Path | None) -> None:
    """Train dictionaries of other sizes, until the largest is known to 1 or 2 %."""
    record = new_record("cuda")
    memory = torch.cuda.get_device_properties(0).total_memory
    for n_ranks in ranks:
        mode = "sharded" if n_ranks > 1 else "one"
        too_few, enough = BYTES_PER_WEIGHT
        tried = enough
        for _ in range(1 + N_HALVINGS):
            n_latents = int(memory / (tried * 2 * d_in)) // 1024 * 1024 * n_ranks
            case = Case("largest", d_in, n_latents, 64, 4096, n_steps=5)
            (found,) = launch([(case, mode)], n_ranks, quick=False, environment=ALLOCATOR)
            result = with_rates(case, mode, n_ranks, found, None)
            keep(result, record, path)
            if result["ms"] is not None:
                enough = tried
            elif tried == enough:
                break  # Even the smallest one does not fit.
            else:
                too_few = tried
            tried = (too_few + enough) / 2


def new_record(device: str) -> dict[str, Any]:
    return {
        "machine": machine(device),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "sae-lens")},
        "date": datetime.date.today().isoformat(),
        "results": [],
    }


def with_rates(
    case: Case, mode: str, n_ranks: int, found: dict[str, Any], ms_of_one: float | None
) -> dict[str, Any]:
    result = {**asdict(case), "mode": mode, "ranks": n_ranks, **found}
    if result["ms"] is not None:
        result["tokens_per_s"] = 1e3 * case.batch / result["ms"]
        if ms_of_one is not None:
            result["speedup"] = ms_of_one / result["ms"]
    return result


def keep(result: dict[str, Any], record: dict[str, Any], path: Path | None) -> None:
    record["results"].append(result)
    print_result(result)
    if path is not None:
        path.write_text(json.dumps(record, indent=2) + "\n")


def print_result(result: dict[str, Any]) -> None:
    name = f"{result['name']:16} {result['ranks']:2} {result['mode']:8}"
    if result["ms"] is None:
        print(f"{name} {'failed' if 'failed' in result else 'out of memory'}", flush=True)
        return
    parts = [f"{result['ms']:9.2f} ms", f"{result['tokens_per_s']:9.0f} tokens/s"]
    for key, form in (
        ("speedup", "{:5.2f}x"),
        ("peak_gib", "{:6.2f} GiB"),
        ("communication_ms", "communication {:.2f} ms"),
        ("error", "error {:.1e}"),
    ):
        if result.get(key) is not None:
            parts.append(form.format(result[key]))
    print(name, *parts, flush=True)


def plot(path: Path, figure_path: Path) -> None:
    """Draw tokens/s over the number of GPUs, a panel for each case in `path`."""
    from plotly.subplots import make_subplots

    record = json.loads(path.read_text())
    results = [result for result in record["results"] if result["ms"] is not None]
    cases = {result["name"]: result for result in results}
    titles = [
        f"{case['d_in']} x {case['d_sae']:,}, batch {case['batch']}" for case in cases.values()
    ]
    figure = make_subplots(1, len(cases), subplot_titles=titles)
    for column, name in enumerate(cases, 1):
        lines: dict[str, dict[int, float]] = {}
        for result in results:
            if result["name"] == name:
                of_mode = {"one": ("sharded", "copies")}.get(result["mode"], (result["mode"],))
                for mode in of_mode:
                    lines.setdefault(mode, {})[result["ranks"]] = result["tokens_per_s"]
        ideal = {n: n * lines["sharded"][1] for n in lines["sharded"]}
        for mode, color in (("sharded", "#1f77b4"), ("copies", "#ff7f0e"), ("ideal", "#bbbbbb")):
            points = ideal if mode == "ideal" else lines[mode]
            figure.add_scatter(
                x=list(points),
                y=list(points.values()),
                name=mode,
                line={"color": color, "dash": "dot" if mode == "ideal" else "solid"},
                showlegend=column == 1,
                row=1,
                col=column,
            )
    figure.update_xaxes(type="log", tickvals=[1, 2, 4, 8], title="GPUs")
    figure.update_yaxes(type="log")
    figure.update_layout(
        title=f"Tokens/s of training steps, {record['machine']}", template="plotly_white"
    )
    figure_path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_image(figure_path, width=300 * len(cases), height=420, scale=2)


def main() -> None:
    n_gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small, on a CPU; writes no file")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="by default all")
    parser.add_argument(
        "--ranks", nargs="+", type=int, metavar="N", help="by default 1, and every GPU or 2"
    )
    parser.add_argument("--results", type=Path, help="JSON file to write")
    parser.add_argument(
        "--largest", type=int, metavar="D_IN", help="look for the largest dictionary of this width"
    )
    parser.add_argument(
        "--plot", action="store_true", help="draw the figure of --results; measures nothing"
    )
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cases = QUICK_CASES if arguments.quick else CASES
    if arguments.work:
        work([(Case(**case), mode) for case, mode in arguments.work], arguments.quick)
        return
    if arguments.plot:
        path = arguments.results
        if path is None:
            parser.error("--plot needs --results, the JSON file to draw")
        plot(path, HERE / "figures" / f"{path.stem}.png")
        return
    if not arguments.quick and n_gpus == 0:
        parser.error("there is no GPU here; --quick runs a small case on a CPU")
    if arguments.cases:
        names = [case.name for case in cases]
        for name in arguments.cases:
            if name not in names:
                parser.error(f"--cases has {name!r}, expected some of {', '.join(names)}")
        cases = [case for case in cases if case.name in arguments.cases]
    ranks = arguments.ranks or [1, 2 if arguments.quick else n_gpus]
    path = arguments.results
    if path is None and not arguments.quick:
        name = f"largest_{arguments.largest}" if arguments.largest else "scale"
        path = HERE / "results" / f"{name}_{kind('cuda')}.json"
    if arguments.largest:
        find_largest(arguments.largest, ranks, path)
    elif not run(cases, ranks, path, arguments.quick):
        sys.exit("a run failed")


if __name__ == "__main__":
    main()
