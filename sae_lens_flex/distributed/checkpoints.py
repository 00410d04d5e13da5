"""SAELens's checkpoints of a sharded run: the files are those of a run of one process."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils.serialization import config

from ..saes.sharded import whole_tensor


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give a directory to write in, which becomes `path` when the block is done.

    Until then an earlier directory of this name stays whole. What a block that fails has written
    is left beside it, in a directory whose name says so.
    """
    aside, earlier = (path.with_name(f".{path.name}.{state}") for state in ("unfinished", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    yield aside
    shutil.rmtree(earlier, ignore_errors=True)
    if path.exists():
        path.rename(earlier)
    aside.rename(path)
    shutil.rmtree(earlier, ignore_errors=True)


def whole_state(optimizer: Optimizer, *, keep: bool) -> dict[str, Any]:
    """Return the state that the optimizer of one process would have, on the CPU.

    Every process has to call this, since each gives its part of every tensor.

    Args:
        optimizer: its parameters are DTensors.
        keep: whether this process wants the state. Where it does not, the state is without
            tensors, and costs no memory.
    """
    state_dict = optimizer.state_dict()
    whole: dict[Any, dict[str, Any]] = {}
    for index, state in state_dict["state"].items():
        whole[index] = {}
        for name, value in state.items():
            if isinstance(value, DTensor):
                value = whole_tensor(value, keep=keep, device=torch.device("cpu"))
            if keep:
                whole[index][name] = value.cpu() if isinstance(value, torch.Tensor) else value
    return {**state_dict, "state": whole}


@contextmanager
def taking_shares(optimizer: Optimizer) -> Iterator[None]:
    """Let `load_state_dict` in the block take its part of the state of one process's optimizer.

    `torch.load` in the block leaves on disk what is not read.
    """

    def shared(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # A part is cut out on the CPU. The whole need not fit on a GPU.
        on_cpu = init_device_mesh("cpu", parameters[0].device_mesh.shape)
        state = {
            index: {
                name: _share(value, parameters[index], on_cpu) for name, value in of_one.items()
            }
            for index, of_one in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    hook = optimizer.register_load_state_dict_pre_hook(shared)
    try:
        settings: Any = config
        with settings.patch("load.mmap", True):
            yield
    finally:
        hook.remove()


def _share(value: Any, parameter: DTensor, on_cpu: DeviceMesh) -> Any:
    """Return this process's part of a moment of the parameter; a number of steps as it is."""
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return value
    if value.shape != parameter.shape:
        raise ValueError(
            f"the optimizer's state has shape {list(value.shape)}, expected that of the parameter, "
            f"{list(parameter.shape)}"
        )
    mesh, placements = parameter.device_mesh, parameter.placements
    part = distribute_tensor(value.cpu(), on_cpu, placements, src_data_rank=None).to_local()
    return DTensor.from_local(
        part.to(parameter.device),
        mesh,
        placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
