"""The processes that `torchrun` started: what each of them is, what they agree on, how they end."""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partialmethod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from tqdm.auto import tqdm

# A process that waits longer for the others in a step gives up. They wait longest where a buffer of
# activations is filled.
LIMIT = timedelta(minutes=10)
# The same where they may wait for a download, for the text that a resumed run skips, or for rank 0,
# which evaluates and writes alone.
LONG_LIMIT = timedelta(hours=2)
_FIRST_ERROR = "sae_lens_flex/first_error"


def are_several() -> bool:
    """Return whether a launcher such as `torchrun` started this process with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_rank_0() -> bool:
    """Return whether this process is the one that prints, if there are several."""
    return not are_several() or int(os.environ["RANK"]) == 0


def is_first_to_fail() -> bool:
    """Return whether an error of this process is the first one among all processes.

    Before they have met, rank 0 is taken for the first one: all parse the same arguments.
    """
    return is_rank_0() if _joined is None else _joined.is_first_to_fail()


@dataclass(frozen=True)
class Processes:
    """This process and the others.

    Fields:
        rank: number of this process, 0..size-1.
        size: number of processes.
        device: of this process, "cpu" or "cuda:I".
        mesh: of all processes, on the devices of their SAE.
        group: all processes, for messages through the host's memory.
        patient_group: the same, with a longer time limit.
        store: key-value store of all processes, None where the user made the process group.
    """

    rank: int
    size: int
    device: str
    mesh: DeviceMesh
    group: dist.ProcessGroup
    patient_group: dist.ProcessGroup
    store: Store | None

    def share(self, total: int) -> int:
        """Return this process's share of `total` things. Shares differ by one at most."""
        return total // self.size + (self.rank < total % self.size)

    def gather(self, mine: Any) -> list[Any]:
        """Return what each process gave, by rank."""
        everyones: list[Any] = [None] * self.size
        dist.all_gather_object(everyones, mine, group=self.group)
        return everyones

    def meet(self) -> None:
        """Return when all processes have called this, some perhaps much later than others."""
        dist.barrier(self.patient_group)

    def check_equal(self, settings: Mapping[str, Any]) -> None:
        """Raise ValueError in all processes where one of `settings` is not the same in all."""
        everyones = self.gather(settings)
        disagreements = []
        for name, first in everyones[0].items():
            for rank, other in enumerate(everyones):
                if other.get(name) != first:
                    disagreements.append(
                        f"{name} is {first!r} on rank 0 and {other.get(name)!r} on rank {rank}"
                    )
                    break
        if disagreements:
            raise ValueError(f"the processes differ: {'; '.join(disagreements)}")

    def is_first_to_fail(self) -> bool:
        """Return whether no other process has called this before.

        What the first one raises is the error. The others' follow from it: they miss its answer,
        or the launcher ends them.
        """
        if self.store is None:
            return True
        me = str(self.rank)
        try:
            return self.store.compare_set(_FIRST_ERROR, "", me).decode() == me
        except RuntimeError:  # The launcher is gone, and the store with it.
            return self.rank == 0

    @contextmanager
    def first_error_only(self) -> Iterator[None]:
        """Let an error in the block pass in the process that has the first; end others silently.

        Raises:
            SystemExit: in place of an error that follows from another process's.
        """
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if self.is_first_to_fail():
                raise
            raise SystemExit(1) from error

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """Silence progress bars, logs and warnings in the block, except on rank 0."""
        if self.rank == 0:
            yield
            return
        make_bar, disabled = tqdm.__init__, logging.root.manager.disable
        tqdm.__init__ = partialmethod(make_bar, disable=True)  # type: ignore[method-assign]
        logging.disable(logging.WARNING)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            tqdm.__init__ = make_bar
            logging.disable(disabled)


_joined: Processes | None = None


def join(device: str) -> Processes:
    """Meet the other processes; return the same again where that has been done.

    Args:
        device: of the SAE. Where it is a GPU, this process takes the one whose number is its own
            on its host. Any other is taken for the CPU.

    Raises:
        ValueError: no launcher started this process, or the host has fewer GPUs than processes.
    """
    device_type = "cuda" if torch.device(device).type == "cuda" else "cpu"
    global _joined
    if _joined is not None and dist.is_initialized():
        if _joined.mesh.device_type != device_type:
            raise ValueError(
                f"device is {device_type!r}, expected {_joined.mesh.device_type!r}, with which "
                "these processes have met"
            )
        return _joined
    if missing := [name for name in ("RANK", "WORLD_SIZE") if name not in os.environ]:
        raise ValueError(
            f"{missing[0]} is not set: start the processes by torchrun, such as "
            '"torchrun --nproc-per-node 2 SCRIPT"'
        )
    device = "cpu"
    if device_type == "cuda":
        local_rank, n_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= n_gpus:
            raise ValueError(
                f"process {local_rank} of this host has no GPU: expected at most {n_gpus} "
                "processes a host (--nproc-per-node), a GPU each"
            )
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(local_rank)
    store = None
    if not dist.is_initialized():
        store, rank, size = next(rendezvous("env://", timeout=LIMIT))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
            store=PrefixStore("default_group", store),
            rank=rank,
            world_size=size,
            timeout=LIMIT,
        )
    _joined = Processes(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=device,
        mesh=init_device_mesh(device_type, (dist.get_world_size(),)),
        group=_gloo(LIMIT),
        patient_group=_gloo(LONG_LIMIT),
        store=store,
    )
    return _joined


def _gloo(limit: timedelta) -> dist.ProcessGroup:
    group: Any = dist.new_group(backend="gloo", timeout=limit)
    return group
