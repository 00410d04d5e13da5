from collections.abc import Callable
from typing import Any

import pytest
import torch
from integration import conftest as toy
from sae_lens import SAE, ActivationsStore, HookedSAETransformer

from sae_lens_flex import BudgetSweep

from .comparison import BATCH_SIZE_PROMPTS, row_at

hf_model_dir, language_model, token_dataset = (
    toy.hf_model_dir,
    toy.language_model,
    toy.token_dataset,
)


@pytest.fixture(autouse=True)
def _same_random_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_store(
    language_model: HookedSAETransformer, token_dataset: Any
) -> Callable[..., ActivationsStore]:
    def make(sae: SAE[Any]) -> ActivationsStore:
        return ActivationsStore.from_sae(
            language_model, sae, token_dataset, store_batch_size_prompts=BATCH_SIZE_PROMPTS
        )

    return make


@pytest.fixture
def sweep() -> BudgetSweep:
    """An SAE at four budgets, two TopK SAEs, and an SAE without a fixed number of latents."""
    return BudgetSweep(
        [
            *(row_at(k, ev, "hierarchical") for k, ev in ((1, 0.3), (2, 0.5), (4, 0.8), (8, 0.9))),
            row_at(2, 0.6, "k=2"),
            row_at(8, 0.92, "k=8"),
            row_at(None, 0.95, "jumprelu"),
        ],
        n_tokens=1000,
    )
