"""The auxiliary loss on a fixed number of latents, of which some are dead."""

from typing import Any

import pytest
import torch
from ops.comparison import every_backend
from saes.comparison import (
    D_SAE,
    FEW_DEAD,
    MANY_DEAD,
    assert_close,
    dead_mask,
    random_activations,
    trained_sae,
)

from sae_lens_flex.ops import selection
from sae_lens_flex.ops.kernels import kept
from sae_lens_flex.training.dead import auxiliary_loss, padded
from sae_lens_flex.training.requests import Gradients, Inputs, WantedGradients, Weights
from sae_lens_flex.training.step import begin_step

from .comparison import ALL, COEFFICIENT, TOLERANCE, Case, D, F, case

HALF = D // 2


def mask_of(some: Case) -> torch.Tensor:
    mask = torch.zeros(F, dtype=torch.bool, device=some.dead.device)
    mask[some.dead] = True
    return mask


def loss_and_gradients(
    some: Case, latents: torch.Tensor, is_dead: torch.Tensor | None = None, wanted: Any = ALL
) -> tuple[torch.Tensor, Gradients]:
    """The loss, and its gradients in the shapes of the weights."""
    main = begin_step(some.weights, some.inputs, some.spec, wanted=wanted)
    loss, gradients = auxiliary_loss(
        some.weights,
        main.rows,
        main.residual,
        latents=latents,
        is_dead=is_dead,
        norms=main.norms,
        coefficient=COEFFICIENT,
        spec=some.spec,
        wanted=wanted,
    )
    return loss, gradients.added_to(Gradients(), some.weights, some.inputs.encoder_input)


def assert_same(found: Gradients, expected: Gradients, tolerance: float) -> None:
    for name, gradient, other in zip(Gradients._fields, found, expected, strict=True):
        if other is None:
            assert gradient is None, name
        else:
            assert gradient is not None
            assert gradient.dtype == other.dtype
            assert_close(gradient, other, tolerance, name)


BY_TORCH = [
    (3, HALF, torch.float64),
    (HALF, HALF, torch.float32),
    (HALF, F, torch.float64),
    (8, 8, torch.float64),
    (8, 16, torch.bfloat16),
    (10, F, torch.float64),
]
# It chooses the largest of the dead latents, where these are more than D // 2.
BY_TRITON = [(3, 8, torch.float32), (8, 16, torch.float32), (8, 16, torch.bfloat16)]


@pytest.mark.parametrize("rescales", [True, False], ids=["rescaled", "not rescaled"])
@pytest.mark.parametrize(
    ("on", "n_dead", "capacity", "dtype"),
    [
        *((("torch", "cpu"), *sizes) for sizes in BY_TORCH),
        *((("triton", "cpu"), *sizes) for sizes in BY_TRITON[1:2] if not torch.cuda.is_available()),
        *(
            pytest.param((by, "cuda"), *sizes, marks=pytest.mark.gpu)
            for by, cases in (("torch", BY_TORCH), ("triton", BY_TRITON))
            for sizes in cases
        ),
    ],
    ids=str,
)
def test_latents_that_are_not_dead_change_nothing(on, n_dead, capacity, dtype, rescales) -> None:
    some = case(on, dtype=dtype, n_dead=n_dead, rescale_acts_by_decoder_norm=rescales)
    expected_loss, expected = loss_and_gradients(some, some.dead)
    latents, is_dead, _ = padded(mask_of(some), capacity)
    assert latents.shape == is_dead.shape == (capacity,)
    loss, found = loss_and_gradients(some, latents, is_dead)
    assert loss.dtype == expected_loss.dtype
    assert_close(loss, expected_loss, TOLERANCE[dtype], "loss")
    assert_same(found, expected, TOLERANCE[dtype])


@every_backend
@pytest.mark.parametrize("is_padded", [True, False])
def test_chunks_of_the_batch_and_lists_of_the_kept_give_the_same(
    on, is_padded, monkeypatch
) -> None:
    some = case(on, n_dead=8)
    dead = padded(mask_of(some), 16)
    latents, is_dead = (dead.latents, dead.is_dead) if is_padded else (some.dead, None)
    expected_loss, expected = loss_and_gradients(some, latents, is_dead)
    monkeypatch.setattr(kept, "MOST_LATENTS", 0)
    of_lists = loss_and_gradients(some, latents, is_dead)
    monkeypatch.undo()
    for name in ("CPU_CHUNK_BYTES", "GPU_CHUNK_BYTES", "GPU_CHUNK_ROWS"):
        monkeypatch.setattr(selection, name, 1)  # a sample a chunk
    for loss, found in (of_lists, loss_and_gradients(some, latents, is_dead)):
        assert_close(loss, expected_loss, 5e-6, "loss")
        assert_same(found, expected, 5e-6)


@every_backend
@pytest.mark.parametrize("capacity", [HALF, 8])
def test_without_dead_latents_loss_and_gradients_are_zero(on, capacity) -> None:
    some = case(on)
    some.inputs = some.inputs._replace(target=some.inputs.target * 1e25)  # its square overflows
    latents, is_dead, _ = padded(mask_of(some), capacity)
    assert not is_dead.any()
    loss, found = loss_and_gradients(some, latents, is_dead)
    assert loss == 0
    for gradient in found:
        assert gradient is None or not gradient.any()


@every_backend
def test_rows_that_no_sample_chose_are_known_to_be_zeros(on) -> None:
    some = case(on, n_dead=8, n_samples=3)
    main = begin_step(some.weights, some.inputs, some.spec, wanted=ALL)
    absent = torch.ones(F, dtype=torch.bool).index_fill(0, main.code.latents.cpu().flatten(), False)
    assert main.is_absent is not None
    assert torch.equal(main.is_absent.cpu(), absent)
    # Of the latents that are called dead here, some are chosen.
    latents = torch.arange(0, F, 3, device=main.is_absent.device)
    assert 0 < absent[::3].sum() < len(latents)
    _, of_dead = auxiliary_loss(
        some.weights,
        main.rows,
        main.residual,
        latents=latents,
        norms=main.norms,
        coefficient=COEFFICIENT,
        spec=some.spec,
        wanted=ALL,
    )
    assert main.gradients.W_enc is not None
    assert main.gradients.W_dec is not None
    assert not main.gradients.W_enc.T[main.is_absent].any()
    assert not main.gradients.W_dec[main.is_absent].any()
    sums = [
        of_dead.added_to(
            Gradients(*(None if each is None else each.clone() for each in main.gradients)),
            some.weights,
            some.inputs.encoder_input,
            is_absent,
        )
        for is_absent in (main.is_absent, None)
    ]
    assert_same(*sums, 0.0)


@every_backend
@pytest.mark.parametrize("n_dead", [3, 8])
def test_weights_of_living_latents_are_not_read(on, n_dead) -> None:
    some = case(on, n_dead=n_dead)
    expected_loss, expected = loss_and_gradients(some, some.dead)
    latents, is_dead, _ = padded(mask_of(some), 2 * n_dead)
    main = begin_step(some.weights, some.inputs, some.spec, wanted=ALL)
    weights = Weights(*(weight.clone() for weight in some.weights))
    living = ~mask_of(some)
    weights.W_dec[living], weights.W_enc[:, living] = torch.nan, torch.inf
    weights.b_enc[living] = torch.nan
    loss, gradients = auxiliary_loss(
        weights,
        main.rows,
        main.residual,
        latents=latents,
        is_dead=is_dead,
        norms=main.norms,
        coefficient=COEFFICIENT,
        spec=some.spec,
        wanted=ALL,
    )
    assert_close(loss, expected_loss, name="loss")
    found = gradients.added_to(Gradients(), weights, some.inputs.encoder_input)
    assert_same(found, expected, 1e-5)


@every_backend
@pytest.mark.parametrize("wanted", ["W_enc", "b_enc", "W_dec", "b_dec", "encoder_input"])
def test_gradients_of_some(on, wanted) -> None:
    some = case(on, n_dead=8)
    _, every = loss_and_gradients(some, some.dead)
    only = WantedGradients(*(name == wanted for name in WantedGradients._fields))
    _, found = loss_and_gradients(some, *padded(mask_of(some), 16)[:2], wanted=only)
    expected = Gradients(**{wanted: getattr(every, wanted)})
    assert_same(found, expected, 1e-5)


@pytest.mark.parametrize("n_dead", [0, 1, FEW_DEAD, 8, MANY_DEAD])
@pytest.mark.parametrize("rescales", [True, False], ids=["rescaled", "not rescaled"])
def test_it_is_saelens_s_in_float64(n_dead, rescales) -> None:
    fields = {"dtype": "float64", "rescale_acts_by_decoder_norm": rescales}
    stock, sae = trained_sae("topk", **fields), trained_sae("flex_topk", **fields)
    x, mask = random_activations(dtype=torch.float64), dead_mask(n_dead)
    acts, hidden_pre = stock.encode_with_hidden_pre(x)
    sae_out = stock.decode(acts)
    expected = stock.calculate_topk_aux_loss(x, sae_out, hidden_pre, mask)
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    if n_dead > 0:
        expected.backward()
    weights = Weights(*(getattr(sae, name).detach() for name in names))
    step_input = sae._request(
        type("Step", (), {"sae_in": x, "is_logging_step": False})  # all that it reads
    )
    for capacity in {max(n_dead, 1), max(n_dead, 8), 32, D_SAE}:
        latents, is_dead, _ = padded(mask, capacity)
        main = begin_step(weights, Inputs(x, x), step_input.spec, wanted=ALL)
        loss, gradients = auxiliary_loss(
            weights,
            main.rows,
            main.residual,
            latents=latents,
            is_dead=is_dead,
            norms=main.norms,
            coefficient=sae.cfg.aux_loss_coefficient,
            spec=step_input.spec,
            wanted=ALL,
        )
        assert_close(loss, expected, 1e-12, "loss")
        found = gradients.added_to(Gradients(), weights, x)
        for name in names:
            theirs = getattr(stock, name).grad
            theirs = torch.zeros_like(getattr(weights, name)) if theirs is None else theirs
            assert_close(getattr(found, name), theirs, 1e-12, name)
