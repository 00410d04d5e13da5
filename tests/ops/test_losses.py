"""Every implementation of the losses against the definitions in float64."""

import gc
import importlib.util
import weakref
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from sae_lens_flex.ops import (
    by_triton,
    hierarchical_sae_loss,
    losses,
    policy,
    products,
    topk_sae_loss,
    triton_hierarchical_sae_loss,
    triton_topk_sae_loss,
)
from sae_lens_flex.ops.codes import Code
from sae_lens_flex.ops.kernels import copies, finish, hierarchical, launch, sums, tiles
from sae_lens_flex.ops.kernels.norms import norms_and_copy
from sae_lens_flex.ops.kernels.tiles import Sizes
from sae_lens_flex.ops.losses import decoder_loss
from sae_lens_flex.ops.requests import DecoderLoss, Wanted

from .comparison import (
    ARGUMENTS,
    KERNEL_DEVICES,
    TOLERANCE,
    Cut,
    Implementation,
    assert_matches_definition,
    by_torch,
    every_backend,
    in_float64,
    random_inputs,
    relative_error,
)

# (B, K, F, D): nothing is a multiple of a tile; K > F repeats latents within a row.
SHAPES = [
    (1, 1, 1, 1),
    (5, 3, 17, 70),
    (7, 4, 9, 5),
    (3, 16, 50, 300),
    (33, 9, 65, 129),
    (2, 40, 8, 64),
    (4, 48, 50, 128),
]


class RecordShapes(TorchDispatchMode):
    """Collects the shapes of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and not function.is_view:
                self.shapes.append(tensor.shape)
        return result


def shape_id(shape: tuple[int, ...]) -> str:
    return "-".join(f"{name}{size}" for name, size in zip("BKFD", shape, strict=True))


@pytest.mark.pairs
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).split(".")[1])
def test_loss_and_gradients_match_float64_definition(implementation, shape, dtype) -> None:
    indices, inputs = random_inputs(shape, dtype, implementation.device)
    assert_matches_definition(implementation, indices, inputs)


def test_int32_indices(implementation) -> None:
    indices, inputs = random_inputs(
        (6, 5, 20, 33), device=implementation.device, index_dtype=torch.int32
    )
    assert_matches_definition(implementation, indices, inputs)


def test_mixed_dtypes(implementation) -> None:
    indices, inputs = random_inputs((6, 5, 20, 33), device=implementation.device)
    for name, dtype in (("vals", torch.bfloat16), ("target", torch.float16)):
        inputs[name] = inputs[name].detach().to(dtype).requires_grad_()
    assert_matches_definition(implementation, indices, inputs)


def test_scale_of_the_loss_keeps_small_gradients_of_float16(implementation) -> None:
    indices, inputs = random_inputs((64, 4, 64, 70), torch.float16, implementation.device)
    for name in ("weight", "bias", "target"):
        inputs[name].data *= 0.01
    exact = in_float64(inputs)
    (implementation.definition(indices.cpu(), **exact) * 2**16).backward()
    (implementation.loss(indices, **inputs) * 2**16).backward()
    for name in ARGUMENTS:
        assert inputs[name].grad.dtype == torch.float16
        assert relative_error(inputs[name].grad, exact[name].grad) < 2**-11


def test_rows_that_cancel_cost_the_last_level_no_digits(implementation) -> None:
    if implementation.uses_levels():
        pytest.skip("lower levels are computed from the last one")
    indices, inputs = random_inputs((4, 8, 20, 33), device=implementation.device)
    indices[:, 6:] = torch.tensor([0, 1])
    inputs["weight"].data[0] = -1e4
    inputs["weight"].data[1] = 1e4
    inputs["vals"].data[:, 7] = inputs["vals"].data[:, 6]
    loss = implementation.loss(indices, **inputs)
    expected = implementation.definition(indices.cpu(), **in_float64(inputs))
    assert relative_error(loss, expected) < 1e-6


def test_strided_inputs(implementation) -> None:
    indices, inputs = random_inputs((6, 5, 20, 34), device=implementation.device)
    strided = {
        name: value.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_()
        for name, value in inputs.items()
    }
    strided["weight"] = inputs["weight"].detach().T.contiguous().T.requires_grad_()
    assert not strided["weight"].is_contiguous()
    indices = indices.repeat_interleave(2, dim=-1)[..., ::2]
    for name in strided:
        strided[name].retain_grad()
    assert_matches_definition(implementation, indices, strided)


@pytest.mark.parametrize("shape", [(6, 5, 20, 33), (4, 32, 40, 64)], ids=shape_id)
def test_offsets_in_64_bits(implementation, shape, monkeypatch) -> None:
    monkeypatch.setattr(Sizes, "is_wide", lambda *_: True)
    indices, inputs = random_inputs(shape, device=implementation.device)
    assert_matches_definition(implementation, indices, inputs)


def test_one_latent_takes_every_pair(implementation) -> None:
    indices, inputs = random_inputs((40, 6, 3, 20), device=implementation.device)
    assert_matches_definition(implementation, torch.ones_like(indices), inputs)


def test_many_latents_span_runs(implementation, monkeypatch) -> None:
    monkeypatch.setattr(sums, "SHORTEST_RUN", 3)
    monkeypatch.setattr(sums, "BLOCK_D", 16)
    monkeypatch.setattr(sums, "MOST_DOTS", 100)  # two slices a launch
    monkeypatch.setattr(sums, "MOST_SCATTERED", 20)
    for n_latents in (1, 2, 7, 300):
        # Of 40 pairs the last run has one. Of 300 latents the last one begins in the run before.
        indices, inputs = random_inputs((8, 5, n_latents, 33), device=implementation.device)
        indices[0, :2] = n_latents - 1
        assert_matches_definition(implementation, indices, inputs)


@pytest.mark.parametrize("n_latents", [3, 40, 600], ids=lambda n: f"{n}-latents")
def test_copies_of_frequent_latents(implementation, monkeypatch, n_latents) -> None:
    # Every latent is frequent, 40 and 600 are more than there are copies for.
    monkeypatch.setattr(copies, "is_worth_copies", lambda *_: True)
    monkeypatch.setattr(copies, "HOT", 0.0)
    for module in (by_triton, copies, finish, hierarchical, tiles):
        monkeypatch.setattr(module, "SLOTS", 8)
    indices, inputs = random_inputs((19, 5, n_latents, 70), device=implementation.device)
    inputs["vals"].data[:, ::3] = 1.5  # None is 0, or a latent might get no gradient.
    indices[3, 2], indices[4, 1] = -1, n_latents
    if implementation.loss in (triton_hierarchical_sae_loss, triton_topk_sae_loss):
        inputs["vals"].data[3, 2] = inputs["vals"].data[4, 1] = 0
        implementation.loss(indices, **inputs).backward()
        gradients = {name: value.grad for name, value in inputs.items()}
        assert gradients["vals"][3, 2] == gradients["vals"][4, 1] == 0
    valid = indices.clamp(0, n_latents - 1)
    for value in inputs.values():
        value.grad = None
    assert_matches_definition(implementation, valid, inputs)


@pytest.mark.pairs
@pytest.mark.parametrize("factor", [0.0, 1.0, -2.5])
@pytest.mark.parametrize("d_in", [70, finish.BLOCK + 6], ids=lambda n: f"D{n}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_with_copies_times_a_factor(
    implementation, dtype, d_in, factor, monkeypatch
) -> None:
    # Some latents have copies, others none, and some do not fire. There are fewer programs than
    # parts of rows.
    monkeypatch.setattr(copies, "is_worth_copies", lambda *_: True)
    monkeypatch.setattr(copies, "HOT", 0.1)
    monkeypatch.setattr(finish, "SCALING_PROGRAMS", 3)
    for module in (by_triton, copies, finish, hierarchical, tiles):
        monkeypatch.setattr(module, "SLOTS", 8)
    indices, inputs = random_inputs((7, 5, 30, d_in), dtype, implementation.device)
    indices[:, :2] = torch.tensor([3, 11])
    assert_matches_definition(implementation, indices, inputs, factor)


@pytest.mark.parametrize("wanted", ARGUMENTS)
def test_only_the_gradient_asked_for_is_returned(implementation, wanted) -> None:
    indices, inputs = random_inputs((6, 5, 20, 33), device=implementation.device)
    for name, value in inputs.items():
        value.requires_grad_(name == wanted)
    assert_matches_definition(implementation, indices, inputs)


def test_no_grad_returns_the_loss_alone(implementation) -> None:
    indices, inputs = random_inputs((6, 5, 20, 33), device=implementation.device)
    with torch.no_grad():
        loss = implementation.loss(indices, **inputs)
    assert not loss.requires_grad
    expected = implementation.definition(indices.cpu(), **in_float64(inputs))
    assert relative_error(loss, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("factor", [0.0, 1.0, -2.5])
def test_backward_multiplies_by_the_incoming_gradient(implementation, factor) -> None:
    indices, inputs = random_inputs((6, 5, 20, 33), device=implementation.device)
    assert_matches_definition(implementation, indices, inputs, factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_level_weights(implementation, dtype) -> None:
    if not implementation.uses_levels():
        pytest.skip("TopK has one level")
    indices, inputs = random_inputs((6, 5, 20, 33), device=implementation.device)
    level_weights = torch.tensor([0.5, 0.0, 0.25, 0.0, 2.0], dtype=dtype)
    level_weights = level_weights.to(implementation.device).requires_grad_()
    strided = level_weights.detach().repeat_interleave(2)[::2]
    assert_matches_definition(implementation, indices, inputs, level_weights=strided)
    for value in inputs.values():
        value.grad = None
    assert_matches_definition(implementation, indices, inputs, level_weights=level_weights)
    assert level_weights.grad is None
    inputs = {name: value.detach() for name, value in inputs.items()}
    assert not implementation.loss(indices, **inputs, level_weights=level_weights).requires_grad
    assert not hierarchical_sae_loss(
        indices, **inputs, level_weights=level_weights.double()
    ).requires_grad


@pytest.mark.parametrize("factor", [1, 2])
def test_second_backward_raises(implementation, factor) -> None:
    indices, inputs = random_inputs((6, 5, 20, 33), device=implementation.device)
    loss = factor * implementation.loss(indices, **inputs)
    loss.backward(retain_graph=True)
    name = getattr(implementation.loss, "__name__", "")
    name = name if name.startswith("triton") else "the decoder loss"
    with pytest.raises(RuntimeError, match=f"^{name} has been differentiated already"):
        loss.backward()


@pytest.mark.parametrize("is_operator", [False, True], ids=["function", "operator"])
def test_a_loss_on_which_nothing_depends_gives_no_gradient(
    implementation, is_operator, monkeypatch
) -> None:
    if is_operator:  # as within torch.compile
        monkeypatch.setattr(losses, "is_traced", lambda *_: True)
    indices, inputs = random_inputs((6, 5, 20, 33), device=implementation.device)
    loss = implementation.loss(indices, **inputs)
    (Cut.apply(loss) + inputs["bias"].sum()).backward(retain_graph=True)
    assert inputs["weight"].grad is None
    loss.backward()  # the gradients are still there
    assert inputs["weight"].grad is not None


@pytest.mark.parametrize(
    ("dtype", "fields", "is_later"),
    [
        (torch.bfloat16, {}, True),
        (torch.float32, {}, True),
        (torch.float32, {"SMALL_BATCH": 5}, True),
        (torch.bfloat16, {"MOST_HELD": 20 * 130 - 1}, False),
        (torch.float32, {"SMALL_BATCH": 5, "MOST_HELD": 20 * 130 - 1}, True),
        (torch.bfloat16, {"MOST_UNFINISHED": 9}, True),  # 3 pairs of samples, 3 slices of D
        (torch.bfloat16, {"MOST_UNFINISHED": 8}, False),
    ],
)
@pytest.mark.parametrize("loss", [triton_hierarchical_sae_loss, triton_topk_sae_loss])
@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_which_gradients_the_launch_of_the_backward_pass_finishes(
    device, loss, dtype, fields, is_later, monkeypatch
) -> None:
    launches: list[str] = []
    call = launch.Launch.__call__

    def recorded(self: launch.Launch, *arguments: Any) -> None:
        launches.append(self._kernel.fn.__name__)
        call(self, *arguments)

    monkeypatch.setattr(launch.Launch, "__call__", recorded)
    for name, value in fields.items():
        monkeypatch.setattr(by_triton, name, value)
    indices, inputs = random_inputs((6, 5, 20, 130), dtype, device)
    value = loss(indices, **inputs)
    n_forward = len(launches)
    value.backward()
    if is_later:
        assert launches == ["_hierarchical_kernel", "_finish_walk_kernel"]
        assert n_forward == 1
    else:
        of_backward = ["_scale_kernel"] if device == "cuda" else []  # PyTorch scales on a CPU
        assert launches[n_forward:] == of_backward


def test_deterministic_gradients_are_finished_at_once(monkeypatch) -> None:
    monkeypatch.setattr(by_triton, "_walk", None)
    indices, inputs = random_inputs((6, 5, 20, 33), torch.bfloat16)
    request = DecoderLoss(
        code=Code(indices, inputs["vals"]),
        weight=inputs["weight"],
        bias=inputs["bias"],
        target=inputs["target"],
        levels="every",
        scale=1.0,
        wanted=Wanted(False, *4 * [torch.bfloat16]),
        deterministic=True,
    )
    assert by_triton.unfinished_decoder_loss(request) is None


def test_batches_that_are_worth_copies() -> None:
    assert copies.is_worth_copies(2048, 2**16)
    assert not copies.is_worth_copies(2047, 2**20)
    assert not copies.is_worth_copies(4096, 2**16 - 1)


def test_a_loss_that_is_dropped_frees_its_gradients_at_once(implementation) -> None:
    indices, inputs = random_inputs((6, 5, 20, 33), device=implementation.device)
    loss = implementation.loss(indices, **inputs)
    dropped = weakref.ref(loss)
    gc.disable()  # which would find a loss that holds itself
    try:
        del loss
        assert dropped() is None
    finally:
        gc.enable()


def test_a_loss_that_is_kept_holds_no_input(implementation) -> None:
    indices, inputs = random_inputs((6, 5, 20, 33), device=implementation.device)
    copied = {name: value * 1 for name, value in inputs.items()}
    held = [weakref.ref(value) for value in copied.values()]
    loss = implementation.loss(indices, **copied)
    loss.backward(retain_graph=True)
    del copied
    assert [value() for value in held] == [None] * 4


@pytest.mark.parametrize("of_what", [*ARGUMENTS, "the factor"])
def test_the_sign_of_a_conjugates_imaginary_part(implementation, of_what) -> None:
    indices, inputs = random_inputs((6, 5, 20, 33), device=implementation.device)
    exact = in_float64(inputs)

    def loss(function: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if of_what == "the factor":
            return negated(function(indices.to(inputs["vals"].device), **inputs))
        changed = {**inputs, of_what: negated(inputs[of_what])}
        assert changed[of_what].is_neg()
        return function(indices.to(inputs["vals"].device), **changed)

    loss(implementation.loss, inputs).backward()
    loss(implementation.definition, exact).backward()
    for name in ARGUMENTS:
        assert relative_error(inputs[name].grad, exact[name].grad) < TOLERANCE[torch.float32]


def negated(x: torch.Tensor) -> torch.Tensor:
    """-x, which lies in memory as x."""
    return torch.complex(torch.zeros_like(x), x).conj().imag


def test_second_derivative_raises(implementation) -> None:
    indices, inputs = random_inputs((6, 5, 20, 33), device=implementation.device)
    loss = implementation.loss(indices, **inputs)
    name = getattr(implementation.loss, "__name__", "")
    name = name if name.startswith("triton") else "the decoder loss"
    with pytest.raises(RuntimeError, match=f"^{name} has no second derivative"):
        torch.autograd.grad(loss, inputs["weight"], create_graph=True)


@pytest.mark.parametrize("wanted", ["weight", "vals", "bias", "target"])
def test_forward_mode_is_refused(implementation, wanted) -> None:
    indices, inputs = random_inputs((6, 5, 20, 33), device=implementation.device)
    inputs = {name: value.detach() for name, value in inputs.items()}
    with forward_ad.dual_level():
        value = inputs[wanted]
        inputs[wanted] = forward_ad.make_dual(value, torch.ones_like(value))
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            implementation.loss(indices, **inputs)


@pytest.mark.pairs
@pytest.mark.parametrize("latent", [-1, 20, 2**32 + 3])
@pytest.mark.parametrize("value", [0.5, float("-inf"), float("nan")])
def test_index_out_of_range(implementation, latent, value) -> None:
    indices, inputs = random_inputs((6, 5, 20, 33), device=implementation.device)
    indices[2, 3] = latent
    inputs["vals"].data[2, 3] = value
    if implementation.loss not in (triton_hierarchical_sae_loss, triton_topk_sae_loss):
        with pytest.raises(IndexError, match=r"expected latents in \[0, 20\)"):
            implementation.loss(indices, **inputs)
        return
    # The kernels ignore the latent, as if its value were 0.
    loss = implementation.loss(indices, **inputs)
    loss.backward()
    exact = in_float64(inputs)
    indices[2, 3] = exact["vals"].data[2, 3] = 0
    expected = implementation.definition(indices.cpu(), **exact)
    expected.backward()
    exact["vals"].grad[2, 3] = 0
    assert relative_error(loss, expected) < TOLERANCE[torch.float32]
    for name in ARGUMENTS:
        assert relative_error(inputs[name].grad, exact[name].grad) < TOLERANCE[torch.float32]


@pytest.mark.pairs
@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_input_makes_the_same_results_non_finite(implementation, name, value) -> None:
    indices, inputs = random_inputs((4, 3, 9, 17), device=implementation.device)
    inputs[name].data.flatten()[1] = value  # vals[0, 1] and weight[0, 1] are used
    indices[0, 1] = 0
    exact = in_float64(inputs)
    expected = implementation.definition(indices.cpu(), **exact)
    expected.backward()
    loss = implementation.loss(indices, **inputs)
    loss.backward()
    assert not expected.isfinite()
    assert not loss.isfinite()
    for argument in ARGUMENTS:
        should_be_finite = exact[argument].grad.isfinite()
        assert torch.equal(inputs[argument].grad.cpu().isfinite(), should_be_finite), argument


@pytest.mark.pairs
@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["target", "bias"])
@pytest.mark.parametrize("k", [3, 16])
def test_infinite_target_gives_what_the_definition_gives(implementation, k, name, value) -> None:
    indices, inputs = random_inputs((4, k, 9, 17), device=implementation.device)
    inputs[name].data.flatten()[1] = value
    exact = in_float64(inputs)
    expected = implementation.definition(indices.cpu(), **exact)
    expected.backward()
    loss = implementation.loss(indices, **inputs)
    loss.backward()
    assert expected.isposinf()
    assert loss.isposinf()
    for argument in ARGUMENTS:
        mine, its = inputs[argument].grad.cpu().double(), exact[argument].grad
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(mine), kind(its)), argument


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("definition", [hierarchical_sae_loss, topk_sae_loss])
@pytest.mark.parametrize("autocast", [False, True])
def test_definitions_compute_in_float32_at_least(definition, dtype, autocast) -> None:
    indices, inputs = random_inputs((6, 5, 20, 33), dtype)
    exact = in_float64(inputs)
    levels = {"level_weights": torch.rand(5)} if definition is hierarchical_sae_loss else {}
    expected = definition(indices, **exact, **levels)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = definition(indices, **inputs, **levels)
    assert loss.dtype == torch.float32
    assert expected.dtype == torch.float64
    assert relative_error(loss, expected) < TOLERANCE[torch.float32]
    loss.backward()
    expected.backward()
    for name in ARGUMENTS:
        assert inputs[name].grad.dtype == dtype
        assert relative_error(inputs[name].grad, exact[name].grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("definition", [hierarchical_sae_loss, topk_sae_loss])
@pytest.mark.parametrize("latent", [-1, 20])
def test_definitions_refuse_what_is_no_latent(definition, latent) -> None:
    indices, inputs = random_inputs((6, 5, 20, 33))
    indices[2, 3] = latent
    with pytest.raises(IndexError, match=r"indices reaches .*, expected latents in \[0, 20\)"):
        definition(indices, **inputs)


def request_of(indices: torch.Tensor, inputs: dict[str, torch.Tensor], **fields) -> DecoderLoss:
    return DecoderLoss(
        **{
            "code": Code(indices, inputs["vals"].detach()),
            "weight": inputs["weight"].detach(),
            "bias": None,
            "target": inputs["target"].detach(),
            "levels": "every",
            "scale": 1.0,
            "wanted": Wanted(residual=True),
            **fields,
        }
    )


every_level_or_last = pytest.mark.parametrize("levels", ["every", "last"])


@every_level_or_last
@every_backend
def test_residual_is_that_of_the_last_level(levels, on) -> None:
    backend, device = on
    indices, inputs = random_inputs((6, 5, 20, 33), device=device)
    request = request_of(indices, inputs, levels=levels)
    residual = decoder_loss(request, use_triton=backend == "triton").residual
    expected = (request.code.values.unsqueeze(-1) * request.weight[indices]).sum(1) - request.target
    assert relative_error(residual, expected.cpu().double()) < TOLERANCE[torch.float32]
    assert not residual.requires_grad


@pytest.mark.pairs
@every_level_or_last
@pytest.mark.parametrize("is_small", [True, False])
@every_backend
def test_a_copy_in_a_lower_precision_is_read_as_it_is(levels, is_small, on, monkeypatch) -> None:
    backend, device = on
    if not is_small:
        monkeypatch.setattr(by_triton, "FEWEST_ELEMENTS", 0)
    indices, inputs = random_inputs((6, 5, 20, 33), device=device)
    copy = inputs["weight"].detach().bfloat16()
    wanted = Wanted(False, *(4 * [torch.float32]))
    results = [
        decoder_loss(
            request_of(
                indices,
                inputs,
                weight=weight,
                bias=inputs["bias"].detach(),
                levels=levels,
                wanted=wanted,
            ),
            use_triton=backend == "triton",
        )
        for weight in (copy, copy.float())
    ]
    for mine, expected in zip(*results, strict=True):
        if expected is None:
            assert mine is None
            continue
        assert mine.dtype == expected.dtype == torch.float32
        assert relative_error(mine, expected.cpu().double()) < TOLERANCE[torch.float32]


@every_level_or_last
@every_backend
def test_the_scale_is_the_one_given_whatever_the_batch(levels, on) -> None:
    backend, device = on
    indices, inputs = random_inputs((6, 5, 20, 33), device=device)
    wanted = Wanted(True, *(4 * [torch.float32]))
    results = [
        decoder_loss(
            request_of(
                indices,
                inputs,
                bias=inputs["bias"].detach(),
                levels=levels,
                wanted=wanted,
                scale=scale,
            ),
            use_triton=backend == "triton",
        )
        for scale in (1.0, 0.25)
    ]
    assert {result.width_errors for result in results} == {None}
    for name in results[0]._fields[:-1]:
        full, quarter = (getattr(result, name) for result in results)
        factor = 1 if name == "residual" else 4
        torch.testing.assert_close(factor * quarter, full)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (17, 288), (3, 1024), (4, 2500)])
@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_norms_and_copy(device, shape, dtype) -> None:
    weight = torch.randn(shape, device=device)
    norms, copy = norms_and_copy(weight, dtype)
    assert copy.dtype == dtype
    cut_off = 2**-7 if device == "cpu" else 0  # the interpreter does not round to bfloat16
    torch.testing.assert_close(copy.float(), weight.to(dtype).float(), rtol=cut_off, atol=0)
    torch.testing.assert_close(norms, weight.norm(dim=-1))


@every_level_or_last
def test_torch_backend_never_builds_all_levels(levels, monkeypatch) -> None:
    monkeypatch.setattr(products, "CPU_CHUNK_ELEMENTS", 4 * 16 * 32)
    indices, inputs = random_inputs((64, 16, 24, 32))
    with RecordShapes() as made:
        by_torch(levels)(indices, **inputs).backward()
    assert max(shape.numel() for shape in made.shapes) == 4 * 16 * 32
    for value in inputs.values():
        value.grad = None
    definition = hierarchical_sae_loss if levels == "every" else topk_sae_loss
    assert_matches_definition(Implementation(definition, by_torch(levels), "cpu"), indices, inputs)


def test_backward_makes_nothing_of_the_size_of_weight(implementation) -> None:
    if implementation.device != "cpu":
        pytest.skip("the backward pass runs in a thread of its own")
    indices, inputs = random_inputs((6, 5, 20, 33))
    loss = implementation.loss(indices, **inputs)
    with RecordShapes() as made:
        loss.backward()
    assert made.shapes
    assert inputs["weight"].shape not in made.shapes


@pytest.mark.pairs
@every_level_or_last
@pytest.mark.parametrize("as_for_large_batches", [False, True], ids=["small", "large"])
@every_backend
def test_operator_passes_opcheck(levels, as_for_large_batches, on, monkeypatch) -> None:
    backend, device = on
    if as_for_large_batches:
        monkeypatch.setattr(by_triton, "SMALL_BATCH", 0)
        monkeypatch.setattr(by_triton, "FEWEST_ELEMENTS", 0)
    indices, inputs = random_inputs((6, 5, 20, 33), device=device)
    tensors = (indices, inputs["weight"], inputs["vals"], inputs["bias"], inputs["target"])
    arguments = (*tensors, None, None, levels == "last", 3.0, backend == "triton")
    operator = torch.ops.sae_lens_flex.decoder_loss.default
    torch.library.opcheck(operator, (*arguments, 4 * [True]))
    with torch.no_grad():
        torch.library.opcheck(operator, (*arguments, 4 * [False]))


def test_compiles_without_a_graph_break(implementation) -> None:
    if implementation.device == "cpu" and "triton" in implementation.loss.__name__:
        pytest.skip("torch.compile does not call the interpreter")
    indices, inputs = random_inputs((6, 5, 20, 33), device=implementation.device)
    compiled = Implementation(
        implementation.definition,
        torch.compile(implementation.loss, fullgraph=True),
        implementation.device,
    )
    assert_matches_definition(compiled, indices, inputs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"vals": torch.zeros(6, 4)},
            ValueError,
            r"vals has shape \[6, 4\], expected indices' \[6, 5\]",
        ),
        (
            {"target": torch.zeros(6, 32)},
            ValueError,
            r"target has shape \[6, 32\], expected .* \[6, 33\]",
        ),
        ({"bias": torch.zeros(1)}, ValueError, r"bias has shape \[1\], expected .* \[33\]"),
        (
            {"weight": torch.zeros(33, 20)},
            ValueError,
            r"weight has shape \[33, 20\], expected \[F, 33\]",
        ),
        ({"weight": torch.zeros(33)}, ValueError, r"weight has shape \[33\], expected \[F, D\]"),
        (
            {"indices": torch.zeros(0, 5, dtype=torch.int64)},
            ValueError,
            r"indices has shape \[0, 5\]",
        ),
        (
            {"indices": torch.zeros(6, 5)},
            TypeError,
            "indices has dtype torch.float32, expected torch.int32",
        ),
        (
            {"weight": torch.zeros(20, 33, dtype=torch.int8)},
            TypeError,
            "weight has dtype torch.int8",
        ),
        (
            {"weight": torch.zeros(20, 33).to_sparse()},
            TypeError,
            "weight has layout torch.sparse_coo, expected torch.strided",
        ),
        (
            {"indices": torch.zeros(6, 5, dtype=torch.int64).to_sparse()},
            TypeError,
            "indices has layout torch.sparse_coo, expected torch.strided",
        ),
        ({"vals": [[1.0]]}, TypeError, "vals is a list, expected a torch.Tensor"),
        (
            {"bias": torch.zeros(33, device="meta")},
            ValueError,
            "bias is on 'meta', expected indices' 'cpu'",
        ),
    ],
)
@pytest.mark.parametrize(
    "loss",
    [
        hierarchical_sae_loss,
        topk_sae_loss,
        triton_hierarchical_sae_loss,
        triton_topk_sae_loss,
    ],
)
def test_wrong_arguments_are_named(loss, change, error, message) -> None:
    indices, inputs = random_inputs((6, 5, 20, 33))
    with pytest.raises(error, match=message):
        loss(**{"indices": indices, **inputs, **change})


@pytest.mark.parametrize("loss", [triton_hierarchical_sae_loss, triton_topk_sae_loss])
def test_a_device_without_kernels_is_named(loss) -> None:
    indices, inputs = random_inputs((6, 5, 20, 33))
    inputs = {name: value.to("meta") for name, value in inputs.items()}
    with pytest.raises(RuntimeError, match=r"cannot run here.*'meta'"):
        loss(indices.to("meta"), **inputs)


def test_deterministic_algorithms_give_equal_results(implementation) -> None:
    shape = (20, 12, 20, 130)
    gradients = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            indices, inputs = random_inputs(shape, device=implementation.device)
            indices[:, 0] = 3  # a latent that every sample chose
            assert_matches_definition(implementation, indices, inputs)
            gradients.append([value.grad for value in inputs.values()])
    finally:
        torch.use_deterministic_algorithms(False)
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


def test_debug_switch_makes_the_kernels_check_indices(implementation, monkeypatch) -> None:
    monkeypatch.setattr(by_triton, "CHECKS_INDICES", True)
    indices, inputs = random_inputs((6, 5, 20, 33), device=implementation.device)
    assert_matches_definition(implementation, indices, inputs)
    indices[2, 3] = 20
    with pytest.raises(IndexError, match=r"reaches from \d+ to 20, expected latents in \[0, 20\)"):
        implementation.loss(indices, **inputs)


def imported_again(module: ModuleType) -> Any:
    """Return another copy of a module."""
    spec = importlib.util.find_spec(module.__name__)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


@pytest.mark.parametrize(("value", "checks"), [("1", True), ("0", False), (None, False)])
def test_debug_switch_is_read_at_import(monkeypatch, value, checks) -> None:
    monkeypatch.delenv("SAE_LENS_FLEX_CHECK_INDICES", raising=False)
    if value is not None:
        monkeypatch.setenv("SAE_LENS_FLEX_CHECK_INDICES", value)
    monkeypatch.setattr(policy, "CHECKS_INDICES", imported_again(policy).CHECKS_INDICES)
    assert imported_again(by_triton).CHECKS_INDICES is checks
