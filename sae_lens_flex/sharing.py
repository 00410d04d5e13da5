"""From and to other SAEs: start from a TopK SAE, export one at a fixed budget, upload."""

from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi
from sae_lens import SAE, TrainingSAE, upload_saes_to_huggingface
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig, TopKTrainingSAE

from .budgets import BudgetSweep
from .saes.fused_topk import check_integer
from .saes.hierarchical_topk import (
    HierarchicalTopKSAE,
    HierarchicalTopKTrainingSAE,
    HierarchicalTopKTrainingSAEConfig,
    doubling_budgets,
)


def export_topk(
    sae: HierarchicalTopKSAE | HierarchicalTopKTrainingSAE, path: str | Path, *, budget: int
) -> Path:
    """Save an SAE at a fixed budget as an ordinary SAELens "topk" SAE.

    What is saved loads with SAELens alone, `SAE.load_from_disk(path)`, and encodes and reconstructs
    as `sae` does at that budget.

    Args:
        sae: the SAE, which is left as it is.
        path: the directory to write.
        budget: latents to keep, 1..k.

    Returns:
        The directory.
    """
    _check_hierarchical(sae)
    budget = check_integer("budget", budget, sae.cfg.k, "k")
    values = {
        field.name: getattr(sae.cfg, field.name)
        for field in fields(TopKSAEConfig)
        if field.name != "metadata"
    }
    cfg = TopKSAEConfig(**{**values, "k": budget, "device": "cpu"})
    cfg.metadata = type(sae.cfg.metadata)(**sae.cfg.metadata.to_dict())
    exported = TopKSAE(cfg)
    exported.load_state_dict(sae.state_dict())
    exported.save_model(path)
    return Path(path)


def from_topk(
    sae: TopKSAE | TopKTrainingSAE, **training_fields: Any
) -> HierarchicalTopKTrainingSAE:
    """Start training for every budget from a TopK SAE, which the result reproduces exactly at k.

        sae = sae_lens_flex.from_topk(SAE.from_pretrained(release, sae_id))
        LanguageModelSAETrainingRunner(cfg, override_sae=sae).run()

    Args:
        sae: SAELens's TopK SAE, for inference or in training; its weights are copied.
        training_fields: fields of HierarchicalTopKTrainingSAEConfig that the SAE does not settle,
            such as `budgets`, `backend` or `aux_loss_coefficient`. If that coefficient is not
            given, it is that of an SAE in training; with the normalizations that do not go with an
            auxiliary loss it is 0.
    """
    if not isinstance(sae, (TopKSAE, TopKTrainingSAE)):
        raise TypeError(f"sae is a {type(sae).__name__}, expected a TopKSAE or a TopKTrainingSAE")
    settled = {field.name for field in fields(TopKSAEConfig)} - {"metadata"}
    for name in training_fields:
        if name in settled:
            raise ValueError(f"{name} is given, expected the SAE's own: {getattr(sae.cfg, name)!r}")
    if sae.cfg.normalize_activations in ("layer_norm", "constant_norm_rescale"):
        training_fields.setdefault("aux_loss_coefficient", 0.0)
    elif isinstance(sae, TopKTrainingSAE):
        training_fields.setdefault("aux_loss_coefficient", sae.cfg.aux_loss_coefficient)
    cfg = HierarchicalTopKTrainingSAEConfig(
        **{name: getattr(sae.cfg, name) for name in settled}, **training_fields
    )
    metadata = sae.cfg.metadata.to_dict()
    cfg.metadata = type(sae.cfg.metadata)(**metadata)
    started = HierarchicalTopKTrainingSAE(cfg)
    with torch.no_grad():
        started.load_state_dict(sae.state_dict())
    return started


def upload(
    sae: HierarchicalTopKSAE | HierarchicalTopKTrainingSAE,
    repo_id: str,
    sae_id: str,
    *,
    sweep: BudgetSweep | None = None,
    revision: str = "main",
) -> None:
    """Upload an SAE to the Hugging Face hub, where `SAE.from_pretrained(repo_id, sae_id)` finds it.

    Uses SAELens's uploader, which makes the repository if there is none. A training SAE goes up in
    its inference form. The model card becomes `{sae_id}/README.md`, and the repository's README.md
    if that does not exist yet.

    Args:
        sae: the SAE.
        repo_id: the repository, "user/name".
        sae_id: the SAE's folder in it.
        sweep: what `sweep_budgets` measured, for the model card's table.
        revision: the branch.
    """
    _check_hierarchical(sae)
    card = model_card(sae, repo_id, sae_id, sweep).encode()
    with TemporaryDirectory() as directory:
        if isinstance(sae, TrainingSAE):
            sae.save_inference_model(directory)
        else:
            sae.save_model(directory)
        upload_saes_to_huggingface(
            {sae_id: directory}, repo_id, revision, show_progress=False, add_default_readme=False
        )
    api = HfApi()
    paths = [f"{sae_id}/README.md"]
    if not api.file_exists(repo_id, "README.md", revision=revision):
        paths.append("README.md")
    for path in paths:
        api.upload_file(
            path_or_fileobj=card,
            path_in_repo=path,
            repo_id=repo_id,
            revision=revision,
            commit_message=f"Describe {sae_id}",
        )


def model_card(sae: SAE[Any], repo_id: str, sae_id: str, sweep: BudgetSweep | None = None) -> str:
    """Return the model card that `upload` writes, in Markdown."""
    metadata = sae.cfg.metadata
    k = sae.cfg.k
    budgets = ", ".join(str(budget) for budget in doubling_budgets(k))
    card = f"""---
library_name: saelens
tags:
- sparse-autoencoder
- sae_lens_flex
---

# {sae_id}: one sparse autoencoder for every sparsity up to {k}

A HierarchicalTopK SAE ([arXiv 2505.24473](https://arxiv.org/abs/2505.24473)), trained with SAELens
and sae_lens_flex. It reconstructs from any number of latents per activation from 1 to {k}.

| | |
|---|---|
| model | {metadata.model_name or "unknown"} |
| hook point | {metadata.hook_name or "unknown"} |
| training data | {metadata.dataset_path or "unknown"} |
| d_in | {sae.cfg.d_in} |
| d_sae | {sae.cfg.d_sae} |
| budgets | 1 to {k} |

```python
import sae_lens_flex  # registers the architecture; without it SAELens raises KeyError
from sae_lens import SAE

sae = SAE.from_pretrained("{repo_id}", "{sae_id}")
sae.budget = {k}  # or {budgets}: any of 1..{k}
```
"""
    if sweep is not None:
        table = sweep.to_pandas()
        rows = [list(table.columns), ["---"] * table.shape[1]]
        rows += [
            [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row]
            for row in table.astype(object).fillna("").itertuples(index=False)
        ]
        lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        card += f"\nMeasured on the same {sweep.n_tokens} tokens at every budget:\n\n{lines}\n"
    return card


def _check_hierarchical(sae: Any) -> None:
    if not isinstance(sae, (HierarchicalTopKSAE, HierarchicalTopKTrainingSAE)):
        raise TypeError(
            f"sae is a {type(sae).__name__}, expected a HierarchicalTopKSAE or a "
            "HierarchicalTopKTrainingSAE"
        )
