"""The losses over generated shapes, dtypes, strides, repeats and level weights."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_flex.ops.losses import decoder_loss

from .comparison import (
    TOLERANCE,
    assert_matches_definition,
    every_backend,
    generated,
    random_inputs,
    relative_error,
)
from .ragged import ascending, exact, ragged_code, ragged_request, random_level_weights

# The interpreter takes about half a second an example.
N_EXAMPLES = 300 if torch.cuda.is_available() else 12

sizes = st.tuples(
    st.integers(1, 40), st.integers(1, 24), st.integers(1, 70), st.integers(1, 140)
)  # B, K, F, D

# Rows of different length: mostly short ones, empty ones and a long one among them.
lengths = st.lists(
    st.one_of(st.just(0), st.integers(0, 20), st.integers(0, 70)), min_size=1, max_size=9
)


@generated(N_EXAMPLES)
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


@generated(N_EXAMPLES)
@given(
    lengths=lengths,
    n_latents=st.integers(1, 70),
    d_in=st.integers(1, 140),
    dtype=st.sampled_from(list(TOLERANCE)),
    n_spare=st.integers(0, 3),
    levels=st.sampled_from(["last", "of_samples", "of_widths"]),
    n_widths=st.integers(1, 6),
    deterministic=st.booleans(),
    seed=st.integers(0, 2**16),
)
@every_backend
def test_any_rows_match_the_definition(
    on, lengths, n_latents, d_in, dtype, n_spare, levels, n_widths, deterministic, seed
) -> None:
    code = ragged_code(lengths, n_latents, device=on[1], n_spare=n_spare, seed=seed)
    fields = {"levels": "last"}
    if levels == "of_samples":
        fields["levels"] = random_level_weights(code, seed)
    elif levels == "of_widths":
        code = ascending(code)
        generator = torch.Generator().manual_seed(seed)
        inner = torch.randperm(n_latents, generator=generator)[: n_widths - 1]
        widths = torch.cat((inner, torch.tensor([n_latents]))).sort().values
        fields["levels"] = torch.rand(len(widths), generator=generator).to(on[1])
        fields["widths"] = widths.to(on[1])
    request = ragged_request(
        code,
        n_latents=n_latents,
        d_in=d_in,
        dtype=dtype,
        deterministic=deterministic,
        **fields,
    )
    result = decoder_loss(request, use_triton=on[0] == "triton")
    magnitudes = exact(request, magnitude=True)
    for name, value in exact(request).items():
        mine = getattr(result, name)
        if value is not None and value.numel() > 0:
            mine = mine[: len(value)] if mine.ndim == 1 else mine
            error = relative_error(mine, value, magnitudes[name])
            assert error < TOLERANCE[torch.float32], f"{name}: {error}"
