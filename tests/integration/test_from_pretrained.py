"""`SAE.from_pretrained` from a stand-in for the hub, and saved configs that have to be refused."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fresh_process import run_new_python
from sae_lens import SAE, TrainingSAE
from safetensors.torch import load_file, save_file

from sae_lens_flex import HierarchicalTopKSAE

from .flows import ARCHITECTURES, D_SAE, K, training_sae_config
from .hub import Hub, running_hub

REPO = "someone/saes"
MISSING = object()

CLIENT = """
    import sys
    from safetensors.torch import load_file, save_file
    from sae_lens import SAE
    import sae_lens_flex

    directory = sys.argv[1]
    x = load_file(directory + "/in.safetensors")["x"]
    results = {}
    for path in ("hierarchical_topk/layer_0", "flex_topk/layer_0"):
        sae, cfg, log_sparsity = SAE.from_pretrained_with_cfg_and_sparsity("someone/saes", path)
        print(path, type(sae).__name__, cfg["architecture"], log_sparsity is not None)
        results[path] = SAE.from_pretrained("someone/saes", path)(x).detach()
    save_file(results, directory + "/out.safetensors")
"""
PRINTED = [
    "hierarchical_topk/layer_0 HierarchicalTopKSAE hierarchical_topk True",
    "flex_topk/layer_0 TopKSAE topk False",
]


@pytest.fixture
def hub(trained: dict[str, SimpleNamespace]) -> Iterator[Hub]:
    files = {
        f"{architecture}/layer_0/{path.name}": path.read_bytes()
        for architecture, run in trained.items()
        for path in run.output.iterdir()
    }
    # SAELens asks for the sparsity, too, and has to take a repository without it.
    del files["flex_topk/layer_0/sparsity.safetensors"]
    with running_hub() as hub:
        hub.files[REPO] = files
        yield hub


def test_loads_from_the_hub_and_then_offline_from_the_cache(
    hub: Hub, trained: dict[str, SimpleNamespace], activations: torch.Tensor, tmp_path: Path
):
    save_file({"x": activations}, tmp_path / "in.safetensors")
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf_home"),
        "NO_PROXY": "127.0.0.1",
    }

    def load(**more: str) -> dict[str, torch.Tensor]:
        printed = run_new_python(CLIENT, tmp_path, **environment, **more)
        assert [line for line in printed.splitlines() if "layer_0" in line] == PRINTED
        return load_file(tmp_path / "out.safetensors")

    online = load(HF_HUB_OFFLINE="0")
    fetched = {path.rsplit("/resolve/main/")[-1] for path in hub.gets}
    assert {
        f"{architecture}/layer_0/{file}"
        for architecture in trained
        for file in ("cfg.json", "sae_weights.safetensors")
    } <= fetched
    hub.stop()
    offline = load(HF_HUB_OFFLINE="1")

    for architecture, run in trained.items():
        expected = run.sae(activations)
        torch.testing.assert_close(online[f"{architecture}/layer_0"], expected)
        assert torch.equal(offline[f"{architecture}/layer_0"], online[f"{architecture}/layer_0"])


def edited(source: Path, destination: Path, **fields: Any) -> Path:
    """Copy a saved SAE with another cfg.json, and return the copy's directory."""
    shutil.copytree(source, destination)
    cfg = json.loads((destination / "cfg.json").read_text())
    for name, value in fields.items():
        if value is MISSING:
            del cfg[name]
        else:
            cfg[name] = value
    (destination / "cfg.json").write_text(json.dumps(cfg))
    return destination


NOT_A_LATENT_COUNT = [MISSING, None, 0, -8, float("nan"), float("inf"), 2.5, 8.0, "8", True, [8]]
NOT_A_BOOL = [MISSING, None, 1, 0, "true", "", float("nan"), []]


def id_of(value: Any) -> str | None:
    return "missing" if value is MISSING else repr(value)


@pytest.mark.parametrize("source", ["output", "checkpoint"])
@pytest.mark.parametrize("k", [*NOT_A_LATENT_COUNT, D_SAE + 1], ids=id_of)
def test_config_without_a_possible_k_is_refused(
    k: Any, source: str, trained: dict[str, SimpleNamespace], tmp_path: Path
):
    path = edited(getattr(trained["hierarchical_topk"], source), tmp_path / "sae", k=k)
    with pytest.raises(ValueError, match=r"^k is "):
        SAE.load_from_disk(path)


@pytest.mark.parametrize("source", ["output", "checkpoint"])
@pytest.mark.parametrize("value", NOT_A_BOOL, ids=id_of)
def test_config_without_a_possible_rescaling_is_refused(
    value: Any, source: str, trained: dict[str, SimpleNamespace], tmp_path: Path
):
    path = edited(
        getattr(trained["hierarchical_topk"], source),
        tmp_path / "sae",
        rescale_acts_by_decoder_norm=value,
    )
    with pytest.raises(ValueError, match=r"^rescale_acts_by_decoder_norm is "):
        SAE.load_from_disk(path)


@pytest.mark.parametrize("value", [*NOT_A_BOOL[1:], 0.5], ids=id_of)
def test_config_with_an_impossible_use_of_the_bias_is_refused(
    value: Any, trained: dict[str, SimpleNamespace], tmp_path: Path
):
    path = edited(trained["hierarchical_topk"].output, tmp_path / "sae", apply_b_dec_to_input=value)
    with pytest.raises(ValueError, match=r"\bapply_b_dec_to_input\b"):
        SAE.load_from_disk(path)


@pytest.mark.parametrize("field", ["d_in", "d_sae"])
@pytest.mark.parametrize("value", NOT_A_LATENT_COUNT[1:], ids=id_of)
def test_config_with_an_impossible_dimension_is_refused(
    field: str, value: Any, trained: dict[str, SimpleNamespace], tmp_path: Path
):
    path = edited(trained["hierarchical_topk"].output, tmp_path / "sae", **{field: value})
    with pytest.raises(ValueError, match=rf"^{field} is "):
        SAE.load_from_disk(path)


@pytest.mark.parametrize("field", ["d_in", "d_sae"])
def test_config_without_a_dimension_is_refused(
    field: str, trained: dict[str, SimpleNamespace], tmp_path: Path
):
    path = edited(trained["hierarchical_topk"].output, tmp_path / "sae", **{field: MISSING})
    with pytest.raises(TypeError, match=rf"'{field}'"):
        SAE.load_from_disk(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("k", D_SAE + 1),
        ("k", "8"),
        ("k", float("nan")),
        ("budgets", [1, 2]),
        ("budgets", "8"),
        ("budgets", [0, K]),
        ("budgets", [1.0, K]),
        ("level_weights", [1]),
        ("level_weights", "even"),
        ("backend", "cuda"),
        ("rescale_acts_by_decoder_norm", "true"),
        ("aux_loss_coefficient", float("nan")),
        ("aux_loss_coefficient", -1.0),
        ("decoder_init_norm", 0.0),
    ],
)
def test_training_checkpoint_with_an_impossible_value_is_refused(
    field: str, value: Any, trained: dict[str, SimpleNamespace], tmp_path: Path
):
    path = edited(trained["hierarchical_topk"].checkpoint, tmp_path / "sae", **{field: value})
    with pytest.raises(ValueError, match=rf"\b{field}\b"):
        TrainingSAE.load_from_disk(path)


@pytest.mark.parametrize("field", ["k", "rescale_acts_by_decoder_norm"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_checkpoint_without_what_it_was_trained_with_is_refused(
    architecture: str, field: str, tmp_path: Path
):
    # SAELens's default for k is 100. With a smaller d_sae it would be refused in any case.
    cfg = training_sae_config(architecture, d_sae=128, rescale_acts_by_decoder_norm=False)
    TrainingSAE.from_dict(cfg.to_dict()).save_model(tmp_path / "checkpoint")
    path = edited(tmp_path / "checkpoint", tmp_path / "sae", **{field: MISSING})
    with pytest.raises(ValueError, match=rf"\b{field}\b"):
        TrainingSAE.load_from_disk(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("k", MISSING),
        ("k", D_SAE + 1),
        ("k", -8),
        ("k", "8"),
        ("rescale_acts_by_decoder_norm", MISSING),
        ("rescale_acts_by_decoder_norm", "true"),
    ],
    ids=id_of,
)
def test_flex_checkpoint_without_possible_values_is_refused_for_inference(
    field: str, value: Any, trained: dict[str, SimpleNamespace], tmp_path: Path
):
    path = edited(trained["flex_topk"].checkpoint, tmp_path / "sae", **{field: value})
    with pytest.raises(ValueError, match=rf"\b{field}\b"):
        SAE.load_from_disk(path)


def test_unknown_keys_of_a_config_are_ignored(
    trained: dict[str, SimpleNamespace], activations: torch.Tensor, tmp_path: Path
):
    run = trained["hierarchical_topk"]
    path = edited(run.output, tmp_path / "sae", budget=3, from_a_later_version={"k": 1})
    loaded = SAE.load_from_disk(path)
    assert type(loaded) is HierarchicalTopKSAE
    torch.testing.assert_close(loaded(activations), run.sae(activations))
