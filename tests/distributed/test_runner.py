"""SAELens's runner in several processes: data, files, logs, refusals."""

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from datasets import Array2D, Dataset, Features, load_dataset
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
)
from safetensors.torch import load_file

from sae_lens_flex import (
    HierarchicalTopKSAE,
    HierarchicalTopKTrainingSAEConfig,
    ShardedTrainingRunner,
    unshard,
)
from sae_lens_flex.distributed.processes import join

from .launch import results

TINY_LM = Path(__file__).parents[2] / "examples" / "tiny_lm"
D_IN, D_SAE, K = 192, 100, 4
BATCH_SIZE, N_STEPS = 65, 8


def config(sae: Any = None, **fields: Any) -> LanguageModelSAERunnerConfig[Any]:
    """Make the config of a short run on the tiny language model, which writes nothing."""
    usual = {
        "sae": sae or HierarchicalTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K),
        "model_name": str(TINY_LM),
        "model_class_name": "AutoModelForCausalLM",
        "hook_name": "transformer.h.1",
        "dataset_path": str(TINY_LM / "wordnet_glosses"),
        "is_dataset_tokenized": False,
        "context_size": 32,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 8,
        "train_batch_size_tokens": BATCH_SIZE,
        "training_tokens": N_STEPS * BATCH_SIZE,
        "lr": 1e-3,
        "n_eval_batches": 1,
        "checkpoint_path": None,
        "output_path": None,
        "verbose": False,
        "logger": LoggingConfig(log_to_wandb=False),
    }
    return LanguageModelSAERunnerConfig(**(usual | fields))


def logging_config(directory: Path) -> LanguageModelSAERunnerConfig[Any]:
    """Make the config of a run that writes and logs everything."""
    return config(
        n_checkpoints=1,
        checkpoint_path=str(directory / "checkpoints"),
        save_final_checkpoint=True,
        output_path=str(directory / "sae"),
        prefetch_llm_batches=True,
        feature_sampling_window=4,
        logger=LoggingConfig(
            wandb_id="run", wandb_log_frequency=2, eval_every_n_wandb_logs=2, run_name="a run"
        ),
    )


def last_checkpoint(directory: Path) -> Path:
    return directory / "checkpoints" / "run" / f"final_{N_STEPS * BATCH_SIZE}"


def data_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "activations_store_state.safetensors")


def run_with_logs(runner: LanguageModelSAETrainingRunner) -> tuple[Any, list[dict[str, Any]]]:
    """Run; return the SAE, and what would have gone to Weights & Biases."""
    logged: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wandb, "init", lambda **settings: logged.append({"init": settings}))
        patch.setattr(wandb, "log", lambda figures, step: logged.append({"step": step, **figures}))
        patch.setattr(wandb, "finish", lambda: logged.append({"finish": True}))
        patch.setattr(wandb, "Histogram", lambda values: "histogram")
        patch.setattr(
            LoggingConfig, "log", lambda *args, **kwargs: logged.append({"artifact": kwargs})
        )
        return runner.run(), logged


def resuming_config(checkpoint: Path) -> LanguageModelSAERunnerConfig[Any]:
    """Make the config of two more steps from a checkpoint."""
    return config(
        resume_from_checkpoint=str(checkpoint), training_tokens=(N_STEPS + 2) * BATCH_SIZE
    )


def run_and_resume(directory: Path, checkpoint_of_one: Path) -> dict[str, Any]:
    rank = join("cpu").rank
    torch.manual_seed(7)
    runner = ShardedTrainingRunner(logging_config(directory))
    initial = unshard(runner.sae).state_dict()
    texts = [row["text"] for row in islice(runner.activations_store.dataset, 50)]
    if rank == 0:
        sae, logged = run_with_logs(runner)
    else:
        logged, init = [], wandb.init
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                wandb, "init", lambda **settings: logged.append(init(**settings).disabled)
            )
            sae = runner.run()
    resumed = ShardedTrainingRunner(resuming_config(last_checkpoint(directory)))
    resumed_sae = resumed.run()
    of_one = ShardedTrainingRunner(resuming_config(checkpoint_of_one))
    of_one.run()
    other = resuming_config(last_checkpoint(directory))
    other.sae.d_sae += 1
    # The second process that fails is silent.
    with pytest.raises((ValueError, SystemExit)) as refused:
        ShardedTrainingRunner(other).run()
    return {
        "refused": str(refused.value),
        "initial": initial,
        "texts": texts,
        "logged": logged,
        "sae": unshard(sae).state_dict(),
        "position": runner.activations_store.n_dataset_processed,
        "resumed": unshard(resumed_sae).state_dict(),
        "resumed position": resumed.activations_store.n_dataset_processed,
        "position from one": of_one.activations_store.n_dataset_processed,
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def by_rank(directory: Path, one: dict[str, Any]) -> list[dict[str, Any]]:
    return results(2, run_and_resume, directory, one["checkpoint"], directory=directory / "results")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the same of a run of one process."""
    directory = tmp_path_factory.mktemp("one")
    torch.manual_seed(7)
    runner = LanguageModelSAETrainingRunner(logging_config(directory))
    initial = {name: weight.clone() for name, weight in runner.sae.state_dict().items()}
    return {
        "initial": initial,
        "logged": run_with_logs(runner)[1],
        "checkpoint": last_checkpoint(directory),
    }


def test_initial_weights_are_those_of_one_process(
    by_rank: list[dict[str, Any]], one: dict[str, Any]
) -> None:
    for of_rank in by_rank:
        assert of_rank["initial"].keys() == one["initial"].keys()
        for name, weight in one["initial"].items():
            assert torch.equal(of_rank["initial"][name], weight)


def test_each_process_reads_its_own_part_of_the_text(by_rank: list[dict[str, Any]]) -> None:
    text = load_dataset(str(TINY_LM / "wordnet_glosses"), split="train")["text"][:100]
    assert by_rank[0]["texts"] == text[::2]
    assert by_rank[1]["texts"] == text[1::2]


def test_rank_0_logs_what_one_process_logs(
    by_rank: list[dict[str, Any]], one: dict[str, Any]
) -> None:
    assert by_rank[1]["logged"] == [True]  # A run of wandb that does nothing.
    ours, theirs = by_rank[0]["logged"], one["logged"]
    assert [entry.keys() for entry in ours] == [entry.keys() for entry in theirs]
    assert [entry.get("step") for entry in ours] == [entry.get("step") for entry in theirs]
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        for name in ("details/n_training_samples", "details/current_learning_rate"):
            assert ours_.get(name) == theirs_.get(name)
    assert ours[0]["init"]["config"]["train_batch_size_tokens"] == BATCH_SIZE


def test_one_process_loads_what_several_have_saved(
    by_rank: list[dict[str, Any]], directory: Path
) -> None:
    sae = SAE.load_from_disk(directory / "sae")
    assert isinstance(sae, HierarchicalTopKSAE)
    checkpoint = load_file(last_checkpoint(directory) / "sae_weights.safetensors")
    for of_rank in by_rank:
        assert of_rank["sae"].keys() == checkpoint.keys()
        for name, weight in checkpoint.items():
            assert torch.equal(of_rank["sae"][name], weight), name
    # For inference SAELens makes the decoder's rows unit vectors.
    rows = checkpoint["W_dec"] / checkpoint["W_dec"].norm(dim=1, keepdim=True)
    torch.testing.assert_close(sae.W_dec.data, rows)
    assert json.loads((directory / "sae" / "runner_cfg.json").read_text())["device"] == "cpu"
    assert sorted(path.name for path in (directory / "sae").iterdir()) == [
        "cfg.json",
        "runner_cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
    ]


def test_a_checkpoint_has_the_data_position_of_every_process(
    by_rank: list[dict[str, Any]], directory: Path
) -> None:
    checkpoints = directory / "checkpoints" / "run"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["325", "final_520"]
    state = data_state(last_checkpoint(directory))
    positions = state["n_dataset_processed_by_rank"].tolist()
    assert len(positions) == 2
    assert state["n_dataset_processed"] == sum(positions)
    for of_rank, position in zip(by_rank, positions, strict=True):
        # A batch may have been read ahead since.
        assert 0 < position <= of_rank["position"]
        assert of_rank["resumed position"] > position
        assert not torch.equal(of_rank["resumed"]["W_dec"], of_rank["sae"]["W_dec"])


def test_data_go_on_where_another_number_of_processes_stopped(
    by_rank: list[dict[str, Any]], one: dict[str, Any], directory: Path
) -> None:
    n_read_by_one = int(data_state(one["checkpoint"])["n_dataset_processed"])
    for of_rank in by_rank:
        # Two steps take less text than was read before.
        assert n_read_by_one // 2 <= of_rank["position from one"] < n_read_by_one

    n_read_by_two = int(data_state(last_checkpoint(directory))["n_dataset_processed"])
    runner = LanguageModelSAETrainingRunner(resuming_config(last_checkpoint(directory)))
    runner.run()
    assert runner.activations_store.n_dataset_processed > n_read_by_two


def read_cached_activations(path: Path) -> tuple[list[float], str]:
    """Return what this process reads of cached activations, and what too few of them raise."""
    cached = {"use_cached_activations": True, "cached_activations_path": str(path)}
    runner = ShardedTrainingRunner(config(**cached, activations_mixing_fraction=0.0))
    runner.run()
    dataset: Any = runner.activations_store.cached_activation_dataset
    numbers = [float(prompt[0, 0]) for prompt in dataset["transformer.h.1"]]
    # The second process that fails is silent.
    with pytest.raises((ValueError, SystemExit)) as caught:
        ShardedTrainingRunner(config(**cached, store_batch_size_prompts=8))
    return numbers, str(caught.value)


def test_a_checkpoint_of_another_size_is_refused_by_name(by_rank: list[dict[str, Any]]) -> None:
    *_, error = sorted(of_rank["refused"] for of_rank in by_rank)
    assert re.match(r"d_sae is \d+, expected that of the checkpoint, \d+: ", error)


def test_each_process_reads_its_own_part_of_cached_activations(tmp_path: Path) -> None:
    # As SAELens caches them, a prompt in a row. Here a prompt is filled with its number.
    prompts = [[[float(number)] * D_IN] * 32 for number in range(14)]
    features = Features({"transformer.h.1": Array2D(shape=(32, D_IN), dtype="float32")})
    dataset = Dataset.from_dict({"transformer.h.1": prompts}, features=features)
    dataset.save_to_disk(tmp_path / "cached")
    by_rank = results(
        2, read_cached_activations, tmp_path / "cached", directory=tmp_path / "results"
    )
    assert [numbers for numbers, _ in by_rank] == [list(range(7)), list(range(7, 14))]
    errors = sorted(error for _, error in by_rank)
    assert errors[0] == "1"
    assert "cached_activations_path has 7 prompts for rank" in errors[1]


def read_a_short_text(path: Path) -> dict[str, Any]:
    join("cpu")
    torch.manual_seed(7)
    runner = ShardedTrainingRunner(config(dataset_path=str(path)))
    initial = unshard(runner.sae).state_dict()
    sae = unshard(runner.run()).state_dict()
    has_moved = {name: not torch.equal(initial[name], weight) for name, weight in sae.items()}
    texts = [row["text"] for row in runner.activations_store.dataset]
    n_read = runner.activations_store.n_dataset_processed
    return {"texts": texts, "n_read": n_read, "sae": sae, "has moved": has_moved}


def test_a_text_that_ends_begins_again_as_in_one_process(tmp_path: Path) -> None:
    # 7 rows: that of rank 0 has 4, and that of rank 1 ends first.
    text = load_dataset(str(TINY_LM / "wordnet_glosses"), split="train")["text"][:7]
    (tmp_path / "text").mkdir()
    Dataset.from_dict({"text": text}).to_json(tmp_path / "text" / "train.jsonl")
    by_rank = results(2, read_a_short_text, tmp_path / "text", directory=tmp_path / "results")
    for rank, of_rank in enumerate(by_rank):
        assert of_rank["texts"] == text[rank::2]
        assert of_rank["n_read"] > 3 * len(of_rank["texts"])
        assert all(of_rank["has moved"].values())
        for name, weight in by_rank[0]["sae"].items():
            assert torch.equal(of_rank["sae"][name], weight)
