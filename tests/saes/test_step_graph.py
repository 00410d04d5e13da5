"""Small steps, differentiated at once and replayed as CUDA graphs, against ordinary ones."""

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comparison import (
    BATCH,
    D_IN,
    FUSED_ARCHITECTURES,
    MANY_DEAD,
    K,
    assert_close,
    assert_same_gradients,
    assert_same_losses,
    copy_weights,
    dead_mask,
    random_activations,
    run_step,
    step_input,
    trained_sae,
)
from sae_lens.saes.sae import TrainStepOutput

from sae_lens_flex.saes import fused_topk, step_graph
from sae_lens_flex.saes.step_graph import ORDINARY_CALLS, StepGraph

both_architectures = pytest.mark.parametrize("architecture", FUSED_ARCHITECTURES)


class Replays:
    """Where steps are recorded: on a GPU. On a CPU the function is called instead."""

    def __init__(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device = device
        if device == "cpu":
            monkeypatch.setattr(
                fused_topk.FusedTopKTrainingSAE,
                "_is_recorded",
                lambda self, x, normalized: self.use_cuda_graph and normalized is x,
            )
            monkeypatch.setattr(StepGraph, "__call__", lambda self, function, x, *on: function(x))

    def sae(self, architecture: str, **fields: Any) -> Any:
        return trained_sae(architecture, device=self.device, **fields)

    def ordinary_sae(self, architecture: str, **fields: Any) -> Any:
        sae = self.sae(architecture, **fields)
        sae.use_cuda_graph = False
        return sae

    def batch(self, seed: int, *shape: int) -> torch.Tensor:
        return random_activations(*shape, seed=seed).to(self.device)

    def dead(self, n_dead: int) -> torch.Tensor:
        return dead_mask(n_dead).to(self.device)

    def has_recorded(self, sae: Any) -> bool:
        graph = sae._step_graph
        return graph is not None and (self.device == "cpu" or graph._recording is not None)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def replays(request, monkeypatch) -> Replays:
    return Replays(request.param, monkeypatch)


N_STEPS = ORDINARY_CALLS + 4


def assert_same_outputs(output: TrainStepOutput, expected: TrainStepOutput) -> None:
    assert_same_losses(output, expected)
    assert_close(output.sae_out, expected.sae_out, name="sae_out")
    assert_close(output.hidden_pre, expected.hidden_pre, name="hidden_pre")
    acts, expected_acts = (each.feature_acts.to_dense() for each in (output, expected))
    assert_close(acts, expected_acts, name="feature_acts")


@both_architectures
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rescale_acts_by_decoder_norm": False},
        {"apply_b_dec_to_input": False},
        {"use_sparse_activations": False},
    ],
    ids=lambda fields: next(iter(fields), "defaults"),
)
def test_every_step_is_the_ordinary_one(replays, architecture, autocast, fields) -> None:
    sae = replays.sae(architecture, **fields)
    ordinary = replays.ordinary_sae(architecture, **fields)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    for step in range(N_STEPS):
        copy_weights(sae, ordinary)
        dead = replays.dead(MANY_DEAD if step % 2 else 0)
        with torch.autocast(replays.device, torch.bfloat16, enabled=autocast):
            output = run_step(sae, replays.batch(step), dead)
            expected = run_step(ordinary, replays.batch(step), dead)
        assert_same_outputs(output, expected)
        assert_same_gradients(sae, ordinary)
        optimizer.step()
    assert replays.has_recorded(sae)


def test_some_levels(replays) -> None:
    fields = {"budgets": [1, 4, K]}
    sae = replays.sae("hierarchical_topk", **fields)
    ordinary = replays.ordinary_sae("hierarchical_topk", **fields)
    for seed in range(N_STEPS):
        output = run_step(sae, replays.batch(seed))
        assert_same_losses(output, run_step(ordinary, replays.batch(seed)))
        assert_same_gradients(sae, ordinary)
    assert replays.has_recorded(sae)


def test_logged_metrics(replays) -> None:
    sae, ordinary = (make("hierarchical_topk") for make in (replays.sae, replays.ordinary_sae))
    for seed in range(N_STEPS):
        step = step_input(replays.batch(seed))
        step.is_logging_step = True
        metrics = sae.training_forward_pass(step).metrics
        expected = ordinary.training_forward_pass(step).metrics
        assert list(metrics) == list(expected)
        for name, value in expected.items():
            assert_close(metrics[name], value, name=name)


@both_architectures
def test_outputs_and_gradients_outlast_the_next_step(replays, architecture) -> None:
    sae, ordinary = (make(architecture) for make in (replays.sae, replays.ordinary_sae))
    outputs, expected_outputs, n_seeds = [], [], N_STEPS + 2
    for seed in range(n_seeds):  # gradients add up
        for model, kept in ((sae, outputs), (ordinary, expected_outputs)):
            output = model.training_forward_pass(step_input(replays.batch(seed)))
            (0.5 * output.loss).backward()
            kept.append(output)
    assert_same_gradients(sae, ordinary)
    for output, expected in zip(outputs, expected_outputs, strict=True):
        assert_same_outputs(output, expected)


@both_architectures
def test_several_forward_passes_before_a_backward_pass(replays, architecture) -> None:
    sae, ordinary = (make(architecture) for make in (replays.sae, replays.ordinary_sae))
    for seed in range(N_STEPS):
        run_step(sae, replays.batch(seed))
    assert replays.has_recorded(sae)
    for model in (sae, ordinary):
        model.zero_grad()
        losses = [
            model.training_forward_pass(step_input(replays.batch(seed), replays.dead(n_dead))).loss
            for seed, n_dead in ((20, MANY_DEAD), (21, 0))
        ]
        (losses[0] - 3 * losses[1]).backward()
    assert_same_gradients(sae, ordinary, 1e-4)


@both_architectures
def test_conditions_that_change(replays, architecture) -> None:
    sae = replays.sae(architecture)
    for n_samples, dtype in ((BATCH, None), (5, None), (BATCH, torch.bfloat16), (BATCH, None)):
        ordinary = replays.ordinary_sae(architecture)
        for seed in range(4 * N_STEPS):  # each recording takes more of the same
            batch = replays.batch(seed, n_samples, D_IN)
            with torch.autocast(replays.device, dtype, enabled=dtype is not None):
                output = run_step(sae, batch)
                expected = run_step(ordinary, batch)
            assert_same_losses(output, expected)
            assert_same_gradients(sae, ordinary)
        assert replays.has_recorded(sae)
    sae.W_dec.data = 2 * sae.W_dec.data  # other memory
    ordinary.W_dec.data.mul_(2)
    for seed in range(N_STEPS):
        output = run_step(sae, replays.batch(seed))
        assert_same_losses(output, run_step(ordinary, replays.batch(seed)))


@both_architectures
def test_hooks_see_what_they_see_in_ordinary_steps(replays, architecture) -> None:
    sae, ordinary = (make(architecture) for make in (replays.sae, replays.ordinary_sae))
    for seed in range(N_STEPS):
        run_step(sae, replays.batch(seed))
    for model in (sae, ordinary):
        model.b_dec.register_hook(lambda gradient: 2 * gradient)
        model.hook_sae_input.add_hook(lambda x, hook: x + 1)
    for seed in range(N_STEPS):
        output = run_step(sae, replays.batch(seed))
        assert_same_losses(output, run_step(ordinary, replays.batch(seed)))
        assert_same_gradients(sae, ordinary)
        if seed == 2:
            for model in (sae, ordinary):
                model.reset_hooks()


@both_architectures
def test_copies_record_for_themselves(replays, architecture) -> None:
    sae = replays.sae(architecture)
    for seed in range(N_STEPS):
        run_step(sae, replays.batch(seed))
    twin = copy.deepcopy(sae)
    assert isinstance(pickle.loads(pickle.dumps(twin._step_graph)), StepGraph)
    assert twin._step_graph._recording is None
    expected = run_step(sae, replays.batch(9))
    with torch.no_grad():
        sae.W_dec.zero_()
    for _ in range(N_STEPS):
        assert_same_losses(run_step(twin, replays.batch(9)), expected)


@both_architectures
def test_eval_gives_the_memory_back(replays, architecture) -> None:
    sae, ordinary = (make(architecture) for make in (replays.sae, replays.ordinary_sae))
    for _ in range(2):
        sae.train()
        for seed in range(N_STEPS):
            output = run_step(sae, replays.batch(seed))
            assert_same_losses(output, run_step(ordinary, replays.batch(seed)))
        assert replays.has_recorded(sae)
        sae.eval()
        assert sae._step_graph is None


@both_architectures
def test_batches_that_are_not_aligned(replays, architecture) -> None:
    fields = {"d_in": 18}
    sae, ordinary = (make(architecture, **fields) for make in (replays.sae, replays.ordinary_sae))
    for seed in range(N_STEPS):
        batch = replays.batch(seed, BATCH + 1, 18)[1:]
        assert batch.data_ptr() % 16 == 8
        assert_same_losses(run_step(sae, batch), run_step(ordinary, batch))
        assert_same_gradients(sae, ordinary)
    assert replays.has_recorded(sae)


@pytest.mark.gpu
@both_architectures
def test_only_small_steps_are_recorded(architecture, monkeypatch) -> None:
    monkeypatch.setattr(fused_topk, "MOST_RECORDED_WEIGHTS", 1)
    sae = trained_sae(architecture, device="cuda")
    for seed in range(N_STEPS):
        run_step(sae, random_activations(seed=seed).cuda())
    assert sae._step_graph is None


@pytest.mark.gpu
def test_without_memory_steps_go_on_as_they_were(monkeypatch) -> None:
    def too_much(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no more")

    sae, ordinary = trained_sae("flex_topk", device="cuda"), trained_sae("flex_topk", device="cuda")
    ordinary.use_cuda_graph = False
    for seed in range(ORDINARY_CALLS):
        run_step(sae, random_activations(seed=seed).cuda())
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", too_much)
    batch = random_activations(seed=9).cuda()
    expected = run_step(ordinary, batch)
    with pytest.warns(UserWarning, match="too little memory"):
        assert_same_losses(run_step(sae, batch), expected)
    assert_same_losses(run_step(sae, batch), expected)


def test_recording_waits_longer_every_time_that_conditions_change(monkeypatch) -> None:
    recorded, called = [], []

    def record(function, x):
        recorded.append(len(called))
        replay = SimpleNamespace(replay=lambda: None)
        return SimpleNamespace(graph=replay, x=torch.empty_like(x), result="replayed")

    def function(x):
        called.append(x)
        return "called"

    monkeypatch.setattr(step_graph, "_record", record)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    graph, x = StepGraph(), torch.ones(4)
    for conditions, n_called in (("a", 3), ("b", 6), ("a", 12)):
        results = [graph(function, x, conditions) for _ in range(20)]
        assert results == ["called"] * n_called + ["replayed"] * (20 - n_called)
    assert recorded == [3, 9, 21]
