"""Short trainings beside SAELens's own SAEs: sizes, batches, options, steps."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from comparison import copy_weights, run_step
from sae_lens.saes.sae import TrainStepOutput


@dataclass
class Training:
    """A size, a backend and a length of training."""

    device: str
    backend: str
    n_steps: int
    d_in: int = 16
    d_sae: int = 64
    k: int = 4
    batch: int = 32
    dead_window: int = 3
    most_ties: float = 1 / 20  # share of the steps that may have one among the dead latents

    @property
    def few_dead(self) -> int:
        return self.d_in // 4

    @property
    def many_dead(self) -> int:
        return self.d_in

    def fields(self) -> dict[str, Any]:
        return {"d_in": self.d_in, "d_sae": self.d_sae, "k": self.k, "device": self.device}

    def batches(self) -> list[torch.Tensor]:
        """Sparse combinations of fixed directions, so that there is something to learn."""
        generator = torch.Generator().manual_seed(3)
        directions = torch.randn(self.d_sae, self.d_in, generator=generator)
        coefficients = torch.rand(self.n_steps, self.batch, self.d_sae, generator=generator)
        coefficients = (coefficients - (1 - self.k / self.d_sae)).relu() * self.d_sae / self.k
        return list((coefficients @ directions).to(self.device))


TRAININGS = [
    pytest.param(Training("cpu", "torch", n_steps=200), id="torch-cpu"),
    pytest.param(
        Training("cpu", "triton", n_steps=5, d_sae=32, batch=16, dead_window=1),
        id="triton-cpu",
        marks=pytest.mark.skipif(
            torch.cuda.is_available(), reason="kernels are compiled where there is a CUDA device"
        ),
    ),
    pytest.param(
        Training(
            "cuda", "triton", n_steps=200, d_in=64, d_sae=512, k=16, batch=128, most_ties=3 / 20
        ),
        id="triton-cuda",
        marks=pytest.mark.gpu,
    ),
]

OPTIONS = [
    pytest.param({"rescale_acts_by_decoder_norm": rescale, "apply_b_dec_to_input": apply}, id=name)
    for name, rescale, apply in [
        ("default", True, True),
        ("b_dec_not_applied", True, False),
        ("not_rescaled", False, True),
        ("neither", False, False),
    ]
] + [pytest.param({"decoder_init_norm": None}, id="no_decoder_init_norm")]


def adam(sae: torch.nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(sae.parameters(), lr=1e-3)


def update(sae: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Apply the gradients as SAETrainer does."""
    torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    optimizer.step()


def silence(sae: Any, n_latents: int) -> None:
    """Make the first `n_latents` latents fire on nothing."""
    with torch.no_grad():
        sae.b_enc[:n_latents] = -5.0


def steps_beside(
    training: Training, stock: Any, flex: Any
) -> Iterator[tuple[TrainStepOutput, TrainStepOutput, torch.Tensor]]:
    """Train SAELens's SAE, and take each of its steps with ours too, from equal weights.

    The auxiliary loss meets no dead latent, fewer than the d_in // 2 it takes, and more.

    Yields:
        What SAELens's step returned, what ours did, and which latents were dead, [d_sae].
    """
    optimizer = adam(stock)
    steps_since_fired = torch.zeros(training.d_sae, device=training.device)
    dead_counts = []
    for step, batch in enumerate(training.batches()):
        if step in (0, training.n_steps // 2):
            silence(stock, training.few_dead if step == 0 else training.many_dead)
        copy_weights(stock, flex)
        dead = steps_since_fired > training.dead_window
        dead_counts.append(int(dead.sum()))

        expected = run_step(stock, batch, dead)
        output = run_step(flex, batch, dead)

        yield expected, output, dead
        assert (expected.losses["auxiliary_reconstruction_loss"] > 0) == (dead_counts[-1] > 0)

        update(stock, optimizer)
        steps_since_fired += 1
        steps_since_fired[expected.feature_acts.bool().any(0)] = 0
    assert dead_counts[0] == 0
    assert any(0 < n_dead < training.d_in // 2 for n_dead in dead_counts)
    assert training.n_steps < 5 or any(n_dead > training.d_in // 2 for n_dead in dead_counts)
