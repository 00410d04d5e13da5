"""Stand-ins for what README and the examples take from the Hugging Face hub.

`install` puts them in place. A model or a text with a name of the hub is a small one that is made
here. Uploads end in `uploaded` of the working directory. Directories load as ever.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import tokenizers
import torch
import transformers
from sae_lens import LanguageModelSAETrainingRunner, TrainingSAE
from sae_lens.training import activations_store
from torch.overrides import TorchFunctionMode

CONFIGS = {
    "gpt2": partial(transformers.GPT2Config, num_hidden_layers=12),
    "google/gemma-2-2b": partial(transformers.Gemma2Config, num_hidden_layers=26),
}
LAYERS = {"gpt2": ("transformer", "h"), "gemma2": ("model", "layers")}
TEXTS = ("monology/pile-uncopyrighted", "HuggingFaceFW/fineweb")
END_OF_TEXT, N_WORDS = "<|endoftext|>", 40
VOCABULARY = {END_OF_TEXT: 0} | {f"w{i}": i for i in range(1, N_WORDS + 1)}

load_dataset = datasets.load_dataset
load_config = transformers.AutoConfig.from_pretrained
load_model = transformers.AutoModelForCausalLM.from_pretrained
load_tokenizer = transformers.AutoTokenizer.from_pretrained


def token_directions(width: int) -> torch.Tensor:
    """Return orthonormal directions, a row for each token, [d_vocab, width]."""
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(width, len(VOCABULARY), generator=generator)).Q.T


def tokenizer() -> Any:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCABULARY, unk_token=END_OF_TEXT))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END_OF_TEXT)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def text(path: str, **options: Any) -> Any:
    """Return documents that count w1, w2, ... w40, w1, ..., each from another word."""
    if Path(path).is_dir():
        return load_dataset(path, **options)
    assert path in TEXTS, f"the stand-in has no dataset {path!r}"
    documents = [
        " ".join(f"w{1 + (start + i) % N_WORDS}" for i in range(150)) for start in range(1200)
    ]
    documents = datasets.Dataset.from_dict({"text": documents})
    return documents.to_iterable_dataset() if options.get("streaming") else documents


class LanguageModel(torch.nn.Module):
    """Predicts the next word of such a text.

    Its residual stream is the direction of the token. Its layers add nothing, and take no time.

    Args:
        config (Any): The model's config, for the names of its layers and its width.
    """

    def __init__(self, config: Any):
        super().__init__()
        directions = token_directions(config.hidden_size)
        self.embed = torch.nn.Embedding.from_pretrained(directions)
        self.register_buffer("unembed", 10 * directions.roll(1, 0).T)
        self.blocks = [torch.nn.Identity() for _ in range(config.num_hidden_layers)]
        outer, inner = LAYERS[config.model_type]
        self.add_module(outer, torch.nn.ModuleDict({inner: torch.nn.ModuleList(self.blocks)}))

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed

    def forward(self, tokens: torch.Tensor) -> SimpleNamespace:
        stream = self.embed(tokens)
        for block in self.blocks:
            stream = block(stream)
        return SimpleNamespace(logits=stream @ self.unembed)


def install(width: int, put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Put the stand-ins in place.

    Args:
        width (int): Width of the models' residual stream.
        put (Callable): `setattr`, or a test's `monkeypatch.setattr`.
    """

    def config(name: Any, **options: Any) -> Any:
        if Path(name).is_dir():
            return load_config(name, **options)
        return CONFIGS[name](
            hidden_size=width, vocab_size=len(VOCABULARY), num_attention_heads=1, head_dim=width
        )

    def model(name: Any, **options: Any) -> Any:
        if Path(name).is_dir():
            return load_model(name, **options)
        assert set(options) <= {"dtype", "attn_implementation"}
        has_softcapping = getattr(config(name), "attn_logit_softcapping", None) is not None
        # What transformers takes by itself may leave it out.
        assert options.get("attn_implementation") == ("eager" if has_softcapping else None)
        return LanguageModel(config(name)).to(getattr(torch, options.get("dtype", "float32")))

    def tokens(name: Any, **options: Any) -> Any:
        return load_tokenizer(name, **options) if Path(name).is_dir() else tokenizer()

    put(transformers.AutoConfig, "from_pretrained", config)
    put(transformers.AutoModelForCausalLM, "from_pretrained", model)
    put(transformers.AutoTokenizer, "from_pretrained", tokens)
    for module in (datasets, activations_store):
        put(module, "load_dataset", text)
    for function in (repo_info, file_exists, upload_folder, upload_file):
        put(huggingface_hub.HfApi, function.__name__, function)


def repo_info(self: Any, repo_id: str) -> str:
    return repo_id


def file_exists(self: Any, repo_id: str, path: str, **options: Any) -> bool:
    return Path("uploaded", repo_id, path).exists()


def upload_folder(
    self: Any, *, folder_path: Path, path_in_repo: str, repo_id: str, **options: Any
) -> None:
    shutil.copytree(folder_path, Path("uploaded", repo_id, path_in_repo))


def upload_file(
    self: Any, *, path_or_fileobj: bytes, path_in_repo: str, repo_id: str, **options: Any
) -> None:
    Path("uploaded", repo_id, path_in_repo).write_bytes(path_or_fileobj)


def end_training_early(n_steps: int, d_sae: int) -> None:
    """Let a runner take a few steps with fewer latents, once it has been made as its config says.

    The SAE that it makes is exchanged for one that knows the stand-in model's tokens, as if it had
    been trained. One that it is handed stays.
    """
    make = LanguageModelSAETrainingRunner.__init__

    def make_and_shorten(self: Any, cfg: Any, **overrides: Any) -> None:
        make(self, cfg, **overrides)
        cfg.training_tokens = n_steps * cfg.train_batch_size_tokens
        if overrides.get("override_sae") is not None:
            return
        sae: Any = TrainingSAE.from_dict(replace(self.sae.cfg, d_sae=d_sae).to_dict())
        with torch.no_grad():
            directions = token_directions(sae.cfg.d_in)
            sae.W_dec[: len(directions)] = directions
            sae.W_enc[:, : len(directions)] = directions.T
        self.sae = sae

    LanguageModelSAETrainingRunner.__init__ = make_and_shorten


class CpuForCuda(TorchFunctionMode):
    """Makes tensors on the CPU where the code says "cuda"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)
