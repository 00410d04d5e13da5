"""Budgets at run time: levels of a reconstruction, adaptive encoding, and what training logs."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from comparison import (
    BATCH,
    D_IN,
    D_SAE,
    EVERY_ARCHITECTURE,
    K,
    assert_close,
    random_activations,
    trained_sae,
)
from sae_lens import LoggingConfig, SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopK, TopKSAE, TopKSAEConfig

from sae_lens_flex import (
    HierarchicalTopKSAE,
    HierarchicalTopKSAEConfig,
    HierarchicalTopKTrainingSAE,
    MeanBudget,
)
from sae_lens_flex.saes.budgets import RuntimeBudget

BUDGETS = [1, 2, 3, 5, K]
NORMALIZATIONS = ["none", "layer_norm", "constant_norm_rescale", "expected_average_only_in"]


def hierarchical_sae(kind: str = "inference", **fields: Any) -> Any:
    """An SAE with b_dec, b_enc and decoder norms of all sizes, in training or for inference."""
    reshape = fields.pop("reshape_activations", "none")
    trained = trained_sae("hierarchical_topk", aux_loss_coefficient=0.0, **fields)
    if kind == "training":
        return trained
    inference_fields = {
        name: getattr(trained.cfg, name)
        for name in (
            *("d_in", "d_sae", "k", "dtype", "rescale_acts_by_decoder_norm"),
            *("normalize_activations", "apply_b_dec_to_input"),
        )
    }
    cfg = HierarchicalTopKSAEConfig(**inference_fields, reshape_activations=reshape)
    cfg.metadata.hook_name = "blocks.0.attn.hook_z" if reshape == "hook_z" else None
    sae = HierarchicalTopKSAE(cfg)
    sae.load_state_dict(trained.state_dict())
    return sae


def decode_each(sae: Any, x: torch.Tensor, budgets: list[int]) -> dict[int, torch.Tensor]:
    """Reconstruct at each budget as SAELens does: one encode and one decode for each."""
    reconstructions = {}
    for budget in budgets:
        with torch.no_grad(), sae.at_budget(budget):
            reconstructions[budget] = sae.decode(sae.encode(x))
    return reconstructions


@pytest.mark.parametrize("shape", [(BATCH, D_IN), (3, 5, D_IN)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("rescale", [False, True], ids=["as-is", "rescaled"])
@pytest.mark.parametrize("kind", ["inference", "training"])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_levels_reconstruct_as_one_decode_per_budget(normalize, kind, rescale, shape) -> None:
    sae = hierarchical_sae(
        kind, normalize_activations=normalize, rescale_acts_by_decoder_norm=rescale
    )
    x = random_activations(*shape)
    expected = decode_each(sae, x, BUDGETS)
    acts, latents = sae.encode_levels(x)
    assert acts.shape == latents.shape == (*shape[:-1], K)
    reconstructions = dict(sae.decode_levels(acts, latents, BUDGETS))
    assert list(reconstructions) == BUDGETS
    for budget in BUDGETS:
        assert_close(reconstructions[budget], expected[budget], 1e-6, f"budget {budget}")


def test_levels_are_the_prefixes_of_the_descending_activations() -> None:
    sae = hierarchical_sae()
    x = random_activations()
    acts, latents = sae.encode_levels(x)
    for budget in BUDGETS:
        with sae.at_budget(budget):
            prefix = torch.zeros(BATCH, D_SAE).scatter(-1, latents[:, :budget], acts[:, :budget])
            assert torch.equal(prefix, sae.encode(x))
            assert torch.equal(sae.encode_levels(x)[0], acts[:, :budget])


def test_levels_without_budgets_are_the_powers_of_two_and_the_last() -> None:
    sae = hierarchical_sae(k=6)
    levels = sae.decode_levels(*sae.encode_levels(random_activations()))
    assert [budget for budget, _ in levels] == [1, 2, 4, 6]


@pytest.mark.parametrize("budgets", [[], [2, 1], [1, 1], [0, 2], [K + 1], 3, "12", [1.5]], ids=repr)
def test_impossible_levels_raise_and_name_the_budgets(budgets) -> None:
    sae = hierarchical_sae()
    acts, latents = sae.encode_levels(random_activations())
    with pytest.raises(ValueError, match="budgets"):
        list(sae.decode_levels(acts, latents, budgets))


@pytest.mark.parametrize("shape", [(BATCH, 4, 4), (3, 5, 4, 4)], ids=["2-D", "3-D"])
def test_levels_keep_the_heads_of_hook_z(shape) -> None:
    sae = hierarchical_sae(reshape_activations="hook_z")
    x = random_activations(*shape)
    expected = decode_each(sae, x, BUDGETS)
    for budget, reconstruction in sae.decode_levels(*sae.encode_levels(x), BUDGETS):
        assert reconstruction.shape == x.shape
        assert_close(reconstruction, expected[budget], 1e-6)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_levels_of_a_bfloat16_sae_are_as_close_as_its_decode(normalize) -> None:
    x = random_activations(256, D_IN)
    sae = hierarchical_sae(normalize_activations=normalize).to(dtype=torch.bfloat16)
    exact = hierarchical_sae(normalize_activations=normalize).to(dtype=torch.float64)
    exact.load_state_dict(sae.state_dict())
    exact.to(dtype=torch.float64)
    acts, latents = sae.encode_levels(x)
    # The latents that bfloat16 chose, decoded without its rounding.
    exact.process_sae_in(x)
    references = dict(exact.decode_levels(acts.double(), latents, BUDGETS))
    stock = decode_each(sae, x, BUDGETS)
    sae.process_sae_in(x)
    for budget, reconstruction in sae.decode_levels(acts, latents, BUDGETS):
        assert reconstruction.dtype == torch.bfloat16
        assert_close(reconstruction, references[budget], 1e-2)
        error = (reconstruction.double() - references[budget]).norm()
        assert error <= 1.05 * (stock[budget].double() - references[budget]).norm()


def above_threshold(sae: Any, x: torch.Tensor, threshold: float) -> torch.Tensor:
    """SAELens's TopK SAE with every positive latent kept, and then those above the threshold."""
    stock = trained_topk_of(sae)
    acts = stock.encode(x)
    return acts.where(acts > threshold, 0)


def trained_topk_of(sae: Any) -> TopKSAE:
    names = ("d_in", "d_sae", "dtype", "rescale_acts_by_decoder_norm", "apply_b_dec_to_input")
    fields = {name: getattr(sae.cfg, name) for name in (*names, "normalize_activations")}
    stock = TopKSAE(TopKSAEConfig(**fields, k=sae.cfg.d_sae))
    stock.load_state_dict(sae.state_dict())
    return stock


@pytest.mark.parametrize("rescale", [False, True], ids=["as-is", "rescaled"])
@pytest.mark.parametrize("kind", ["inference", "training"])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_a_mean_budget_keeps_what_is_above_its_threshold(normalize, kind, rescale) -> None:
    sae = hierarchical_sae(
        kind,
        normalize_activations=normalize,
        rescale_acts_by_decoder_norm=rescale,
        dtype="float64",
    )
    x = random_activations(2, 24, D_IN, dtype=torch.float64)
    counts = set()
    for threshold in (0.0, 1.0, 3.0):
        with torch.no_grad(), sae.at_budget(MeanBudget(3, threshold)):
            acts = sae.encode(x)
            assert sae.budget == MeanBudget(3, threshold)
            stock = trained_topk_of(sae)
            expected = above_threshold(sae, x, threshold)
            torch.testing.assert_close(acts, expected)
            stock.process_sae_in(x)
            torch.testing.assert_close(sae(x), stock.decode(expected))
        counts |= set(acts.count_nonzero(-1).flatten().tolist())
    assert sae.budget == K
    assert min(counts) < 3
    assert max(counts) > K


def test_a_mean_budget_has_the_gradients_of_what_it_keeps() -> None:
    sae = hierarchical_sae("training")
    x = random_activations()
    sae.budget = MeanBudget(3, 0.5)
    kept = sae.encode(x)
    kept.sum().backward()
    gradient = sae.b_enc.grad.clone()
    norms = sae.W_dec.norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else 1
    torch.testing.assert_close(gradient, (kept > 0).sum(0) * norms)


def test_a_mean_budget_compares_under_autocast_as_jumprelu_does() -> None:
    # In bfloat16 the threshold would be 1.0, and would not keep 1.0.
    sae = hierarchical_sae(rescale_acts_by_decoder_norm=False)
    sae.budget = MeanBudget(3, 0.999)
    acts = torch.tensor([[0.5, 1.0, -2.0, 1.5]], dtype=torch.bfloat16)
    assert sae.activation_fn(acts).tolist() == [[0, 1.0, 0, 1.5]]


def test_a_training_step_keeps_k_latents_at_a_mean_budget() -> None:
    x = random_activations()
    steps = []
    for fused in (True, False):
        sae = hierarchical_sae("training")
        sae.use_fused_path = fused
        expected = step(sae, x)
        sae.budget = MeanBudget(1, 1.0)
        assert torch.equal(step(sae, x).loss, expected.loss)
        steps.append(expected)
        assert sae.budget == MeanBudget(1, 1.0)
    assert_close(steps[0].loss, steps[1].loss)


@pytest.mark.parametrize("name", ["encode_levels", "encode_adaptive", "activation_fn.k"])
def test_what_needs_a_number_of_latents_refuses_a_mean_budget(name) -> None:
    sae = hierarchical_sae()
    x = random_activations()
    sae.budget = MeanBudget(3, 0.5)
    calls = {
        "encode_levels": lambda: sae.encode_levels(x),
        "encode_adaptive": lambda: sae.encode_adaptive(x, 0.4),
        "activation_fn.k": lambda: sae.activation_fn.k,
    }
    with pytest.raises(ValueError, match=rf"^{name} needs a number .* MeanBudget\(mean=3.0"):
        calls[name]()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool], ids=str)
@pytest.mark.parametrize("name", ["encode_levels", "encode_adaptive"])
def test_activations_that_are_no_real_numbers_are_refused(name, dtype) -> None:
    sae, x = hierarchical_sae(), random_activations().to(dtype)
    arguments = (x,) if name == "encode_levels" else (x, 0.4)
    with pytest.raises(TypeError, match=rf"^x has dtype {dtype}, expected one of real numbers"):
        getattr(sae, name)(*arguments)


@pytest.mark.parametrize("wrong", [None, "x", [[1.0]], np.zeros((2, D_IN))], ids=repr)
def test_what_is_no_tensor_is_refused(wrong) -> None:
    sae = hierarchical_sae()
    acts, latents = sae.encode_levels(random_activations())
    calls = {
        "x": [lambda: sae.encode_levels(wrong), lambda: sae.encode_adaptive(wrong, 0.4)],
        "acts": [lambda: sae.decode_levels(wrong, latents)],
        "latents": [lambda: sae.decode_levels(acts, wrong)],
    }
    for name, each in calls.items():
        for call in each:
            with pytest.raises(TypeError, match=rf"^{name} is .*, expected a (torch.T|t)ensor"):
                call()


def test_decode_levels_refuses_what_encode_levels_does_not_return() -> None:
    sae = hierarchical_sae()
    acts, latents = sae.encode_levels(random_activations())
    for dtype in (torch.int16, torch.uint8):
        narrow = sae.decode_levels(acts, latents.to(dtype))
        for (_, found), (_, expected) in zip(narrow, sae.decode_levels(acts, latents), strict=True):
            assert torch.equal(found, expected)
    with pytest.raises(TypeError, match=r"^latents is of torch.float32, expected a tensor of int"):
        sae.decode_levels(latents, acts)
    with pytest.raises(ValueError, match=r"^latents has shape .* and acts .*, expected one shape"):
        sae.decode_levels(acts[:, 1:], latents)


@pytest.mark.parametrize("wrong", [None, "cfg", {}], ids=repr)
def test_an_sae_of_no_config_is_refused(wrong) -> None:
    with pytest.raises(TypeError, match=r"^cfg is a \w+, expected a TopKSAEConfig for a"):
        HierarchicalTopKSAE(wrong)


@pytest.mark.parametrize(
    ("mean", "threshold"), [(0, 1), (-1, 1), ("3", 1), (3, -0.1), (3, float("nan")), (3, None)]
)
def test_an_impossible_mean_budget_raises(mean, threshold) -> None:
    with pytest.raises(ValueError, match=r"^(mean|threshold) is "):
        MeanBudget(mean, threshold)


def test_a_mean_above_k_is_refused_and_leaves_the_budget() -> None:
    sae = hierarchical_sae()
    sae.budget = 5
    with pytest.raises(ValueError, match=rf"^budget is MeanBudget\(.*up to k \({K}\)"):
        sae.budget = MeanBudget(K + 1, 0.1)
    assert sae.budget == 5
    sae.budget = MeanBudget(K, 0.1)
    sae.cfg.k = K - 1
    with pytest.raises(ValueError, match=r"^budget is MeanBudget"):
        sae.encode(random_activations())


def test_a_replaced_activation_function_refuses_a_mean_budget() -> None:
    sae = hierarchical_sae()
    sae.activation_fn = TopK(4)
    with pytest.raises(ValueError, match="activation_fn was replaced by a TopK"):
        sae.budget = MeanBudget(3, 0.5)
    assert sae.budget == 4


def test_copies_have_a_mean_budget_of_their_own() -> None:
    sae = hierarchical_sae()
    sae.budget = MeanBudget(3, 0.5)
    twin = copy.deepcopy(sae)
    sae.budget = 2
    assert twin.budget == MeanBudget(3, 0.5)
    x = random_activations()
    torch.testing.assert_close(twin.encode(x), above_threshold(sae, x, 0.5))


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
def test_training_saes_without_budgets_refuse_one(architecture) -> None:
    sae = trained_sae(architecture)
    assert hasattr(sae, "budget") == hasattr(sae, "at_budget") == isinstance(sae, RuntimeBudget)
    if architecture == "hierarchical_topk":
        return
    with pytest.raises(AttributeError, match=rf"^a {type(sae).__name__} takes no budget"):
        sae.budget = 4
    assert "budget" not in vars(copy.deepcopy(sae))


def test_an_activation_function_without_k_is_refused_by_name() -> None:
    sae, x = hierarchical_sae("training"), random_activations()
    sae.activation_fn = torch.nn.ReLU()
    expected = "activation_fn was replaced by a ReLU, expected one with a k"
    with pytest.raises(ValueError, match=expected):
        sae.budget = 3
    assert not hasattr(sae.activation_fn, "k")
    with pytest.raises(ValueError, match=expected):
        _ = sae.budget
    with pytest.raises(ValueError, match=expected), sae.at_budget(3):
        pass
    with pytest.warns(UserWarning, match="unfused"), pytest.raises(ValueError, match=expected):
        step(sae, x)


@pytest.mark.parametrize("kind", ["inference", "training"])
@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
def test_levels_are_not_decoded_twice_without_what_undoes_the_normalization(
    normalize, kind
) -> None:
    sae, x = hierarchical_sae(kind, normalize_activations=normalize), random_activations()
    encoded = sae.encode_levels(x)
    once = dict(sae.decode_levels(*encoded))
    with pytest.raises(ValueError, match=r"^decode_levels .* call encode_levels before each"):
        sae.decode_levels(*encoded)
    again = dict(sae.decode_levels(*sae.encode_levels(x)))
    assert all(torch.equal(again[budget], once[budget]) for budget in once)


@pytest.mark.parametrize("kind", ["inference", "training"])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_decode_takes_what_adaptive_encoding_returns(normalize, kind) -> None:
    sae, x = hierarchical_sae(kind, normalize_activations=normalize), random_activations()
    assert_close(sae.decode(sae.encode_adaptive(x, 0)), sae.decode(sae.encode(x)))


def test_levels_leave_the_sae_as_it_was() -> None:
    sae = hierarchical_sae(normalize_activations="layer_norm")
    before = set(vars(sae))
    sae.budget = 5
    list(sae.decode_levels(*sae.encode_levels(random_activations())))
    assert set(vars(sae)) == before
    sae.decode(sae.encode_adaptive(random_activations(), 0.1))
    assert set(vars(sae)) == before
    assert sae.budget == 5


def adaptive_by_definition(sae: Any, x: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Keep the first j latents, j the smallest with |residual at j|^2 <= tolerance |x - b_dec|^2.

    b_dec is scaled and shifted like the output: it is the reconstruction from no latents at all.
    """
    flat = x.flatten(0, -2)
    acts = torch.zeros(len(flat), sae.cfg.d_sae, dtype=sae.dtype)
    for row in range(len(flat)):
        one = flat[row : row + 1]
        full = sae.encode(one)
        bias = sae.decode(torch.zeros_like(full))
        order = full[0].argsort(descending=True)
        for j in range(1, sae.budget + 1):
            kept = torch.zeros_like(full)
            kept[0, order[:j]] = full[0, order[:j]]
            sae.process_sae_in(one)
            residual = sae.decode(kept) - one
            if residual.square().sum() <= tolerance * (one - bias).square().sum():
                break
        acts[row] = kept[0]
    return acts.view(*x.shape[:-1], -1)


@pytest.mark.parametrize("rescale", [False, True], ids=["as-is", "rescaled"])
@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
def test_adaptive_encoding_matches_its_definition(normalize, rescale) -> None:
    sae = hierarchical_sae(
        normalize_activations=normalize, rescale_acts_by_decoder_norm=rescale, dtype="float64"
    )
    x = random_activations(2, 24, D_IN, dtype=torch.float64)
    n_kept = set()
    for tolerance in (0.05, 0.4, 0.6, 0.8, 1.0):
        with torch.no_grad():
            expected = adaptive_by_definition(sae, x, tolerance)
        acts = sae.encode_adaptive(x, tolerance)
        assert torch.equal(acts.count_nonzero(-1), expected.count_nonzero(-1))
        torch.testing.assert_close(acts, expected)
        n_kept |= set(acts.count_nonzero(-1).flatten().tolist())
    assert len(n_kept) > K // 2, "few levels were tried"


def test_adaptive_encoding_keeps_all_latents_at_no_tolerance_and_one_at_any() -> None:
    sae = hierarchical_sae()
    x = random_activations()
    assert torch.equal(sae.encode_adaptive(x, 0), sae.encode(x))
    with sae.at_budget(1):
        first = sae.encode(x)
    assert torch.equal(sae.encode_adaptive(x, 1e9), first)


def test_adaptive_encoding_keeps_no_more_than_the_budget() -> None:
    sae = hierarchical_sae()
    x = random_activations()
    with sae.at_budget(3):
        assert torch.equal(sae.encode_adaptive(x, 0), sae.encode(x))


def test_adaptive_encoding_of_the_training_sae_is_that_of_the_inference_sae() -> None:
    x = random_activations()
    acts = hierarchical_sae("training").encode_adaptive(x, 0.4)
    assert not acts.requires_grad
    assert torch.equal(acts, hierarchical_sae().encode_adaptive(x, 0.4))


def test_encode_adaptive_tells_errors_that_are_not_finite() -> None:
    sae, x = hierarchical_sae(), random_activations()
    x[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^x has NaN or infinite values"):
        sae.encode_adaptive(x, 0.4)
    with torch.no_grad():
        sae.W_dec[:] = torch.inf
    with pytest.raises(ValueError, match=r"^sae has NaN or infinite values in W_dec, expected"):
        sae.encode_adaptive(random_activations(), 0.4)


def test_adaptive_encoding_takes_the_heads_of_hook_z() -> None:
    sae = hierarchical_sae(reshape_activations="hook_z")
    x = random_activations(3, 5, D_IN)
    expected = hierarchical_sae().encode_adaptive(x, 0.4)
    assert torch.equal(sae.encode_adaptive(x.view(3, 5, 4, 4), 0.4), expected)


@pytest.mark.parametrize("options", [{}, {"reshape_activations": "hook_z"}], ids=str)
def test_adaptive_encoding_refuses_another_width(options) -> None:
    sae = hierarchical_sae(**options)
    with pytest.raises(ValueError, match=r"^x has shape \[3, 5\], expected 16 values"):
        sae.encode_adaptive(torch.zeros(3, 5), 0.4)


@pytest.mark.parametrize("tolerance", [-0.1, float("nan"), "0.1", None], ids=repr)
def test_adaptive_encoding_refuses_an_impossible_tolerance(tolerance) -> None:
    with pytest.raises(ValueError, match="tolerance is"):
        hierarchical_sae().encode_adaptive(random_activations(), tolerance)


@pytest.mark.parametrize("kind", ["inference", "training"])
@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("object", "decode"),
        ("subclass", "decode"),
        ("object", "run_time_activation_norm_fn_out"),
    ],
)
def test_replaced_decoding_is_refused_by_name(how, name, kind) -> None:
    sae = hierarchical_sae(kind)
    x = random_activations()
    acts, latents = sae.encode_levels(x)
    if how == "object":
        own = getattr(sae, name)
        setattr(sae, name, lambda x: 0.5 * own(x))
    else:
        sae.__class__ = type("Mine", (type(sae),), {name: lambda sae, acts: acts})
    with pytest.raises(NotImplementedError, match=f"decode_levels .* but {name} is not SAELens's"):
        sae.decode_levels(acts, latents)
    with pytest.raises(NotImplementedError, match=f"encode_adaptive .* but {name} is not"):
        sae.encode_adaptive(x, 0.1)


def step(sae: Any, x: torch.Tensor, is_logging_step: bool = False) -> TrainStepOutput:
    return sae.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients={},
            dead_neuron_mask=None,
            n_training_steps=0,
            is_logging_step=is_logging_step,
        )
    )


def logged(sae: Any, x: torch.Tensor, is_logging_step: bool) -> dict[str, Any]:
    return step(sae, x, is_logging_step).metrics


def expected_metrics(sae: Any, x: torch.Tensor) -> dict[str, float]:
    """Explained variance and MSE, by SAELens's formulas, of one decode per budget."""
    metrics = {}
    variance = (x - x.mean(0)).square().sum(-1).mean()
    for budget, reconstruction in decode_each(sae, x, [1, 2, 4, K]).items():
        mse = (reconstruction - x).square().sum(-1).mean()
        metrics[f"explained_variance_at_{budget}"] = (1 - mse / variance).item()
        metrics[f"mse_at_{budget}"] = mse.item()
    curve = [value for name, value in metrics.items() if name.startswith("explained")]
    falls = [high - low for n, high in enumerate(curve) for low in curve[n:]]
    return metrics | {"explained_variance_fall": max(falls)}


@pytest.mark.parametrize("path", ["fused", "unfused"])
@pytest.mark.parametrize("rescale", [False, True], ids=["as-is", "rescaled"])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_logging_steps_report_every_doubling_budget(normalize, rescale, path) -> None:
    sae = hierarchical_sae(
        "training", normalize_activations=normalize, rescale_acts_by_decoder_norm=rescale
    )
    sae.use_fused_path = path == "fused"
    x = random_activations()
    metrics = {name: float(value) for name, value in logged(sae, x, True).items()}
    expected = expected_metrics(sae, x)
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert expected["explained_variance_fall"] > 0.01, "the SAE shows no fall"


def test_a_curve_that_only_rises_has_no_fall() -> None:
    sae = hierarchical_sae("training", d_sae=D_IN)
    with torch.no_grad():  # Each latent is a coordinate, so a further one takes off some error.
        for weight in sae.parameters():
            torch.nn.init.eye_(weight) if weight.ndim == 2 else weight.zero_()
    metrics = logged(sae, random_activations().abs(), True)
    assert metrics["explained_variance_at_1"] < metrics["explained_variance_at_2"]
    assert metrics["explained_variance_fall"] == 0


@pytest.mark.filterwarnings("ignore:training steps take the unfused path")
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_logging_steps_report_what_a_replaced_decode_returns(normalize) -> None:
    class Halved(HierarchicalTopKTrainingSAE):
        def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
            return 0.5 * super().decode(feature_acts)

    sae = hierarchical_sae("training", normalize_activations=normalize)
    x = random_activations()
    plain = expected_metrics(sae, x)
    sae.__class__ = Halved
    expected = expected_metrics(sae, x)
    assert expected != pytest.approx(plain, rel=0.01)
    metrics = {name: float(value) for name, value in logged(sae, x, True).items()}
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("path", ["fused", "unfused"])
def test_other_steps_compute_no_metrics(path, monkeypatch) -> None:
    sae = hierarchical_sae("training")
    sae.use_fused_path = path == "fused"
    monkeypatch.setattr(sae, "_logging_metrics", lambda *_: pytest.fail("computed"))
    assert logged(sae, random_activations(), False) == {}


def test_trainer_logs_the_budgets_under_metrics_on_logging_steps_only(monkeypatch) -> None:
    sae = hierarchical_sae("training")
    batches = [random_activations(seed=seed) for seed in range(6)]
    cfg = SAETrainerConfig(
        total_training_samples=len(batches) * BATCH,
        train_batch_size_samples=BATCH,
        lr=1e-2,
        lr_end=1e-2,
        logger=LoggingConfig(log_to_wandb=True, wandb_log_frequency=3),
    )
    trainer = SAETrainer(cfg=cfg, sae=sae, data_provider=iter(batches))
    logs = []

    def record(output: Any) -> None:
        if output.metrics:
            assert trainer._is_logging_step()
            logs.append(trainer.build_train_step_log_dict(output, trainer.n_training_samples))
        else:
            assert not trainer._is_logging_step()

    expected = []
    step = trainer._train_step

    def recording_step(sae: Any, sae_in: torch.Tensor) -> Any:
        if trainer._is_logging_step():  # the weights that the optimizer has not changed yet
            expected.append(expected_metrics(sae, sae_in))
        return step(sae=sae, sae_in=sae_in)

    monkeypatch.setattr(trainer, "_train_step", recording_step)
    monkeypatch.setattr(trainer, "_log_train_step", record)
    monkeypatch.setattr(trainer, "_run_and_log_evals", lambda: None)
    monkeypatch.setattr(trainer, "save_checkpoint", lambda *_, **__: None)
    trainer.fit()
    assert len(logs) == len(expected) == 2
    for log, metrics in zip(logs, expected, strict=True):
        assert {name: log[f"metrics/{name}"] for name in metrics} == pytest.approx(
            metrics, rel=1e-5, abs=1e-6
        )
        # SAELens's own metric, of the reconstruction at k
        assert log[f"metrics/explained_variance_at_{K}"] == pytest.approx(
            log["metrics/explained_variance"], rel=1e-4
        )
