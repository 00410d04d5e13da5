"""Where steps are recorded as CUDA graphs, and what stands for recordings on a CPU."""

import types
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from saes.comparison import dead_mask, random_activations, trained_sae

from sae_lens_flex.saes import fused_topk
from sae_lens_flex.training import graph
from sae_lens_flex.training.graph import Recorder
from sae_lens_flex.training.requests import Inputs


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors of nested named tuples and dataclasses."""
    if isinstance(value, torch.Tensor):
        return [value]
    if value is None:
        return []
    return [
        tensor
        for each in (value if isinstance(value, tuple) else vars(value).values())
        for tensor in tensors_in(each)
    ]


def with_memory_of_now(function: Any) -> Any:
    """A function that goes on reading its tensors where they lie, whatever they are set to."""

    def of_now(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach()
        if isinstance(value, tuple):
            values = map(of_now, value)
            return type(value)(*values) if hasattr(value, "_fields") else tuple(values)
        return value

    cells = (types.CellType(of_now(cell.cell_contents)) for cell in function.__closure__)
    return types.FunctionType(function.__code__, function.__globals__, closure=tuple(cells))


class Recomputed:
    """Stands for a recording where there are no CUDA graphs.

    As a recording it reads the weights where they lay, takes the inputs from memory of its own, and
    leaves the results in memory of its own, which the next replay overwrites.
    """

    def __init__(self, function: Any, inputs: Inputs, pool: Any) -> None:
        self.function = with_memory_of_now(function)
        self.inputs = graph._map_inputs(torch.zeros_like, inputs)
        for tensor in tensors_in(self.inputs):
            tensor.fill_(torch.nan)
        self.result: Any = None
        self.graph = self

    def pool(self) -> None:
        return None

    def replay(self) -> None:
        with torch.no_grad():
            fresh = self.function(self.inputs)
        self.result = self.result or fresh
        for mine, new in zip(tensors_in(self.result), tensors_in(fresh), strict=True):
            mine.copy_(new)


class Replays:
    """Where steps are recorded: on a GPU. On a CPU a stand-in for recordings computes again."""

    def __init__(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device = device
        if device == "cuda":
            return
        recorder_of = fused_topk.FusedTopKTrainingSAE._recorder_of

        def as_by_triton(self, request, **options: bool) -> Recorder | None:
            spec = replace(request.spec, use_triton=True)
            return recorder_of(self, request._replace(spec=spec), **options)

        monkeypatch.setattr(fused_topk.FusedTopKTrainingSAE, "_recorder_of", as_by_triton)
        monkeypatch.setattr(fused_topk, "is_worth_recording", lambda *_, **__: True)
        monkeypatch.setattr(graph, "_record", Recomputed)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        on_no_stream(monkeypatch)

    def sae(self, architecture: str, **fields: Any) -> Any:
        return trained_sae(architecture, device=self.device, **fields)

    def ordinary_sae(self, architecture: str, **fields: Any) -> Any:
        sae = self.sae(architecture, **fields)
        sae.use_cuda_graph = False
        return sae

    def batch(self, seed: int, *shape: int) -> torch.Tensor:
        return random_activations(*shape, seed=seed).to(self.device)

    def dead(self, n_dead: int) -> torch.Tensor:
        return dead_mask(n_dead).to(self.device)


def on_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))


def has_recorded(sae: Any) -> bool:
    return sae._recorder is not None and len(sae._recorder.recordings) > 0


def recording_of(sae: Any) -> Any:
    return next(iter(sae._recorder.recordings), None)
