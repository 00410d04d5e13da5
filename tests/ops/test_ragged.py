"""Products and decoder losses of rows of different length, against their definition in float64."""

import dataclasses

import pytest
import torch

from sae_lens_flex.ops import (
    hierarchical_sae_loss,
    products,
    topk_sae_loss,
    triton_hierarchical_sae_loss,
    triton_topk_sae_loss,
)
from sae_lens_flex.ops.codes import Code
from sae_lens_flex.ops.kernels import copies
from sae_lens_flex.ops.losses import decoder_loss
from sae_lens_flex.ops.products import gather, scatter

from .comparison import KERNEL_DEVICES, TOLERANCE, every_backend, relative_error
from .ragged import (
    LENGTHS,
    ascending,
    exact,
    lengths_of,
    ragged_code,
    ragged_request,
    random_level_weights,
)

F, D = 29, 37

every_length = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)


def assert_is_the_definition(request, on, tolerance: float | None = None) -> None:
    result = decoder_loss(request, use_triton=on[0] == "triton")
    expected, magnitude = exact(request), exact(request, magnitude=True)
    for name, value in expected.items():
        mine = getattr(result, name)
        is_wanted = {**request.wanted._asdict(), "loss": True, "width_errors": True}
        if value is None or not is_wanted[name]:
            assert mine is None
            continue
        if name == "values":  # of the spare pairs there is nothing
            assert not mine[len(value) :].any()
            mine = mine[: len(value)]
        assert mine.shape == value.shape, name
        if value.numel() > 0:
            error = relative_error(mine, value, magnitude[name])
            assert error < (tolerance or TOLERANCE[mine.dtype]), f"{name}: {error}"


@every_length
@every_backend
def test_last_level_is_the_definition(on, lengths) -> None:
    code = ragged_code(lengths, F, device=on[1], n_spare=len(lengths) % 4)
    request = ragged_request(code, n_latents=F, d_in=D)
    assert_is_the_definition(request, on)


@every_length
@every_backend
def test_level_weights_of_each_sample_are_the_definition(on, lengths) -> None:
    code = ragged_code(lengths, F, device=on[1], n_spare=len(lengths) % 4)
    request = ragged_request(code, n_latents=F, d_in=D, levels=random_level_weights(code))
    assert_is_the_definition(request, on)
    assert_is_the_definition(dataclasses.replace(request, bias=None), on)


# Nested dictionaries. Some add no latent to a sample, and some nothing at all.
WIDTHS = {
    "one": ((F,), (0.7,)),
    "five": ((1, 4, 9, 20, F), (1.0, 0.5, 0.0, 3.0, 2.0)),
    "inner_ones_alone": ((3, 7, F), (0.0, 1.0, 0.0)),
    "negative": ((12, 13, F), (1.0, -2.0, 1.0)),
}


def of_widths(name: str, device: str) -> dict[str, torch.Tensor]:
    widths, weights = WIDTHS[name]
    return {
        "widths": torch.tensor(widths, device=device),
        "levels": torch.tensor(weights, device=device),
    }


@pytest.mark.parametrize("widths", WIDTHS)
@every_length
@every_backend
def test_loss_of_widths_is_the_definition(on, lengths, widths) -> None:
    code = ascending(ragged_code(lengths, F, device=on[1], n_spare=len(lengths) % 4))
    request = ragged_request(code, n_latents=F, d_in=D, **of_widths(widths, on[1]))
    assert_is_the_definition(request, on)


@pytest.mark.parametrize("deterministic", [False, True])
@every_backend
def test_loss_of_widths_takes_an_index(on, deterministic) -> None:
    code = ascending(ragged_code(LENGTHS["mixed"], F, device=on[1], n_spare=2))
    fields = {"n_latents": F, "d_in": D, "deterministic": deterministic}
    request = ragged_request(code, **fields, **of_widths("five", on[1]))
    index = code.by_latent(F, use_triton=on[0] == "triton", deterministic=deterministic)
    assert_is_the_definition(dataclasses.replace(request, index=index), on)


@every_backend
def test_an_infinite_error_of_a_width_that_weighs_nothing_is_no_nan(on) -> None:
    code = ascending(ragged_code(LENGTHS["mixed"], F, device=on[1]))
    fields = of_widths("five", on[1])
    fields["levels"] = torch.tensor([1.0, 0.5, 2.0, 3.0, 0.0], device=on[1])
    request = ragged_request(code, n_latents=F, d_in=D, **fields)
    expected = decoder_loss(request, use_triton=on[0] == "triton")
    code.values[(code.latents >= 20).nonzero()[0]] = torch.inf
    result = decoder_loss(request, use_triton=on[0] == "triton")
    assert result.width_errors[-1].isinf()
    for name in ("loss", "bias", "target"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name), msg=name)
    torch.testing.assert_close(result.weight[:20], expected.weight[:20])


@every_length
def test_rows_cut_by_width_have_the_latents_between_two_widths(lengths) -> None:
    code = ascending(ragged_code(lengths, F, n_spare=2))
    widths = torch.tensor([1, 4, 9, 20, F])
    parts = code.by_width(widths)
    n_between = []
    for b in range(len(lengths)):
        latents = code.latents[code.starts[b] : code.starts[b + 1]]
        n_below = (latents.unsqueeze(-1) < widths).sum(0)
        n_between += n_below.diff(prepend=n_below.new_zeros(1)).tolist()
    assert lengths_of(parts) == n_between
    assert parts.starts[-1] == sum(lengths)


VARIANTS = {
    "several_slices": {"d_in": 150},
    "slices_divide": {"d_in": 128},
    "deterministic": {"d_in": 150, "deterministic": True},
    "bfloat16": {"dtype": torch.bfloat16, "values": torch.float32},
    "no_bias": {"has_bias": False, "bias": None},
    "loss_alone": dict.fromkeys(("residual", "weight", "values", "bias", "target"), None)
    | {"residual": False},
    "of_weight_alone": dict.fromkeys(("values", "bias", "target"), None) | {"residual": False},
    "of_values_alone": dict.fromkeys(("weight", "bias", "target"), None),
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("levels", ["last", "of_samples", "of_widths"])
@every_backend
def test_variants_are_the_definition(on, levels, variant, monkeypatch) -> None:
    monkeypatch.setattr(copies, "is_worth_copies", lambda *_: True)
    monkeypatch.setattr(copies, "HOT", 1 / 10)
    code = ragged_code((3, 0, 40, 1, 19, 16), F, device=on[1], n_spare=3)
    code.latents[code.samples() == 2] %= 3  # so that few latents have many pairs
    code = ascending(code)
    fields = {"n_latents": F, "d_in": D, **kinds_of_levels(code)[levels], **variant}
    assert_is_the_definition(ragged_request(code, **fields), on)


def kinds_of_levels(code: Code) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "last": {},
        "of_samples": {"levels": random_level_weights(code)},
        "of_widths": of_widths("five", code.latents.device.type),
    }


@pytest.mark.parametrize("levels", ["last", "of_samples", "of_widths"])
def test_float64_is_exact(levels, monkeypatch) -> None:
    monkeypatch.setattr(products, "CPU_CHUNK_ELEMENTS", 30 * D)  # so that there are chunks
    code = ascending(ragged_code(LENGTHS["mixed"], F, dtype=torch.float64))
    fields = {"n_latents": F, "d_in": D, **kinds_of_levels(code)[levels]}
    request = ragged_request(code, dtype=torch.float64, **fields)
    assert_is_the_definition(request, ("torch", "cpu"), tolerance=1e-13)


@every_backend
def test_level_weights_of_each_sample_for_as_many_latents_of_each(on) -> None:
    code = ragged_code((5, 5, 5), F, device=on[1])
    weights = random_level_weights(code)
    ragged = ragged_request(code, n_latents=F, d_in=D, levels=weights)
    even = dataclasses.replace(
        ragged,
        code=Code(code.latents.view(3, 5), code.values.view(3, 5)),
        levels=weights.view(3, 6),
    )
    use_triton = on[0] == "triton"
    results = (decoder_loss(request, use_triton=use_triton) for request in (even, ragged))
    for name, mine, expected in zip(ragged.wanted._fields, *results, strict=False):
        torch.testing.assert_close(mine.flatten(), expected.flatten(), msg=name)


@every_length
@every_backend
def test_gather(on, lengths) -> None:
    code = ragged_code(lengths, F, device=on[1], n_spare=len(lengths) % 4)
    request = ragged_request(code, n_latents=F, d_in=D)
    out = gather(code, request.weight, use_triton=on[0] == "triton", target=request.target)
    expected = exact(dataclasses.replace(request, bias=None))["residual"]
    assert relative_error(out, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("deterministic", [False, True])
@every_length
@every_backend
def test_scatter(on, lengths, deterministic) -> None:
    code = ragged_code(lengths, F, device=on[1], n_spare=len(lengths) % 4)
    use_triton = on[0] == "triton"
    index = code.by_latent(F, use_triton=use_triton, deterministic=deterministic)
    rows = torch.randn(code.n_samples, D, generator=torch.Generator().manual_seed(3))
    out = torch.full((F, D), torch.nan, device=on[1])
    scatter(index, code.values, rows.to(on[1]), out=out, use_triton=use_triton)
    expected = torch.zeros(F, D, dtype=torch.float64)
    first = 0
    for b, length in enumerate(lengths):
        for pair in range(first, first + length):
            expected[code.latents[pair]] += code.values[pair].double().cpu() * rows[b].double()
        first += length
    assert relative_error(out, expected) < TOLERANCE[torch.float32]


@every_length
def test_sums_and_numbers_of_samples(lengths) -> None:
    code = ragged_code(lengths, F, n_spare=2)
    assert lengths_of(code) == list(lengths)
    n_pairs = sum(lengths)
    expected = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    assert torch.equal(code.samples()[:n_pairs], expected)
    assert code.samples()[n_pairs:].tolist() == [len(lengths) - 1] * 2
    of_samples = torch.arange(1.0, 1 + len(lengths)).unsqueeze(-1)
    assert torch.equal(code.of_pairs(of_samples)[:n_pairs], expected + 1.0)
    sums = code.sum_by_sample(torch.ones(n_pairs + 2) * (torch.arange(n_pairs + 2) < n_pairs))
    assert sums.flatten().tolist() == list(lengths)


def test_chunks_hold_what_they_may() -> None:
    code = ragged_code((3, 0, 9, 1, 0, 5, 17), F)
    chunks = code.chunks(most_pairs=12)
    assert chunks == [slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 6), slice(6, 7)]


def test_a_latent_outside_is_an_error_that_says_so() -> None:
    code = ragged_code((3, 2), F)
    code.latents[1] = F
    with pytest.raises(IndexError, match=rf"indices reaches from .* in \[0, {F}\)"):
        decoder_loss(ragged_request(code, n_latents=F, d_in=D), use_triton=False)


# --- the public functions


def arguments_of(code: Code, request, n_spare: int = 0) -> dict[str, torch.Tensor]:
    if n_spare > 0:  # What pairs of no sample hold does not matter.
        code.latents[-n_spare:] = torch.tensor([F + 3, 1])[:n_spare]
        code.values[-n_spare:] = torch.tensor([torch.nan, 3.0])[:n_spare]
    names = {"weight": request.weight, "bias": request.bias, "target": request.target}
    return {
        "indices": code.latents,
        **{name: tensor.clone().requires_grad_() for name, tensor in names.items()},
        "vals": code.values.clone().requires_grad_(),
        "starts": code.starts,
    }


def assert_same_as_the_definition(loss, definition, arguments) -> None:
    exact_arguments = {
        name: tensor.detach().cpu().double().requires_grad_(tensor.requires_grad)
        if tensor.is_floating_point()
        else tensor.cpu()
        for name, tensor in arguments.items()
    }
    result, expected = loss(**arguments), definition(**exact_arguments)
    assert result.dtype == torch.float32
    (3 * result).backward()
    (3 * expected).backward()
    assert relative_error(result, expected) < 1e-5
    for name in ("weight", "vals", "bias", "target"):
        gradient = exact_arguments[name].grad
        if gradient is not None and gradient.numel() > 0:
            assert relative_error(arguments[name].grad, gradient) < 1e-5, name


@pytest.mark.parametrize("weights", ["equal", "of_samples"])
@every_length
@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_public_hierarchical_loss(device, lengths, weights) -> None:
    code = ragged_code(lengths, F, device=device, n_spare=2)
    arguments = arguments_of(code, ragged_request(code, n_latents=F, d_in=D), n_spare=2)
    if weights == "of_samples":
        arguments["level_weights"] = random_level_weights(code)
    assert_same_as_the_definition(triton_hierarchical_sae_loss, hierarchical_sae_loss, arguments)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_rows_without_any_pair_have_no_gradient_of_values(device) -> None:
    code = ragged_code((0, 0, 0), F, device=device)
    arguments = arguments_of(code, ragged_request(code, n_latents=F, d_in=D))
    assert_same_as_the_definition(triton_hierarchical_sae_loss, hierarchical_sae_loss, arguments)
    assert arguments["vals"].grad is not None
    assert arguments["vals"].grad.shape == (0,)


@every_length
@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_public_topk_loss(device, lengths) -> None:
    code = ragged_code(lengths, F, device=device, n_spare=2)
    arguments = arguments_of(code, ragged_request(code, n_latents=F, d_in=D), n_spare=2)
    assert_same_as_the_definition(triton_topk_sae_loss, topk_sae_loss, arguments)


def test_definition_of_rows_of_one_length_is_that_of_a_rectangle() -> None:
    code = ragged_code((5, 5, 5), F)
    ragged = arguments_of(code, ragged_request(code, n_latents=F, d_in=D))
    even = {**ragged, "indices": code.latents.view(3, 5), "vals": code.values.view(3, 5)}
    del even["starts"]
    torch.testing.assert_close(topk_sae_loss(**ragged), topk_sae_loss(**even))
    expected = hierarchical_sae_loss(**even)
    torch.testing.assert_close(hierarchical_sae_loss(**ragged), expected)
    of_samples = torch.tensor([0.0] + 5 * [1 / 5]).repeat(3, 1)
    torch.testing.assert_close(hierarchical_sae_loss(**even, level_weights=of_samples), expected)
    of_samples[:, 0] = 2  # and the bias alone
    expected = expected + 2 * (ragged["bias"] - ragged["target"]).square().mean()
    loss = hierarchical_sae_loss(**even, level_weights=of_samples)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_public_loss_with_weights_of_each_sample(device) -> None:
    code = ragged_code((5, 5, 5), F, device=device)
    arguments = arguments_of(code, ragged_request(code, n_latents=F, d_in=D))
    arguments["indices"] = code.latents.view(3, 5)
    arguments["vals"] = code.values.view(3, 5).clone().requires_grad_()
    arguments["level_weights"] = random_level_weights(code).view(6, 3).T
    del arguments["starts"]
    assert_same_as_the_definition(triton_hierarchical_sae_loss, hierarchical_sae_loss, arguments)


WRONG = {
    "indices": (
        torch.zeros(3, 4, dtype=torch.int64),
        r"indices has shape \[3, 4\], expected \[n\]",
    ),
    "vals": (torch.zeros(4), r"vals has shape \[4\], expected indices' \[5\]"),
    "starts": (torch.tensor([0, 5]), r"starts has shape \[2\], expected one more .*\[3\]"),
    "starts-dtype": (torch.zeros(3), r"starts has dtype torch.float32, expected torch.int32"),
    "starts-order": (torch.tensor([0, 4, 3]), r"starts goes from 0 to 3, expected ascending"),
    "starts-end": (torch.tensor([0, 4, 6]), r"starts goes from 0 to 6, .* number of pairs, 5"),
    "starts-begin": (torch.tensor([1, 4, 5]), r"starts goes from 1 to 5, expected .* from 0"),
    "level_weights": (
        torch.zeros(5),
        r"level_weights has shape \[5\], expected a number for each pair and each sample, \[7\]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("loss", [hierarchical_sae_loss, triton_hierarchical_sae_loss])
def test_wrong_argument_is_an_error_that_names_it(loss, case) -> None:
    code = ragged_code((2, 3), F)
    arguments = arguments_of(code, ragged_request(code, n_latents=F, d_in=D))
    wrong, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=message):
        loss(**{**arguments, case.split("-")[0]: wrong})


def test_level_weights_of_a_rectangle_fit_it() -> None:
    code = ragged_code((2, 2), F)
    arguments = arguments_of(code, ragged_request(code, n_latents=F, d_in=D))
    arguments["indices"], arguments["vals"] = code.latents.view(2, 2), code.values.view(2, 2)
    del arguments["starts"]
    message = r"level_weights has shape \[2, 2\], expected .*\[2\], or .* \[2, 3\]"
    with pytest.raises(ValueError, match=message):
        hierarchical_sae_loss(**arguments, level_weights=torch.zeros(2, 2))


@every_backend
def test_operator_with_rows_of_different_length_passes_opcheck(on) -> None:
    code = ragged_code((3, 0, 9), F, device=on[1])
    request = ragged_request(code, n_latents=F, d_in=D)
    tensors = (request.weight, code.values, request.bias, request.target)
    tensors = (code.latents, *(tensor.requires_grad_() for tensor in tensors))
    operator = torch.ops.sae_lens_flex.decoder_loss.default
    for weights in (None, random_level_weights(code)):
        arguments = (*tensors, weights, code.starts, weights is None, 3.0, on[0] == "triton")
        torch.library.opcheck(operator, (*arguments, 4 * [True]))
