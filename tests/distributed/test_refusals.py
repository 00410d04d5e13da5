"""What several processes do not train with, told by name in each of them when the run starts."""

from typing import Any

import pytest
from datasets import Dataset
from sae_lens import TopKTrainingSAEConfig

from sae_lens_flex import (
    HierarchicalTopKTrainingSAE,
    HierarchicalTopKTrainingSAEConfig,
    ShardedTrainingRunner,
)
from sae_lens_flex.distributed import runner
from sae_lens_flex.distributed.processes import join

from .launch import results
from .test_runner import D_IN, D_SAE, K, config


def refusals() -> dict[str, str]:
    """Return what a run with each setting raises in this process."""
    us = join("cpu")
    rank = us.rank
    whitened = HierarchicalTopKTrainingSAEConfig(
        d_in=D_IN, d_sae=D_SAE, k=K, normalize_activations="covariance_whitening"
    )
    settings: dict[str, dict[str, Any]] = {
        "architecture": {"sae": TopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K)},
        "whitening": {"sae": whitened},
        "compile_sae": {"compile_sae": True},
        "batch": {"train_batch_size_tokens": 1},
        "device": {"device": "mps"},
        "other device": {"device": "cuda"},
        "llm_device": {"llm_device": "cuda:1"},
        "act_store_device": {"act_store_device": "cuda"},
        "other lr": {"lr": 1e-3 if rank == 0 else 2e-3},
        "other sae": {"sae": HierarchicalTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K + rank)},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "join", lambda device: us)
        errors = {"gpu": _error(config(device="cuda:1"))}
    errors |= {name: _error(config(**fields)) for name, fields in settings.items()}
    texts = Dataset.from_dict({"text": ["a"] * (10 + rank)})
    errors["other data"] = _error(config(), override_dataset=texts)
    texts = Dataset.from_dict({"text": ["a", "b" if rank == 0 else "c", "d"]})
    errors["other rows"] = _error(config(), override_dataset=texts)
    one_text = Dataset.from_dict({"text": ["a"]})
    stream = one_text.to_iterable_dataset()
    errors["no text in a stream"] = _error(config(), override_dataset=stream)
    errors["no text"] = _error(config(), override_dataset=one_text)
    sae = HierarchicalTopKTrainingSAE(whitened)
    errors["whitening of override_sae"] = _error(config(), override_sae=sae)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "version", lambda package: f"{package} {rank}")
        errors["other version"] = _error(config())
    return errors


def _error(cfg: Any, **overrides: Any) -> str:
    try:
        ShardedTrainingRunner(cfg, **overrides)
    except ValueError as error:
        return str(error)
    except SystemExit:
        return "another process has said it"
    return "none"


EXPECTED = {
    "architecture": "architecture is 'topk', expected one of hierarchical_topk, flex_topk",
    "whitening": "normalize_activations is 'covariance_whitening'",
    "compile_sae": "compile_sae is True, expected False",
    "batch": "train_batch_size_tokens is 1, expected at least 2",
    "device": "device is 'mps', expected 'cpu' or 'cuda'",
    "gpu": "device is 'cuda:1', expected 'cpu' or 'cuda'",
    "other device": "device is 'cuda', expected 'cpu', with which these processes have met",
    "llm_device": "llm_device is 'cuda:1', expected one of",
    "act_store_device": "act_store_device is 'cuda', expected one of",
    "other lr": "lr is 0.001 on rank 0 and 0.002 on rank 1",
    "other sae": "sae.k is 4 on rank 0 and 5 on rank 1",
    "other rows": "a hash of row 1 of override_dataset is ",
    "other data": "override_dataset is \"10 rows of ['text']\" on rank 0",
    "other version": "version of torch is 'torch 0' on rank 0 and 'torch 1' on rank 1",
}


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return results(2, refusals, directory=tmp_path_factory.mktemp("refusals"))


@pytest.mark.parametrize("name", EXPECTED)
def test_every_process_refuses_by_name(name: str, by_rank: list[dict[str, str]]) -> None:
    for errors in by_rank:
        assert EXPECTED[name] in errors[name]


def test_too_little_text_is_told(by_rank: list[dict[str, str]]) -> None:
    of_stream = [errors["no text in a stream"] for errors in by_rank]
    assert of_stream[0] == "none"
    assert of_stream[1] == "the dataset has no text for rank 1 of 2 processes"
    # Rank 1 has failed first. What another one raises after that is left unsaid.
    assert by_rank[0]["no text"] == "another process has said it"
    expected = "the dataset has 1 rows, expected at least 2, one for each process"
    assert by_rank[1]["no text"] == expected


def test_the_normalization_of_a_given_sae_counts(by_rank: list[dict[str, str]]) -> None:
    # Rank 1 speaks, which failed first above.
    error = by_rank[1]["whitening of override_sae"]
    assert error.startswith("normalize_activations is 'covariance_whitening'")


def test_without_a_launcher_the_runner_says_what_to_type() -> None:
    with pytest.raises(ValueError, match="RANK is not set: start the processes by torchrun"):
        ShardedTrainingRunner(config())


def test_rows_are_compared_as_they_are_stored() -> None:
    rows = [[row * 5000 + token for token in range(3000)] for row in range(5)]
    tokens = Dataset.from_dict({"tokens": rows})
    rows[2][1500] = -1  # which a tensor's repr leaves out
    others = Dataset.from_dict({"tokens": rows})
    settings = runner._settings(config(), tokens)
    formats = tokens.with_format("torch"), tokens.with_transform(lambda batch: {"a": [object()]})
    for same in formats:
        assert settings == runner._settings(config(), same) | {
            "override_dataset": settings["override_dataset"]
        }
    found = runner._settings(config(), others.with_format("torch"))
    different = [name for name, value in settings.items() if found[name] != value]
    assert different == ["a hash of row 2 of override_dataset"]
    assert runner._settings(config(), tokens.select([]))["override_dataset"].startswith("0 rows")
