"""SAEs exported to TopK, started from TopK, and uploaded to the Hugging Face hub."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_process import run_new_python, run_python
from integration import conftest as toy
from integration.flows import activation_batches, make_trainer, runner_config
from integration.hub import TOKEN, Hub, running_hub
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    LanguageModelSAETrainingRunner,
)
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from safetensors.torch import load_file, save_file

import sae_lens_flex
from sae_lens_flex import (
    BudgetMetrics,
    BudgetSweep,
    FlexTopKTrainingSAE,
    FlexTopKTrainingSAEConfig,
    HierarchicalTopKSAE,
    HierarchicalTopKSAEConfig,
    HierarchicalTopKTrainingSAE,
    HierarchicalTopKTrainingSAEConfig,
    MeanBudget,
    export_jumprelu,
    export_sparsify,
    export_topk,
    from_topk,
    mean_budget,
    sweep_budgets,
    upload,
)
from sae_lens_flex.sharing import model_card

hf_model_dir, language_model, token_dataset = (
    toy.hf_model_dir,
    toy.language_model,
    toy.token_dataset,
)

D_IN, D_SAE, K = toy.D_IN, 48, 8
CLASSES: dict[str, tuple[type[Any], type[Any]]] = {
    "topk": (TopKSAE, TopKSAEConfig),
    "topk-training": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "flex": (FlexTopKTrainingSAE, FlexTopKTrainingSAEConfig),
    "hierarchical": (HierarchicalTopKSAE, HierarchicalTopKSAEConfig),
    "hierarchical-training": (HierarchicalTopKTrainingSAE, HierarchicalTopKTrainingSAEConfig),
}
RESCALE = pytest.mark.parametrize("rescale", [False, True], ids=["as-is", "rescaled"])


@pytest.fixture(autouse=True)
def _same_random_numbers_every_time() -> None:
    torch.manual_seed(0)


def make_sae(kind: str, rescale: bool = True, **fields: Any) -> Any:
    """Return an SAE with random weights and biases. An output that left one out would be off."""
    sae_class, cfg_class = CLASSES[kind]
    sae = sae_class(
        cfg_class(
            **{"d_in": D_IN, "d_sae": D_SAE, "k": K, "rescale_acts_by_decoder_norm": rescale},
            **fields,
        )
    )
    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    sae.cfg.metadata.model_name = "gpt2"
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        sae.W_enc.copy_(sae.W_dec.T + 0.05 * torch.randn(D_IN, D_SAE, generator=generator))
    return sae


def activations(n_tokens: int = 32) -> torch.Tensor:
    return 0.2 + torch.randn(n_tokens, D_IN, generator=torch.Generator().manual_seed(4))


LOAD_WITHOUT_THE_PLUGIN = """
    import sys
    from pathlib import Path
    from safetensors.torch import load_file, save_file
    from sae_lens import SAE

    x = load_file(sys.argv[1] + "/in.safetensors")["x"]
    results = {}
    for path in sorted(Path(sys.argv[1]).glob("exported-*")):
        sae = SAE.load_from_disk(path)
        assert type(sae).__name__ == "TopKSAE", type(sae)
        assert sae.cfg.architecture() == "topk"
        acts = sae.encode(x)
        results[path.name + ".k"] = acts.new_tensor(sae.cfg.k)
        results[path.name + ".acts"] = acts.detach()
        results[path.name + ".out"] = sae.decode(acts).detach()
    assert not any(name.startswith("sae_lens_flex") for name in sys.modules)
    save_file(results, sys.argv[1] + "/out.safetensors")
"""


def test_exports_load_without_the_plugin_and_compute_the_same(tmp_path: Path) -> None:
    x = activations()
    save_file({"x": x}, tmp_path / "in.safetensors")
    expected = {}
    folded = make_sae("hierarchical")
    folded.fold_W_dec_norm()
    saes = {
        "inference": make_sae("hierarchical"),
        "training": make_sae("hierarchical-training"),
        "inference-as-is": make_sae("hierarchical", rescale=False),
        "training-as-is": make_sae("hierarchical-training", rescale=False),
        "folded": folded,
        "layer-norm": make_sae("hierarchical", normalize_activations="layer_norm"),
        "bias-kept": make_sae("hierarchical", apply_b_dec_to_input=False),
    }
    for name, sae in saes.items():
        for budget in (1, 7, K):
            path = tmp_path / f"exported-{name}-{budget}"
            assert export_topk(sae, path, budget=budget) == path
            with torch.no_grad(), sae.at_budget(budget):
                acts = sae.encode(x)
                expected[path.name] = (budget, acts, sae.decode(acts))
    run_python(LOAD_WITHOUT_THE_PLUGIN, tmp_path)
    loaded = load_file(tmp_path / "out.safetensors")
    assert len(loaded) == 3 * len(expected) == 63
    for name, (budget, acts, out) in expected.items():
        assert loaded[f"{name}.k"] == budget
        assert acts.count_nonzero(-1).max() == budget
        torch.testing.assert_close(loaded[f"{name}.acts"], acts)
        torch.testing.assert_close(loaded[f"{name}.out"], out)


JUMPRELU_WITHOUT_THE_PLUGIN = (
    LOAD_WITHOUT_THE_PLUGIN.replace("TopKSAE", "JumpReLUSAE")
    .replace('"topk"', '"jumprelu"')
    .replace("sae.cfg.k", "sae.threshold.detach()")
)


def test_jumprelu_exports_load_without_the_plugin_and_compute_the_same(tmp_path: Path) -> None:
    x = activations(64).double()
    save_file({"x": x}, tmp_path / "in.safetensors")
    folded = make_sae("hierarchical", dtype="float64")
    folded.fold_W_dec_norm()
    saes = {
        "inference": make_sae("hierarchical", dtype="float64"),
        "training": make_sae("hierarchical-training", dtype="float64"),
        "as-is": make_sae("hierarchical", rescale=False, dtype="float64"),
        "folded": folded,
        "bias-kept": make_sae("hierarchical", apply_b_dec_to_input=False, dtype="float64"),
        **{
            normalize: make_sae("hierarchical", normalize_activations=normalize, dtype="float64")
            for normalize in ("layer_norm", "constant_norm_rescale", "expected_average_only_in")
        },
    }
    expected = {}
    for name, sae in saes.items():
        for mean in (2, K):
            path = tmp_path / f"exported-{name}-{mean}"
            budget = mean_budget(sae, x, mean)
            # Between two activations, so that rounding decides nothing.
            budget = MeanBudget(budget.mean, budget.threshold * (1 + 1e-9))
            assert export_jumprelu(sae, path, budget=budget) == path
            with torch.no_grad(), sae.at_budget(budget):
                acts = sae.encode(x)
                expected[path.name] = (budget.threshold, acts, sae.decode(acts))
            assert sae.budget == K
    run_python(JUMPRELU_WITHOUT_THE_PLUGIN, tmp_path)
    loaded = load_file(tmp_path / "out.safetensors")
    assert len(loaded) == 3 * len(expected) == 48
    for name, (threshold, acts, out) in expected.items():
        assert loaded[f"{name}.k"].tolist() == [threshold] * D_SAE
        assert torch.equal(loaded[f"{name}.acts"] > 0, acts > 0)
        assert acts.count_nonzero(-1).amax() > acts.count_nonzero(-1).amin()
        torch.testing.assert_close(loaded[f"{name}.acts"], acts)
        torch.testing.assert_close(loaded[f"{name}.out"], out)
    assert max(int(acts.count_nonzero(-1).amax()) for _, acts, _ in expected.values()) > K


def test_jumprelu_export_in_bfloat16_differs_by_rounding_only(tmp_path: Path) -> None:
    x = activations(256).bfloat16()
    sae = make_sae("hierarchical", dtype="bfloat16", reshape_activations="hook_z")
    sae.cfg.metadata.hook_name = "blocks.0.attn.hook_z"
    x = x.view(-1, 4, 4)
    budget = mean_budget(make_sae("hierarchical", dtype="bfloat16"), x.flatten(1), 3)
    export_jumprelu(sae, tmp_path, budget=budget)
    exported = SAE.load_from_disk(tmp_path)
    assert exported.dtype == torch.bfloat16
    with torch.no_grad(), sae.at_budget(budget):
        ours, theirs = sae.encode(x), exported.encode(x)
        assert exported(x).shape == sae(x).shape == x.shape
    differ = (ours > 0) != (theirs > 0)
    assert differ.sum() < 0.02 * (ours > 0).sum()
    # Those that only one keeps are next to the threshold.
    near = torch.maximum(ours, theirs)[differ].float()
    assert ((near - budget.threshold).abs() <= 0.02 * budget.threshold).all()
    torch.testing.assert_close(ours[~differ], theirs[~differ], rtol=0.02, atol=0)


def test_latents_without_a_decoder_row_stay_inactive_in_a_jumprelu_export(tmp_path: Path) -> None:
    sae = make_sae("hierarchical")
    with torch.no_grad():
        sae.W_dec[3] = 0
    export_jumprelu(sae, tmp_path, budget=MeanBudget(K, 0))
    x = activations()
    acts = SAE.load_from_disk(tmp_path).encode(x)
    assert (acts[:, 3] == 0).all()
    with sae.at_budget(MeanBudget(K, 0)):
        torch.testing.assert_close(acts, sae.encode(x))


def test_jumprelu_export_says_what_it_is_and_is_replaced(tmp_path: Path) -> None:
    sae = make_sae("hierarchical")
    sae.cfg.metadata.l0, sae.cfg.metadata.num_dead_features = 7.5, 3
    before = {name: weight.clone() for name, weight in sae.state_dict().items()}
    for threshold in (0.25, 0.5):
        export_jumprelu(sae, tmp_path, budget=MeanBudget(3, threshold))
        exported = SAE.load_from_disk(tmp_path)
        assert exported.threshold.tolist() == [threshold] * D_SAE
    assert exported.cfg.metadata.sae_lens_flex_export == {
        "architecture": "hierarchical_topk",
        "k": K,
        "mean": 3.0,
        "threshold": 0.5,
    }
    assert "l0" not in exported.cfg.metadata
    assert exported.cfg.metadata.hook_name == "blocks.0.hook_resid_post"
    assert all(torch.equal(weight, before[name]) for name, weight in sae.state_dict().items())
    with pytest.raises(TypeError, match=r"^sae is a JumpReLUSAE"):
        from_topk(exported)


def test_exports_refuse_the_other_kind_of_budget(tmp_path: Path) -> None:
    sae = make_sae("hierarchical")
    with pytest.raises(ValueError, match=r"^budget is MeanBudget.*export_jumprelu"):
        export_topk(sae, tmp_path, budget=MeanBudget(3, 0.5))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^budget is 3, .*export_topk"):
        export_jumprelu(sae, tmp_path, budget=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^budget is MeanBudget.*up to k"):
        export_jumprelu(sae, tmp_path, budget=MeanBudget(K + 1, 0.5))
    with pytest.raises(TypeError, match=r"^sae is a TopKSAE"):
        export_jumprelu(make_sae("topk"), tmp_path, budget=MeanBudget(3, 0.5))
    assert not any(tmp_path.iterdir())


def test_a_diverged_sae_is_not_passed_on(tmp_path: Path) -> None:
    sae = make_sae("hierarchical")
    with torch.no_grad():
        sae.b_enc[3] = torch.nan
    mean: Any = {"budget": MeanBudget(3, 0.5)}
    for function, arguments in (
        *(
            (function, {"path": tmp_path, "budget": 3})
            for function in (export_topk, export_sparsify)
        ),
        (export_jumprelu, {"path": tmp_path} | mean),
        (upload, {"repo_id": "someone/saes", "sae_id": "layer_0", "folder": tmp_path}),
        (from_topk, {}),
    ):
        with pytest.raises(ValueError, match=r"^sae has NaN or infinite values in b_enc, expected"):
            function(sae, **arguments)  # type: ignore[operator]
    assert not any(tmp_path.iterdir())


def test_export_keeps_the_metadata_and_leaves_the_sae_alone(tmp_path: Path) -> None:
    sae = make_sae("hierarchical")
    sae.budget = 3
    before = sae.cfg.to_dict()
    export_topk(sae, str(tmp_path), budget=5)
    assert sae.budget == 3
    assert sae.cfg.to_dict() == before
    exported = SAE.load_from_disk(tmp_path)
    assert exported.cfg.metadata.hook_name == "blocks.0.hook_resid_post"
    assert exported.cfg.metadata.model_name == "gpt2"


def test_export_says_what_it_is_and_drops_what_was_measured_at_k(tmp_path: Path) -> None:
    sae = make_sae("hierarchical")
    sae.cfg.metadata.l0, sae.cfg.metadata.num_dead_features = 7.5, 3
    export_topk(sae, tmp_path, budget=5)
    metadata = SAE.load_from_disk(tmp_path).cfg.metadata
    origin = {"architecture": "hierarchical_topk", "k": K, "budget": 5}
    assert metadata.sae_lens_flex_export == origin
    assert "l0" not in metadata
    assert "num_dead_features" not in metadata
    assert sae.cfg.metadata.l0 == 7.5


def test_export_replaces_an_earlier_export(tmp_path: Path) -> None:
    sae = make_sae("hierarchical-training")
    for budget in (5, 2):
        export_topk(sae, tmp_path, budget=budget)
        assert SAE.load_from_disk(tmp_path).cfg.k == budget


@pytest.mark.parametrize("kind", ["topk", "hierarchical", "hierarchical-training"])
def test_export_leaves_another_sae_alone(kind, tmp_path: Path) -> None:
    make_sae(kind).save_model(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=rf"^path is {str(tmp_path)!r}, which holds another SAE"):
        export_topk(make_sae("hierarchical"), tmp_path, budget=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_export_leaves_files_that_belong_to_no_sae(tmp_path: Path) -> None:
    for name in ("notes.txt", "sweep.json", "README.md"):
        (tmp_path / name).write_text(name)
    sae = make_sae("hierarchical")
    for budget in (5, 2):
        export_topk(sae, tmp_path, budget=budget)
        assert SAE.load_from_disk(tmp_path).cfg.k == budget
    for name in ("notes.txt", "sweep.json", "README.md"):
        assert (tmp_path / name).read_text() == name


@pytest.mark.parametrize("function", [export_topk, export_sparsify])
@pytest.mark.parametrize(
    "name",
    ["sae_weights.safetensors", "sparsity.safetensors", "runner_cfg.json", "sae.safetensors"],
)
@pytest.mark.parametrize("beside_an_export", [False, True])
def test_export_refuses_files_that_an_sae_is_read_from(
    function, name, beside_an_export, tmp_path: Path
) -> None:
    sae = make_sae("hierarchical")
    if beside_an_export:
        function(sae, tmp_path, budget=3)
        own = "sae_weights.safetensors" if function is export_topk else "sae.safetensors"
        if name == own:
            function(sae, tmp_path, budget=2)
            assert json.loads((tmp_path / "cfg.json").read_text())["k"] == 2
            return
    (tmp_path / name).write_text("theirs")
    with pytest.raises(ValueError, match=rf"^path is .*another SAE \({name} of no"):
        function(sae, tmp_path, budget=1)
    assert (tmp_path / name).read_text() == "theirs"


def test_an_export_does_not_replace_one_of_another_kind(tmp_path: Path) -> None:
    sae, mean = make_sae("hierarchical"), MeanBudget(3, 0.5)
    kinds: dict[str, tuple[Any, Any]] = {
        "topk": (export_topk, 3),
        "jumprelu": (export_jumprelu, mean),
        "sparsify": (export_sparsify, 3),
    }
    for kind, (export, budget) in kinds.items():
        path = tmp_path / kind
        export(sae, path, budget=budget)
        before = {file.name: file.read_bytes() for file in path.iterdir()}
        for other in kinds.keys() - {kind}:
            export_other, other_budget = kinds[other]
            message = rf"^path is '{path}', .*\(an export as {kind}, not as {other}\), expected a"
            with pytest.raises(ValueError, match=message):
                export_other(sae, path, budget=other_budget)
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def sparsify_forward(path: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what sparsify's SparseCoder is defined to, in float64.

    Returns:
        Activations [tokens, d_sae] and reconstructions [tokens, d_in].
    """
    cfg = json.loads((path / "cfg.json").read_text())
    weights = {name: w.double() for name, w in load_file(path / "sae.safetensors").items()}
    assert set(weights) == {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}
    assert weights["encoder.weight"].shape == (cfg["num_latents"], cfg["d_in"])
    assert (cfg["activation"], cfg["transcode"], cfg["skip_connection"]) == ("topk", False, False)
    centred = x.double() - weights["b_dec"]
    hidden = torch.relu(centred @ weights["encoder.weight"].T + weights["encoder.bias"])
    values, latents = hidden.topk(cfg["k"], dim=-1)
    acts = torch.zeros_like(hidden).scatter(-1, latents, values)
    return acts, acts @ weights["W_dec"] + weights["b_dec"]


@RESCALE
@pytest.mark.parametrize("applied", [False, True], ids=["b_dec-kept", "b_dec-applied"])
@pytest.mark.parametrize("kind", ["hierarchical", "hierarchical-training"])
def test_sparsify_keeps_the_same_latents_and_reconstructs_the_same(
    kind, applied, rescale, tmp_path: Path
) -> None:
    sae = make_sae(kind, rescale, apply_b_dec_to_input=applied)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    x = activations()
    for budget in (1, 3, K):
        assert export_sparsify(sae, tmp_path / "layers.0", budget=budget) == tmp_path / "layers.0"
        acts, out = sparsify_forward(tmp_path / "layers.0", x)
        with torch.no_grad(), sae.at_budget(budget):
            expected = sae.encode(x)
            assert torch.equal(acts != 0, expected != 0)
            torch.testing.assert_close(acts.float(), expected)
            torch.testing.assert_close(out.float(), sae(x))
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


def test_latent_without_a_decoder_row_never_fires_in_sparsify(tmp_path: Path) -> None:
    sae = make_sae("hierarchical")
    with torch.no_grad():
        sae.W_dec[5] = 0
    acts, out = sparsify_forward(export_sparsify(sae, tmp_path, budget=K), activations())
    assert acts[:, 5].count_nonzero() == 0
    assert out.isfinite().all()


@RESCALE
def test_sparsify_itself_opens_the_export(rescale, tmp_path: Path) -> None:
    sparsify = pytest.importorskip("sparsify")
    sae = make_sae("hierarchical", rescale, apply_b_dec_to_input=not rescale)
    export_sparsify(sae, tmp_path / "layers.0", budget=3)
    coder = sparsify.SparseCoder.load_many(str(tmp_path), local=True)["layers.0"]
    x = activations()
    with torch.no_grad(), sae.at_budget(3):
        acts, latents, _ = coder.encode(x)
        expected = sae.encode(x)
        torch.testing.assert_close(torch.zeros_like(expected).scatter(1, latents, acts), expected)
        torch.testing.assert_close(coder(x).sae_out, sae(x))
    assert coder.cfg.normalize_decoder == rescale
    if rescale:
        torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(D_SAE))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("normalize_activations", "layer_norm"),
        ("normalize_activations", "constant_norm_rescale"),
        ("normalize_activations", "expected_average_only_in"),
        ("reshape_activations", "hook_z"),
    ],
)
def test_sparsify_export_refuses_by_name_what_its_format_cannot_hold(
    field, value, tmp_path: Path
) -> None:
    sae = make_sae("hierarchical", **{field: value})
    with pytest.raises(ValueError, match=rf"^{field} is '{value}'"):
        export_sparsify(sae, tmp_path / "new", budget=1)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"metadata": null}'], ids=repr)
def test_export_leaves_a_config_that_it_cannot_read_alone(text, tmp_path: Path) -> None:
    (tmp_path / "cfg.json").write_text(text)
    with pytest.raises(ValueError, match=r"^path is "):
        export_topk(make_sae("hierarchical"), tmp_path, budget=1)
    assert (tmp_path / "cfg.json").read_text() == text


@pytest.mark.parametrize("wrong", [None, 3, b"sae", ["sae"]], ids=repr)
def test_what_is_no_path_is_refused(wrong, tmp_path: Path) -> None:
    sae = make_sae("hierarchical")
    expected = ", expected the path of a file or directory$"
    for export in (export_topk, export_sparsify):
        with pytest.raises(TypeError, match=f"^path is .*{expected}"):
            export(sae, wrong, budget=1)
    with pytest.raises(TypeError, match=f"^path is .*{expected}"):
        export_jumprelu(sae, wrong, budget=MeanBudget(1, 0.5))
    if wrong is not None:
        with pytest.raises(TypeError, match=f"^folder is .*{expected}"):
            upload(sae, "user/name", "sae", folder=wrong)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"^folder is .*file' is a file$"):
        upload(sae, "user/name", "sae", folder=tmp_path / "file" / "below")


@pytest.mark.parametrize("name", ["file", "file/below", "file/far/below"])
def test_export_into_a_file_says_so(name, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for function in (export_topk, export_sparsify):
        with pytest.raises(NotADirectoryError, match=r"^path is .*file' is a file$"):
            function(make_sae("hierarchical"), tmp_path / name, budget=1)


def test_export_keeps_the_dtype_and_the_heads(tmp_path: Path) -> None:
    sae = make_sae("hierarchical", reshape_activations="hook_z", dtype="bfloat16")
    sae.cfg.metadata.hook_name = "blocks.0.attn.hook_z"
    export_topk(sae, tmp_path, budget=5)
    exported = SAE.load_from_disk(tmp_path)
    x = activations().view(-1, 4, 4).bfloat16()
    assert exported.dtype == torch.bfloat16
    with sae.at_budget(5):
        assert torch.equal(exported(x), sae(x))


@pytest.mark.parametrize("budget", [0, K + 1, 2.5, None, "3"], ids=repr)
def test_export_refuses_an_impossible_budget(budget, tmp_path: Path) -> None:
    for function in (export_topk, export_sparsify):
        with pytest.raises(ValueError, match=r"^budget is"):
            function(make_sae("hierarchical"), tmp_path / "exported", budget=budget)
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("function", [export_topk, export_sparsify, upload])
def test_only_hierarchical_saes_are_exported_and_uploaded(function, tmp_path: Path) -> None:
    arguments = {"sae_id": "layer_0"} if function is upload else {"budget": 1}
    with pytest.raises(TypeError, match=r"^sae is a TopKSAE, expected .*from_topk"):
        function(make_sae("topk"), str(tmp_path), **arguments)


@RESCALE
@pytest.mark.parametrize("kind", ["topk", "topk-training", "flex", "hierarchical"])
def test_from_topk_reproduces_the_sae_exactly_at_k(kind, rescale) -> None:
    source = make_sae(kind, rescale)
    x = activations()
    before = {name: value.clone() for name, value in source.state_dict().items()}
    sae = from_topk(source)
    assert type(sae) is HierarchicalTopKTrainingSAE
    assert (sae.cfg.k, sae.cfg.d_in, sae.cfg.d_sae) == (K, D_IN, D_SAE)
    assert sae.cfg.rescale_acts_by_decoder_norm == rescale
    assert sae.cfg.metadata.model_name == "gpt2"
    assert torch.equal(sae.encode(x), source.encode(x))
    assert torch.equal(sae(x), source(x))
    # The weights are copies, so training leaves the source alone.
    with torch.no_grad():
        sae.W_dec.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())


@RESCALE
def test_first_step_from_topk_has_the_error_of_the_topk_sae_at_k(rescale) -> None:
    source = make_sae("topk-training", rescale)
    x = activations()
    with torch.no_grad():
        expected = (source(x) - x).square().sum(-1).mean()
    sae = from_topk(source, budgets=[K])
    output = make_trainer(sae, [x]).step(x)
    torch.testing.assert_close(output.losses["mse_loss"].detach(), expected)


@pytest.mark.parametrize(
    ("normalize", "aux"), [("none", 0.25), ("layer_norm", 0.0), ("constant_norm_rescale", 0.0)]
)
def test_from_topk_keeps_how_the_sae_was_trained(normalize, aux) -> None:
    source = make_sae("topk-training", normalize_activations=normalize, aux_loss_coefficient=0.25)
    source.cfg.apply_b_dec_to_input = False
    x = activations()
    sae = from_topk(source)
    assert sae.cfg.aux_loss_coefficient == aux
    assert sae.cfg.normalize_activations == normalize
    assert torch.equal(sae(x), source(x))
    assert from_topk(source, aux_loss_coefficient=0.0).cfg.aux_loss_coefficient == 0


def test_from_topk_takes_a_saved_topk_sae_and_training_fields(tmp_path: Path) -> None:
    make_sae("topk").save_model(tmp_path)
    sae = from_topk(SAE.load_from_disk(tmp_path), budgets=[1, 2, K], backend="torch")
    assert (sae.cfg.budgets, sae.cfg.backend) == ([1, 2, K], "torch")


def test_from_topk_takes_over_nothing_that_was_measured(tmp_path: Path) -> None:
    trained = make_sae("hierarchical")
    trained.cfg.metadata.l0, trained.cfg.metadata.num_dead_features = 7.5, 3
    export_topk(trained, tmp_path, budget=2)
    for source in (trained, SAE.load_from_disk(tmp_path)):
        metadata = from_topk(source).cfg.metadata
        for name in ("l0", "num_dead_features", "sae_lens_flex_export"):
            assert name not in metadata
        assert metadata.training_architecture == "hierarchical_topk"


@pytest.mark.parametrize(
    "field", ["k", "d_sae", "rescale_acts_by_decoder_norm", "dtype", "device", "metadata"]
)
def test_from_topk_refuses_what_the_sae_settles(field) -> None:
    with pytest.raises(ValueError, match=rf"^{field} is given"):
        from_topk(make_sae("topk"), **{field: 1})


@pytest.mark.filterwarnings("error")
def test_from_topk_refuses_impossible_budgets_without_a_warning_of_their_weights() -> None:
    source = from_topk(make_sae("topk"), budgets=[1, K], level_weights=[1, 2])
    with pytest.raises(ValueError, match=rf"^budgets is \[1\], expected its last to be k \({K}\)"):
        from_topk(source, budgets=[1])


def test_from_topk_refuses_other_architectures_and_unknown_fields() -> None:
    with pytest.raises(TypeError, match=r"^sae is a StandardSAE"):
        from_topk(StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=D_SAE)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^sae is a BatchTopKTrainingSAE, expected .* topk, "):
        from_topk(BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=2.5)))
    with pytest.raises(TypeError, match="budgetz"):
        from_topk(make_sae("topk"), budgetz=[1])


def test_training_from_topk_improves_the_small_budgets() -> None:
    batches = activation_batches(80)
    sae = from_topk(make_sae("topk"))
    x = torch.cat(batches[-8:])

    def error_at_2() -> torch.Tensor:
        with torch.no_grad(), sae.at_budget(2):
            return (sae(x) - x).square().sum(-1).mean()

    before = error_at_2()
    make_trainer(sae, batches).fit()
    assert error_at_2() < 0.8 * before


def test_runner_trains_from_topk_and_saves(
    language_model: Any, token_dataset: Any, tmp_path: Path
) -> None:
    started = from_topk(make_sae("topk"), budgets=[1, 4, K])
    cfg = runner_config(started.cfg, output_path=str(tmp_path))
    before = started.W_dec.detach().clone()
    trained = LanguageModelSAETrainingRunner(
        cfg, override_model=language_model, override_dataset=token_dataset, override_sae=started
    ).run()
    assert trained is started
    assert not torch.equal(trained.W_dec, before)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is HierarchicalTopKSAE
    x = activations()
    torch.testing.assert_close(loaded(x), trained(x))


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


UPLOAD = """
    import sys
    from pathlib import Path
    import torch
    from sae_lens import SAE, TrainingSAE
    import sae_lens_flex

    directory = Path(sys.argv[1])
    training = TrainingSAE.load_from_disk(directory / "training")
    sweep = sae_lens_flex.BudgetSweep.from_json((directory / "sweep.json").read_text())
    sae_lens_flex.upload(training, "someone/saes", "layer_0", sweep=sweep)
    sae_lens_flex.upload(SAE.load_from_disk(directory / "inference"), "someone/saes", "layer_1")
"""
DOWNLOAD = """
    import sys
    from safetensors.torch import load_file, save_file
    import sae_lens_flex
    from sae_lens import SAE

    x = load_file(sys.argv[1] + "/in.safetensors")["x"]
    results = {}
    for sae_id in ("layer_0", "layer_1"):
        sae = SAE.from_pretrained("someone/saes", sae_id)
        assert type(sae).__name__ == "HierarchicalTopKSAE"
        sae.budget = 3
        results[sae_id] = sae(x).detach()
    save_file(results, sys.argv[1] + "/out.safetensors")
"""


def a_sweep() -> BudgetSweep:
    return BudgetSweep(
        [BudgetMetrics("sae", k, 0.5 + k / 100, 12.25 - k, k, 0.125) for k in (1, 2, 4, K)], 4096
    )


def test_uploaded_saes_have_a_card_and_load_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    training = make_sae("hierarchical-training")
    inference = make_sae("hierarchical", rescale=False)
    training.save_model(tmp_path / "training")
    inference.save_model(tmp_path / "inference")
    a_sweep().to_json(tmp_path / "sweep.json")
    x = activations()
    save_file({"x": x}, tmp_path / "in.safetensors")
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
    }
    run_new_python(UPLOAD + DOWNLOAD, tmp_path, **environment)

    files = hub.files["someone/saes"]
    assert set(files) == {
        "README.md",
        *(
            f"layer_{i}/{name}"
            for i in (0, 1)
            for name in ("README.md", "cfg.json", "sae_weights.safetensors")
        ),
    }
    # The training SAE was sent in its inference form, without the fields of training.
    assert json.loads(files["layer_0/cfg.json"])["architecture"] == "hierarchical_topk"
    assert "aux_loss_coefficient" not in json.loads(files["layer_0/cfg.json"])
    card = files["layer_0/README.md"].decode()
    assert card == model_card(training, "someone/saes", "layer_0", a_sweep())
    # The second upload wrote the card of its own SAE, and left the repository's as it was.
    assert files["README.md"] == files["layer_0/README.md"]
    assert "layer_1" in files["layer_1/README.md"].decode()

    loaded = load_file(tmp_path / "out.safetensors")
    for sae_id, sae in (("layer_0", training), ("layer_1", inference)):
        with torch.no_grad(), sae.at_budget(3):
            torch.testing.assert_close(loaded[sae_id], sae(x))


def test_upload_to_a_folder_writes_what_a_hub_would_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_lens_flex.sharing.HfApi", None)  # It would raise a TypeError.
    folder = tmp_path / "new" / "preview"
    saes = {
        "layer_0": make_sae("hierarchical-training"),
        "deep/layer_1": make_sae("hierarchical", rescale=False),
    }
    for sae_id, sae in saes.items():
        upload(sae, "someone/saes", sae_id, sweep=a_sweep(), folder=folder)
        card = (folder / sae_id / "README.md").read_text()
        assert card == model_card(sae, "someone/saes", sae_id, a_sweep())
        loaded = SAE.load_from_disk(folder / sae_id)
        assert type(loaded) is HierarchicalTopKSAE
        torch.testing.assert_close(loaded(activations()), sae(activations()))
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        "README.md",
        *(
            f"{sae_id}/{name}"
            for sae_id in ("deep/layer_1", "layer_0")
            for name in ("README.md", "cfg.json", "sae_weights.safetensors")
        ),
    ]
    # As on the hub, the repository's card is that of the first SAE.
    assert (folder / "README.md").read_text() == (folder / "layer_0" / "README.md").read_text()
    with pytest.raises(FileExistsError, match=r"^folder is .*there is 'layer_0' already"):
        upload(saes["layer_0"], "someone/saes", "layer_0", folder=folder)


@pytest.mark.parametrize(
    ("name", "error", "arguments"),
    [
        ("repo_id|Repo id", ValueError, {"repo_id": "a/b/c"}),
        ("sae_id", ValueError, {"sae_id": ""}),
        ("sae_id", ValueError, {"sae_id": "/"}),
        ("sae_id", ValueError, {"sae_id": "../layer_0"}),
        ("sae_id", ValueError, {"sae_id": "."}),
        ("sweep", TypeError, {"sweep": a_sweep().to_pandas()}),
    ],
)
def test_upload_refuses_wrong_arguments_before_the_network(
    name, error, arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_lens_flex.sharing.HfApi", None)
    arguments = {"repo_id": "someone/saes", "sae_id": "layer_0"} | arguments
    with pytest.raises(error, match=name):
        upload(make_sae("hierarchical"), **arguments)


FAILING_UPLOAD = """
    from sae_lens_flex import HierarchicalTopKSAE, HierarchicalTopKSAEConfig, upload

    cfg = HierarchicalTopKSAEConfig(d_in=4, d_sae=8, k=2, rescale_acts_by_decoder_norm=True)
    try:
        upload(HierarchicalTopKSAE(cfg), "someone/saes", "layer_0")
    except OSError as error:
        print(type(error).__name__, error)
"""


def test_upload_that_fails_names_the_hub_and_the_repository(hub: Hub, tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:9"
    for url, error in ((nowhere, "ConnectionError"), (hub.url, "HfHubHTTPError")):
        environment = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        printed = run_new_python(FAILING_UPLOAD, HF_TOKEN="hf_wrong", **environment)
        assert printed.startswith(error), printed
        assert "repo_id is 'someone/saes'" in printed
        assert url in printed


@pytest.mark.parametrize("saved", [False, True], ids=["in-training", "saved"])
def test_card_names_budgets_and_weights_as_trained(saved, tmp_path: Path) -> None:
    for fields, budgets, weights in (
        ({}, "every one of 1 to 8", "even"),
        ({"budgets": [1, 3, 8], "level_weights": [1, 1.5, 2]}, "1, 3, 8", "1, 1.5, 2"),
    ):
        sae = make_sae("hierarchical-training", **fields)
        if saved:
            sae.save_inference_model(str(tmp_path))
            sae = SAE.load_from_disk(tmp_path)
        card = model_card(sae, "someone/saes", "layer_0")
        assert f"| `budgets` in training | {budgets} |\n" in card
        assert f"| `level_weights` in training | {weights} |\n" in card


def test_card_shows_how_thresholds_are_used_with_all_their_digits() -> None:
    sae, x = make_sae("hierarchical"), activations(200)
    means = [mean_budget(sae, x, mean) for mean in (1, 2.5)]
    sweep = sweep_budgets(sae, x, budgets=[2, *means], show_progress=False)
    code = model_card(sae, "someone/saes", "layer_0", sweep).split("```python")[2].split("```")[0]
    for line, budget in zip(code.split("\n")[1:-1], means, strict=True):
        exec(line, {"sae": sae, "sae_lens_flex": sae_lens_flex})
        assert sae.budget == budget
    assert f" {means[0].threshold} |" in model_card(sae, "someone/saes", "layer_0", sweep)


def test_card_shows_the_import_the_budgets_and_the_sweep() -> None:
    sae = make_sae("hierarchical")
    card = model_card(sae, "someone/saes", "layer_0", a_sweep())
    assert card.startswith("---\nlibrary_name: saelens\n")
    lines = card.splitlines()
    code = "\n".join(lines[lines.index("```python") + 1 :]).partition("```")[0]
    assert code.startswith("import sae_lens_flex")
    compile(code, "card", "exec")
    assert 'SAE.from_pretrained("someone/saes", "layer_0")' in code
    assert "1, 2, 4, 8" in code
    assert "| budgets to choose from | 1 to 8 |" in lines
    assert "| `budgets` in training | unknown |" in lines
    assert "| model | gpt2 |" in lines
    assert "same 4096 tokens" in card
    table = lines[lines.index(next(line for line in lines if line.startswith("| sae | budget"))) :]
    assert table == [
        "| sae | budget | explained_variance | mse | l0 | not_seen |",
        "| --- | --- | --- | --- | --- | --- |",
        "| sae | 1 | 0.51 | 11.25 | 1 | 0.125 |",
        "| sae | 2 | 0.52 | 10.25 | 2 | 0.125 |",
        "| sae | 4 | 0.54 | 8.25 | 4 | 0.125 |",
        "| sae | 8 | 0.58 | 4.25 | 8 | 0.125 |",
    ]
    assert "Measured" not in model_card(sae, "someone/saes", "layer_0")


def test_card_has_a_blank_where_an_sae_has_no_budget() -> None:
    sweep = BudgetSweep([BudgetMetrics("jumprelu", None, 0.5, 1.0, 17.5, 0.0)], 10)
    card = model_card(make_sae("hierarchical"), "someone/saes", "layer_0", sweep)
    assert card.splitlines()[-1] == "| jumprelu |  | 0.5 | 1 | 17.5 | 0 |"
