"""An SAE whose weights lie in parts in several processes, and the way there and back."""

import copy
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import sae_lens
import torch
import torch.distributed as dist
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from typing_extensions import override

from ..ops.policy import computes_by_triton, is_deterministic, product_dtype
from ..training.dead import Dead, dead_counts_later
from ..training.requests import Weights
from ..training.shards import Shards, Split, Whole, gather_rows, local_part
from .checks import check_real, warn_of_other_settings
from .fused_path import OF_SAMPLES, hooked, replaced
from .fused_topk import OWN, FusedTopKTrainingSAE

PLACEMENTS = {"W_enc": Shard(1), "b_enc": Shard(0), "W_dec": Shard(1), "b_dec": Replicate()}
# Weights go from rank to rank in pieces of about this many bytes.
PIECE_BYTES = 2**26
# What `unshard` leaves out: what belongs to the parts, and a compiled step, which is bound to them.
NOT_COPIED = ("_shards", "_mesh", "_ranks", "training_forward_pass")

T = TypeVar("T", bound=FusedTopKTrainingSAE)


def shard(sae: T, mesh: DeviceMesh | None = None) -> T:
    """Make a training SAE one of several processes, in place, and return it.

    Every rank calls this with an SAE of the same config. Each then holds its part of rank 0's
    weights on the mesh's device: the parameters become `DTensor`s, W_enc and b_enc in parts of the
    latents, W_dec in parts of the width, b_dec whole. PyTorch's `clip_grad_norm_`, `Adam` and
    `torch.distributed.checkpoint` take them as they are.

    `training_forward_pass` then takes a rank's own samples, [B_r, d_in]; how many may differ
    between ranks and from step to step. All else in its input is the same on every rank. Of its
    output

    - `loss` and `losses` are those of the global batch, the samples of rank 0, 1, ... in turn;
      `backward` gives each rank the gradients of its parts;
    - `feature_acts`, [B, d_sae], and `hidden_pre`, [B, k], are of the global batch, on every rank;
    - `sae_in` and `sae_out` are of the rank's own samples. On a step that is no logging step
      `sae_out` is NaN, because computing it would take one more exchange;
    - `metrics` are those of the global batch.

    What needs the whole SAE (`encode`, `decode`, `save_model` and others) raises; `unshard` gives
    it. Steps are recorded as CUDA graphs within `accelerate()` alone.

    On the device "meta" an SAE has no memory for weights. If rank 0's is there, each rank draws its
    part as `initialize_weights` does, by rank 0's generator. So the whole need not fit anywhere.

    Args:
        sae (FusedTopKTrainingSAE): A flex_topk or hierarchical_topk training SAE, on any device.
            The weights of other ranks than 0 are not read.
        mesh (DeviceMesh | None): One dimension. None takes all processes of the default group.

    Raises:
        TypeError: for another SAE, or one that has been sharded, or for what is no mesh.
        ValueError: for a mesh of more dimensions, or where a rank would hold no latent or no part
            of the width, or where the ranks' configs or versions differ.
        NotImplementedError: for an SAE with methods, functions or hooks that are not SAELens's own;
            on "meta" also for an `initialize_weights` of its own; and for an architecture that
            selects over the batch, as flex_batchtopk.
    """
    if not isinstance(sae, FusedTopKTrainingSAE):
        raise TypeError(
            f"sae is a {type(sae).__name__}, expected a flex_topk or hierarchical_topk training SAE"
        )
    if sae._over_batch:
        raise NotImplementedError(
            f"sae is a {type(sae).__name__}, which trains in one process only: expected a "
            "flex_topk or hierarchical_topk training SAE"
        )
    if isinstance(sae, ShardedTrainingSAE):
        raise TypeError("sae has been sharded already")
    if mesh is None:
        is_nccl = "nccl" in dist.get_backend()
        mesh = init_device_mesh("cuda" if is_nccl else "cpu", (dist.get_world_size(),))
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh is a {type(mesh).__name__}, expected a DeviceMesh or None")
    if mesh.ndim != 1:
        raise ValueError(f"mesh has {mesh.ndim} dimensions, expected 1")
    group, size, rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()
    control: Any = group
    if dist.get_backend(group) != "gloo":
        ranks = dist.get_process_group_ranks(group)
        control = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    problem = None
    if names := _reasons(sae, OWN):
        problem = NotImplementedError(
            f"an SAE of several processes calls SAELens's own methods alone, but {', '.join(names)}"
        )
    of_rank_0 = torch.tensor(sae.W_dec.is_meta)
    dist.broadcast(of_rank_0, dist.get_global_rank(control, 0), group=control)
    is_drawn = bool(of_rank_0)
    if problem is None and is_drawn and not _draws_by_latent(sae):
        problem = NotImplementedError(
            "initialize_weights is not SAELens's own, so an SAE on the device 'meta' cannot be "
            "drawn in parts: make the whole, on any other device"
        )
    for name, length in (("d_sae", sae.cfg.d_sae), ("d_in", sae.cfg.d_in)):
        if problem is None and 0 in Split.even(length, size).sizes:
            problem = ValueError(
                f"{name} is {length}, which leaves one of {size} ranks without a part: take fewer "
                "ranks"
            )
    cfg = {k: v for k, v in sae.cfg.to_dict().items() if k not in ("device", "metadata")}
    from .. import __version__

    versions = {
        "the version of torch": torch.__version__,
        "the version of sae_lens": sae_lens.__version__,
        "the version of sae_lens_flex": __version__,
    }
    _Ranks(control, rank, size).agree({"class": type(sae).__name__, **cfg, **versions}, 0, problem)

    device = torch.device(mesh.device_type)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    shards = Shards(
        group, rank, latents=Split.even(sae.cfg.d_sae, size), width=Split.even(sae.cfg.d_in, size)
    )
    locals_ = {
        name: torch.empty(
            _own_rows(name, _by_rows(name, weight.to("meta")), shards).shape,
            dtype=weight.dtype,
            device=device,
        )
        for name, weight in sae.named_parameters()
    }
    draws = _drawn(sae, device, control) if is_drawn else _sent(sae, device, group, rank)
    for name, piece, rows in draws:
        _copy_own(name, locals_[name], piece, rows, shards)
    for name, weight in list(sae.named_parameters()):
        parameter = nn.Parameter(_distributed(name, locals_.pop(name), weight.shape, mesh))
        parameter.requires_grad_(weight.requires_grad)
        setattr(sae, name, parameter)
    sae.__class__ = _sharded_class(type(sae))
    sae._recorder = None
    sae.device, sae.cfg.device = device, str(device)
    vars(sae).update(_shards=shards, _mesh=mesh, _ranks=_Ranks(control, rank, size))
    return sae


@torch.no_grad()
def unshard(
    sae: FusedTopKTrainingSAE, *, keep: bool = True, device: torch.device | str | None = None
) -> Any:
    """Return an ordinary SAE with the weights of all ranks. Every rank calls this.

    Args:
        sae (FusedTopKTrainingSAE): A sharded SAE, which stays as it is.
        keep (bool): Whether this rank gets the SAE. False returns None, without its memory.
        device (torch.device | str | None): Where its weights go. None takes the device of `sae`.

    Raises:
        TypeError: for an SAE that is not sharded.
    """
    if not isinstance(sae, ShardedTrainingSAE):
        raise TypeError(f"sae is a {type(sae).__name__}, expected one that `shard` made")
    device = torch.device(device or sae.device)
    whole = {
        name: whole_tensor(cast(DTensor, weight), keep=keep, device=device)
        for name, weight in sae.named_parameters()
    }
    if not keep:
        return None
    # A copy, as `deepcopy` makes it, that has the whole weights where the original has its parts.
    base: Any = type(sae)._base
    result = base.__new__(base)
    memo: dict[int, Any] = {id(sae): result}
    for name, weight in sae.named_parameters():
        memo[id(weight)] = nn.Parameter(
            cast(torch.Tensor, whole[name]), requires_grad=weight.requires_grad
        )
    state = {k: v for k, v in vars(sae).items() if k not in NOT_COPIED}
    result.__setstate__(copy.deepcopy(state, memo))
    result.device, result.cfg.device = device, str(device)
    return result


def whole_tensor(tensor: DTensor, *, keep: bool, device: torch.device) -> torch.Tensor | None:
    """Return a tensor of which each rank has a part. Every rank calls this.

    The parts go from rank to rank in pieces. So a GPU never holds the whole, unless it is `device`.

    Args:
        tensor: cut along one dimension, or whole on every rank.
        keep: whether this rank gets it. False returns None.
        device: where it goes.
    """
    local, mesh, (placement,) = local_part(tensor).detach(), tensor.device_mesh, tensor.placements
    group, rank = mesh.get_group(), mesh.get_local_rank()
    like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=local.dtype, device="meta")
    out = torch.empty_like(like, device=device) if keep else None
    is_cut = isinstance(placement, Shard)
    dim = placement.dim if is_cut else 0
    is_by_column = like.ndim == 2 and like.stride(0) < like.stride(1)  # as W_enc is stored

    def by_rows(matrix: torch.Tensor) -> torch.Tensor:
        return matrix.T if is_by_column else matrix

    start = 0
    for source, part in enumerate(like.chunk(mesh.size(), dim) if is_cut else (like,)):
        into = None if out is None else out.narrow(dim, start, part.shape[dim])
        start += part.shape[dim]
        for piece, rows in _pieces(by_rows(part)):
            sent = local.new_empty(rows.shape)
            if source == rank:
                sent.copy_(by_rows(local)[piece])
            dist.broadcast(sent, dist.get_global_rank(group, source), group=group)
            if into is not None:
                by_rows(into)[piece].copy_(sent)
    return out


class ShardedTrainingSAE(FusedTopKTrainingSAE):
    """What `shard` makes of an SAE; `shard` says what it does and what it refuses."""

    _base: type = FusedTopKTrainingSAE
    _shards: Shards  # pyright: ignore[reportIncompatibleVariableOverride]
    _mesh: DeviceMesh
    _ranks: "_Ranks"

    @override
    @torch.compiler.disable()
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Compute a step's losses on the global batch from this rank's samples, [B_r, d_in]."""
        return self._fused_training_forward_pass(step_input, self._shards_of(step_input))

    @override
    def _shards_of(
        self, step_input: TrainStepInput, *, whole_step_for: int | None = None
    ) -> Shards:
        settings: dict[str, Any] = {}
        problem = None
        try:
            settings = self._checked_settings(step_input)
            settings["dead latents of a whole step, see accelerate"] = whole_step_for
        except Exception as error:  # All ranks are to raise, not to wait for this one.
            problem = error
        sizes = self._ranks.agree(settings, len(step_input.sae_in), problem)
        return replace(self._shards, samples=Split(tuple(sizes)))

    @override
    def _takes_fused_path(self, step_input: TrainStepInput) -> bool:
        return True  # What would keep a step from it is refused.

    def _checked_settings(self, step_input: TrainStepInput) -> dict[str, Any]:
        """Return what must be the same on all ranks. Raises for what a step cannot do."""
        x, mask = step_input.sae_in, step_input.dead_neuron_mask
        own = {name: _REFUSED.get(name, method) for name, method in OWN.items()}
        if names := _reasons(self, own):
            raise NotImplementedError(
                "a step of several processes calls SAELens's own methods alone, but "
                + ", ".join(names)
            )
        if x.ndim != 2 or x.shape[0] == 0 or x.shape[1] != self.cfg.d_in:
            raise ValueError(
                f"sae_in has shape {list(x.shape)}, expected [batch, {self.cfg.d_in}] with an "
                "activation at least"
            )
        check_real("sae_in", x)
        if x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                "sae_in requires a gradient, which a step of several processes does not compute"
            )
        if mask is not None and mask.shape != (self.cfg.d_sae,):
            raise ValueError(
                f"dead_neuron_mask has shape {list(mask.shape)}, expected [{self.cfg.d_sae}], one "
                "element a latent"
            )
        self._check_config()
        weights = self._weights()
        return {
            "is_logging_step": step_input.is_logging_step,
            "k": self._step_k(len(x)),
            "budgets": getattr(self.cfg, "budgets", None),
            "level_weights": getattr(self.cfg, "level_weights", None),
            "aux_loss_coefficient": self.cfg.aux_loss_coefficient,
            "dead_neuron_mask": "None" if mask is None else "a tensor",
            "dtype of sae_in": x.dtype,
            "dtype of the weights": weights.W_dec.dtype,
            "autocast's dtype": product_dtype(weights.W_dec),
            "use of Triton": computes_by_triton(self.cfg.backend, weights.W_dec, x),
            "normalize_activations": self.cfg.normalize_activations,
            "apply_b_dec_to_input": self.cfg.apply_b_dec_to_input,
            "rescale_acts_by_decoder_norm": self.cfg.rescale_acts_by_decoder_norm,
            "deterministic algorithms": is_deterministic(),
            "is_grad_enabled": torch.is_grad_enabled(),
            "requires_grad": [weight.requires_grad for weight in weights],
        }

    @override
    def _weights(self) -> Weights:
        # The gradient of a part is a part. That of b_dec is whole on every rank.
        return Weights(*(local_part(getattr(self, name)) for name in PLACEMENTS))

    @override
    def _dead(self, mask: torch.Tensor | None) -> Dead | None:
        dead = super()._dead(mask)
        if dead is None or mask is None:
            return dead
        counts = dead_counts_later(mask, self._shards.latents)

        @cache
        def agreed_split() -> Split:
            *sizes, total = counts()
            settings = {"dead_neuron_mask": (sizes, total)}
            self._ranks.agree(settings, 0, None)
            return Split(tuple(sizes))

        def latents() -> torch.Tensor:
            agreed_split()
            return dead.latents()

        return Dead(latents, dead.coefficient, agreed_split)

    @override
    def _reported_output(
        self, x: torch.Tensor, residual: torch.Tensor, shards: Whole, is_logging_step: bool
    ) -> torch.Tensor:
        if not is_logging_step:
            return x.new_full((), torch.nan, dtype=self.dtype).expand(x.shape)
        return super()._reported_output(x, residual, shards, is_logging_step)

    @override
    def _store_latent_major(self) -> None:
        if not isinstance(self.W_enc, DTensor):
            super()._store_latent_major()

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the parameters as DTensors, for `torch.distributed.checkpoint`."""
        return nn.Module.state_dict(self, *args, **kwargs)

    @override
    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load DTensors of the same mesh."""
        for name, value in state_dict.items():
            if not isinstance(value, DTensor):
                raise TypeError(
                    f"{name} is a {type(value).__name__}, expected a DTensor: a sharded SAE loads "
                    "the state of sharded ones, and load_weights_from_checkpoint SAELens's files"
                )
        return nn.Module.load_state_dict(self, state_dict, strict, assign=False)

    @override
    @torch.no_grad()
    def load_weights_from_checkpoint(self, checkpoint_path: Path | str) -> None:
        """Read this rank's parts from the file of an ordinary SAE."""
        warn_of_other_settings(self.cfg, checkpoint_path)
        with safe_open(Path(checkpoint_path) / SAE_WEIGHTS_FILENAME, "pt") as file:
            for name, weight in self.named_parameters():
                stored = file.get_slice(name)
                if list(stored.get_shape()) != list(weight.shape):
                    raise ValueError(
                        f"{name} has shape {stored.get_shape()} in the checkpoint, expected "
                        f"{list(weight.shape)}"
                    )
                local = local_part(weight)
                if name == "W_enc":
                    local.copy_(stored[:, self._shards.own_latents(self.cfg.d_sae)])
                elif name == "W_dec":
                    local.copy_(stored[:, self._shards.own_width(self.cfg.d_in)])
                elif name == "b_enc":
                    local.copy_(stored[self._shards.own_latents(self.cfg.d_sae)])
                else:
                    local.copy_(stored[:])

    @override
    @torch.no_grad()
    def log_histograms(self) -> dict[str, Any]:
        """Return the norms of the decoder's rows. Every rank calls this."""
        norms = self._shards.norms(local_part(self.W_dec).float())
        return {"weights/W_dec_norms": norms.cpu().numpy()}

    @override
    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a sharded SAE cannot be copied or pickled: `sae_lens_flex.unshard` makes an ordinary "
            "one, and torch.distributed.checkpoint saves its state_dict"
        )


_NEEDS_THE_WHOLE = (
    "forward",
    "encode",
    "encode_with_hidden_pre",
    "decode",
    "encode_levels",
    "encode_adaptive",
    "decode_levels",
    "process_sae_in",
    "calculate_aux_loss",
    "calculate_topk_aux_loss",
    "fold_W_dec_norm",
    "fold_and_get_W_dec_norm",
    "get_W_dec_norm",
    "fold_activation_whitening",
    "save_model",
    "save_inference_model",
    "initialize_weights",
)


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{name} needs the whole SAE, and each process holds a part of it: call "
            "`sae_lens_flex.unshard(sae)` on every rank, and this on what it returns"
        )

    refuse.__name__ = name
    return refuse


_REFUSED = {name: _refusal(name) for name in _NEEDS_THE_WHOLE}
for _name, _function in _REFUSED.items():
    setattr(ShardedTrainingSAE, _name, _function)


@cache
def _sharded_class(base: type) -> Any:
    return type(f"Sharded{base.__name__}", (ShardedTrainingSAE, base), {"_base": base})


def _reasons(sae: Any, own: dict[str, Any]) -> list[str]:
    """Return what a step would have to call, each with what is the matter with it."""
    reasons = [f"{name} has hooks" for name in hooked(sae)]
    if sae.use_fused_path is False:
        reasons.append("use_fused_path is False")
    if sae.use_fused_path is None:
        reasons += [f"{name} is not SAELens's own" for name in replaced(sae, own, OF_SAMPLES)]
    return reasons


class _Ranks:
    """What the processes tell each other on the host before a step."""

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self.group, self.rank, self.size = group, rank, size

    def agree(
        self, settings: dict[str, Any], n_samples: int, problem: Exception | None
    ) -> list[int]:
        """Return every rank's number of samples, by one exchange of a few numbers.

        Args:
            settings: what must be the same on all ranks.
            n_samples: of this rank.
            problem: what keeps this rank from going on.

        Raises:
            Exception: `problem`.
            RuntimeError: where another rank has one.
            ValueError: where a setting differs between ranks; it names them.
        """
        checksum = zlib.crc32(repr(settings).encode())
        mine = torch.tensor([n_samples, problem is not None, checksum])
        rows = gather_rows(mine.view(1, 3), self.size, self.group)
        sizes, problems, checksums = rows.T.tolist()
        if any(problems):
            texts = self._texts(None if problem is None else f"{type(problem).__name__}: {problem}")
            if problem is not None:
                raise problem
            raise RuntimeError(
                "; ".join(f"rank {rank} raised {t}" for rank, t in enumerate(texts) if t)
            )
        if len(set(checksums)) > 1:
            all_settings = self._texts({name: repr(value) for name, value in settings.items()})
            raise ValueError(
                "ranks differ, expected the same on all: " + "; ".join(_differences(all_settings))
            )
        return sizes

    def _texts(self, mine: Any) -> list[Any]:
        texts: list[Any] = [None] * self.size
        dist.all_gather_object(texts, mine, group=self.group)
        return texts


def _differences(settings: list[dict[str, str]]) -> Iterator[str]:
    for name in sorted({name for of_rank in settings for name in of_rank}):
        values = [of_rank.get(name, "missing") for of_rank in settings]
        if len(set(values)) > 1:
            of_ranks = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
            yield f"{name} is {of_ranks}"


# --- weights, as rows: W_enc latent by latent, as it is stored


def _by_rows(name: str, weight: torch.Tensor) -> torch.Tensor:
    return weight.T if name == "W_enc" else weight


def _own_rows(name: str, rows: torch.Tensor, shards: Shards) -> torch.Tensor:
    """Return the view of a rank's part of a weight's rows."""
    if name in ("W_enc", "b_enc"):
        return rows[shards.own_latents(len(rows))]
    return rows[:, shards.own_width(rows.shape[1])] if name == "W_dec" else rows


Rows = tuple[str, slice, torch.Tensor]
"""A weight's name, which of its rows, and these rows of the whole weight."""


def _sent(sae: Any, device: torch.device, group: Any, rank: int) -> Iterator[Rows]:
    """Yield all of rank 0's weights, in pieces, on every rank."""
    for name, weight in sae.named_parameters():
        for piece, rows in _pieces(_by_rows(name, weight.data)):
            if rank == 0:
                received = rows.to(device).contiguous()
            else:
                received = torch.empty(rows.shape, dtype=rows.dtype, device=device)
            dist.broadcast(received, dist.get_global_rank(group, 0), group=group)
            yield name, piece, received


def _draws_by_latent(sae: Any) -> bool:
    """Return whether SAELens draws the weights, each latent's by itself."""
    own = FusedTopKTrainingSAE.initialize_weights
    return "initialize_weights" not in vars(sae) and type(sae).initialize_weights is own


def _drawn(sae: Any, device: torch.device, control: Any) -> Iterator[Rows]:
    """Yield weights that are drawn anew, in pieces, the same on every rank.

    On a CPU they are the numbers that the whole would be drawn with, which come latent by latent.
    """
    own_state = _random_state(device)
    state = own_state.clone()
    dist.broadcast(state, dist.get_global_rank(control, 0), group=control)
    _set_random_state(state, device)
    part, whole = copy.deepcopy(sae), sae.W_dec.to("meta")
    part.device = device
    for piece, rows in _pieces(whole):
        part.cfg.d_sae = len(rows)
        part.initialize_weights()
        for name, weight in part.named_parameters():
            if name != "b_dec":
                yield name, piece, _by_rows(name, weight.data)
    yield "b_dec", slice(0, sae.cfg.d_in), part.b_dec.data
    if dist.get_rank(control) > 0:
        _set_random_state(own_state, device)


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: torch.Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def _copy_own(
    name: str, local: torch.Tensor, piece: slice, rows: torch.Tensor, shards: Shards
) -> None:
    """Copy this rank's part of a piece of a weight's rows."""
    if name == "W_dec":
        local[piece] = rows[:, shards.own_width(rows.shape[1])]
    elif name == "b_dec":
        local[piece] = rows
    else:
        own = shards.own_latents(0)
        start, stop = max(own.start, piece.start), min(own.stop, piece.stop)
        if start < stop:
            part = rows[start - piece.start : stop - piece.start]
            local[start - own.start : stop - own.start] = part


def _pieces(rows: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    row_bytes = max(1, rows.shape[1:].numel() * rows.itemsize)
    n_rows = max(1, PIECE_BYTES // row_bytes)
    for start in range(0, len(rows), n_rows):
        piece = slice(start, min(len(rows), start + n_rows))
        yield piece, rows[piece]


def _distributed(name: str, local: torch.Tensor, shape: torch.Size, mesh: DeviceMesh) -> DTensor:
    whole = _by_rows(name, torch.empty(shape, device="meta"))
    stride = _by_rows(name, torch.empty(whole.shape, device="meta")).stride()
    return DTensor.from_local(
        _by_rows(name, local),
        mesh,
        [PLACEMENTS[name]],
        run_check=False,
        shape=shape,
        stride=stride,
    )
