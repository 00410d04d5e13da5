"""Small steps, differentiated at once and replayed as CUDA graphs, against ordinary ones."""

import contextlib
import copy
import gc
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainStepOutput
from saes.comparison import (
    BATCH,
    D_IN,
    D_SAE,
    EVERY_ARCHITECTURE,
    MANY_DEAD,
    K,
    assert_close,
    assert_same_gradients,
    assert_same_losses,
    copy_weights,
    random_activations,
    run_step,
    step_input,
    trained_sae,
)

from sae_lens_flex.training import graph
from sae_lens_flex.training.graph import ORDINARY_CALLS, Recorder, reconstruct_by
from sae_lens_flex.training.requests import Inputs
from sae_lens_flex.training.step import reconstruct

from .comparison import ALL, case
from .replays import Replays, has_recorded, on_no_stream, recording_of

every_architecture = pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)


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
    assert list(output.metrics) == list(expected.metrics)
    for name, value in expected.metrics.items():
        assert_close(output.metrics[name], value, name=name)


@every_architecture
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
    assert has_recorded(sae)


def test_some_levels(replays) -> None:
    fields = {"budgets": [1, 4, K]}
    sae = replays.sae("hierarchical_topk", **fields)
    ordinary = replays.ordinary_sae("hierarchical_topk", **fields)
    for seed in range(N_STEPS):
        output = run_step(sae, replays.batch(seed))
        assert_same_losses(output, run_step(ordinary, replays.batch(seed)))
        assert_same_gradients(sae, ordinary)
    assert has_recorded(sae)


@pytest.mark.parametrize("by_width", [False, True])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_losses_of_widths(replays, by_width, autocast) -> None:
    # Width 1 is mostly level 0. The last batches have fewer positive activations than are kept.
    fields = {"matryoshka_widths": [1, 12, D_SAE], "use_matryoshka_aux_loss": by_width}
    sae, ordinary = (
        make("flex_matryoshka_batchtopk", **fields) for make in (replays.sae, replays.ordinary_sae)
    )
    threshold = sae.topk_threshold
    for seed in range(N_STEPS + 4):
        if seed == N_STEPS:
            for model in (sae, ordinary):
                model.b_enc.data.sub_(2)
        outputs = []
        for model in (sae, ordinary):
            model.zero_grad()
            with torch.autocast(replays.device, torch.bfloat16, enabled=autocast):
                output = model.training_forward_pass(
                    step_input(replays.batch(seed), replays.dead(MANY_DEAD if seed % 2 else 0))
                )
            (output.loss + (seed % 3) * output.losses["inner_mse_loss_12"]).backward()
            outputs.append(output)
        assert_same_outputs(*outputs)
        assert_same_gradients(sae, ordinary)
        assert torch.equal(sae.topk_threshold, ordinary.topk_threshold)
        n_positive = int((outputs[0].feature_acts.to_dense() > 0).sum())
        assert 0 < n_positive <= BATCH * K
        assert (n_positive < BATCH * K) == (seed >= N_STEPS)
    assert has_recorded(sae)
    assert sae.topk_threshold is threshold


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


@every_architecture
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


@every_architecture
def test_several_forward_passes_before_a_backward_pass(replays, architecture) -> None:
    sae, ordinary = (make(architecture) for make in (replays.sae, replays.ordinary_sae))
    for seed in range(N_STEPS):
        run_step(sae, replays.batch(seed))
    assert has_recorded(sae)
    for model in (sae, ordinary):
        model.zero_grad()
        losses = [
            model.training_forward_pass(step_input(replays.batch(seed), replays.dead(n_dead))).loss
            for seed, n_dead in ((20, MANY_DEAD), (21, 0))
        ]
        (losses[0] - 3 * losses[1]).backward()
    assert_same_gradients(sae, ordinary, 1e-4)


@every_architecture
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
        assert has_recorded(sae)
    sae.W_dec.data = 2 * sae.W_dec.data  # other memory
    ordinary.W_dec.data.mul_(2)
    for seed in range(N_STEPS):
        output = run_step(sae, replays.batch(seed))
        assert_same_losses(output, run_step(ordinary, replays.batch(seed)))


@every_architecture
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


@every_architecture
def test_copies_record_for_themselves(replays, architecture) -> None:
    sae = replays.sae(architecture)
    for seed in range(N_STEPS):
        run_step(sae, replays.batch(seed))
    twin = copy.deepcopy(sae)
    assert isinstance(pickle.loads(pickle.dumps(twin._recorder)), Recorder)
    assert not has_recorded(twin)
    expected = run_step(sae, replays.batch(9))
    with torch.no_grad():
        sae.W_dec.zero_()
    for _ in range(N_STEPS):
        assert_same_losses(run_step(twin, replays.batch(9)), expected)


@every_architecture
def test_eval_gives_the_memory_back(replays, architecture) -> None:
    sae, ordinary = (make(architecture) for make in (replays.sae, replays.ordinary_sae))
    for _ in range(2):
        sae.train()
        for seed in range(N_STEPS):
            output = run_step(sae, replays.batch(seed))
            assert_same_losses(output, run_step(ordinary, replays.batch(seed)))
        assert has_recorded(sae)
        sae.eval()
        assert sae._recorder is None


@every_architecture
def test_batches_that_are_not_aligned(replays, architecture) -> None:
    fields = {"d_in": 18}
    sae, ordinary = (make(architecture, **fields) for make in (replays.sae, replays.ordinary_sae))
    for seed in range(N_STEPS):
        batch = replays.batch(seed, BATCH + 1, 18)[1:]
        assert batch.data_ptr() % 16 == 8
        assert_same_losses(run_step(sae, batch), run_step(ordinary, batch))
        assert_same_gradients(sae, ordinary)
    assert has_recorded(sae)


@pytest.mark.gpu
@every_architecture
def test_only_small_steps_are_recorded(architecture, monkeypatch) -> None:
    monkeypatch.setattr(graph, "MOST_RECORDED_WEIGHTS", 1)
    sae = trained_sae(architecture, device="cuda")
    for seed in range(N_STEPS):
        run_step(sae, random_activations(seed=seed).cuda())
    assert sae._recorder is None


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError, ValueError])
def test_no_garbage_is_collected_while_something_is_recorded(monkeypatch, error) -> None:
    # It may hold another recording, and to free that is an error meanwhile.
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    monkeypatch.setattr(graph, "_stream", lambda device: None)
    on_no_stream(monkeypatch)

    def function(inputs: Inputs) -> bool:
        if error is not None:
            raise error("of the function")
        return gc.isenabled()

    expected = {
        None: contextlib.nullcontext(),
        ValueError: pytest.raises(ValueError, match="of the function"),
    }
    with expected.get(error) or pytest.warns(UserWarning, match="too little memory"):
        recording = graph._record(function, case().inputs, None)
        assert (recording is None) == (error is not None)
        assert recording is None or recording.result is False
    assert gc.isenabled()


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


@pytest.mark.gpu
def test_steps_that_cannot_be_recorded_go_on_as_they_were(monkeypatch) -> None:
    reconstruct = graph.reconstruct

    def waiting(*arguments: Any) -> Any:
        result = reconstruct(*arguments)
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()  # which CUDA forbids meanwhile
        return result

    monkeypatch.setattr(graph, "reconstruct", waiting)
    sae, ordinary = trained_sae("flex_topk", device="cuda"), trained_sae("flex_topk", device="cuda")
    ordinary.use_cuda_graph = False
    batch = random_activations(seed=9).cuda()
    expected = run_step(ordinary, batch)
    for _ in range(ORDINARY_CALLS):
        run_step(sae, batch)
    with pytest.warns(UserWarning, match="not recorded as CUDA graphs: .*captur"):
        assert_same_losses(run_step(sae, batch), expected)
    assert 0 <= float(torch.rand((), device="cuda")) < 1  # A broken recording does not forbid it.
    for _ in range(N_STEPS):
        assert_same_losses(run_step(sae, batch), expected)


def test_recording_waits_longer_every_time_that_conditions_change(monkeypatch) -> None:
    recorded, called = [], []

    def record(function, inputs, pool) -> SimpleNamespace:
        recorded.append(len(called))
        replay = SimpleNamespace(replay=lambda: None)
        return graph._Recording(replay, graph._map_inputs(torch.empty_like, inputs), "replayed")

    def function(inputs: Inputs) -> str:
        called.append(inputs)
        return "called"

    monkeypatch.setattr(graph, "_record", record)
    on_no_stream(monkeypatch)
    recorder, inputs = Recorder(), case().inputs
    for conditions, n_called in ((3, 3), (2, 6), (3, 12)):
        results = [recorder(function, inputs, conditions) for _ in range(20)]
        assert results == n_called * [("called", False)] + (20 - n_called) * [("replayed", True)]
        assert len(recorder.recordings) == 1
    assert recorded == [3, 9, 21]


def test_the_two_forms_used_last_stay_recorded(monkeypatch) -> None:
    def record(function, inputs, pool) -> SimpleNamespace:
        form = function(inputs)
        recorded.append((form, pool))
        replay = SimpleNamespace(replay=lambda: None, pool=lambda: form)
        return graph._Recording(replay, graph._map_inputs(torch.empty_like, inputs), None)

    recorded = []
    monkeypatch.setattr(graph, "_record", record)
    on_no_stream(monkeypatch)
    recorder, inputs = Recorder(), case().inputs
    for form in ("a", "b", "a", "c", "a", "b"):
        for _ in range(100):
            recorder(lambda inputs, form=form: form, inputs, "conditions", form=form)
        assert len(recorder.recordings) <= graph.MOST_FORMS
    # Each shares the memory of another one that is kept.
    assert recorded == [("a", None), ("b", "a"), ("c", "a"), ("b", "a")]
    recorder(lambda inputs: "a", inputs, "others", form="a")
    assert recorder.recordings == []


def test_another_form_does_not_make_the_next_ones_wait_longer(monkeypatch) -> None:
    def record(function, inputs, pool) -> SimpleNamespace:
        replay = SimpleNamespace(replay=lambda: None, pool=lambda: None)
        return graph._Recording(replay, graph._map_inputs(torch.empty_like, inputs), None)

    monkeypatch.setattr(graph, "_record", record)
    on_no_stream(monkeypatch)
    recorder, inputs = Recorder(), case().inputs
    for form in range(12):
        is_replay = [
            recorder(lambda inputs: None, inputs, "conditions", form=form)[1] for _ in range(20)
        ]
        assert is_replay == ORDINARY_CALLS * [False] + (20 - ORDINARY_CALLS) * [True]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_loss_gradients_latents_and_hidden_pre_outlast_the_next_call(device, monkeypatch) -> None:
    if device == "cpu":
        Replays(device, monkeypatch)
    some = case(("torch" if device == "cpu" else "triton", device), has_scale=True)
    recorder, batches, kept = Recorder(), [], []
    by = reconstruct_by(recorder)
    for call in range(N_STEPS):
        inputs = some.inputs._replace(
            encoder_input=some.inputs.encoder_input.roll(call, -1),
            target=some.inputs.target + call,
        )
        batches.append(inputs)
        kept.append(by(some.weights, inputs, some.spec, ALL))
    assert len(recorder.recordings) == 1
    for inputs, result in zip(batches, kept, strict=True):
        expected = reconstruct(some.weights, inputs, some.spec, ALL)
        assert torch.equal(result.code.latents, expected.code.latents)
        assert_close(result.mse_loss, expected.mse_loss, name="mse_loss")
        assert_close(result.hidden_pre, expected.hidden_pre, name="hidden_pre")
        for gradient, expected_gradient in zip(result.gradients, expected.gradients, strict=True):
            assert_close(gradient, expected_gradient)


# --- what a recording depends on


def assert_next_steps_are_ordinary(
    replays: Replays, sae: Any, ordinary: Any, n_dead: int = 0, n_steps: int = 2
) -> None:
    for seed in range(n_steps):
        batch, dead = replays.batch(30 + seed), replays.dead(n_dead)
        assert_same_outputs(run_step(sae, batch, dead), run_step(ordinary, batch, dead))
        assert_same_gradients(sae, ordinary)


def recorded_pair(replays: Replays, architecture: str, **fields: Any) -> tuple[Any, Any]:
    """An SAE with a recording, and one without."""
    sae, ordinary = (make(architecture, **fields) for make in (replays.sae, replays.ordinary_sae))
    for seed in range(N_STEPS):
        run_step(sae, replays.batch(seed))
    ordinary.load_state_dict(sae.state_dict())  # with the threshold that it has learned
    assert has_recorded(sae)
    return sae, ordinary


@pytest.mark.parametrize("budgets", [[K], [2, K], [1, 2, 5, K]], ids=str)
def test_budgets_edited_between_replays_act_at_once(replays, budgets) -> None:
    sae, ordinary = recorded_pair(replays, "hierarchical_topk", budgets=[1, 4, K])
    recording = recording_of(sae)
    for model in (sae, ordinary):
        model.cfg.budgets = budgets
    assert_next_steps_are_ordinary(replays, sae, ordinary)
    assert recording_of(sae) is recording  # The level weights are inputs.


@pytest.mark.parametrize("budgets", [None, [1, 4, K]], ids=["every_level", "some_levels"])
def test_level_weights_edited_between_replays_act_at_once(replays, budgets) -> None:
    n_budgets = len(budgets or range(K))
    sae, ordinary = recorded_pair(
        replays, "hierarchical_topk", budgets=budgets, level_weights=[1.0] * n_budgets
    )
    recording = recording_of(sae)
    for weights in ([*range(n_budgets)], [0.0] * (n_budgets - 1) + [2.0]):
        for model in (sae, ordinary):
            model.cfg.level_weights = weights
        assert_next_steps_are_ordinary(replays, sae, ordinary)
        assert recording_of(sae) is recording


def test_budgets_edited_to_none_and_back_act_at_once(replays) -> None:
    sae, ordinary = recorded_pair(replays, "hierarchical_topk", budgets=[1, 4, K])
    for budgets in (None, [3, K], None):
        for model in (sae, ordinary):
            model.cfg.budgets = budgets
        assert_next_steps_are_ordinary(replays, sae, ordinary)


@every_architecture
def test_k_edited_between_replays_acts_at_once(replays, architecture) -> None:
    sae, ordinary = recorded_pair(replays, architecture)
    for k in (3, K):
        for model in (sae, ordinary):
            model.activation_fn.k = model.cfg.k = k
        assert_next_steps_are_ordinary(replays, sae, ordinary)
        outputs = [run_step(model, replays.batch(0)) for model in (sae, ordinary)]
        assert [output.hidden_pre.numel() for output in outputs] == [BATCH * k] * 2


@every_architecture
def test_auxiliary_coefficient_edited_between_replays_acts_at_once(replays, architecture) -> None:
    sae, ordinary = recorded_pair(replays, architecture)
    recording = recording_of(sae)
    for coefficient in (0.125, 0, 3):
        for model in (sae, ordinary):
            model.cfg.aux_loss_coefficient = coefficient
        assert_next_steps_are_ordinary(replays, sae, ordinary, MANY_DEAD)
    assert recording_of(sae) is recording


@every_architecture
@pytest.mark.parametrize("fields", ["rescale_acts_by_decoder_norm", "apply_b_dec_to_input"])
def test_settings_edited_between_replays_act_at_once(replays, architecture, fields) -> None:
    sae, ordinary = recorded_pair(replays, architecture)
    for model in (sae, ordinary):
        setattr(model.cfg, fields, False)
    assert_next_steps_are_ordinary(replays, sae, ordinary)


@every_architecture
def test_deterministic_mode_between_replays(replays, architecture) -> None:
    sae, ordinary = recorded_pair(replays, architecture)
    recording = recording_of(sae)
    torch.use_deterministic_algorithms(True)
    try:
        assert_next_steps_are_ordinary(replays, sae, ordinary)
    finally:
        torch.use_deterministic_algorithms(False)
    assert recording_of(sae) is not recording


@every_architecture
@pytest.mark.parametrize("frozen", [("W_dec",), ("W_enc", "W_dec"), ("b_dec",)], ids="-".join)
def test_weights_frozen_later_get_no_gradient(replays, architecture, frozen) -> None:
    sae, ordinary = recorded_pair(replays, architecture)
    for is_frozen in (True, False):
        for model in (sae, ordinary):
            model.zero_grad()
            for name in frozen:
                model.get_parameter(name).requires_grad_(not is_frozen)
        for seed in range(4 * N_STEPS):  # until it is recorded, too
            batch, dead = replays.batch(seed), replays.dead(MANY_DEAD)
            assert_same_losses(run_step(sae, batch, dead), run_step(ordinary, batch, dead))
            for name, parameter in ordinary.named_parameters():
                gradient = sae.get_parameter(name).grad
                if is_frozen and name in frozen:
                    assert gradient is parameter.grad is None
                else:
                    assert_close(gradient, parameter.grad, name=name)
        assert has_recorded(sae)


@every_architecture
def test_activations_that_need_a_gradient(replays, architecture) -> None:
    sae, ordinary = recorded_pair(replays, architecture)
    for seed in range(3 * N_STEPS):
        needs_gradient = seed < 2 * N_STEPS
        batches = [replays.batch(seed).requires_grad_(needs_gradient) for _ in range(2)]
        output = run_step(sae, batches[0], replays.dead(MANY_DEAD))
        assert_same_losses(output, run_step(ordinary, batches[1], replays.dead(MANY_DEAD)))
        assert_same_gradients(sae, ordinary)
        if needs_gradient:
            assert_close(batches[0].grad, batches[1].grad, name="x")
        else:
            assert batches[0].grad is None
        if seed == 2 * N_STEPS - 1:
            assert has_recorded(sae)


@pytest.mark.parametrize(
    "architecture", [name for name in EVERY_ARCHITECTURE if name != "flex_matryoshka_batchtopk"]
)
@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm_rescale"])
def test_normalized_activations_are_recorded_too(replays, architecture, normalization) -> None:
    fields = {"normalize_activations": normalization, "aux_loss_coefficient": 0}
    sae, ordinary = recorded_pair(replays, architecture, **fields)
    for seed in range(3):
        x, expected_x = (replays.batch(seed) * (seed + 1) + seed for _ in range(2))
        assert_same_outputs(run_step(sae, x), run_step(ordinary, expected_x))
        assert_same_gradients(sae, ordinary)
    for seed in range(2 * N_STEPS):  # a gradient through mean, norm and scale
        batches = [(replays.batch(seed) + seed).requires_grad_() for _ in range(2)]
        run_step(sae, batches[0])
        run_step(ordinary, batches[1])
        assert_same_gradients(sae, ordinary)
        assert_close(batches[0].grad, batches[1].grad, name="x")
    assert has_recorded(sae)


@every_architecture
def test_evaluation_between_steps_leaves_the_recording(replays, architecture) -> None:
    sae, ordinary = recorded_pair(replays, architecture)
    recording = recording_of(sae)
    with torch.no_grad():
        for n_samples in (BATCH, 5):
            batch = replays.batch(40, n_samples, D_IN)
            output = sae.training_forward_pass(step_input(batch, replays.dead(MANY_DEAD)))
            expected = ordinary.training_forward_pass(step_input(batch, replays.dead(MANY_DEAD)))
            assert_same_outputs(output, expected)
            assert not output.loss.requires_grad
            assert_close(sae(batch), ordinary(batch), name="output")
    assert has_recorded(sae)
    assert_next_steps_are_ordinary(replays, sae, ordinary)
    assert recording_of(sae) is recording


@every_architecture
def test_second_backward_pass_of_a_replay_computes_its_own_step_again(
    replays, architecture
) -> None:
    sae, ordinary = recorded_pair(replays, architecture)
    losses = []
    for model in (sae, ordinary):
        model.zero_grad()
        first = model.training_forward_pass(step_input(replays.batch(50), replays.dead(MANY_DEAD)))
        first.loss.backward(retain_graph=True)
        run_step(model, replays.batch(51))  # It replays the recording, and resets the gradients.
        model.zero_grad()
        first.losses["mse_loss"].backward()
        losses.append(first)
    assert_same_outputs(*losses)
    assert_same_gradients(sae, ordinary)


@every_architecture
def test_unequal_memory_of_the_inputs_is_kept_apart(replays, architecture) -> None:
    # Without normalization the encoder's input and the target are one tensor; with a hook two.
    sae, ordinary = recorded_pair(replays, architecture)
    for model in (sae, ordinary):
        model.hook_sae_input.add_hook(lambda x, hook: 2 * x)
    assert_next_steps_are_ordinary(replays, sae, ordinary, n_steps=4 * N_STEPS)
    assert has_recorded(sae)
    for model in (sae, ordinary):
        model.reset_hooks()
    assert_next_steps_are_ordinary(replays, sae, ordinary)
