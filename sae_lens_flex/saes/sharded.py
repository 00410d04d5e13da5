"""A training SAE that is cut among several processes."""

import copy
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from safetensors import safe_open
from torch import nn
from torch.distributed import ProcessGroup, get_backend, new_group
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from typing_extensions import override

from ..training.requests import Weights
from ..training.shards import Shards, Whole, bounds
from .fused_path import hooked, replaced
from .fused_topk import OWN, FusedTopKTrainingSAE

PLACEMENTS: dict[str, Placement] = {
    "W_enc": Shard(1),
    "b_enc": Shard(0),
    "W_dec": Shard(1),
    "b_dec": Replicate(),
}
# A process that waits longer for the others' numbers of samples gives up.
LIMIT = timedelta(minutes=10)


class Sharded(FusedTopKTrainingSAE):
    """
    What `shard` adds to the class of a training SAE.

    Its parameters are DTensors: `W_enc` and `b_enc` are cut by latents, `W_dec` by the model's
    width, and `b_dec` is whole on every rank. So PyTorch's optimizers, `clip_grad_norm_` and
    `torch.distributed.checkpoint` take them.

    A training step takes the rank's samples, [batch of the rank, d_in], and is the step of all
    ranks' samples together. The ranks' numbers of samples may differ. Every rank has to take part.
    Of its `TrainStepOutput`

    - `loss`, `losses` and `metrics` are of the whole batch, the same on every rank; a backward pass
      gives every rank the gradients of its part of the weights;
    - `feature_acts` and `hidden_pre` are of the whole batch, so every rank counts the same firing;
    - `sae_in` and `sae_out` are of the rank's samples; `sae_out` is there on logging steps only,
      and empty, [0, d_in], on others, because it takes another exchange.

    What needs the whole SAE, as `encode`, `decode` and saving do, raises; `unshard` returns one.
    """

    _shards: Shards
    _mesh: DeviceMesh

    @override
    def initialize_weights(self) -> None:
        """Leave the weights to `shard`, which has them."""

    @override
    def _weights(self) -> Weights:
        # Autograd has no DTensor in it from here on.
        return Weights(*(getattr(self, name).to_local() for name in PLACEMENTS))

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if not self._takes_fused_path(step_input):
            raise NotImplementedError(
                "a sharded SAE has no unfused path, which this training step needs: "
                + ", ".join(self._unfused_reasons or ("use_fused_path is False",))
            )
        if step_input.sae_in.requires_grad:
            raise NotImplementedError(
                "sae_in requires a gradient, which a sharded SAE does not compute"
            )
        return self._fused_training_forward_pass(step_input)

    @override
    def _shards_of_step(self, step_input: TrainStepInput, k: int) -> Whole:
        return self._shards.of_step(len(step_input.sae_in), step_input.is_logging_step, k)

    @override
    def _sae_out(
        self, step_input: TrainStepInput, residual: torch.Tensor, shards: Whole
    ) -> torch.Tensor:
        if not step_input.is_logging_step:
            return step_input.sae_in.new_empty((0, self.cfg.d_in), dtype=self.dtype)
        return super()._sae_out(step_input, shards.own_samples(residual), shards)

    @override
    @torch.no_grad()
    def load_weights_from_checkpoint(self, checkpoint_path: Path | str) -> None:
        """Read this rank's part of the weights from a checkpoint of the whole SAE."""
        with safe_open(Path(checkpoint_path) / SAE_WEIGHTS_FILENAME, "pt") as file:
            for name, weight in self.named_parameters():
                stored = file.get_slice(name)
                if list(stored.get_shape()) != list(weight.shape):
                    raise ValueError(
                        f"{name} has shape {stored.get_shape()} in {str(checkpoint_path)!r}, "
                        f"expected {list(weight.shape)}"
                    )
                part = self._shards.part(name)
                of_rank = stored[:, part] if len(weight.shape) == 2 else stored[part]
                _local(weight).copy_(of_rank)

    @override
    @torch.no_grad()
    def log_histograms(self) -> dict[str, Any]:
        """Return the norms of the decoder's rows, as SAELens does. Every rank has to call it."""
        norms = _local(self.W_dec).float().norm(dim=1)
        return {"weights/W_dec_norms": self._shards.whole_norms(norms).cpu().numpy()}

    @override
    @classmethod
    def _own(cls) -> dict[str, Any]:
        return {**OWN, **{name: getattr(Sharded, name) for name in ("decode", ENCODE)}}

    @override
    def _warn_of_unfused(self, reasons: Any) -> None:
        self._unfused_reasons = tuple(reasons)

    @override
    def encode_with_hidden_pre(self, x: torch.Tensor) -> NoReturn:
        _refuse("encode")

    @override
    def decode(self, feature_acts: torch.Tensor) -> NoReturn:
        _refuse("decode")

    @override
    def save_model(self, path: Any) -> NoReturn:
        _refuse("save_model")

    @override
    def save_inference_model(self, path: Any) -> NoReturn:
        _refuse("save_inference_model")

    def __deepcopy__(self, memo: Any) -> NoReturn:
        _refuse("a deep copy")


ENCODE = "encode_with_hidden_pre"


def _refuse(what: str) -> NoReturn:
    raise NotImplementedError(
        f"{what} needs the whole SAE, and this one is sharded: use sae_lens_flex.unshard(sae)"
    )


def shard(sae: FusedTopKTrainingSAE, mesh: DeviceMesh) -> Sharded:
    """
    Return a training SAE cut among the processes of a mesh.

        mesh = torch.distributed.init_device_mesh("cuda", (world_size,))
        sae = sae_lens_flex.shard(sae, mesh)

    Every rank calls it with the same SAE, of which it keeps its part. Of w ranks each holds 1 / w
    of the weights, and then of their gradients and of the optimizer's state.

    Args:
        sae: a `flex_topk` or `hierarchical_topk` training SAE. Its weights may be on the CPU,
            where the mesh is of GPUs.
        mesh: of one dimension. Its ranks need not divide `d_sae` and `d_in`.

    Raises:
        TypeError, ValueError: for another SAE or mesh, or more ranks than `d_in` or `d_sae` can be
            cut into.
        NotImplementedError: for an SAE with overridden methods or with hooks.
    """
    if not isinstance(sae, FusedTopKTrainingSAE) or isinstance(sae, Sharded):
        raise TypeError(
            f"sae is a {type(sae).__name__}, expected a flex_topk or hierarchical_topk training "
            "SAE that is not sharded yet"
        )
    if reasons := [*replaced(sae, OWN), *hooked(sae)]:
        raise NotImplementedError(
            "a sharded SAE computes SAELens's own training step, and of this SAE you have replaced "
            f"or hooked {', '.join(reasons)}"
        )
    if mesh.ndim != 1:
        raise ValueError(f"mesh has {mesh.ndim} dimensions, expected 1")
    size, rank = mesh.size(), mesh.get_local_rank()
    latents, width = bounds(sae.cfg.d_sae, size), bounds(sae.cfg.d_in, size)
    for name, starts in (("d_sae", latents), ("d_in", width)):
        if starts[-1] == starts[-2]:
            raise ValueError(
                f"{name} is {starts[-1]}, of which {size} ranks take {starts[1]} each: nothing is "
                "left for the last"
            )
    group = mesh.get_group()
    made = _sharded_class(type(sae))(sae.cfg)
    vars(made).update(_own_attributes(sae))
    made._mesh = mesh
    made._shards = Shards(group, _cpu_group(group), rank, size, latents, width)
    # In the order of the whole SAE, by which optimizers number their state.
    for name, parameter in sae.named_parameters():
        placement, weight = PLACEMENTS[name], parameter.detach()
        part = made._shards.part(name)
        local = weight[:, part] if weight.ndim == 2 else weight[part]
        # W_enc stays latent by latent in memory. A copy, or the whole weight would stay, too.
        local = local.T.contiguous().T.clone() if name == "W_enc" else local.contiguous().clone()
        strides = (1, weight.shape[0]) if name == "W_enc" else weight.contiguous().stride()
        sharded = DTensor.from_local(
            local, mesh, [placement], run_check=False, shape=weight.shape, stride=strides
        )
        made.register_parameter(name, nn.Parameter(sharded, parameter.requires_grad))
    return made


@torch.no_grad()
def unshard(sae: Sharded, device: torch.device | str = "cpu", *, keep: bool = True) -> Any:
    """
    Return an ordinary training SAE with the weights of a sharded one.

    Every rank has to call it.

    Args:
        sae: what `shard` returned.
        device: where the weights go, one after the other.
        keep: whether this rank wants the SAE. With False it returns None, and holds one whole
            weight at a time.
    """
    if not isinstance(sae, Sharded):
        raise TypeError(
            f"sae is a {type(sae).__name__}, expected what sae_lens_flex.shard returned"
        )
    weights = {}
    for name, weight in sae.named_parameters():
        assert isinstance(weight, DTensor)
        whole = weight.full_tensor()
        if keep:
            # What is whole on every rank comes without a copy.
            whole = whole.clone() if PLACEMENTS[name].is_replicate() else whole
            weights[name] = nn.Parameter(whole.to(device), weight.requires_grad)
    if not keep:
        return None
    cfg = copy.deepcopy(sae.cfg)
    cfg.device = "meta"  # It draws no weights.
    made = type(sae).__mro__[2](cfg)
    for name, weight in weights.items():
        made.register_parameter(name, weight)
    made._store_latent_major()
    vars(made).update(_own_attributes(sae))
    return made.to(device).train(sae.training)


def _local(weight: Any) -> torch.Tensor:
    return weight.to_local()


_classes: dict[type, type] = {}


def _sharded_class(cls: type) -> Any:
    if cls not in _classes:
        _classes[cls] = type(f"Sharded{cls.__name__}", (Sharded, cls), {})
    return _classes[cls]


def _own_attributes(sae: FusedTopKTrainingSAE) -> dict[str, Any]:
    names = ("use_fused_path", "use_cuda_graph")
    return {name: vars(sae)[name] for name in names if name in vars(sae)}


def _cpu_group(group: ProcessGroup) -> ProcessGroup:
    if get_backend(group) == "gloo":
        return group
    ranks = torch.distributed.get_process_group_ranks(group)
    made = new_group(ranks, backend="gloo", timeout=LIMIT)
    assert isinstance(made, ProcessGroup)
    return made
