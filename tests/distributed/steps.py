"""Steps of one process and of several, from equal weights on the same global batches."""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

import sae_lens_flex
from sae_lens_flex.saes.registration import TRAINING_CLASSES

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True)
class Case:
    """Settings of an SAE, and its batches. The samples of a batch are dealt out unevenly."""

    architecture: str = "hierarchical_topk"
    d_in: int = 15
    d_sae: int = 37
    k: int = 5
    n_samples: int = 11
    dtype: str = "float64"
    n_dead: int = 0
    first_dead: int = 0
    autocast: bool = False
    weights: str = "random"
    steps: int = 3
    device: str = "cpu"
    settings: dict[str, Any] = field(default_factory=dict)

    def sae(self) -> Any:
        sae_class, config_class = TRAINING_CLASSES[self.architecture]
        settings = {"aux_loss_coefficient": 0.5, "decoder_init_norm": None, **self.settings}
        cfg = config_class(
            d_in=self.d_in,
            d_sae=self.d_sae,
            k=self.k,
            dtype=self.dtype,
            device=self.device,
            **settings,
        )
        sae = sae_class(cfg)
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        w_dec = randn(self.d_sae, self.d_in) * (0.5 + randn(self.d_sae, 1).abs())
        w_enc = w_dec.T + 0.3 * randn(self.d_in, self.d_sae)
        b_enc, b_dec = 0.3 * randn(self.d_sae), 0.3 * randn(self.d_in)
        if self.weights == "ties":  # of small integers, whose sums are exact in every order
            w_dec, w_enc = w_dec.round().clamp(-1, 1), w_enc.round().clamp(-1, 1)
            b_enc, b_dec = b_enc.zero_(), b_dec.zero_()
        elif self.weights == "first":  # all winners are latents of rank 0
            b_enc[self.k :] -= 100
        elif self.weights == "last":
            b_enc[: -self.k] -= 100
        elif self.weights == "few positive":
            b_enc[2:] -= 100
        with torch.no_grad():
            for name, value in zip(NAMES, (w_enc, b_enc, w_dec, b_dec), strict=True):
                getattr(sae, name).copy_(value)
        return sae

    def batches(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        shape = (self.steps, self.n_samples, self.d_in)
        batches = torch.randn(*shape, generator=generator, dtype=torch.float64)
        if self.weights == "ties":
            batches = batches.round()
        batches = batches.to(self.device, getattr(torch, self.dtype))
        return [self._without_near_ties(x) for x in batches]

    def _without_near_ties(self, batch: torch.Tensor) -> torch.Tensor:
        """Leave out samples of which rounding in float32 decides which latent is kept."""
        if self.dtype != "float32":
            return batch
        exact = replace(self, dtype="float64").sae()
        _, hidden = exact.encode_with_hidden_pre(batch.double())
        largest = hidden.detach().topk(self.k + 1).values
        return batch[largest[:, -2] - largest[:, -1] > 1e-6 * largest[:, -2].abs()]

    def mask(self) -> torch.Tensor:
        mask = torch.zeros(self.d_sae, dtype=torch.bool, device=self.device)
        mask[self.first_dead : self.first_dead + self.n_dead] = True
        return mask


def parts(n: int, size: int, step: int) -> list[int]:
    """Deal out n samples, at least one each, differently from step to step."""
    sizes = [1] * size
    sizes[step % size] += n - size - (n - size) // 3
    sizes[(step + 1) % size] += (n - size) // 3
    return sizes


def forward(case: Case, sae: Any, x: torch.Tensor, is_logging_step: bool = True) -> TrainStepOutput:
    """Call a step and its backward pass."""
    step_input = TrainStepInput(
        sae_in=x,
        coefficients={},
        dead_neuron_mask=case.mask() if case.n_dead else None,
        n_training_steps=0,
        is_logging_step=is_logging_step,
    )
    autocast = torch.autocast(case.device, torch.bfloat16) if case.autocast else nullcontext()
    with autocast:
        output = sae.training_forward_pass(step_input)
    for weight in sae.parameters():
        weight.grad = None
    output.loss.backward()
    return output


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def record(sae: Any, output: TrainStepOutput) -> dict[str, Any]:
    """Return what is compared of a step, on the CPU."""
    acts = output.feature_acts
    acts = acts.to_dense() if acts.is_sparse else acts
    record = {
        "losses": {
            "loss": output.loss.detach(),
            **{n: v.detach() for n, v in output.losses.items()},
        },
        "gradients": {name: whole(getattr(sae, name).grad) for name in NAMES},
        "own b_dec": own(sae.b_dec.grad),
        "hidden_pre": output.hidden_pre,
        "feature_acts": acts,
        "sae_out": output.sae_out,
        "metrics": output.metrics,
    }
    return tree_map_only(torch.Tensor, torch.Tensor.cpu, record)


def stepwise(case: Case, size: int = 1) -> list[dict[str, Any]]:
    """Return the records of steps that all start from the same weights.

    Args:
        case: the SAE and its batches.
        size: number of ranks.
    """
    sae = case.sae()
    rank = 0
    if size > 1:
        sae, rank = sae_lens_flex.shard(sae), dist.get_rank()
    records = []
    for step, batch in enumerate(case.batches()):
        part = batch.split(parts(len(batch), size, step))[rank] if size > 1 else batch
        records.append(record(sae, forward(case, sae, part)))
    return records


def on_rank(case: Case) -> list[dict[str, Any]]:
    return stepwise(case, dist.get_world_size())


N_STEPS_TO_DEATH = 4


def free(case: Case, size: int = 1) -> dict[str, Any]:
    """Train with clipping and Adam. Latents that have not fired for some steps are dead."""
    sae: Any = case.sae()
    rank = 0
    if size > 1:
        sae, rank = sae_lens_flex.shard(sae), dist.get_rank()
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
    since_fired = torch.zeros(case.d_sae, device=case.device)
    losses, n_dead, norms = [], [], []
    for step, batch in enumerate(case.batches()):
        part = batch.split(parts(len(batch), size, step))[rank] if size > 1 else batch
        mask = since_fired > N_STEPS_TO_DEATH
        step_input = TrainStepInput(
            sae_in=part,
            coefficients={},
            dead_neuron_mask=mask,
            n_training_steps=step,
            is_logging_step=False,
        )
        output = sae.training_forward_pass(step_input)
        optimizer.zero_grad()
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        fired = output.feature_acts.bool().float().sum(0)
        since_fired = torch.where(fired > 0, 0, since_fired + 1)
        losses.append(
            torch.stack([output.loss.detach(), *map(torch.detach, output.losses.values())])
        )
        n_dead.append(int(mask.sum()))
        norms.append(whole(norm))
    end = {
        "losses": torch.stack(losses),
        "norms": torch.stack(norms),
        "n_dead": n_dead,
        "since_fired": since_fired,
        "weights": {name: whole(getattr(sae, name).detach()) for name in NAMES},
    }
    return tree_map_only(torch.Tensor, torch.Tensor.cpu, end)


def free_on_rank(case: Case) -> dict[str, Any]:
    return free(case, dist.get_world_size())
