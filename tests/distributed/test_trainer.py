"""SAELens's trainer in several processes, against one process on the same batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sae_lens_flex import fused_adam, unshard
from sae_lens_flex.distributed.checkpoints import whole_state
from sae_lens_flex.distributed.processes import join
from sae_lens_flex.distributed.trainer import ShardedSAETrainer

from .launch import results
from .training import (
    BATCH_SIZE,
    N_STATISTICS,
    N_STEPS,
    assert_close,
    batches,
    fit,
    new_sae,
    new_trainer,
)

N_STEPS_BEFORE = 5
# SAELens sums norms in float32, for the last of the runs below.
RELATIVE_ERRORS = (1e-9, 1e-9, 1e-5)
CHECKPOINT = str(N_STEPS_BEFORE * BATCH_SIZE)  # SAELens's name: the activations seen.


def train(checkpoint_path: Path, several: bool) -> list[dict[str, Any]]:
    """Train SAEs that differ in what the trainer does with them."""
    processes = join("cpu") if several else None
    hierarchical = new_trainer(new_sae("hierarchical_topk"), batches(), processes, checkpoint_path)
    with fused_adam():
        flex = new_trainer(new_sae("flex_topk"), batches(), processes)
    normalized = new_trainer(
        new_sae("flex_topk", normalize_activations="expected_average_only_in"),
        batches(N_STATISTICS + N_STEPS),
        processes,
    )
    return [fit(trainer) for trainer in (hierarchical, flex, normalized)]


class Run:
    """What each process of a run has in the end, and its checkpoint."""

    def __init__(self, n_processes: int, directory: Path) -> None:
        self.checkpoint = directory / "checkpoints" / CHECKPOINT
        self.by_rank = (
            [train(self.checkpoint.parent, several=False)]
            if n_processes == 1
            else results(
                n_processes, train, self.checkpoint.parent, True, directory=directory / "results"
            )
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Run]:
    return {n: Run(n, tmp_path_factory.mktemp(f"by-{n}")) for n in (1, 2, 3)}


@pytest.mark.parametrize("n_processes", [2, 3])
def test_figures_statistics_and_weights_are_those_of_one_process(
    n_processes: int, runs: dict[int, Run]
) -> None:
    (one,) = runs[1].by_rank
    steps = [entry["step"] for entry in one[0]["logged"] if "metrics/evaluated" in entry]
    assert steps == [3, 7, 11]
    assert one[0]["metadata"][1] > 0  # There are dead latents.
    for rank, several in enumerate(runs[n_processes].by_rank):
        for ours, theirs, rtol in zip(several, one, RELATIVE_ERRORS, strict=True):
            logged = theirs["logged"]
            if rank > 0:  # Rank 0 alone evaluates.
                logged = [
                    {name: value for name, value in entry.items() if name != "metrics/evaluated"}
                    for entry in logged
                ]
            assert_close(ours, {**theirs, "logged": logged}, rtol)


@pytest.mark.parametrize("n_processes", [2, 3])
def test_a_checkpoint_has_the_files_and_the_contents_of_one_process(
    n_processes: int, runs: dict[int, Run]
) -> None:
    ours, theirs = runs[n_processes].checkpoint, runs[1].checkpoint
    assert [p.name for p in sorted(ours.parent.iterdir())] == [CHECKPOINT, "99"]
    assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in theirs.iterdir())
    for path in theirs.glob("*.safetensors"):
        assert_close(load_file(ours / path.name), load_file(path))
    for path in theirs.glob("*.json"):
        assert (ours / path.name).read_text() == path.read_text()
    assert_close(torch.load(ours / "trainer_state.pt"), torch.load(theirs / "trainer_state.pt"))


def resume(checkpoints: list[Path], several: bool) -> list[tuple[Any, Any, Any]]:
    """Return weights and optimizer as they are after loading, and the end of the run."""
    resumed = []
    for checkpoint in checkpoints:
        trainer = new_trainer(
            new_sae("hierarchical_topk"),
            batches()[N_STEPS_BEFORE:],
            join("cpu") if several else None,
        )
        trainer.load_trainer_state(checkpoint)
        trainer.sae.load_weights_from_checkpoint(checkpoint)
        if isinstance(trainer, ShardedSAETrainer):
            weights = unshard(trainer.sae).state_dict()
            optimizer = whole_state(trainer.optimizer, keep=True)
        else:
            weights = trainer.sae.state_dict()
            optimizer = trainer.optimizer.state_dict()
        weights = {name: weight.clone() for name, weight in weights.items()}
        state = {
            index: {name: value.clone() for name, value in of_one.items()}
            for index, of_one in optimizer["state"].items()
        }
        resumed.append((weights, state, fit(trainer)))
    return resumed


@pytest.mark.parametrize(("before", "after"), [((2, 3), 1), ((1, 2, 3), 2)])
def test_a_run_resumes_in_another_number_of_processes(
    before: tuple[int, ...], after: int, runs: dict[int, Run], tmp_path: Path
) -> None:
    checkpoints = [runs[n].checkpoint for n in before]
    by_rank = (
        [resume(checkpoints, several=False)]
        if after == 1
        else results(after, resume, checkpoints, True, directory=tmp_path)
    )
    # Not the uninterrupted run: SAELens's checkpoint numbers the step before the last one.
    expected = resume([runs[1].checkpoint], several=False)[0][2]
    del expected["logged"]
    for of_one in by_rank:
        for checkpoint, (weights, state, end) in zip(checkpoints, of_one, strict=True):
            saved = load_file(checkpoint / "sae_weights.safetensors")
            assert weights.keys() == saved.keys()
            assert all(torch.equal(weights[name], saved[name]) for name in saved)
            saved = torch.load(checkpoint / "trainer_state.pt")["optimizer"]["state"]
            assert state.keys() == saved.keys() == {0, 1, 2, 3}
            for index, of_parameter in saved.items():
                assert state[index].keys() == of_parameter.keys()
                for name, value in of_parameter.items():
                    assert torch.equal(state[index][name], value)
            del end["logged"]
            assert_close(end, expected)
