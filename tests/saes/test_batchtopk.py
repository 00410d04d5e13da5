"""The architectures of a batch against SAELens's."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from comparison import (
    D_SAE,
    DEVICES,
    FEW_DEAD,
    MANY_DEAD,
    STOCK,
    assert_close,
    assert_same_gradients,
    assert_same_losses,
    dead_mask,
    new_sae,
    random_activations,
    run_step,
    step_input,
    trained_sae,
    training_config,
)
from sae_lens import SAE, SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.topk_sae import TopK
from torch.utils.checkpoint import checkpoint
from trainings import OPTIONS, TRAININGS, Training, steps_beside

from sae_lens_flex import accelerate, shard
from sae_lens_flex.acceleration import trainer_step

# An architecture, and fields of its own. Of small widths many samples have no latent.
CASES = {
    "flex_batchtopk": ("flex_batchtopk", {}),
    "matryoshka": ("flex_matryoshka_batchtopk", {"matryoshka_widths": [3, 8, 20]}),
    "matryoshka-aux_loss_by_width": (
        "flex_matryoshka_batchtopk",
        {"matryoshka_widths": [6, 11, 30], "use_matryoshka_aux_loss": True},
    ),
}
every_case = pytest.mark.parametrize(("architecture", "own"), CASES.values(), ids=CASES)
every_architecture = pytest.mark.parametrize(
    "architecture", ["flex_batchtopk", "flex_matryoshka_batchtopk"]
)


def same_sae(architecture: str, **fields: Any) -> tuple[Any, Any]:
    """SAELens's SAE and ours, with equal weights."""
    return trained_sae(STOCK[architecture], **fields), trained_sae(architecture, **fields)


def has_a_near_tie(compared: torch.Tensor, n: int) -> bool:
    """Whether rounding decides which n of each row are the largest."""
    if compared.shape[1] <= n:
        return False
    highest = compared.relu().topk(n + 1).values
    is_near = highest[:, -2] - highest[:, -1] <= 2e-6 * compared.abs().max()
    return bool((is_near & (highest[:, -2] > 0)).any())


def near_ties(sae: Any, expected: Any, dead: torch.Tensor, d_in: int) -> bool:
    """Whether rounding decides what a step of SAELens's keeps: for the main loss, or the other."""
    n_kept = int(sae.activation_fn.k * len(expected.hidden_pre))
    if has_a_near_tie(expected.hidden_pre.flatten().unsqueeze(0), n_kept):
        return True
    of_dead = expected.hidden_pre[:, dead]
    return has_a_near_tie(
        of_dead - of_dead.amin().clamp(max=0) if of_dead.numel() else of_dead, d_in // 2
    )


# The other options meet nothing that is not met in flex_topk.
STEPS = [
    pytest.param(*CASES[name], *option.values, id=f"{name}-{option.id}")
    for name in CASES
    for option in OPTIONS
    if option.id == "default" or (option.id == "neither" and name == "flex_batchtopk")
]


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize(("architecture", "own", "options"), STEPS)
def test_every_step_is_that_of_stock(architecture, own, options, training: Training) -> None:
    if training.backend == "triton" and training.device == "cpu":  # the interpreter is slow
        if own.get("use_matryoshka_aux_loss") or options != OPTIONS[0].values[0]:
            pytest.skip("these are met on a GPU, and by PyTorch")
        training = dataclasses.replace(training, n_steps=3)
    torch.manual_seed(0)
    # SAELens appends the last width to the list that it is given.
    fields = {**training.fields(), "k": training.k + 0.3, **options, **copy.deepcopy(own)}
    stock = new_sae(STOCK[architecture], **fields)
    flex = new_sae(architecture, **fields, backend=training.backend)
    n_ties = 0
    for expected, output, dead in steps_beside(training, stock, flex):
        if near_ties(stock, expected, dead, training.d_in):
            n_ties += 1
            flex.topk_threshold.copy_(stock.topk_threshold)
        else:
            assert_close(output.sae_out, expected.sae_out, name="sae_out")
            assert_same_losses(output, expected)
            assert_same_gradients(flex, stock)
            assert_close(output.feature_acts.to_dense(), expected.feature_acts, name="acts")
            assert_close(flex.topk_threshold, stock.topk_threshold, 1e-6, "topk_threshold")
            assert torch.equal(output.metrics["topk_threshold"], flex.topk_threshold)
            assert list(output.metrics) == list(expected.metrics)
    assert n_ties <= max(1, 2 * training.most_ties * training.n_steps)


def matryoshka_pair(**fields: Any) -> tuple[Any, Any]:
    # Width 1 is mostly level 0, and some samples have no latent below 12.
    fields = {"matryoshka_widths": [1, 12, 30, D_SAE], "k": 2, **fields}
    architecture = "flex_matryoshka_batchtopk"
    return trained_sae(STOCK[architecture], **fields), trained_sae(architecture, **fields)


WEIGHTS = {
    "one_inner": {"inner_mse_loss_12": 2.0},
    "outer": {"mse_loss": 1.0},
    "all_inner": {"inner_mse_loss_1": 1.0, "inner_mse_loss_12": 0.0, "inner_mse_loss_30": -3.0},
    "auxiliary": {"auxiliary_reconstruction_loss": 1.5},
    "auxiliary_and_inner": {"auxiliary_reconstruction_loss": 1.5, "inner_mse_loss_30": 1.0},
    "with_total": {"total": 1.0, "inner_mse_loss_30": 0.5},
}


@pytest.mark.parametrize("by_width", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_each_loss_of_a_width_has_its_gradient(weights, by_width) -> None:
    pair = matryoshka_pair(use_matryoshka_aux_loss=by_width)
    for sae in pair:
        output = sae.training_forward_pass(step_input(random_activations(), dead_mask(MANY_DEAD)))
        losses = {**output.losses, "total": output.loss}
        sum(weight * losses[name] for name, weight in weights.items()).backward()
    stock, flex = pair
    for name, parameter in stock.named_parameters():
        gradient = flex.get_parameter(name).grad
        if parameter.grad is None or not parameter.grad.any():
            assert gradient is None or not gradient.any()
        else:
            assert_close(gradient, parameter.grad, name=name)


def test_losses_of_widths_are_differentiated_one_after_the_other() -> None:
    stock, flex = matryoshka_pair()
    dead = dead_mask(FEW_DEAD)
    expected = run_step(stock, random_activations(), dead)
    output = flex.training_forward_pass(step_input(random_activations(), dead))
    for loss in output.losses.values():
        loss.backward(retain_graph=True)
    assert_same_losses(output, expected)
    assert_same_gradients(flex, stock)
    output.loss.backward()
    for parameter in stock.parameters():
        parameter.grad.mul_(2)
    assert_same_gradients(flex, stock)


def assert_same_step(stock: Any, flex: Any, dead: torch.Tensor | None = None, **kw: Any) -> Any:
    expected = run_step(stock, random_activations(**kw), dead)
    output = run_step(flex, random_activations(**kw), dead)
    assert_same_losses(output, expected)
    assert_same_gradients(flex, stock)
    assert_close(output.feature_acts.to_dense(), expected.feature_acts, name="feature_acts")
    assert_close(flex.topk_threshold, stock.topk_threshold, 1e-6, "topk_threshold")
    return output


@pytest.mark.parametrize("k", [1 / 48, 0.3, 2.5, 7, D_SAE])
@every_architecture
def test_k_is_a_mean_that_need_not_be_whole(architecture, k) -> None:
    stock, flex = same_sae(architecture, k=k)
    output = assert_same_step(stock, flex, dead_mask(FEW_DEAD))
    n_positive = int((output.feature_acts.to_dense() > 0).sum())
    assert n_positive == int(k * len(random_activations())) or k == D_SAE


@every_architecture
def test_where_nothing_is_positive_the_threshold_stays(architecture) -> None:
    stock, flex = same_sae(architecture)
    for sae in (stock, flex):
        run_step(sae, random_activations())
        sae.b_enc.data.sub_(100)
    before = flex.topk_threshold.clone()
    assert before > 0
    output = assert_same_step(stock, flex)
    assert not output.feature_acts.to_dense().any()
    assert torch.equal(flex.topk_threshold, before)


@pytest.mark.parametrize("n_dead", [0, FEW_DEAD])
def test_a_checkpoint_that_computes_again_moves_the_threshold_once(n_dead) -> None:
    stock, ours = same_sae("flex_batchtopk")
    x, dead = random_activations(), dead_mask(n_dead) if n_dead else None
    for sae in (stock, ours):
        step = lambda sae=sae: sae.training_forward_pass(step_input(x, dead)).loss  # noqa: E731
        checkpoint(step, use_reentrant=False).backward()
    assert_close(ours.topk_threshold, stock.topk_threshold, 1e-6, "threshold")


@every_architecture
def test_threshold_is_one_buffer_and_each_metric_its_own(architecture) -> None:
    stock, flex = same_sae(architecture)
    buffer, metrics = flex.topk_threshold, []
    for seed in range(3):
        expected = run_step(stock, random_activations(seed=seed))
        metrics.append(run_step(flex, random_activations(seed=seed)).metrics["topk_threshold"])
        assert metrics[-1].dtype == torch.float64
        assert_close(metrics[-1], expected.metrics["topk_threshold"], 1e-6, "metric")
    assert flex.topk_threshold is buffer
    assert len({float(metric) for metric in metrics}) == 3
    flex.fold_activation_norm_scaling_factor(2.0)
    stock.fold_activation_norm_scaling_factor(2.0)
    assert_close(flex.topk_threshold, stock.topk_threshold, 1e-6, "topk_threshold")


@every_architecture
def test_activation_fn_says_how_many_are_kept(architecture) -> None:
    stock, flex = same_sae(architecture, k=6)
    for sae in (stock, flex):
        sae.activation_fn.k = 2.5
    assert_same_step(stock, flex)
    flex.activation_fn.k = D_SAE + 1
    with pytest.raises(ValueError, match=r"activation_fn.k is 49, expected .* d_sae \(48\)"):
        run_step(flex, random_activations())


@pytest.mark.parametrize("path", ["fused", "unfused"])
@every_architecture
def test_a_threshold_update_of_a_subclass_is_called(architecture, path) -> None:
    class Counting(type(trained_sae(architecture))):
        def update_topk_threshold(self, acts_topk: torch.Tensor) -> None:
            self.topk_threshold.fill_(float((acts_topk > 0).sum()))

    sae = Counting(trained_sae(architecture, k=3).cfg)
    sae.use_fused_path = path == "fused"
    output = run_step(sae, random_activations())
    n_kept = 3 * len(random_activations())
    assert sae.topk_threshold == output.metrics["topk_threshold"] == n_kept


@pytest.mark.parametrize("name", ["_iterable_decode", "calculate_matryoshka_aux_loss"])
def test_decoding_that_a_user_replaced_is_called(name) -> None:
    stock, flex = matryoshka_pair(use_matryoshka_aux_loss=True)
    dead, calls = dead_mask(FEW_DEAD), []
    for sae in (stock, flex):
        own = getattr(sae, name)

        def replacement(*args: Any, own: Any = own, **kwargs: Any) -> Any:
            calls.append(name)
            if name == "calculate_matryoshka_aux_loss":
                return 2 * own(*args, **kwargs)
            return ((width, 0.5 * output) for width, output in own(*args, **kwargs))

        setattr(sae, name, replacement)
    expected = run_step(stock, random_activations(), dead)
    n_calls = len(calls)
    with pytest.warns(UserWarning, match=f"{name} is not SAELens's own"):
        output = run_step(flex, random_activations(), dead)
    assert len(calls) == 2 * n_calls > 0
    assert_same_losses(output, expected)
    assert_same_gradients(flex, stock)


@every_architecture
def test_an_activation_function_of_samples_is_taken_as_it_is(architecture) -> None:
    stock, flex = same_sae(architecture)
    for sae in (stock, flex):
        sae.activation_fn = TopK(3)
    with pytest.warns(UserWarning, match="activation_fn is not SAELens's own"):
        output = run_step(flex, random_activations())
    expected = run_step(stock, random_activations())
    assert_same_losses(output, expected)
    assert_same_gradients(flex, stock)


@pytest.mark.parametrize("rescale", [True, False])
@every_architecture
def test_saved_for_inference_it_is_the_jumprelu_that_stock_saves(
    architecture, rescale, tmp_path
) -> None:
    pair = same_sae(architecture, rescale_acts_by_decoder_norm=rescale)
    loaded = []
    for number, sae in enumerate(pair):
        for seed in range(3):
            run_step(sae, random_activations(seed=seed))
        sae.save_inference_model(tmp_path / str(number))
        loaded.append(SAE.load_from_disk(tmp_path / str(number)))
        assert type(loaded[-1]) is JumpReLUSAE
    expected, mine = loaded
    for name, value in expected.state_dict().items():
        assert_close(mine.state_dict()[name], value, name=name)
    batch = random_activations()
    assert_close(mine.encode(batch), expected.encode(batch), name="feature_acts")
    assert_close(mine(batch), expected(batch), name="output")
    assert mine.encode(batch).any()


@every_architecture
def test_a_training_checkpoint_goes_on_as_it_was(architecture, tmp_path) -> None:
    sae = trained_sae(architecture)
    run_step(sae, random_activations())
    sae.save_model(tmp_path)
    loaded = type(sae).load_from_disk(tmp_path)
    assert type(loaded) is type(sae)
    assert loaded.cfg.to_dict() == sae.cfg.to_dict()
    for one in (sae, loaded):
        run_step(one, random_activations(seed=3))
    # SAELens loads it in the dtype of the weights.
    assert_close(loaded.topk_threshold, sae.topk_threshold, 1e-6, "topk_threshold")
    assert_same_gradients(loaded, sae, 0)


@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("rescale", [True, False])
def test_run_time_normalization_is_that_of_stock(normalization, rescale) -> None:
    fields = {"normalize_activations": normalization, "aux_loss_coefficient": 0, "k": 4.5}
    stock, flex = same_sae("flex_batchtopk", **fields, rescale_acts_by_decoder_norm=rescale)
    assert_same_step(stock, flex)


@every_architecture
def test_gradient_of_the_input_is_that_of_stock(architecture) -> None:
    inputs = [random_activations().requires_grad_() for _ in range(2)]
    for sae, x in zip(same_sae(architecture), inputs, strict=True):
        run_step(sae, x, dead_mask(MANY_DEAD))
    assert_close(inputs[1].grad, inputs[0].grad, name="gradient of sae_in")


WRONG_FIELDS = [
    ({"k": 0}, r"k is 0, expected a finite number above 0"),
    ({"k": D_SAE + 0.5}, r"k is 48\.5, expected a number up to d_sae \(48\)"),
    ({"k": True}, r"k is True, expected a finite number"),
    ({"topk_threshold_lr": -1}, r"topk_threshold_lr is -1, expected"),
    ({"normalize_activations": "layer_norm"}, r"normalize_activations is 'layer_norm'.*, expected"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG_FIELDS, ids=str)
@every_architecture
def test_wrong_field_is_an_error_that_names_it(architecture, fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        training_config(architecture, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"matryoshka_widths": 7}, r"matryoshka_widths is 7, expected a list of integers"),
        ({"matryoshka_widths": [3, 2.5]}, r"an element of matryoshka_widths is 2\.5, expected"),
        ({"matryoshka_widths": [3, 99]}, r"an element of matryoshka_widths is 99, expected .*48"),
        (
            {"normalize_activations": "layer_norm", "aux_loss_coefficient": 0},
            r"normalize_activations is 'layer_norm', expected another one",
        ),
        ({"use_matryoshka_aux_loss": 1}, r"use_matryoshka_aux_loss is 1, expected true or false"),
    ],
    ids=str,
)
def test_wrong_field_of_a_matryoshka_is_an_error_that_names_it(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        training_config("flex_matryoshka_batchtopk", **fields)


@pytest.mark.parametrize("widths", [[], [5, 5], [9, 3]], ids=str)
def test_widths_that_stock_refuses_are_refused(widths) -> None:
    for architecture in ("matryoshka_batchtopk", "flex_matryoshka_batchtopk"):
        with pytest.raises(ValueError, match=r"cfg\.matryoshka_widths must"):
            trained_sae(architecture, matryoshka_widths=widths)


@every_architecture
def test_several_processes_are_refused_by_name(architecture) -> None:
    with pytest.raises(NotImplementedError, match=r"BatchTopKTrainingSAE, .* one process only"):
        shard(trained_sae(architecture))


@pytest.mark.parametrize("device", DEVICES)
@every_architecture
def test_deterministic_steps_are_equal_from_run_to_run(architecture, device) -> None:
    if device == "cuda":
        pytest.importorskip("triton")
    sae = trained_sae(architecture, device=device)
    x, dead = random_activations().to(device), dead_mask(MANY_DEAD).to(device)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            output = run_step(sae, x, dead)
            runs.append([output.loss, *(parameter.grad.clone() for parameter in sae.parameters())])
    finally:
        torch.use_deterministic_algorithms(False)
    for value, expected in zip(*runs, strict=True):
        assert torch.equal(value, expected)
    assert_close(runs[0][0], run_step(sae, x, dead).loss, name="loss")


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("n_dead", [0, FEW_DEAD, MANY_DEAD])
@every_case
def test_a_step_waits_for_the_number_of_dead_latents_alone(
    architecture, own, n_dead, autocast
) -> None:
    sae = trained_sae(architecture, device="cuda", **copy.deepcopy(own))
    sae.use_cuda_graph = False
    x, dead = random_activations().cuda(), dead_mask(n_dead).cuda()
    outputs = []
    for mode in ("default", "error"):
        # The first step makes what later ones keep. The mode does not see waits for an event, by
        # which the number of dead latents comes.
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                outputs.append(run_step(sae, x, dead))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert (outputs[1].losses["auxiliary_reconstruction_loss"] > 0) == (n_dead > 0)
    assert_same_losses(*outputs)


@pytest.mark.gpu
@every_architecture
def test_a_step_at_scale_is_that_of_pytorch(architecture) -> None:
    fields = {"d_in": 200, "d_sae": 5000, "k": 20.5, "device": "cuda"}
    saes = [trained_sae(architecture, backend=name, **fields) for name in ("torch", "triton")]
    x = random_activations(1001, 200).cuda()
    x[7] *= 30  # which takes most of the batch's latents
    expected, output = (run_step(sae, x, dead_mask(3000, 5000).cuda()) for sae in saes)
    assert int(expected.feature_acts.to_dense()[7].count_nonzero()) > 1000
    kept = [each.feature_acts.to_dense() > 0 for each in (output, expected)]
    # The two compute pre-activations with different rounding.
    n_different = int((kept[0] != kept[1]).sum())
    assert n_different <= 4
    tolerance = 1e-5 if n_different == 0 else 1e-3
    assert_same_losses(output, expected, tolerance)
    assert_same_gradients(saes[1], saes[0], tolerance)


@every_architecture
def test_a_step_that_accelerate_passes_on_learns_the_threshold(architecture, monkeypatch) -> None:
    batches = [random_activations(seed=seed) for seed in range(4)]
    results = []
    for is_plain in (False, True):
        sae = trained_sae(architecture)
        trainer = SAETrainer(
            SAETrainerConfig(
                total_training_samples=len(batches) * len(batches[0]),
                train_batch_size_samples=len(batches[0]),
                lr_end=3e-5,
            ),
            sae=sae,
            data_provider=iter(batches),
        )
        monkeypatch.setattr(trainer_step, "may_take_whole_steps", lambda *_: is_plain)  # noqa: B023
        with accelerate():
            outputs = [trainer.step(batch) for batch in batches]
        results.append((sae.topk_threshold, *(output.loss for output in outputs)))
        assert all("topk_threshold" in output.metrics for output in outputs)
    assert results[0][0] > 0
    for value, expected in zip(*results, strict=True):
        assert torch.equal(value, expected)
