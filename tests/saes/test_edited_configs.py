"""A config edited after the SAE was made: as SAELens's own SAE takes it, or refused by name."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from comparison import (
    D_IN,
    D_SAE,
    EVERY_ARCHITECTURE,
    MANY_DEAD,
    STOCK,
    K,
    assert_close,
    assert_same_gradients,
    assert_same_losses,
    copy_weights,
    dead_mask,
    random_activations,
    run_step,
    step_input,
    trained_sae,
)
from sae_lens.saes.sae import SAE, TrainingSAE
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from sae_lens_flex import HierarchicalTopKSAE, HierarchicalTopKSAEConfig, sweep_budgets

NAN = float("nan")

# What SAELens's TopK takes in the next step or in `encode`, and what it does not look at again.
AS_STOCK: list[tuple[str, Any]] = [
    ("apply_b_dec_to_input", False),
    ("rescale_acts_by_decoder_norm", False),
    ("aux_loss_coefficient", 0.0),
    ("aux_loss_coefficient", np.float32(0.5)),
    ("aux_loss_coefficient", 3),
    ("use_sparse_activations", False),
    ("decoder_init_norm", 5.0),
    ("d_sae", 2 * D_SAE),
    ("d_sae", None),
    ("d_in", D_IN // 2),
    ("dtype", "float64"),
    ("device", "meta"),
    ("reshape_activations", "hook_z"),
    ("normalize_activations", "expected_average_only_in"),
]
# What a step refuses. Some of it SAELens takes and computes nonsense.
REFUSED: list[tuple[str, Any]] = [
    *(("aux_loss_coefficient", value) for value in (-1.0, NAN, "1", None, True)),
    *(
        (name, value)
        for name in (
            "apply_b_dec_to_input",
            "rescale_acts_by_decoder_norm",
            "use_sparse_activations",
        )
        for value in (0.5, 0, "no", None, np.bool_(True))
    ),
    *(("normalize_activations", value) for value in ("layer_norm", "constant_norm_rescale")),
]
REFUSED_BY_BATCHTOPK = [("topk_threshold_lr", value) for value in (-1.0, NAN, "x", None)]
REFUSED_BY_MATRYOSHKA: list[tuple[str, Any]] = [
    ("use_matryoshka_aux_loss", "no"),
    ("use_matryoshka_aux_loss", None),
    *(
        ("matryoshka_widths", widths)
        for widths in (
            [20, 5, D_SAE],
            [5, 5, D_SAE],
            [0, 5, D_SAE],
            [2.0, 5, D_SAE],
            [5, 20],
            [5, D_SAE + 1],
            [],
            None,
            5,
        )
    ),
]
REFUSED_BY_HIERARCHICAL: list[tuple[str, Any]] = [
    *(("k", value) for value in (0, D_SAE + 1, 3.0, 2.5, "3", None, True)),
    *(("budgets", value) for value in ([1, 4], [1.0, K], [], K, [0, K])),
    *(("level_weights", value) for value in ([1.0] * (K - 1), 1.0, [0.0] * K, [NAN] * K)),
]
EVERY_REFUSED = [
    (architecture, *edit)
    for architecture in EVERY_ARCHITECTURE
    for edit in (
        *REFUSED,
        *(REFUSED_BY_BATCHTOPK if "batch" in architecture else ()),
        *(REFUSED_BY_MATRYOSHKA if "matryoshka" in architecture else ()),
        *(REFUSED_BY_HIERARCHICAL if "hierarchical" in architecture else ()),
    )
]
either_path = pytest.mark.parametrize("path", [None, False], ids=["fused", "unfused"])


def edited_sae(architecture: str, path: bool | None, field: str, value: Any) -> Any:
    # At budget k alone the hierarchical loss is SAELens's.
    sae = trained_sae(architecture, **({"budgets": [K]} if "hierarchical" in architecture else {}))
    if architecture in EVERY_ARCHITECTURE:
        sae.use_fused_path = path
    setattr(sae.cfg, field, value)
    return sae


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
@pytest.mark.parametrize(("field", "value"), AS_STOCK, ids=repr)
@either_path
def test_an_edit_acts_as_in_stock(architecture, field, value, path) -> None:
    sae = edited_sae(architecture, path, field, value)
    stock = edited_sae(STOCK[architecture], None, field, value)
    x, dead = random_activations(), dead_mask(MANY_DEAD)
    assert_same_losses(run_step(sae, x, dead), run_step(stock, x, dead))
    assert_same_gradients(sae, stock)
    assert_close(sae.encode(x), stock.encode(x).to_dense(), name="encode")
    assert_close(sae(x), stock(x), name="forward")


@pytest.mark.parametrize(("architecture", "field", "value"), EVERY_REFUSED, ids=repr)
@pytest.mark.parametrize("n_dead", [None, MANY_DEAD])
@either_path
def test_an_impossible_edit_ends_the_next_step_and_is_named(
    architecture, field, value, path, n_dead
) -> None:
    sae = edited_sae(architecture, path, field, value)
    if field in ("k", "level_weights"):
        sae.cfg.budgets = None
    dead = None if n_dead is None else dead_mask(n_dead)
    with pytest.raises(ValueError, match=rf"^(an element of )?{field} is "):
        sae.training_forward_pass(step_input(random_activations(), dead))


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("flex_topk", {"aux_loss_coefficient": np.float32(0.5)}),
        ("flex_batchtopk", {"topk_threshold_lr": np.float64(0.5)}),
        ("hierarchical_topk", {"k": np.int64(3), "budgets": np.array([1, 3])}),
        ("hierarchical_topk", {"k": torch.tensor(3), "level_weights": torch.arange(3.0)}),
        ("hierarchical_topk", {"budgets": torch.tensor([1, K]), "level_weights": np.ones(2)}),
    ],
    ids=str,
)
@either_path
def test_edited_numbers_of_numpy_and_torch_are_saved(architecture, fields, path, tmp_path) -> None:
    sae = trained_sae(architecture)
    sae.use_fused_path = path
    for field, value in fields.items():
        setattr(sae.cfg, field, value)
    run_step(sae, random_activations())
    sae.save_model(tmp_path)
    saved = TrainingSAE.load_from_disk(tmp_path).cfg
    for field, value in fields.items():
        expected = value.tolist() if hasattr(value, "tolist") else value
        assert getattr(saved, field) == expected


@pytest.mark.parametrize("k", [np.int64(3), np.float32(2.5)], ids=repr)
@pytest.mark.parametrize("architecture", ["flex_batchtopk", "flex_matryoshka_batchtopk"])
def test_a_mean_k_of_numpy_is_saved(architecture, k, tmp_path) -> None:
    sae = trained_sae(architecture, k=k)
    sae.save_model(tmp_path)
    saved = TrainingSAE.load_from_disk(tmp_path).cfg
    assert saved.k == k == sae.activation_fn.k
    assert type(saved.k) is type(k.item())


@pytest.mark.parametrize("architecture", ["flex_topk", "hierarchical_topk", "flex_batchtopk"])
@either_path
def test_an_auxiliary_loss_that_cannot_be_is_refused_before_a_latent_is_dead(
    architecture, path
) -> None:
    sae = trained_sae(architecture, normalize_activations="layer_norm", aux_loss_coefficient=0)
    sae.use_fused_path = path
    sae.cfg.aux_loss_coefficient = 1.0
    message = "^normalize_activations is 'layer_norm' and aux_loss_coefficient is 1.0"
    with pytest.raises(ValueError, match=message):
        sae.training_forward_pass(step_input(random_activations(), dead_mask(0)))


@pytest.mark.parametrize("by_width", [False, True])
@pytest.mark.parametrize("widths", [[5, 20, D_SAE], (30, D_SAE), [D_SAE]], ids=str)
@either_path
def test_edited_widths_act_as_in_stock(widths, by_width, path) -> None:
    sae = edited_sae("flex_matryoshka_batchtopk", path, "matryoshka_widths", widths)
    stock = edited_sae("matryoshka_batchtopk", None, "matryoshka_widths", widths)
    sae.cfg.use_matryoshka_aux_loss = stock.cfg.use_matryoshka_aux_loss = by_width
    x, dead = random_activations(), dead_mask(MANY_DEAD)
    assert_same_losses(run_step(sae, x, dead), run_step(stock, x, dead))
    assert_same_gradients(sae, stock)


# --- hierarchical_topk takes k where it encodes, too


def hierarchical_sae(kind: str, k: int = K) -> Any:
    trained = trained_sae("hierarchical_topk", budgets=[k], k=k)
    if kind == "training":
        return trained
    sae = HierarchicalTopKSAE(
        HierarchicalTopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=k, rescale_acts_by_decoder_norm=True)
    )
    copy_weights(trained, sae)
    return sae


def stock_sae(k: int) -> SAE[Any]:
    sae = TopKSAE(TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=k, rescale_acts_by_decoder_norm=True))
    copy_weights(hierarchical_sae("training"), sae)
    return sae


either_kind = pytest.mark.parametrize("kind", ["training", "inference"])


@either_kind
@pytest.mark.parametrize("k", [1, 3, np.int64(3), torch.tensor(3), D_SAE], ids=repr)
def test_an_edited_k_is_what_an_sae_made_with_it_keeps(kind, k) -> None:
    sae, stock, x = hierarchical_sae(kind), stock_sae(int(k)), random_activations()
    sae.cfg.k = k
    assert sae.budget == int(k)
    assert_close(sae.encode(x), stock.encode(x), name="encode")
    assert_close(sae(x), stock(x), name="forward")


@either_kind
@pytest.mark.parametrize("k", [0, -1, D_SAE + 1, 3.0, 2.5, "3", None, True], ids=repr)
def test_an_impossible_k_is_refused_wherever_it_is_read(kind, k) -> None:
    sae, x = hierarchical_sae(kind), random_activations()
    sae.cfg.k = k

    def set_budget() -> None:
        sae.budget = 1

    message = "^k is " + ("missing" if k is None else re.escape(repr(k)))
    for use in (
        lambda: sae.encode(x),
        lambda: sae(x),
        lambda: sae.budget,
        set_budget,
        lambda: sae.encode_levels(x),
        lambda: sae.encode_adaptive(x, 0.1),
        lambda: sweep_budgets(sae, x, show_progress=False),
    ):
        with pytest.raises(ValueError, match=message):
            use()


@either_kind
def test_edited_sizes_change_nothing_at_run_time(kind) -> None:
    expected, sae, x = hierarchical_sae(kind), hierarchical_sae(kind), random_activations()
    sae.cfg.d_sae, sae.cfg.d_in = 2 * D_SAE, D_IN // 2
    assert torch.equal(sae.encode_adaptive(x, 0.1), expected.encode_adaptive(x, 0.1))
    levels = sae.decode_levels(*sae.encode_levels(x))
    for (budget, output), at in zip(
        levels, expected.decode_levels(*expected.encode_levels(x)), strict=True
    ):
        assert budget == at[0]
        assert torch.equal(output, at[1])
