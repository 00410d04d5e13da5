"""What the configs accept, refuse and write."""

import json
import re
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from comparison import (
    EVERY_ARCHITECTURE,
    FUSED_ARCHITECTURES,
    TRAINING_CLASSES,
    K,
    training_config,
)
from sae_lens import SAEConfig, TopKTrainingSAEConfig, TrainingSAEConfig

from sae_lens_flex import (
    FlexTopKTrainingSAEConfig,
    HierarchicalTopKSAEConfig,
    HierarchicalTopKTrainingSAE,
    HierarchicalTopKTrainingSAEConfig,
)

OTHERS = (TopKTrainingSAEConfig, HierarchicalTopKTrainingSAEConfig, FlexTopKTrainingSAEConfig)

NAN, INFINITY = float("nan"), float("inf")
NO_NUMBERS = ["8", "x", "", [8], (8,), {8: 1}, {8}, b"8", 1j, object(), torch.float32, int]

# Values that a cfg.json, a command line or a slip can put in a field.
BAD_INTEGERS = [0, -1, 2.5, 8.0, True, False, None, NAN, INFINITY, np.float32(8), *NO_NUMBERS]
BAD_COEFFICIENTS = [-1, -1e-9, NAN, INFINITY, -INFINITY, True, None, 10**400, *NO_NUMBERS]
BAD_NORMS = [0, -0.1, NAN, INFINITY, True, 10**400, *NO_NUMBERS]
BAD_BOOLS = ["true", "", 0, 1, 1.0, None, NAN, [], [True], {}]
BAD_CHOICES = ["cuda", "Torch", "", None, 0, True, NAN, ["torch"], {"torch": 1}, torch.float32]
BAD_DTYPES = ["nonsense", "float8", "", "int32", None, 0, True, NAN, ["float32"], {"float32": 1}]
BAD_BUDGETS = [
    [],
    [0, K],
    [-1, K],
    [1, K, K + 1],
    [1, 4],
    [K, 1],
    [1, 1, K],
    [1, 4, 2, K],
    [1.0, K],
    [True, K],
    [None, K],
    ["1", K],
    [NAN, K],
    [[1], K],
    [[1, K]],
    [1, [K]],
    "all",
    "1,8",
    "[1, 8]",
    b"\x01\x08",
    K,
    0,
    2.5,
    True,
    False,
    NAN,
    {1: "a", K: "b"},
    {1, K},
    list,
    object(),
    torch.tensor(K),
    np.array(K),
]

# For budgets 1, 4, K.
BAD_LEVEL_WEIGHTS = [
    [],
    [1, 2],
    [1, 2, 3, 4],
    [1] * K,
    [0, 0, 0],
    [1, -1e-9, 1],
    [1, NAN, 1],
    [1, INFINITY, 1],
    [1, True, 1],
    [1, None, 1],
    [1, "1", 1],
    [1, [1], 1],
    [1, 10**400, 1],
    [1, 1j, 1],
    "even",
    "1, 1, 2",
    b"\x01\x01\x02",
    3,
    0.5,
    True,
    {1: 1, 4: 1, K: 1},
    {1.0, 2.0, 3.0},
    object(),
    torch.tensor(1.0),
    torch.ones(3, 1),
    np.array(1.0),
]

both_architectures = pytest.mark.parametrize("architecture", FUSED_ARCHITECTURES)


def cases(bad_values: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(field, value, id=f"{field}-{repr(value)[:20]}")
        for field, values in bad_values.items()
        for value in values
    ]


@both_architectures
@pytest.mark.parametrize(
    ("field", "value"),
    cases(
        {
            "d_in": BAD_INTEGERS,
            "d_sae": BAD_INTEGERS,
            "k": [49, 10**30, *BAD_INTEGERS],
            "rescale_acts_by_decoder_norm": BAD_BOOLS,
            "use_sparse_activations": BAD_BOOLS,
            "apply_b_dec_to_input": BAD_BOOLS,
            "aux_loss_coefficient": BAD_COEFFICIENTS,
            "decoder_init_norm": BAD_NORMS,
            "backend": BAD_CHOICES,
            "normalize_activations": BAD_CHOICES,
            "dtype": BAD_DTYPES,
        }
    ),
)
def test_impossible_values_are_refused_by_name(architecture, field, value) -> None:
    with pytest.raises(ValueError, match=field):
        training_config(architecture, **{field: value})


@pytest.mark.parametrize(("field", "value"), cases({"budgets": BAD_BUDGETS}))
def test_impossible_budgets_are_refused_by_name(field, value) -> None:
    with pytest.raises(ValueError, match="budgets"):
        training_config("hierarchical_topk", **{field: value})


@pytest.mark.parametrize(("field", "value"), cases({"level_weights": BAD_LEVEL_WEIGHTS}))
def test_impossible_level_weights_are_refused_by_name(field, value) -> None:
    with pytest.raises(ValueError, match="level_weights"):
        training_config("hierarchical_topk", budgets=[1, 4, K], **{field: value})


def test_level_weights_without_budgets_are_those_of_every_level() -> None:
    weights = [1.0] * (K - 1) + [float(K)]
    assert training_config("hierarchical_topk", level_weights=weights).level_weights == weights
    with pytest.raises(ValueError, match=rf"^level_weights is \[1, 2\], of 2, expected {K} "):
        training_config("hierarchical_topk", level_weights=[1, 2])


@pytest.mark.parametrize(
    ("field", "value"),
    cases(
        {
            "d_in": BAD_INTEGERS,
            "d_sae": BAD_INTEGERS,
            "k": [49, *BAD_INTEGERS],
            "rescale_acts_by_decoder_norm": BAD_BOOLS,
            "apply_b_dec_to_input": BAD_BOOLS,
            "normalize_activations": BAD_CHOICES,
        }
    ),
)
def test_inference_config_refuses_impossible_values_by_name(field, value) -> None:
    fields = {"d_in": 16, "d_sae": 48, "k": K, "rescale_acts_by_decoder_norm": True, field: value}
    with pytest.raises(ValueError, match=field):
        HierarchicalTopKSAEConfig(**fields)
    with pytest.raises(ValueError, match=field):
        SAEConfig.from_dict({**fields, "architecture": "hierarchical_topk"})


@pytest.mark.parametrize("missing", ["k", "rescale_acts_by_decoder_norm"])
def test_inference_config_does_not_guess(missing) -> None:
    fields = {"d_in": 16, "d_sae": 48, "k": K, "rescale_acts_by_decoder_norm": True}
    del fields[missing]
    with pytest.raises(ValueError, match=f"{missing} is missing"):
        HierarchicalTopKSAEConfig(**fields)
    with pytest.raises(ValueError, match=f"{missing} is missing"):
        SAEConfig.from_dict({**fields, "architecture": "hierarchical_topk"})


@both_architectures
def test_message_says_what_came_and_what_was_expected(architecture) -> None:
    with pytest.raises(ValueError, match=r"k is 64, expected an integer within 1\.\.d_sae \(48\)"):
        training_config(architecture, k=64)
    with pytest.raises(ValueError, match="backend is 'cuda', expected one of auto, triton, torch"):
        training_config(architecture, backend="cuda")


@both_architectures
@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm_rescale"])
def test_auxiliary_loss_is_refused_with_run_time_normalization(architecture, normalization) -> None:
    with pytest.raises(ValueError, match="aux_loss_coefficient"):
        training_config(architecture, normalize_activations=normalization)
    cfg = training_config(architecture, normalize_activations=normalization, aux_loss_coefficient=0)
    assert cfg.normalize_activations == normalization


@both_architectures
def test_defaults_are_those_of_stock_topk(architecture) -> None:
    ours = TRAINING_CLASSES[architecture][1](d_in=16, d_sae=128).to_dict()
    stock = TRAINING_CLASSES["topk"][1](d_in=16, d_sae=128).to_dict()
    differing = {name for name, value in stock.items() if ours[name] != value}
    assert differing == {"architecture", "metadata", "use_sparse_activations"}
    assert ours["use_sparse_activations"] is True
    assert ours["backend"] == "auto"
    assert set(ours) - set(stock) == {"backend"} | (
        {"budgets", "level_weights"} if architecture == "hierarchical_topk" else set()
    )


@both_architectures
@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_numpy_integers_become_ints(architecture, integer) -> None:
    cfg = training_config(architecture, d_in=integer(16), d_sae=integer(48), k=integer(K))
    assert (type(cfg.d_in), type(cfg.d_sae), type(cfg.k)) == (int, int, int)
    written = json.loads(json.dumps(cfg.to_dict()))
    assert (written["d_in"], written["d_sae"], written["k"]) == (16, 48, K)


@both_architectures
def test_numpy_floats_are_written_as_json(architecture) -> None:
    cfg = training_config(
        architecture, aux_loss_coefficient=np.float32(0.5), decoder_init_norm=np.float32(0.25)
    )
    written = json.loads(json.dumps(cfg.to_dict()))
    assert (written["aux_loss_coefficient"], written["decoder_init_norm"]) == (0.5, 0.25)


@both_architectures
@pytest.mark.parametrize("dtype", [torch.bfloat16, "torch.bfloat16", "bfloat16"])
def test_dtype_is_written_as_its_name(architecture, dtype) -> None:
    cfg = training_config(architecture, dtype=dtype)
    assert json.loads(json.dumps(cfg.to_dict()))["dtype"] in ("bfloat16", "torch.bfloat16")


@pytest.mark.parametrize(
    "budgets",
    [[1, 4, K], (1, 4, K), np.array([1, 4, K]), torch.tensor([1, 4, K]), [np.int64(1), 4, K]],
    ids=["list", "tuple", "numpy", "torch", "numpy_integer"],
)
def test_budgets_become_a_list_of_ints(budgets) -> None:
    cfg = training_config("hierarchical_topk", budgets=budgets)
    assert cfg.budgets == [1, 4, K]
    assert type(cfg.budgets) is list
    assert {type(budget) for budget in cfg.budgets} == {int}
    assert cfg.metadata.training_architecture_details["budgets"] == [1, 4, K]
    assert type(cfg.metadata.training_architecture_details["budgets"]) is list
    assert json.loads(json.dumps(cfg.to_dict()))["budgets"] == [1, 4, K]


@pytest.mark.parametrize(
    "weights",
    [[1, 0, 2], (1.0, 0, 2), np.array([1, 0, 2]), torch.tensor([1.0, 0, 2]), [np.float32(1), 0, 2]],
    ids=["list", "tuple", "numpy", "torch", "numpy_float"],
)
def test_level_weights_become_a_list_of_floats(weights) -> None:
    cfg = training_config("hierarchical_topk", budgets=[1, 4, K], level_weights=weights)
    assert type(cfg.level_weights) is list
    assert {type(weight) for weight in cfg.level_weights} == {float}
    assert cfg.level_weights == [1, 0, 2]  # as given; the SAE normalizes them
    assert cfg.metadata.training_architecture_details["level_weights"] == [1, 0, 2]
    assert json.loads(json.dumps(cfg.to_dict()))["level_weights"] == [1, 0, 2]


def test_config_keeps_its_own_lists() -> None:
    budgets, weights = [1, 4, K], [1, 1, 2]
    cfg = training_config("hierarchical_topk", budgets=budgets, level_weights=weights)
    budgets.append(0)
    weights.append(0)
    assert (cfg.budgets, cfg.level_weights) == ([1, 4, K], [1, 1, 2])


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("flex_topk", {}),
        ("flex_topk", {"backend": "torch", "decoder_init_norm": None}),
        ("flex_topk", {"normalize_activations": "layer_norm", "aux_loss_coefficient": 0.0}),
        ("hierarchical_topk", {}),
        ("hierarchical_topk", {"budgets": [1, 4, K], "rescale_acts_by_decoder_norm": False}),
        ("hierarchical_topk", {"budgets": (K,), "use_sparse_activations": False}),
        ("hierarchical_topk", {"budgets": [1, 4, K], "level_weights": (0.1, 0.2, 7)}),
        ("hierarchical_topk", {"level_weights": [1 / 3] * K}),
    ],
)
def test_config_survives_json(architecture, fields) -> None:
    cfg = training_config(architecture, **fields)
    written = json.loads(json.dumps(cfg.to_dict()))
    assert written["architecture"] == architecture
    assert TrainingSAEConfig.from_dict(written) == cfg


def test_inference_config_survives_json() -> None:
    cfg = HierarchicalTopKSAEConfig(d_in=16, d_sae=48, k=K, rescale_acts_by_decoder_norm=False)
    written = json.loads(json.dumps(cfg.to_dict()))
    assert written["architecture"] == "hierarchical_topk"
    assert SAEConfig.from_dict(written) == cfg


@both_architectures
def test_unknown_keys_are_ignored(architecture) -> None:
    cfg = training_config(architecture)
    written = {**cfg.to_dict(), "hook_name": "blocks.0.hook_resid_post", "foo": 1}
    assert TrainingSAEConfig.from_dict(written) == cfg


@both_architectures
def test_inference_config_of_a_training_config_keeps_what_inference_needs(architecture) -> None:
    cfg = training_config(architecture, rescale_acts_by_decoder_norm=False)
    inference = SAEConfig.from_dict(json.loads(json.dumps(cfg.get_inference_sae_cfg_dict())))
    expected = {"flex_topk": "topk"}.get(architecture, architecture)
    assert inference.architecture() == expected
    assert (inference.d_in, inference.d_sae, inference.k) == (16, 48, K)
    assert inference.rescale_acts_by_decoder_norm is False
    details = inference.metadata.training_architecture_details
    assert inference.metadata.training_architecture == architecture
    assert details["backend"] == "auto"
    for name in ("budgets", "level_weights"):
        assert (name in details) == (architecture == "hierarchical_topk")


def test_changing_k_alone_is_refused_where_budgets_are_given() -> None:
    cfg = training_config("hierarchical_topk", budgets=[1, K])
    with pytest.raises(ValueError, match="budgets"):
        replace(cfg, k=K - 1)


def test_changing_k_or_budgets_alone_is_refused_where_level_weights_are_given() -> None:
    cfg = training_config("hierarchical_topk", level_weights=[1.0] * K)
    with pytest.raises(ValueError, match="level_weights"):
        replace(cfg, k=K - 1)
    with pytest.raises(ValueError, match="level_weights"):
        replace(cfg, budgets=[1, K])


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
def test_config_of_another_class_is_refused(architecture) -> None:
    sae_class, config_class = TRAINING_CLASSES[architecture]
    for other in OTHERS:
        if other is not config_class:
            expected = f"cfg is a {other.__name__}, expected a {config_class.__name__} for a"
            with pytest.raises(TypeError, match=expected):
                sae_class(other(d_in=8, d_sae=16, k=2))


def test_going_on_with_other_settings_warns(tmp_path) -> None:
    def new(**fields: Any) -> HierarchicalTopKTrainingSAE:
        cfg = HierarchicalTopKTrainingSAEConfig(d_in=8, d_sae=16, k=4, **fields)
        return HierarchicalTopKTrainingSAE(cfg)

    new(budgets=[1, 4], level_weights=[1, 2.0]).save_model(tmp_path)
    expected = "budgets is [1, 2, 4], and was [1, 4]; level_weights is None, and was [1"
    with pytest.warns(UserWarning, match=re.escape(expected)):
        new(budgets=[1, 2, 4]).load_weights_from_checkpoint(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new(budgets=[1, 4], level_weights=[1, 2]).load_weights_from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("flex_topk", {"dtype": "float64"}),
        ("flex_topk", {"k": 3}),
        ("flex_topk", {"aux_loss_coefficient": 0.5}),
        ("flex_topk", {"rescale_acts_by_decoder_norm": False}),
        ("flex_topk", {"apply_b_dec_to_input": False}),
        ("flex_topk", {"normalize_activations": "expected_average_only_in"}),
        ("flex_topk", {"reshape_activations": "hook_z"}),
        ("flex_batchtopk", {"topk_threshold_lr": 0.5}),
        ("flex_matryoshka_batchtopk", {"matryoshka_widths": [8, 16]}),
        ("flex_matryoshka_batchtopk", {"use_matryoshka_aux_loss": True}),
    ],
)
def test_going_on_with_each_other_setting_warns(architecture, fields, tmp_path) -> None:
    sae_class, config_class = TRAINING_CLASSES[architecture]
    base = {"d_in": 8, "d_sae": 16, "k": 4}
    if "matryoshka" in architecture:
        base["matryoshka_widths"] = [4, 16]

    def new(**fields: Any) -> Any:
        return sae_class(config_class(**(base | fields)))

    new().save_model(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new().load_weights_from_checkpoint(tmp_path)
    ((name, value),) = fields.items()
    assert getattr(config_class(**base), name) != value
    message = f"other settings than the checkpoint's: {name} is {value!r}, and was"
    with pytest.warns(UserWarning, match=re.escape(message)):
        new(**fields).load_weights_from_checkpoint(tmp_path)


def test_going_on_from_another_size_is_refused(tmp_path) -> None:
    def new(d_sae: int) -> HierarchicalTopKTrainingSAE:
        cfg = HierarchicalTopKTrainingSAEConfig(d_in=8, d_sae=d_sae, k=4)
        return HierarchicalTopKTrainingSAE(cfg)

    new(16).save_model(tmp_path)
    with pytest.raises(ValueError, match="d_sae is 17, expected that of the checkpoint, 16"):
        new(17).load_weights_from_checkpoint(tmp_path)
