"""A few processes that call functions together, for tests."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

FORKED: Any = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["sae_lens_flex", "torch.distributed.tensor"])
# A fork of a process that has used CUDA cannot.
SPAWNED: Any = multiprocessing.get_context("spawn")


class Ranks:
    """Processes that are one group until `close`: gloo on the CPU, or NCCL with a GPU each."""

    def __init__(self, size: int, directory: Any, device: str = "cpu") -> None:
        self.size, self.is_open = size, True
        store = f"file://{directory}/store"
        self.pipes, self.processes = [], []
        context = FORKED if device == "cpu" else SPAWNED
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, store, rank, size, device), daemon=True
            )
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def call(
        self, function: Callable[..., Any], *arguments: Any, seconds: float = 100
    ) -> list[Any]:
        """Return what a module's function returns on each rank.

        Raises:
            AssertionError: where it raised on a rank, or took longer.
        """
        assert self.is_open, "an earlier call hung"
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results, errors = [], []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(seconds if not errors else 5):
                errors.append(f"rank {rank} did not return")
                continue
            result, error = pipe.recv()
            results.append(result)
            if error:
                errors.append(f"rank {rank}: {error}")
        if any("did not return" in error for error in errors):
            self.close()
        assert not errors, "\n".join(errors)
        return results

    def close(self) -> None:
        self.is_open = False
        for process in self.processes:
            process.kill()


def _serve(pipe: Any, store: str, rank: int, size: int, device: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=size)
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((function(*arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
