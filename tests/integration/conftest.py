from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import HookedSAETransformer, LanguageModelSAETrainingRunner, SAETrainer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens import HookedTransformerConfig
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from .flows import ARCHITECTURES, CONTEXT_SIZE, D_IN, HOOK_NAME, runner_config, training_sae_config

N_WORDS = 60
END_OF_TEXT = "<|endoftext|>"


@pytest.fixture(autouse=True)
def _same_random_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def hf_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a GPT-2 of two layers, with random weights, and its tokenizer."""
    path = tmp_path_factory.mktemp("gpt2-random-weights")
    vocabulary = {END_OF_TEXT: 0} | {f"w{i}": i + 1 for i in range(N_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END_OF_TEXT))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
    ).save_pretrained(path)
    torch.manual_seed(0)
    cfg = GPT2Config(
        vocab_size=len(vocabulary),
        n_layer=2,
        n_embd=D_IN,
        n_head=2,
        n_positions=CONTEXT_SIZE,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.5,
    )
    GPT2LMHeadModel(cfg).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory for `datasets.load_dataset`, with texts of the tokenizer's words."""
    path = tmp_path_factory.mktemp("texts")
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(N_WORDS, (200, 40), generator=generator)
    texts = [" ".join(f"w{i}" for i in row) for row in words.tolist()]
    Dataset.from_dict({"text": texts}).to_json(path / "train.jsonl")
    return path


@pytest.fixture(scope="session")
def token_dataset() -> Dataset:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, N_WORDS + 1, (256, CONTEXT_SIZE), generator=generator)
    tokens[:, 0] = 0
    return Dataset.from_dict({"tokens": tokens.tolist()})


@pytest.fixture(scope="session")
def language_model(hf_model_dir: Path) -> HookedSAETransformer:
    """Return a transformer of two layers with random weights.

    All tests of a session share it, so a test that attaches an SAE has to detach it.
    """
    cfg = HookedTransformerConfig(
        n_layers=2,
        d_model=D_IN,
        n_ctx=CONTEXT_SIZE,
        n_heads=2,
        d_head=D_IN // 2,
        d_mlp=2 * D_IN,
        d_vocab=N_WORDS + 1,
        act_fn="gelu",
        seed=0,
        device="cpu",
    )
    return HookedSAETransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(hf_model_dir))


@pytest.fixture
def step_losses(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """Return a dictionary that fills with the loss of every step of a trainer, by architecture."""
    losses: dict[str, list[float]] = defaultdict(list)
    step = SAETrainer.step

    def recording_step(self: Any, batch: torch.Tensor) -> Any:
        output = step(self, batch)
        losses[self.sae.cfg.architecture()].append(output.loss.item())
        return output

    monkeypatch.setattr(SAETrainer, "step", recording_step)
    return losses


@pytest.fixture(scope="session")
def trained(
    language_model: HookedSAETransformer,
    token_dataset: Dataset,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, SimpleNamespace]:
    """Return, by architecture, the SAE of a run, its final output and its last checkpoint."""
    runs = {}
    for architecture in ARCHITECTURES:
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp(architecture)
        cfg = runner_config(
            training_sae_config(architecture),
            output_path=str(path / "output"),
            checkpoint_path=str(path / "checkpoints"),
            save_final_checkpoint=True,
        )
        sae = LanguageModelSAETrainingRunner(
            cfg, override_model=language_model, override_dataset=token_dataset
        ).run()
        (checkpoint,) = Path(cfg.checkpoint_path or "").iterdir()
        runs[architecture] = SimpleNamespace(
            sae=sae, output=path / "output", checkpoint=checkpoint, cfg=cfg
        )
    return runs


@pytest.fixture
def activations(language_model: HookedSAETransformer, token_dataset: Dataset) -> torch.Tensor:
    """Return the toy language model's activations where the SAEs read, [8, context, d_in]."""
    tokens = torch.as_tensor(token_dataset[:8]["tokens"])
    _, cache = language_model.run_with_cache(tokens, names_filter=HOOK_NAME)
    return cache[HOOK_NAME]
