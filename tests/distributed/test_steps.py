"""A step of several processes is that of one process on the global batch."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from .ranks import Ranks
from .steps import Case, free, free_on_rank, on_rank, stepwise

AUXILIARY: Any = {"n_dead": 9, "first_dead": 8}  # more than k_aux, on two ranks

CASES = {
    "hierarchical": Case(),
    "topk": Case("flex_topk"),
    "budgets": Case(settings={"budgets": [1, 3, 5]}),
    "level weights": Case(settings={"level_weights": [1, 0, 2, 0, 7]}),
    "level weights of budgets": Case(
        settings={"budgets": [1, 3, 5], "level_weights": [0.25, 1, 2]}
    ),
    "without norms": Case(settings={"rescale_acts_by_decoder_norm": False}),
    "b_dec kept in": Case("flex_topk", settings={"apply_b_dec_to_input": False}),
    "layer_norm": Case(settings={"normalize_activations": "layer_norm", "aux_loss_coefficient": 0}),
    "constant_norm": Case(
        settings={"normalize_activations": "constant_norm_rescale", "aux_loss_coefficient": 0}
    ),
    "dense acts": Case("flex_topk", settings={"use_sparse_activations": False}),
    "all winners on the first rank": Case(weights="first"),
    "all winners on the last rank": Case(weights="last"),
    "ties": Case(weights="ties", d_sae=200, n_samples=40),
    "ties without norms": Case(
        weights="ties",
        d_sae=200,
        n_samples=40,
        settings={"rescale_acts_by_decoder_norm": False},
    ),
    "few positive": Case(weights="few positive"),
    "K above a rank's share": Case("flex_topk", d_sae=15, k=11),
    "K all": Case(d_sae=15, k=15),
    "a sample a rank": Case(n_samples=0),
    "few dead": Case(n_dead=3, first_dead=17),
    "many dead": Case(**AUXILIARY),
    "many dead, topk": Case("flex_topk", **AUXILIARY),
    "many dead without norms": Case(settings={"rescale_acts_by_decoder_norm": False}, **AUXILIARY),
    "many dead, b_dec kept in": Case(settings={"apply_b_dec_to_input": False}, **AUXILIARY),
    "few dead, none on others": Case(n_dead=2, first_dead=0),
    "dead on the last rank alone": Case(n_dead=11, first_dead=26),
    "a rank's latents all dead": Case(n_dead=19, first_dead=0),
    "all dead": Case(n_dead=37),
}


def assert_close(name: str, value: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert value.shape == expected.shape, name
    assert value.dtype == expected.dtype, name
    error = (value - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error <= tolerance, f"{name}: {error}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_steps_are_those_of_one_process(ranks: Ranks, case: Case) -> None:
    if case.n_samples == 0:
        case = replace(case, n_samples=ranks.size)
    _compare(case, stepwise(case), ranks.call(on_rank, case), tolerance=1e-12)


@pytest.mark.parametrize("architecture", ["hierarchical_topk", "flex_topk"])
@pytest.mark.parametrize("n_dead", [0, 20])
def test_steps_in_float32_are_those_of_one_process(
    ranks: Ranks, architecture: str, n_dead: int
) -> None:
    case = Case(architecture, 24, 150, 8, n_samples=64, dtype="float32", n_dead=n_dead)
    n_left_out = case.steps * case.n_samples - sum(map(len, case.batches()))
    assert n_left_out <= 2
    _compare(case, stepwise(case), ranks.call(on_rank, case), tolerance=1e-6)


@pytest.mark.parametrize("architecture", ["hierarchical_topk", "flex_topk"])
def test_steps_under_autocast_are_those_of_one_process(ranks: Ranks, architecture: str) -> None:
    case = Case(architecture, dtype="float32", autocast=True, n_dead=9)
    # Values of dead latents are rounded to bfloat16, on each rank those of its part.
    _compare(case, stepwise(case), ranks.call(on_rank, case), tolerance=2**-7)


def test_steps_of_16_bit_weights_are_those_of_one_process(ranks: Ranks) -> None:
    case = Case(dtype="bfloat16", n_dead=9)
    _compare(case, stepwise(case), ranks.call(on_rank, case), tolerance=2**-7)


BY_KERNELS = Case(
    d_in=6, d_sae=13, k=2, n_samples=4, steps=1, dtype="float32", settings={"backend": "triton"}
)


@pytest.mark.parametrize(
    ("case", "tolerance"),
    [
        (replace(BY_KERNELS, n_dead=6, first_dead=4), 2e-6),
        (replace(BY_KERNELS, autocast=True), 2**-7),
        (replace(BY_KERNELS, dtype="bfloat16"), 2**-7),
    ],
    ids=["many dead", "autocast", "bfloat16"],
)
def test_steps_by_kernels_are_those_of_one_process(
    two_ranks: Ranks, case: Case, tolerance: float
) -> None:
    _compare(case, stepwise(case), two_ranks.call(on_rank, case), tolerance=tolerance)


def test_many_steps_are_those_of_one_process(ranks: Ranks) -> None:
    architecture = "flex_topk" if ranks.size == 2 else "hierarchical_topk"  # each takes seconds
    _compare_many_steps(ranks, Case(architecture, n_samples=16, d_sae=70, steps=80))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_steps_on_gpus_are_those_of_one_process(gpu_ranks: Ranks, case: Case) -> None:
    n_samples = gpu_ranks.size if case.n_samples == 0 else case.n_samples
    case = replace(case, n_samples=n_samples, device="cuda")
    _compare(case, stepwise(case), gpu_ranks.call(on_rank, case), tolerance=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["hierarchical_topk", "flex_topk"])
@pytest.mark.parametrize("n_dead", [0, 300])
def test_steps_by_kernels_on_gpus_are_those_of_one_process(
    gpu_ranks: Ranks, architecture: str, n_dead: int
) -> None:
    case = Case(
        architecture, 96, 1000, 16, n_samples=500, dtype="float32", n_dead=n_dead, device="cuda"
    )
    n_left_out = case.steps * case.n_samples - sum(map(len, case.batches()))
    assert n_left_out <= 10
    _compare(case, stepwise(case), gpu_ranks.call(on_rank, case), tolerance=1e-6)
    case = replace(case, autocast=True)
    _compare(case, stepwise(case), gpu_ranks.call(on_rank, case), tolerance=2**-7)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["hierarchical_topk", "flex_topk"])
def test_many_steps_on_gpus_are_those_of_one_process(gpu_ranks: Ranks, architecture: str) -> None:
    case = Case(architecture, n_samples=16, d_sae=70, steps=200, device="cuda")
    _compare_many_steps(gpu_ranks, case)


def _compare_many_steps(ranks: Ranks, case: Case) -> None:
    one = free(case)
    assert max(one["n_dead"]) > case.d_in // 2
    for several in ranks.call(free_on_rank, case):
        assert several["n_dead"] == one["n_dead"]
        assert torch.equal(several["since_fired"], one["since_fired"])
        for name in ("losses", "norms"):
            for step, (value, expected) in enumerate(zip(several[name], one[name], strict=True)):
                assert_close(f"{name} of step {step}", value, expected, 1e-12)
        for name, expected in one["weights"].items():
            assert_close(name, several["weights"][name], expected, 1e-12)


def _compare(case: Case, expected: list, found: list, tolerance: float) -> None:
    for step, one in enumerate(expected):
        several = [of_rank[step] for of_rank in found]
        outputs = torch.cat([each["sae_out"] for each in several])
        assert_close("sae_out", outputs, one["sae_out"], tolerance)
        for each in several:
            assert torch.equal(each["feature_acts"] != 0, one["feature_acts"] != 0)
            assert torch.equal(each["own b_dec"], several[0]["own b_dec"])
            for name in ("feature_acts", "hidden_pre"):
                assert_close(name, each[name], one[name], tolerance)
            for of in ("losses", "metrics", "gradients"):
                assert each[of].keys() == one[of].keys()
                for name, value in one[of].items():
                    assert_close(name, each[of][name], value, tolerance)
