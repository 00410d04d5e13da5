"""Small training SAEs with equal weights, and how their steps and gradients are compared."""

from typing import Any

import pytest
import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

from sae_lens_flex import (
    FlexBatchTopKTrainingSAE,
    FlexBatchTopKTrainingSAEConfig,
    FlexMatryoshkaBatchTopKTrainingSAE,
    FlexMatryoshkaBatchTopKTrainingSAEConfig,
    FlexTopKTrainingSAE,
    FlexTopKTrainingSAEConfig,
    HierarchicalTopKTrainingSAE,
    HierarchicalTopKTrainingSAEConfig,
)

D_IN, D_SAE, K, BATCH = 16, 48, 8, 24

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))

# d_in // 2 = 8 dead latents is where SAELens's auxiliary loss stops growing with their number.
FEW_DEAD, MANY_DEAD = 5, 20

TRAINING_CLASSES: dict[str, tuple[type[Any], type[Any]]] = {
    "matryoshka_batchtopk": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    "flex_batchtopk": (FlexBatchTopKTrainingSAE, FlexBatchTopKTrainingSAEConfig),
    "flex_matryoshka_batchtopk": (
        FlexMatryoshkaBatchTopKTrainingSAE,
        FlexMatryoshkaBatchTopKTrainingSAEConfig,
    ),
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "flex_topk": (FlexTopKTrainingSAE, FlexTopKTrainingSAEConfig),
    "hierarchical_topk": (HierarchicalTopKTrainingSAE, HierarchicalTopKTrainingSAEConfig),
}
FUSED_ARCHITECTURES = ("flex_topk", "hierarchical_topk")
EVERY_ARCHITECTURE = (*FUSED_ARCHITECTURES, "flex_batchtopk", "flex_matryoshka_batchtopk")
STOCK = {  # SAELens's counterpart of each architecture
    "flex_topk": "topk",
    "hierarchical_topk": "topk",
    "flex_batchtopk": "batchtopk",
    "flex_matryoshka_batchtopk": "matryoshka_batchtopk",
}
FIELDS_UNKNOWN_TO_STOCK = ("backend", "budgets", "level_weights", "use_sparse_activations")


def training_config(architecture: str, **fields: Any) -> Any:
    """A small config of one of our architectures, or of a counterpart of SAELens's."""
    if architecture in STOCK.values():
        fields = {n: value for n, value in fields.items() if n not in FIELDS_UNKNOWN_TO_STOCK}
    if "matryoshka" in architecture:
        d_sae = fields.get("d_sae", D_SAE)
        fields = {"matryoshka_widths": [d_sae // 16, d_sae // 3, d_sae], **fields}
    return TRAINING_CLASSES[architecture][1](**{"d_in": D_IN, "d_sae": D_SAE, "k": K, **fields})


def new_sae(architecture: str, **fields: Any) -> Any:
    """A training SAE as SAELens initializes it."""
    return TRAINING_CLASSES[architecture][0](training_config(architecture, **fields))


def trained_sae(architecture: str, **fields: Any) -> Any:
    """A training SAE where no bias is zero, no norm 1, and encoder and decoder differ.

    The weights are the same for every architecture.
    """
    sae = new_sae(architecture, **fields)
    generator = torch.Generator().manual_seed(0)

    def noise(parameter: torch.Tensor) -> torch.Tensor:
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        return values.to(parameter)

    with torch.no_grad():
        sae.W_dec.copy_(noise(sae.W_dec) / sae.cfg.d_in**0.5)
        sae.W_dec.mul_(0.5 + noise(sae.b_enc).sigmoid().unsqueeze(-1))
        sae.W_enc.copy_(sae.W_dec.T + 0.1 * noise(sae.W_enc))
        sae.b_enc.copy_(0.1 * noise(sae.b_enc))
        sae.b_dec.copy_(0.3 * noise(sae.b_dec))
    return sae


def copy_weights(source: torch.nn.Module, destination: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in destination.named_parameters():
            parameter.copy_(source.get_parameter(name))


def random_activations(
    *shape: int, seed: int = 1, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Activations of the given shape, or of [BATCH, D_IN]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(*(shape or (BATCH, D_IN)), generator=generator, dtype=torch.float64)
    return (1.5 * noise + 0.2).to(dtype)


def dead_mask(n_dead: int, d_sae: int = D_SAE) -> torch.Tensor:
    """`n_dead` latents, spread over the dictionary."""
    mask = torch.zeros(d_sae, dtype=torch.bool)
    mask[torch.randperm(d_sae, generator=torch.Generator().manual_seed(2))[:n_dead]] = True
    return mask


def step_input(sae_in: torch.Tensor, dead: torch.Tensor | None = None) -> TrainStepInput:
    return TrainStepInput(
        sae_in=sae_in,
        coefficients={},
        dead_neuron_mask=dead,
        n_training_steps=0,
        is_logging_step=False,
    )


def run_step(
    sae: TrainingSAE[Any], sae_in: torch.Tensor, dead: torch.Tensor | None = None
) -> TrainStepOutput:
    """Run a training pass and its backward pass, from gradients of zero."""
    sae.zero_grad()
    output = sae.training_forward_pass(step_input(sae_in, dead))
    output.loss.backward()
    return output


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """The Frobenius norm of the difference, relative to that of `expected`."""
    assert value.shape == expected.shape
    value, expected = value.detach().cpu().double(), expected.detach().cpu().double()
    difference = float((value - expected).norm())
    return difference / max(float(expected.norm()), 1e-30)


def assert_close(
    value: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5, name: str = "tensor"
) -> None:
    error = relative_error(value, expected)
    assert error <= tolerance, f"{name}: relative error {error:.1e}, expected {tolerance:.0e}"


def assert_same_losses(
    output: TrainStepOutput, expected: TrainStepOutput, tolerance: float = 1e-5
) -> None:
    assert list(output.losses) == list(expected.losses)
    for name, loss in expected.losses.items():
        assert_close(output.losses[name], loss, tolerance, name)
    assert_close(output.loss, expected.loss, tolerance, "loss")


def assert_same_gradients(
    sae: torch.nn.Module, expected: torch.nn.Module, tolerance: float = 1e-5
) -> None:
    for name, parameter in expected.named_parameters():
        gradient = sae.get_parameter(name).grad
        assert gradient is not None
        assert parameter.grad is not None
        assert_close(gradient, parameter.grad, tolerance, f"gradient of {name}")
