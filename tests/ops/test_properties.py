"""The losses over generated shapes, dtypes, strides, repeats and level weights."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .comparison import TOLERANCE, assert_matches_definition, random_inputs

# The interpreter takes about half a second an example.
N_EXAMPLES = 300 if torch.cuda.is_available() else 12

sizes = st.tuples(
    st.integers(1, 40), st.integers(1, 24), st.integers(1, 70), st.integers(1, 140)
)  # B, K, F, D


@settings(
    max_examples=N_EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=sizes,
    dtype=st.sampled_from(list(TOLERANCE)),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    n_distinct=st.integers(1, 70),
    is_strided=st.booleans(),
    with_level_weights=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_input_matches_the_definition(
    implementation, shape, dtype, index_dtype, n_distinct, is_strided, with_level_weights, seed
) -> None:
    indices, inputs = random_inputs(shape, dtype, implementation.device, index_dtype, seed)
    indices = indices % n_distinct  # few distinct latents: many repeats in a row
    if is_strided:
        indices = indices.T.contiguous().T
        inputs = {
            name: value.detach().T.contiguous().T.requires_grad_() for name, value in inputs.items()
        }
    levels = {}
    if with_level_weights and implementation.uses_levels():
        generator = torch.Generator().manual_seed(seed)
        levels["level_weights"] = torch.rand(shape[1], generator=generator).to(
            implementation.device
        )
    assert_matches_definition(implementation, indices, inputs, **levels)
