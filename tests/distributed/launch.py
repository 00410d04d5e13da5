"""Several processes for a test, by what `torchrun` starts them with.

They are forked from a process that has imported everything, so that starting them takes a second.
"""

import multiprocessing
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

CONTEXT: Any = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["sae_lens_flex"])


class Launch:
    """A launcher, and the processes that it starts.

    Args:
        n_processes: how many.
        function: of a module of tests. Each process calls it with `arguments`.
        directory: an empty one, for what the processes return and print.
    """

    def __init__(
        self, n_processes: int, function: Callable[..., Any], *arguments: Any, directory: Path
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.launcher = CONTEXT.Process(
            target=_launch, args=(n_processes, function, arguments, directory)
        )
        self.launcher.start()

    def wait(self, seconds: float) -> int:
        """Return the launcher's exit code. Fail if it takes longer."""
        self.launcher.join(seconds)
        if self.launcher.exitcode is None:
            self.launcher.terminate()
            self.launcher.join(40)
            self.launcher.kill()
            raise AssertionError(f"not done in {seconds} seconds:\n{self.printed()}")
        return self.launcher.exitcode

    def printed(self) -> str:
        """Return what launcher and processes have written to stderr so far."""
        return "".join(path.read_text() for path in sorted(self.directory.rglob("stderr.log")))


def results(
    n_processes: int, function: Callable[..., Any], *arguments: Any, directory: Path
) -> list[Any]:
    """Return what the function returns in each of several processes, by rank."""
    launch = Launch(n_processes, function, *arguments, directory=directory)
    assert launch.wait(120) == 0, launch.printed()
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(n_processes)]


def _launch(
    n_processes: int, function: Callable[..., Any], arguments: tuple[Any, ...], directory: Path
) -> None:
    with open(directory / "stderr.log", "w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(log_dir=str(directory), redirects=Std.ALL),
    )
    elastic_launch(config, _work)(function, arguments, directory)


def _work(function: Callable[..., Any], arguments: tuple[Any, ...], directory: Path) -> None:
    torch.set_num_threads(1)
    torch.save(function(*arguments), directory / f"{os.environ['RANK']}.pt")
