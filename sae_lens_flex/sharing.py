"""SAEs from and to others: start from a TopK SAE, export one at a budget, upload."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import HfHubHTTPError, validate_repo_id
from sae_lens import SAE, TrainingSAE, upload_saes_to_huggingface
from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSIFY_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig, TopKTrainingSAE
from safetensors.torch import save_file

from .evals import BudgetSweep
from .saes.budgets import (
    MeanBudget,
    check_budget,
    check_trained_budgets,
    doubling_budgets,
    largest_budget,
)
from .saes.checks import check_integer, check_path, check_weights
from .saes.hierarchical_topk import (
    HierarchicalTopKSAE,
    HierarchicalTopKTrainingSAE,
    HierarchicalTopKTrainingSAEConfig,
)
from .saes.registration import TOPK_TRAINING_CLASSES
from .saes.sharded import ShardedTrainingSAE

# Metadata that SAELens's trainer measured at the SAE's own k. At another budget it is wrong.
MEASURED_AT_K = ("l0", "num_dead_features")
# An export has this key in its metadata; in sparsify's format, in its cfg.json. A later export of
# the same kind replaces an SAE that has it, and no other.
EXPORT_KEY = "sae_lens_flex_export"
SPARSIFY = "sparsify"
# SAELens and sparsify read these files where they open a directory as an SAE.
FILES_OF_SAES = (
    *(SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME, RUNNER_CFG_FILENAME),
    SPARSIFY_WEIGHTS_FILENAME,
)
# These fields belong to the weights. With other values the weights would be another SAE's.
SETTLED = tuple(
    field.name for field in fields(TopKSAEConfig) if field.name not in ("device", "metadata")
)
# huggingface_hub sends with requests before its version 1, and with httpx since. Its own error
# derives from that library's.
HTTP_ERRORS: Any = HfHubHTTPError.__bases__


def export_topk(
    sae: HierarchicalTopKSAE | HierarchicalTopKTrainingSAE, path: str | Path, *, budget: int
) -> Path:
    """Save an SAE at a fixed budget as an ordinary SAELens "topk" SAE.

    `SAE.load_from_disk(path)` loads it with SAELens alone. It encodes and reconstructs as `sae`
    does at that budget. Its metadata is that of `sae`, but for two things: the L0 and the number of
    dead latents, which were measured at k, are left out, and `sae_lens_flex_export` is added, which
    says what was exported.

    Args:
        sae: the SAE. It is not changed.
        path: the directory to write. An earlier `export_topk` in it is replaced. Files that belong
            to no SAE are left as they are.
        budget: latents to keep, 1..k. `export_jumprelu` takes a MeanBudget.

    Returns:
        The directory.

    Raises:
        ValueError: if `path` holds files of another SAE, or `budget` is not within 1..k, or
            weights are not finite.
        NotADirectoryError: if `path` is a file, or lies below one.
    """
    path = _check_export(sae, path, TopKSAEConfig.architecture())
    if isinstance(budget, MeanBudget):
        raise ValueError(
            f"budget is {budget!r}, expected a number of latents: `export_jumprelu` takes this one"
        )
    budget = check_integer("budget", budget, largest_budget(sae), "k")
    cfg = _export_config(TopKSAEConfig, sae, {"budget": budget}, k=budget)
    exported = TopKSAE(cfg)
    exported.load_state_dict(sae.state_dict())
    exported.save_model(path)
    return path


@torch.no_grad()
def export_jumprelu(
    sae: HierarchicalTopKSAE | HierarchicalTopKTrainingSAE,
    path: str | Path,
    *,
    budget: MeanBudget,
) -> Path:
    """Save an SAE at a MeanBudget as an ordinary SAELens "jumprelu" SAE.

    `SAE.load_from_disk(path)` loads it with SAELens alone. It encodes and reconstructs as `sae`
    does at that budget, up to rounding: a latent whose activation is as close to the threshold as
    that may be kept by one of them only. With `rescale_acts_by_decoder_norm` the decoder's norms
    are multiplied into the encoder, because SAELens's "jumprelu" knows no rescaling. The metadata
    is as `export_topk` says.

    Args:
        sae: the SAE. It is not changed.
        path: the directory to write. An earlier `export_jumprelu` in it is replaced. Files that
            belong to no SAE are left as they are.
        budget: what `mean_budget` has returned for this SAE.

    Returns:
        The directory.

    Raises:
        TypeError: if `budget` is no MeanBudget.
        ValueError: if `path` holds files of another SAE, or the budget's mean is above k, or
            weights are not finite.
        NotADirectoryError: if `path` is a file, or lies below one.
    """
    path = _check_export(sae, path, JumpReLUSAEConfig.architecture())
    if not isinstance(budget, MeanBudget):
        raise TypeError(
            f"budget is {budget!r}, expected a MeanBudget, as `mean_budget` returns it: "
            "`export_topk` takes a number of latents"
        )
    check_budget(budget, largest_budget(sae))
    cfg = _export_config(JumpReLUSAEConfig, sae, asdict(budget))
    exported = JumpReLUSAE(cfg)
    weights = _with_norms_folded(sae, sae.dtype)
    threshold = torch.full_like(weights["b_enc"], budget.threshold)
    exported.load_state_dict(weights | {"threshold": threshold})
    exported.save_model(path)
    return path


@torch.no_grad()
def export_sparsify(
    sae: HierarchicalTopKSAE | HierarchicalTopKTrainingSAE, path: str | Path, *, budget: int
) -> Path:
    """Save an SAE at a fixed budget in the format of EleutherAI's sparsify, which delphi reads too.

    `sparsify.SparseCoder.load_from_disk(path)` loads it. Up to rounding it keeps the latents that
    `sae` keeps at that budget, with the same activations and the same reconstruction. For this the
    decoder's norms are folded into the weights where `rescale_acts_by_decoder_norm` is set, and
    `b_dec` into the encoder's bias where `apply_b_dec_to_input` is not. A latent whose folded norm
    is zero never fires.

    sparsify and delphi take the name of the last directory for the model's module, such as
    "layers.12", and read the activations that the module returns.

    Args:
        sae: the SAE. It is not changed.
        path: the directory to write. An earlier `export_sparsify` in it is replaced. Files that
            belong to no SAE are left as they are.
        budget: latents to keep, 1..k.

    Returns:
        The directory.

    Raises:
        ValueError: if the format cannot hold the SAE, which is so with `normalize_activations` and
            `reshape_activations` other than "none"; if `path` holds files of another SAE; if
            `budget` is not within 1..k; or if weights are not finite.
        NotADirectoryError: if `path` is a file, or lies below one.
    """
    path = _check_export(sae, path, SPARSIFY)
    budget = check_integer("budget", budget, largest_budget(sae), "k")
    for name in ("normalize_activations", "reshape_activations"):
        if getattr(sae.cfg, name) != "none":
            raise ValueError(
                f"{name} is {getattr(sae.cfg, name)!r} in the SAE's config, expected 'none': "
                "sparsify's format has no place for it"
            )
    weights = _with_norms_folded(sae, torch.float64)
    encoder, b_enc = weights["W_enc"].T, weights["b_enc"]  # [F, D], [F]
    if not sae.cfg.apply_b_dec_to_input:
        b_enc = b_enc + encoder @ weights["b_dec"]  # sparsify subtracts b_dec from every input.
    tensors = {
        "encoder.weight": encoder,
        "encoder.bias": b_enc,
        "W_dec": weights["W_dec"],
        "b_dec": weights["b_dec"],
    }
    cfg = {
        "activation": "topk",
        "d_in": sae.cfg.d_in,
        "num_latents": sae.cfg.d_sae,
        "k": budget,
        # sparsify's trainer keeps the norms of the decoder at 1, if they are.
        "normalize_decoder": sae.cfg.rescale_acts_by_decoder_norm,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        EXPORT_KEY: _origin(sae, {"budget": budget}),
    }
    path.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.to(sae.dtype).contiguous() for name, value in tensors.items()},
        path / SPARSIFY_WEIGHTS_FILENAME,
    )
    (path / SAE_CFG_FILENAME).write_text(json.dumps(cfg, indent=2) + "\n")
    return path


def _with_norms_folded(sae: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return an SAE's weights on the CPU, as they are without `rescale_acts_by_decoder_norm`.

    The decoder's norms are multiplied into the encoder, so that activations stay what they are.
    """
    weights = {name: weight.to("cpu", dtype) for name, weight in sae.state_dict().items()}
    if sae.cfg.rescale_acts_by_decoder_norm:
        norms = weights["W_dec"].norm(dim=-1)  # [d_sae]
        weights["W_enc"] = weights["W_enc"] * norms
        weights["b_enc"] = weights["b_enc"] * norms
        # A latent without a decoder row is never active, here or there.
        weights["W_dec"] = weights["W_dec"] / norms.where(norms > 0, 1).unsqueeze(1)
    return weights


def _check_export(sae: Any, path: str | Path, kind: str) -> Path:
    _check_hierarchical(sae)
    _check_whole(sae)
    check_weights(sae)
    path = check_path("path", path)
    _check_export_directory(path, kind)
    return path


def _export_config(config_class: type[Any], sae: Any, budget: dict[str, Any], **own: Any) -> Any:
    """Return the config of an export, which says of which SAE and budget it is."""
    names = {field.name for field in fields(config_class)} - {"metadata", *own}
    values = {name: getattr(sae.cfg, name) for name in names}
    cfg = config_class(**values | own | {"device": "cpu"})
    cfg.metadata = _metadata_without(sae, *MEASURED_AT_K)
    cfg.metadata[EXPORT_KEY] = _origin(sae, budget)
    return cfg


def _origin(sae: Any, budget: dict[str, Any]) -> dict[str, Any]:
    return {"architecture": sae.cfg.architecture(), "k": sae.cfg.k, **budget}


def _check_export_directory(path: Path, kind: str) -> None:
    """Raise if an export of that kind, an architecture or SPARSIFY, cannot go there."""
    _check_is_directory("path", path)
    there = {name for name in FILES_OF_SAES if (path / name).exists()}
    exported = _kind_of_export(path)
    if exported == kind:
        weights_name = SPARSIFY_WEIGHTS_FILENAME if kind == SPARSIFY else SAE_WEIGHTS_FILENAME
        there -= {SAE_CFG_FILENAME, weights_name}
    if there:
        what = f"{', '.join(sorted(there))} of no earlier {kind} export"
        if exported not in (None, kind):
            what = f"an export as {exported}, not as {kind}"
        raise ValueError(
            f"path is {str(path)!r}, which holds another SAE ({what}), expected a new directory"
        )


def _check_is_directory(name: str, path: Path) -> None:
    """Raise a NotADirectoryError that names a path where there can be no directory."""
    existing = next(part for part in (path, *path.parents) if part.exists())
    if not existing.is_dir():
        raise NotADirectoryError(
            f"{name} is {str(path)!r}, expected a directory: {str(existing)!r} is a file"
        )


def _kind_of_export(path: Path) -> str | None:
    """Return the architecture, or SPARSIFY, of the export in a directory. None if none is there."""
    try:
        cfg = json.loads((path / SAE_CFG_FILENAME).read_text())
        if EXPORT_KEY in cfg:
            return SPARSIFY
        return cfg["architecture"] if EXPORT_KEY in cfg["metadata"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _metadata_without(sae: SAE[Any], *names: str) -> Any:
    metadata = sae.cfg.metadata.to_dict()
    return type(sae.cfg.metadata)(**{k: v for k, v in metadata.items() if k not in names})


def from_topk(
    sae: TopKSAE | TopKTrainingSAE, **training_fields: Any
) -> HierarchicalTopKTrainingSAE:
    """Make an SAE that starts training for every budget from a TopK SAE.

        sae = sae_lens_flex.from_topk(SAE.from_pretrained(release, sae_id))
        LanguageModelSAETrainingRunner(cfg, override_sae=sae).run()

    At budget k the new SAE reconstructs exactly as the given one. The given one may also be a
    `hierarchical_topk` SAE, saved or in training, which is then trained on.

    Args:
        sae: a TopK or `hierarchical_topk` SAE, for inference or in training. Its weights are
            copied.
        training_fields: fields of HierarchicalTopKTrainingSAEConfig that do not belong to the
            weights, such as `budgets`, `backend` or `aux_loss_coefficient`. A field that is not
            given is as the SAE was trained, if that is known, and has its default otherwise. Of a
            `hierarchical_topk` SAE all fields are known, but `level_weights` belong to its
            `budgets`: with other `budgets` they are not taken over, and a warning says so unless
            `level_weights` are given, too. Of a `flex_topk` SAE, and of an
            SAE that `export_topk` wrote, all but these two are known. Of SAELens's `topk` in
            training `aux_loss_coefficient` is, but it is 0 with "layer_norm" and
            "constant_norm_rescale", which do not go with an auxiliary loss.

    Raises:
        TypeError: for an SAE of another architecture, or a field that the config does not have.
        ValueError: for a field that belongs to the weights, such as `k`, or an impossible value,
            or weights that are not finite.
    """
    # SAELens's BatchTopK and Matryoshka SAEs in training derive from its TopK ones.
    is_topk = isinstance(sae, (TopKSAE, TopKTrainingSAE))
    if not is_topk or sae.cfg.architecture() not in ("topk", *TOPK_TRAINING_CLASSES):
        raise TypeError(
            f"sae is a {type(sae).__name__}, expected an SAE of one of the architectures topk, "
            f"{', '.join(TOPK_TRAINING_CLASSES)}"
        )
    _check_whole(sae)
    own = {name: getattr(sae.cfg, name) for name in (*SETTLED, "device")}
    for name in training_fields:
        if name in (*own, "metadata"):
            raise ValueError(f"{name} is given, expected the SAE's own: {getattr(sae.cfg, name)!r}")
    known = trained_with(sae, HierarchicalTopKTrainingSAEConfig)
    if "budgets" in training_fields and "level_weights" not in training_fields:
        if training_fields["budgets"] is not None:
            check_trained_budgets(training_fields["budgets"], own["k"])
        drop_weights_of_other_budgets(known, training_fields["budgets"], stacklevel=2)
    cfg = HierarchicalTopKTrainingSAEConfig(**own, **(known | training_fields))
    return cast(HierarchicalTopKTrainingSAE, start_training(sae, cfg))


def drop_weights_of_other_budgets(known: dict[str, Any], budgets: Any, stacklevel: int) -> None:
    """Remove an SAE's `level_weights` where it is to be trained on other budgets. Warn of it.

    Args:
        known: what `trained_with` returned. It is changed.
        budgets: those that it is to be trained on.
        stacklevel: of the warning, 1 for the caller.
    """
    levels = budgets.tolist() if hasattr(budgets, "tolist") else budgets  # a tensor or array
    levels = list(levels) if isinstance(levels, (tuple, range)) else levels
    if levels != known.get("budgets") and (weights := known.pop("level_weights", None)) is not None:
        warnings.warn(
            f"budgets is {budgets!r} and level_weights is left out, so all budgets weigh alike: "
            f"the SAE was trained with level_weights {weights} on budgets {known.get('budgets')}. "
            "Give level_weights for the new budgets, too",
            stacklevel=stacklevel + 1,
        )


def trained_with(sae: TopKSAE | TopKTrainingSAE, config_class: type[Any]) -> dict[str, Any]:
    """Return what is known of how an SAE was trained, as fields of a training config.

    Args:
        sae: an SAE in training, or one for inference. The metadata of the latter may say how it was
            trained.
        config_class: the class of the training config. No other fields are returned.

    Raises:
        ValueError: if the metadata is not as SAELens writes it.
    """
    if isinstance(sae, TopKTrainingSAE):
        architecture = sae.cfg.architecture()
        known = sae.cfg.get_training_architecture_details()
    else:
        architecture = sae.cfg.metadata.training_architecture
        known = sae.cfg.metadata.get("training_architecture_details", {})
        if not isinstance(known, dict):
            raise ValueError(
                f"training_architecture_details is {known!r} in the SAE's metadata, expected a "
                "dictionary"
            )
    if architecture not in TOPK_TRAINING_CLASSES:
        # Of a topk SAE of SAELens only this field is taken over. The others either belong to the
        # weights, or would make our training slower, as its dense activations would.
        is_topk = architecture == "topk" or isinstance(sae, TopKTrainingSAE)
        shared = {"aux_loss_coefficient"} if is_topk else set()
        known = {name: value for name, value in known.items() if name in shared}
        if sae.cfg.normalize_activations in ("layer_norm", "constant_norm_rescale"):
            known["aux_loss_coefficient"] = 0.0
    names = {field.name for field in fields(config_class)} - {*SETTLED, "device", "metadata"}
    if not isinstance(sae, (HierarchicalTopKSAE, HierarchicalTopKTrainingSAE)):
        # The metadata of an export has the budgets of the SAE that was exported. They end with that
        # SAE's k, not with the export's.
        names -= {"budgets", "level_weights"}
    return {name: value for name, value in known.items() if name in names}


def start_training(sae: TopKSAE | TopKTrainingSAE, cfg: Any) -> TrainingSAE[Any]:
    """Make the training SAE of a config, with the weights and the metadata of another SAE.

    Args:
        sae: the SAE. Its weights and its metadata are copied, the latter without what was measured.
        cfg: the config of one of this package's training SAEs. It is not changed.

    Raises:
        ValueError: if a field that belongs to the weights is not that of `sae`, or if the weights
            are not finite.
    """
    check_weights(sae)
    for name in SETTLED:
        if getattr(cfg, name) != getattr(sae.cfg, name):
            raise ValueError(
                f"{name} is {getattr(cfg, name)!r}, expected the SAE's own: "
                f"{getattr(sae.cfg, name)!r}"
            )
    cfg = replace(cfg, metadata=_metadata_without(sae, *MEASURED_AT_K, EXPORT_KEY))
    started = TOPK_TRAINING_CLASSES[cfg.architecture()][0](cfg)
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
    folder: str | Path | None = None,
) -> None:
    """Upload an SAE to the Hugging Face hub, where `SAE.from_pretrained(repo_id, sae_id)` finds it.

    SAELens's uploader sends it, and makes the repository if there is none. A training SAE is sent
    in its inference form. A model card is written to `{sae_id}/README.md`. It is also written to
    README.md of the repository if there is none yet.

    Args:
        sae: the SAE.
        repo_id: the repository, "user/name".
        sae_id: the SAE's folder in the repository.
        sweep: the result of `sweep_budgets`, which the model card then shows as a table.
        revision: the branch.
        folder: a directory. With it the files are written there as they would lie in the
            repository. Nothing is sent, and no hub is asked.

    Raises:
        ValueError, TypeError: for arguments that do not fit. Nothing has been sent then.
        NotADirectoryError: if `folder` is a file, or lies below one.
        FileExistsError: if there is something at `{folder}/{sae_id}` already.
        ConnectionError: if the hub cannot be reached.
        HfHubHTTPError: if the hub refuses. The class is huggingface_hub's.
    """
    _check_hierarchical(sae)
    _check_whole(sae)
    check_weights(sae)
    validate_repo_id(repo_id)
    if not isinstance(sae_id, str) or not sae_id.strip("/") or {".", ".."} & {*sae_id.split("/")}:
        raise ValueError(f"sae_id is {sae_id!r}, expected the name of a folder in the repository")
    sae_id = sae_id.strip("/")  # A path of the hub may not begin with it.
    if sweep is not None and not isinstance(sweep, BudgetSweep):
        raise TypeError(f"sweep is a {type(sweep).__name__}, expected a BudgetSweep")
    card = model_card(sae, repo_id, sae_id, sweep)
    if folder is not None:
        folder = check_path("folder", folder)
        _check_is_directory("folder", folder)
        _write(sae, card, folder, sae_id)
        return
    api = HfApi()
    with TemporaryDirectory() as directory:
        _save(sae, directory)
        try:
            _send(api, directory, card.encode(), repo_id, sae_id, revision)
        except HfHubHTTPError as error:
            error.append_to_message(f"\nrepo_id is {repo_id!r}, sae_id is {sae_id!r}")
            raise
        except (OSError, *HTTP_ERRORS) as error:
            raise ConnectionError(
                f"repo_id is {repo_id!r}: the upload to the hub at {api.endpoint} failed: "
                f"{type(error).__name__}: {error}"
            ) from error


def _save(sae: SAE[Any], path: str | Path) -> None:
    if isinstance(sae, TrainingSAE):
        sae.save_inference_model(str(path))
    else:
        sae.save_model(path)


def _write(sae: SAE[Any], card: str, folder: Path, sae_id: str) -> None:
    """Write what `upload` sends into a directory."""
    path = folder / sae_id
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise FileExistsError(
            f"folder is {str(folder)!r}, in which there is {sae_id!r} already, expected a new one"
        )
    _save(sae, path)
    (path / "README.md").write_text(card)
    if not (folder / "README.md").exists():
        (folder / "README.md").write_text(card)


def _send(
    api: HfApi, directory: str, card: bytes, repo_id: str, sae_id: str, revision: str
) -> None:
    upload_saes_to_huggingface(
        {sae_id: directory}, repo_id, revision, show_progress=False, add_default_readme=False
    )
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
    known = trained_with(cast(Any, sae), HierarchicalTopKTrainingSAEConfig)
    trained_budgets, weights = "unknown", "unknown"
    if "budgets" in known:
        levels, level_weights = known["budgets"], known.get("level_weights")
        trained_budgets = f"every one of 1 to {k}" if levels is None else _listed(levels)
        weights = "even" if level_weights is None else _listed(level_weights)
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
| budgets to choose from | 1 to {k} |
| `budgets` in training | {trained_budgets} |
| `level_weights` in training | {weights} |

```python
import sae_lens_flex  # registers the architecture; without it SAELens raises KeyError
from sae_lens import SAE

sae = SAE.from_pretrained("{repo_id}", "{sae_id}")
sae.budget = {k}  # or {budgets}: any of 1..{k}
```
"""
    if sweep is not None:
        table = sweep.to_pandas().rename(columns={"dead_latents": "not_seen"})
        rows = [list(table.columns), ["---"] * table.shape[1]]
        rows += [
            [
                f"{value:.4g}" if isinstance(value, float) and name != "threshold" else str(value)
                for name, value in zip(table.columns, row, strict=True)
            ]
            for row in table.astype(object).fillna("").itertuples(index=False)
        ]
        lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        card += (
            f"\nMeasured on the same {sweep.n_tokens} tokens at every budget. `not_seen` is the "
            f"share of the latents that none of them activated.\n\n{lines}\n"
        )
        means = [
            MeanBudget(mean=row.l0 if row.mean is None else row.mean, threshold=row.threshold)
            for row in sweep.metrics
            if row.threshold is not None
        ]
        if means:
            code = "\n".join(f"sae.budget = sae_lens_flex.{budget!r}" for budget in means)
            card += (
                "\nA row with a `threshold` keeps the latents whose activation is above it: `mean` "
                "of them on average on the activations that it was chosen on.\n\n"
                f"```python\n{code}\n```\n"
            )
    return card


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def _check_whole(sae: Any) -> None:
    if isinstance(sae, ShardedTrainingSAE):
        raise TypeError(
            "sae lies in parts in several processes: call `sae_lens_flex.unshard(sae)` on every "
            "rank, and this on what it returns"
        )


def _check_hierarchical(sae: Any) -> None:
    if not isinstance(sae, (HierarchicalTopKSAE, HierarchicalTopKTrainingSAE)):
        raise TypeError(
            f"sae is a {type(sae).__name__}, expected a HierarchicalTopKSAE or a "
            "HierarchicalTopKTrainingSAE (`from_topk` makes one of a TopK SAE)"
        )
