"""A training step as a function of tensors, against its definition in float64."""

import itertools
from dataclasses import replace

import pytest
import torch
from ops.comparison import BACKENDS, DEVICES, every_backend

from sae_lens_flex.ops import selection
from sae_lens_flex.training.dead import Dead, nonzero_later
from sae_lens_flex.training.requests import WantedGradients
from sae_lens_flex.training.step import begin_step, finish_step, step

from .comparison import ALL, TOLERANCE, B, D, assert_is_the_definition, case, expected_of

FEW_DEAD, MANY_DEAD = D // 2 - 1, D // 2 + 4
LEVELS = {
    "every": {"levels": "every"},
    "last": {"levels": "last"},
    "weighted": {"level_weights": torch.tensor([0.5, 0.0, 2.0, 0.25])},
}
NONE = WantedGradients(*[False] * 7)
# At least one of every kind: a weight or an input alone, pairs that share a product, all but one.
SOME_SUBSETS = [
    WantedGradients(*(name in names for name in WantedGradients._fields))
    for names in (
        ("W_enc",),
        ("b_enc",),
        ("W_dec",),
        ("b_dec",),
        ("encoder_input",),
        ("target",),
        ("output_scale",),
        ("b_enc", "b_dec"),
        ("W_enc", "W_dec"),
        ("b_enc", "b_dec", "encoder_input"),
        ("W_dec", "b_dec", "target", "output_scale"),
        ("W_enc", "b_enc", "W_dec", "b_dec"),
    )
]


@every_backend
@pytest.mark.parametrize(
    ("levels", "n_dead"),
    [
        ("every", 0),
        ("every", MANY_DEAD),
        ("last", 1),
        ("last", D // 2),
        ("weighted", FEW_DEAD),
    ],
)
def test_losses_and_gradients_match_the_definition(on, levels, n_dead) -> None:
    assert_is_the_definition(case(on, n_dead=n_dead, has_scale=True, **LEVELS[levels]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("has_scale", [True, False], ids=["scaled", "not_scaled"])
@pytest.mark.parametrize("rescale", [True, False], ids=["by_norm", "by_activation"])
@pytest.mark.parametrize("apply_b_dec", [True, False], ids=["b_dec", "no_b_dec"])
@pytest.mark.parametrize("n_dead", [0, 1, FEW_DEAD, D // 2, MANY_DEAD])
def test_every_setting(device, levels, has_scale, rescale, apply_b_dec, n_dead) -> None:
    settings = {"rescale_acts_by_decoder_norm": rescale, "apply_b_dec_to_input": apply_b_dec}
    on = ("torch", device)
    assert_is_the_definition(
        case(on, has_scale=has_scale, n_dead=n_dead, **settings, **LEVELS[levels])
    )


@every_backend
@pytest.mark.parametrize("rescale", [True, False], ids=["by_norm", "by_activation"])
@pytest.mark.parametrize("apply_b_dec", [True, False], ids=["b_dec", "no_b_dec"])
def test_settings_without_output_scale(on, rescale, apply_b_dec) -> None:
    settings = {"rescale_acts_by_decoder_norm": rescale, "apply_b_dec_to_input": apply_b_dec}
    assert_is_the_definition(case(on, n_dead=MANY_DEAD, levels="every", **settings))


# --- wanted gradients


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("levels", ["every", "last"])
@pytest.mark.parametrize("has_scale", [True, False], ids=["scaled", "not_scaled"])
@pytest.mark.parametrize("apply_b_dec", [True, False], ids=["b_dec", "no_b_dec"])
@pytest.mark.parametrize("n_dead", [0, FEW_DEAD, MANY_DEAD])
def test_every_subset_of_gradients(device, levels, has_scale, apply_b_dec, n_dead) -> None:
    some = case(
        ("torch", device),
        levels=levels,
        has_scale=has_scale,
        n_dead=n_dead,
        apply_b_dec_to_input=apply_b_dec,
    )
    expected = expected_of(some)
    for flags in itertools.product((False, True), repeat=7):
        assert_is_the_definition(some, WantedGradients(*flags), expected=expected)


@every_backend
@pytest.mark.parametrize(
    "subset",
    SOME_SUBSETS,
    ids=lambda subset: "-".join(
        name for name, is_wanted in zip(subset._fields, subset, strict=True) if is_wanted
    ),
)
def test_some_subsets_of_gradients(on, subset) -> None:
    assert_is_the_definition(case(on, has_scale=True, levels="every", n_dead=FEW_DEAD), subset)


@every_backend
def test_no_gradients(on) -> None:
    result = assert_is_the_definition(case(on, levels="every", n_dead=MANY_DEAD), NONE)
    assert all(gradient is None for gradient in result.main.gradients)


@pytest.mark.parametrize("device", DEVICES)
def test_weights_that_ask_for_gradients_are_only_read(device) -> None:
    some = case(("torch", device), has_scale=True, n_dead=FEW_DEAD)
    before = [tensor.clone() for tensor in (*some.weights, *some.inputs[:3])]
    for tensor in (*some.weights, *some.inputs[:3]):
        tensor.requires_grad_()
    result = some.step()
    assert not result.main.mse_loss.requires_grad
    assert not result.auxiliary_loss.requires_grad
    for tensor, copy in zip((*some.weights, *some.inputs[:3]), before, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor.grad is None


# --- dtypes


@every_backend
@pytest.mark.parametrize(
    ("dtype", "levels"), [(torch.bfloat16, "every"), (torch.float16, "last")], ids=str
)
def test_16_bit_weights(on, dtype, levels) -> None:
    some = case(on, dtype=dtype, levels=levels, n_dead=FEW_DEAD, has_scale=True)
    assert_is_the_definition(some, tolerance=2 * TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("levels", ["every", "last"])
@pytest.mark.parametrize("n_dead", [0, MANY_DEAD])
def test_float64(device, levels, n_dead) -> None:
    on = ("torch", device)
    assert_is_the_definition(
        case(on, dtype=torch.float64, levels=levels, n_dead=n_dead, has_scale=True)
    )


@every_backend
@pytest.mark.parametrize(("levels", "has_scale"), [("every", False), ("last", True)])
def test_products_in_a_lower_precision(on, levels, has_scale) -> None:
    some = case(
        on,
        levels=levels,
        has_scale=has_scale,
        n_dead=MANY_DEAD,
        product_dtype=torch.bfloat16,  # as under autocast
    )
    dtype = torch.bfloat16
    assert_is_the_definition(some, computed_in=dtype, tolerance=2 * TOLERANCE[dtype])


@every_backend
def test_spec_and_not_autocast_says_in_which_dtype_products_are(on) -> None:
    some = case(on, levels="every", n_dead=FEW_DEAD)
    with torch.autocast(on[1], torch.bfloat16):
        assert_is_the_definition(some)


# --- sizes, layouts, chunks


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("levels", ["every", "last"])
def test_losses_average_over_the_samples_that_spec_says(device, levels) -> None:
    # B may be a share of the batch.
    some = case(("torch", device), levels=levels, n_dead=MANY_DEAD)
    some.spec = replace(some.spec, n_samples=5 * B)
    result = assert_is_the_definition(some)
    some.spec = replace(some.spec, n_samples=B)
    whole = some.step()
    torch.testing.assert_close(5 * result.main.mse_loss, whole.main.mse_loss)
    torch.testing.assert_close(5 * result.auxiliary_loss, whole.auxiliary_loss)


@every_backend
def test_contiguous_encoder(on) -> None:
    some = case(on, levels="every", n_dead=MANY_DEAD, latent_major=False)
    assert some.weights.W_enc.is_contiguous()
    assert_is_the_definition(some)


@every_backend
@pytest.mark.parametrize(("n_samples", "k"), [(1, 12), (4, 1)])
def test_other_sizes(on, n_samples, k) -> None:
    some = case(on, levels="every", n_dead=FEW_DEAD, n_samples=n_samples, k=k)
    some.spec = replace(some.spec, n_samples=5 * B)  # B may be a share of the batch.
    assert_is_the_definition(some)


@every_backend
@pytest.mark.parametrize("n_dead", [FEW_DEAD, MANY_DEAD])  # all kept, or some
def test_chunks_of_one_sample(on, n_dead, monkeypatch) -> None:
    monkeypatch.setattr(selection, "CPU_CHUNK_BYTES", 1)
    monkeypatch.setattr(selection, "GPU_CHUNK_BYTES", 1)
    monkeypatch.setattr(selection, "GPU_CHUNK_ROWS", 1)
    assert_is_the_definition(case(on, levels="last", n_dead=n_dead))


@every_backend
def test_frozen_input_gets_no_gradient_from_dead_latents(on) -> None:
    wanted = ALL._replace(encoder_input=False)
    result = assert_is_the_definition(case(on, n_dead=MANY_DEAD), wanted)
    assert result.auxiliary_gradients.encoder_input is None
    assert result.auxiliary_gradients.b_enc is not None


@pytest.mark.parametrize(
    "on",
    [on for on in BACKENDS if on.id != "torch-cuda"],  # torch.cumsum refuses there
)
@pytest.mark.parametrize("levels", ["every", "last"])
def test_deterministic_steps_are_equal_from_run_to_run(on, levels) -> None:
    some = case(on, levels=levels, n_dead=MANY_DEAD, deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        first = assert_is_the_definition(some)
        again = some.step()
    finally:
        torch.use_deterministic_algorithms(False)
    for value, expected in zip(
        (again.main.mse_loss, again.auxiliary_loss, *again.main.gradients),
        (first.main.mse_loss, first.auxiliary_loss, *first.main.gradients),
        strict=True,
    ):
        assert value is expected is None or torch.equal(value, expected)
    tensors = (result.auxiliary_gradients.tensors() for result in (again, first))
    for value, expected in zip(*tensors, strict=True):
        assert torch.equal(value, expected)


# --- no dead latents


@pytest.mark.parametrize("device", DEVICES)
def test_without_an_auxiliary_loss_nobody_asks_which_latents_are_dead(device) -> None:
    some = case(("torch", device), n_dead=MANY_DEAD)
    result = step(some.weights, some.inputs, some.spec, wanted=ALL)
    assert result.auxiliary_loss is result.auxiliary_gradients is None
    assert torch.equal(result.main.mse_loss, some.step().main.mse_loss)


@pytest.mark.parametrize("device", DEVICES)
def test_dead_latents_are_asked_for_last(device) -> None:
    some, calls = case(("torch", device), n_dead=FEW_DEAD), []

    def latents() -> torch.Tensor:
        calls.append("latents")
        return some.dead

    def by(*arguments):
        calls.append("reconstruct")
        return some.step().main

    arguments = some.weights, some.inputs, some.spec
    main = begin_step(*arguments, wanted=ALL, by=by)
    assert calls == ["reconstruct"]
    finish_step(main, *arguments, wanted=ALL, dead=Dead(latents, 1.0))
    assert calls == ["reconstruct", "latents"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_set", [0, 1, 1000])
def test_nonzero_later_is_nonzero(device, n_set) -> None:
    mask = torch.arange(1000, device=device) < n_set
    mask = mask[torch.randperm(1000, device=device)]
    wait = nonzero_later(mask)
    assert torch.equal(wait(), mask.nonzero().squeeze(-1))


@pytest.mark.gpu
def test_nonzero_later_waits_only_when_it_is_asked() -> None:
    mask = torch.arange(1000, device="cuda") % 3 == 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        wait = nonzero_later(mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(wait(), mask.nonzero().squeeze(-1))
