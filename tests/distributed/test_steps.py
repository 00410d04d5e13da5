"""A step of several processes is that of one process on the global batch."""

import pytest
import torch

from .ranks import Ranks
from .steps import Case, on_rank, parts, stepwise

CASES = {
    "plain": Case(),
}


def assert_close(name: str, value: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert value.shape == expected.shape, name
    assert value.dtype == expected.dtype, name
    error = (value - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error <= tolerance, f"{name}: {error}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_steps_are_those_of_one_process(ranks: Ranks, case: Case) -> None:
    expected, found = stepwise(case), ranks.call(on_rank, case)
    tolerance = 1e-12
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
