"""The command line: what it does, and one line of error for every kind of wrong input."""

import json
import os
import runpy
import shlex
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import plotly.graph_objects as go
import pytest
import torch
from datasets import Dataset
from integration import conftest as toy
from integration.flows import BATCH_SIZE
from sae_lens import SAE, LanguageModelSAETrainingRunner, SAETrainer
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from sae_lens.training._interruption import InterruptedException

import sae_lens_flex
from sae_lens_flex import (
    BudgetSweep,
    HierarchicalTopKSAE,
    HierarchicalTopKTrainingSAEConfig,
    MeanBudget,
)
from sae_lens_flex.cli import LOWEST, _fit_buffer, main
from sae_lens_flex.train_flags import parse

hf_model_dir, text_dir, step_losses = toy.hf_model_dir, toy.text_dir, toy.step_losses

D_IN, D_SAE, K = toy.D_IN, 32, 8
HOOK_NAME = "transformer.h.0"


@pytest.fixture(autouse=True)
def _same_random_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Run the command line in this process."""

    def run(*arguments: Any) -> SimpleNamespace:
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        captured = capfd.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return run


def assert_refused(result: SimpleNamespace, *words: str) -> None:
    """Check that the exit code is 2, and stderr one short line in which the words are."""
    assert result.code == 2, result.err
    assert len(result.err.splitlines()) == 1, result.err
    assert result.err.startswith("sae-lens-flex")
    assert "error: " in result.err
    assert len(result.err) < 700, result.err
    assert "Traceback" not in result.err
    assert result.err.rstrip().partition("error: ")[2], "an empty message"
    for word in words:
        assert word in result.err


@pytest.fixture(scope="module")
def train_flags(
    hf_model_dir: Path, text_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("run")
    return {
        "--architecture": "hierarchical_topk",
        "--d_in": D_IN,
        "--d_sae": D_SAE,
        "--k": K,
        "--model_class_name": "AutoModelForCausalLM",
        "--model_name": hf_model_dir,
        "--hook_name": HOOK_NAME,
        "--dataset_path": text_dir,
        "--context_size": toy.CONTEXT_SIZE,
        "--store_batch_size_prompts": 8,
        "--n_batches_in_buffer": 4,
        "--train_batch_size_tokens": BATCH_SIZE,
        "--training_tokens": 20 * BATCH_SIZE,
        "--lr": 3e-3,
        "--output_path": path / "output",
        "--checkpoint_path": path / "checkpoints",
        "--log_to_wandb": "false",
        "--verbose": "false",
    }


def as_arguments(flags: dict[str, Any]) -> list[Any]:
    return [part for flag, value in flags.items() if value is not None for part in (flag, value)]


@pytest.fixture(scope="module")
def trained(train_flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of an SAE that the command line trained."""
    path = tmp_path_factory.mktemp("trained")
    flags = train_flags | {"--output_path": path}
    assert main(list(map(str, ["train", *as_arguments(flags)]))) == 0
    return path


# -- what it does


def test_train_saves_an_sae_from_flags_alone(trained: Path) -> None:
    sae = SAE.load_from_disk(trained)
    assert type(sae) is HierarchicalTopKSAE
    assert (sae.cfg.k, sae.cfg.d_sae) == (K, D_SAE)
    assert sae.cfg.metadata.hook_name == HOOK_NAME


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_pretokenized_text_in_a_local_directory(
    train_flags, run, streaming: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = torch.randint(1, toy.N_WORDS + 1, (256, toy.CONTEXT_SIZE))
    (tmp_path / "tokens").mkdir()
    text = Dataset.from_dict({"input_ids": tokens.tolist()})
    text.to_parquet(tmp_path / "tokens" / "train.parquet")
    flags = train_flags | {
        "--dataset_path": tmp_path / "tokens",
        "--is_dataset_tokenized": "true",
        "--streaming": streaming,
        "--output_path": tmp_path / "sae",
    }
    result = run("train", *as_arguments(flags))
    assert result.code == 0, result.err
    assert "fewer samples" not in result.err
    assert "override" not in result.err + caplog.text
    sae = SAE.load_from_disk(tmp_path / "sae")
    assert sae.cfg.metadata.dataset_path == str(tmp_path / "tokens")
    result = run("sweep", tmp_path / "sae", "--n-batches", 1)
    assert result.code == 0, result.err
    assert f"text: {tmp_path / 'tokens'}" in result.out


def test_sweep_prints_and_writes_every_budget(
    trained: Path, run, tmp_path: Path, text_dir: Path
) -> None:
    result = run(
        *("sweep", trained, "--n-batches", 2, "--batch-size-prompts", 4, "--kl"),
        *("--json", tmp_path / "sweep.json", "--figure", tmp_path / "new" / "far" / "sweep.html"),
    )
    assert result.code == 0, result.err
    header, *rows, n_tokens, text, json_file, figure = result.out.splitlines()
    for metric in ("explained_variance", "mse", "l0", "not_seen", "ce_loss_score", "kl_div_score"):
        assert metric in header.split()
    assert [row.split()[0] for row in rows] == ["1", "2", "4", "8"]
    sweep = BudgetSweep.from_json((tmp_path / "sweep.json").read_text())
    assert [row.budget for row in sweep.metrics] == [1, 2, 4, 8]
    assert 0 < sweep.n_tokens <= 2 * 4 * toy.CONTEXT_SIZE
    assert n_tokens.startswith(f"(of {sweep.n_tokens} tokens; not_seen: ")
    assert text.startswith(f"text: {text_dir}, split train, the text that the SAE was trained on")
    assert json_file == f"json: {tmp_path / 'sweep.json'}"
    assert figure == f"figure: {tmp_path / 'new' / 'far' / 'sweep.html'}"
    assert "plotly" in (tmp_path / "new" / "far" / "sweep.html").read_text()


def test_sweep_measures_mean_budgets_beside_fixed_ones(trained: Path, run, tmp_path: Path) -> None:
    flags = ("sweep", trained, "--no-ce", "--n-batches", 2, "--batch-size-prompts", 4)
    json_file = ("--json", tmp_path / "sweep.json")
    result = run(*flags, *json_file, "--mean-budgets", 3, 1.5)
    assert result.code == 0, result.err
    sweep = BudgetSweep.from_json((tmp_path / "sweep.json").read_text())
    assert [row.budget for row in sweep.metrics] == [1, 2, 4, 8, None, None]
    for row, mean in zip(sweep.metrics[4:], (3, 1.5), strict=True):
        assert row.threshold is not None
        assert row.mean == pytest.approx(mean, rel=0.01)
        assert f"mean {row.mean:.4g} " in result.out
        assert abs(row.l0 - mean) < 0.3 * mean  # It was chosen on other tokens.
    assert "from its beginning, after 2 batches that chose the thresholds" in result.out
    result = run(*flags, *json_file, "--budgets", 2, "--mean-budgets", 3)
    assert result.code == 0, result.err
    sweep = BudgetSweep.from_json((tmp_path / "sweep.json").read_text())
    assert [row.budget for row in sweep.metrics] == [2, None]


def test_sweep_measures_the_split_that_it_says(
    trained: Path, run, text_dir: Path, tmp_path: Path
) -> None:
    for split, document in (("train", "w1 w2 w3"), ("validation", "w4 w5 w6")):
        Dataset.from_dict({"text": 20 * [20 * document]}).to_json(tmp_path / f"{split}.jsonl")

    def explained_variance(*flags: Any) -> tuple[float, str]:
        result = run("sweep", trained, "--n-batches", 1, "--no-ce", "--budgets", K, *flags)
        assert result.code == 0, result.err
        _, row, _, text = result.out.splitlines()
        return float(row.split()[1]), text

    on_training_text, text = explained_variance()
    assert text == f"text: {text_dir}, split train, the text that the SAE was trained on, from " + (
        "its beginning"
    )
    results = [on_training_text]
    for split in ("train", "validation"):
        result, text = explained_variance("--dataset", tmp_path, "--split", split)
        assert text == f"text: {tmp_path}, split {split}, from its beginning"
        results.append(result)
    assert len(set(results)) == 3


def test_sweep_says_that_the_text_began_again(trained: Path, run, tmp_path: Path) -> None:
    Dataset.from_dict({"text": 4 * [20 * "w1 w2 w3 "]}).to_json(tmp_path / "train.jsonl")
    for n_prompts, words in ((2, "from its beginning"), (2000, "began again")):
        result = run(
            *("sweep", trained, "--n-batches", 1, "--batch-size-prompts", n_prompts),
            *("--dataset", tmp_path, "--no-ce"),
        )
        assert words in result.out.splitlines()[-1]


def test_sweep_makes_prompts_of_the_text_as_training_did(
    run, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, tmp_path / "sae")
    cfg = json.loads((trained / "cfg.json").read_text())
    cfg["metadata"] |= {"disable_concat_sequences": True, "sequence_separator_token": None}
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(cfg))
    stores = []
    measure = sae_lens_flex.cli.sweep_budgets

    def recorded(sae: Any, store: Any, **options: Any) -> BudgetSweep:
        stores.append(store)
        return measure(sae, torch.randn(8, D_IN), budgets=[1])

    monkeypatch.setattr(sae_lens_flex.cli, "sweep_budgets", recorded)
    for path in (tmp_path / "sae", trained):
        assert run("sweep", path).code == 0
    made = [(store.disable_concat_sequences, store.sequence_separator_token) for store in stores]
    assert made == [(True, None), (False, "bos")]


def test_sweep_takes_its_flags(trained: Path, run, hf_model_dir: Path, text_dir: Path) -> None:
    result = run(
        *("sweep", trained, "--budgets", 3, 5, "--no-ce", "--n-batches", 1),
        *("--model", hf_model_dir, "--model-class", "AutoModelForCausalLM"),
        *("--dataset", text_dir, "--device", "cpu"),
    )
    assert result.code == 0, result.err
    header, *rows, _, _ = result.out.splitlines()
    assert "ce_loss_score" not in header
    assert [row.split()[0] for row in rows] == ["3", "5"]


def test_sweep_measures_a_stock_sae_as_it_is(trained: Path, run, tmp_path: Path) -> None:
    assert run("export", trained, "--budget", 4, "--output", tmp_path / "topk").code == 0
    result = run("sweep", tmp_path / "topk", "--n-batches", 1)
    assert result.code == 0, result.err
    assert [row.split()[0] for row in result.out.splitlines()[1:-2]] == ["4"]


def test_export_writes_a_topk_sae(trained: Path, run, tmp_path: Path) -> None:
    result = run("export", trained, "--budget", 5, "--output", tmp_path / "topk")
    assert result.code == 0, result.err
    assert "k=5" in result.out
    exported, sae = SAE.load_from_disk(tmp_path / "topk"), SAE.load_from_disk(trained)
    assert type(exported) is TopKSAE
    x = torch.randn(8, D_IN)
    with sae.at_budget(5):
        torch.testing.assert_close(exported(x), sae(x))


def test_export_writes_the_threshold_of_a_sweep_as_a_jumprelu_sae(
    trained: Path, run, tmp_path: Path
) -> None:
    result = run(
        *("sweep", trained, "--no-ce", "--n-batches", 1, "--mean-budgets", 2),
        *("--json", tmp_path / "sweep.json"),
    )
    row = json.loads((tmp_path / "sweep.json").read_text())["metrics"][-1]
    result = run(
        *("export", trained, "--mean", row["mean"], "--threshold", row["threshold"]),
        *("--output", tmp_path / "jumprelu"),
    )
    assert result.code == 0, result.err
    given = f"threshold {row['threshold']:g}, given for 2 latents on average"
    assert result.out == f"{tmp_path / 'jumprelu'}: a jumprelu SAE with {given}\n"
    exported, sae = SAE.load_from_disk(tmp_path / "jumprelu"), SAE.load_from_disk(trained)
    x = torch.randn(8, D_IN)
    with sae.at_budget(MeanBudget(row["mean"], row["threshold"])):
        torch.testing.assert_close(exported(x), sae(x))


def test_sae_id_is_a_folder_of_a_directory_too(trained: Path, run, tmp_path: Path) -> None:
    result = run(
        *("export", trained.parent, "--sae-id", trained.name),
        *("--budget", 2, "--output", tmp_path / "topk"),
    )
    assert result.code == 0, result.err


def test_training_ends_with_what_was_saved(train_flags, run, tmp_path: Path) -> None:
    flags = train_flags | {"--output_path": tmp_path / "sae", "--training_tokens": BATCH_SIZE}
    result = run("train", *as_arguments(flags))
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1] == f"{tmp_path / 'sae'}: a hierarchical_topk SAE, k={K}"
    result = run("train", *as_arguments(flags | {"--architecture": "flex_topk"}))
    assert result.out.splitlines()[-1] == f"{tmp_path / 'sae'}: a topk SAE, k={K}"
    result = run("train", *as_arguments(flags | {"--architecture": "flex_batchtopk"}))
    trained = f"a jumprelu SAE, trained for {K} latents on average"
    assert result.out.splitlines()[-1] == f"{tmp_path / 'sae'}: {trained}"


def test_training_that_diverged_says_so(train_flags, run, tmp_path: Path) -> None:
    flags = {"--lr": 1e38, "--training_tokens": 4 * BATCH_SIZE, "--output_path": tmp_path / "sae"}
    with pytest.warns(UserWarning, match=r"^the SAE has NaN or infinite values in .*W_dec"):
        assert run("train", *as_arguments(train_flags | flags)).code == 0
    assert_refused(
        run("export", tmp_path / "sae", "--budget", 1, "--output", tmp_path / "new"),
        "NaN or infinite values in",
    )


def test_buffer_holds_a_batch_unless_a_flag_says_its_size(
    train_flags, run, tmp_path: Path, step_losses
) -> None:
    # 20 prompts, SAELens's default, are less than a batch of 24 prompts
    batch_size = 24 * toy.CONTEXT_SIZE
    flags = train_flags | {
        "--n_batches_in_buffer": None,
        "--train_batch_size_tokens": batch_size,
        "--training_tokens": 2 * batch_size,
        "--output_path": tmp_path / "sae",
    }
    result = run("train", *as_arguments(flags))
    assert result.code == 0, result.err
    assert len(step_losses["hierarchical_topk"]) == 2
    runner_cfg = json.loads((tmp_path / "sae" / "runner_cfg.json").read_text())
    assert runner_cfg["n_batches_in_buffer"] == 8 * 24


def test_buffer_of_several_processes_holds_the_part_of_each(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    sizes = {"context_size": 1024, "seqpos_slice": (None,), "train_batch_size_tokens": 32768}
    given = ["--n_batches_in_buffer", "4"]
    _fit_buffer(SimpleNamespace(n_batches_in_buffer=4, **sizes), given)
    with pytest.raises(ValueError, match=r"is 3, expected at least 4: .* part of a batch"):
        _fit_buffer(SimpleNamespace(n_batches_in_buffer=3, **sizes), given)
    cfg = SimpleNamespace(n_batches_in_buffer=3, **sizes)
    _fit_buffer(cfg, [])
    assert cfg.n_batches_in_buffer == 32


def test_buffer_that_holds_a_batch_is_as_saelens_has_it(train_flags, run, tmp_path: Path) -> None:
    flags = train_flags | {"--output_path": tmp_path / "sae", "--training_tokens": BATCH_SIZE}
    for n_batches, expected in ((None, 20), (BATCH_SIZE // toy.CONTEXT_SIZE, 4)):
        result = run("train", *as_arguments(flags | {"--n_batches_in_buffer": n_batches}))
        assert result.code == 0, result.err
        runner_cfg = json.loads((tmp_path / "sae" / "runner_cfg.json").read_text())
        assert runner_cfg["n_batches_in_buffer"] == expected


def test_sae_trained_with_relative_paths_is_swept_from_anywhere(
    train_flags, run, tmp_path: Path, hf_model_dir: Path, text_dir: Path, monkeypatch
) -> None:
    monkeypatch.chdir(hf_model_dir.parent)
    flags = train_flags | {
        "--model_name": hf_model_dir.name,
        "--dataset_path": os.path.relpath(text_dir),
        "--output_path": tmp_path / "sae",
        "--training_tokens": BATCH_SIZE,
    }
    assert run("train", *as_arguments(flags)).code == 0
    monkeypatch.chdir(tmp_path)
    result = run("sweep", "sae", "--n-batches", 1)
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("field", "flag"), [("model_name", "--model"), ("dataset_path", "--dataset")]
)
def test_relative_path_of_an_sae_that_is_not_found_is_named_with_the_way_out(
    field, flag, trained: Path, run, tmp_path: Path
) -> None:
    path = shutil.copytree(trained, tmp_path / "sae")
    cfg = json.loads((path / "cfg.json").read_text())
    for name in ("a/relative/path", str(tmp_path / "moved")):
        cfg["metadata"][field] = name
        (path / "cfg.json").write_text(json.dumps(cfg))
        assert_refused(run("sweep", path), name, "director", flag)


def test_version_is_that_of_the_package(run) -> None:
    result = run("--version")
    assert (result.code, result.out) == (0, f"sae-lens-flex {sae_lens_flex.__version__}\n")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=str)
def test_help_lists_the_commands(arguments, run) -> None:
    result = run(*arguments)
    assert (result.code, result.err) == (0, "")
    for word in ("usage: sae-lens-flex", "train", "sweep", "export", "--help", "--traceback"):
        assert word in result.out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", ["--architecture", "hierarchical_topk", "--k", "--model_name", "--output_path"]),
        ("sweep", ["PATH_OR_REPO", "--budgets", "--model", "--dataset", "--figure", "--sae-id"]),
        ("export", ["PATH_OR_REPO", "--budget", "--output", "1..k"]),
    ],
)
def test_help_of_a_command_explains_its_flags(command, words, run) -> None:
    result = run(command, "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"usage: sae-lens-flex {command}")
    assert len(result.out.splitlines()) < 50
    assert max(map(len, result.out.splitlines())) <= 100
    for word in words:
        assert word in result.out


def test_example_in_the_help_of_train_is_understood(run) -> None:
    example = run("train", "--help").out.partition("For example")[2].split("\n\n")[1]
    words = shlex.split(example.replace("\\\n", ""))
    assert words[:2] == ["sae-lens-flex", "train"]
    cfg = parse(words[2:])
    assert isinstance(cfg.sae, HierarchicalTopKTrainingSAEConfig)
    assert (cfg.sae.k, cfg.model_name, cfg.is_dataset_tokenized) == (64, "gpt2", False)
    assert (cfg.output_path, cfg.logger.log_to_wandb) == ("my_sae", False)


def test_all_flags_of_saelens_are_listed(run) -> None:
    result = run("train", "--architecture", "hierarchical_topk", "--all-flags")
    assert result.code == 0
    for flag in ("--budgets", "--backend", "--k", "--dataset_path", "--wandb_project"):
        assert flag in result.out


def test_module_and_installed_script_run_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In this process: others import SAELens again, which takes long.
    def check_error(execute: Callable[..., Any], name: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as end:
            execute(name, run_name="__main__")
        result = SimpleNamespace(code=end.value.code, err=capsys.readouterr().err)
        assert_refused(result, "no directory")

    missing = str(tmp_path / "missing")
    check_error(runpy.run_module, "sae_lens_flex", "sweep", missing)
    (script,) = entry_points(group="console_scripts", name="sae-lens-flex") or (None,)
    if script is None:
        pytest.skip("this installation is older than the script")
    assert script.load() is main
    path = shutil.which("sae-lens-flex", path=str(Path(sys.executable).parent))
    assert path is not None
    export = ("export", missing, "--budget", "1", "--output", str(tmp_path / "out"))
    check_error(runpy.run_path, path, *export)


# -- what it refuses


@pytest.mark.parametrize("command", ["swep", "", "--budgets", "help me"])
def test_unknown_command_is_refused(command, run) -> None:
    assert_refused(run(command), "no command", "train, sweep, export")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("sweep", ["PATH_OR_REPO"]),
        ("sweep SAE --budget 4", ["--budget is no flag, did you mean --budgets?"]),
        ("sweep SAE --nonsense 3", ["--nonsense is no flag"]),
        ("export SAE --budget 1 --outp TMP/new --output TMP/new", ["did you mean --output?"]),
        ("sweep SAE SAE", ["unrecognized"]),
        ("sweep SAE --budgets one", ["--budgets", "one"]),
        ("sweep SAE --budgets", ["--budgets"]),
        ("sweep SAE --budgets 1 99", ["--budgets", "99"]),
        ("sweep SAE --budgets 0", ["--budgets", "0"]),
        ("sweep SAE --budgets 4 2", ["--budgets", "[4, 2]"]),
        ("sweep SAE --budgets '1 4 8'", ["--budgets: '1 4 8' is no whole", "without quotes"]),
        ("sweep SAE --budgets 1,4,8", ["--budgets: '1,4,8' is no whole", "spaces between them"]),
        ("sweep SAE --mean-budgets '2 4.5'", ["--mean-budgets: '2 4.5'", "without quotes"]),
        ("sweep SAE --mean-budgets 9", ["--mean-budgets: 9, expected up to k (8)"]),
        ("sweep SAE --mean-budgets nan", ["--mean-budgets: 'nan' is no number above 0"]),
        ("sweep SAE --mean-budgets 0", ["--mean-budgets: '0' is no number above 0"]),
        ("sweep TOPK --mean-budgets 1", ["--mean-budgets", "TopKSAE"]),
        ("sweep SAE --n-batches 0", ["--n-batches", "0"]),
        ("sweep SAE --n-batches many", ["--n-batches", "many"]),
        ("sweep SAE --batch-size-prompts -1", ["--batch-size-prompts"]),
        ("sweep SAE --json FILE/sweep.json", ["--json", "file"]),
        ("sweep SAE --figure FILE/new/sweep.html", ["--figure", "file"]),
        ("sweep SAE --figure TMP", ["--figure"]),
        ("sweep SAE --json TMP", ["--json", "irectory"]),
        ("sweep SAE --split nonsense", ["split nonsense", "train"]),
        ("sweep SAE --figure TMP/sweep.gif", ["--figure", "sweep.gif", ".png"]),
        ("sweep MISSING", ["missing", "--sae-id"]),
        ("sweep someone/saes", ["someone/saes", "--sae-id"]),
        ("sweep TMP", ["holds no SAE", "cfg.json"]),
        ("sweep SAE --sae-id layer_9", ["layer_9", "holds no SAE"]),
        ("sweep SPARSIFY", ["sparsify", "cfg.json names no dtype", "expected an SAE of SAELens"]),
        ("train", ["no flags", "--help"]),
        ("sweep SAE --model MISSING", ["missing"]),
        ("sweep SAE --model-class Transformer", ["Transformer"]),
        ("sweep SAE --dataset MISSING", ["missing"]),
        ("sweep SAE --dataset EMPTY", ["empty"]),
        ("sweep SAE --dataset CORRUPTED", ["corrupted"]),
        ("sweep SAE --dataset COLUMNS", ["columns", "text"]),
        ("sweep SAE --device gpu", ["gpu"]),
        ("sweep TOPK --budgets 1", ["--budgets", "TopKSAE"]),
        ("sweep TOPK", ["hook_name"]),
        ("export", ["PATH_OR_REPO"]),
        ("export SAE", ["--budget"]),
        ("export SAE --budget 1", ["--output"]),
        ("export SAE --budget 1 --mean 2 --output TMP/new", ["either --budget", "--threshold"]),
        ("export SAE --budget 1 --mean 2 --threshold 1 --output TMP/new", ["either --budget"]),
        ("export SAE --mean 2 --output TMP/new", ["both --mean and --threshold"]),
        (
            "export SAE --mean 2 --threshold -1 --output TMP/new",
            ["'-1' is no number of at least 0"],
        ),
        ("export SAE --mean 9 --threshold 1 --output TMP/new", ["--mean is", "k (8)"]),
        ("export SAE --mean 2 --threshold 1 --output SAE", ["--output is", "another SAE"]),
        ("export SAE --budget 0 --output TMP/new", ["--budget is 0", "1..k (8)"]),
        ("export SAE --budget 9 --output TMP/new", ["--budget is 9", "1..k (8)"]),
        ("export SAE --budget 2.5 --output TMP/new", ["--budget", "2.5"]),
        ("export SAE --budget 1 --output FILE", ["file"]),
        ("export SAE --budget 1 --output SAE", ["--output is", "another SAE"]),
        ("export SAE --budget 1 --output TOPK", ["--output is", "another SAE"]),
        ("export SAE --budget 1 --output FILE/new", ["--output is", "is a file"]),
        ("export MISSING --budget 1 --output TMP/new", ["missing", "--sae-id"]),
        ("export TOPK --budget 1 --output TMP/new", ["TopKSAE"]),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: str, words: list[str], trained: Path, run, tmp_path: Path
) -> None:
    places = {name: tmp_path / name.lower() for name in ("EMPTY", "CORRUPTED", "COLUMNS", "TOPK")}
    for path in places.values():
        path.mkdir()
    (places["CORRUPTED"] / "train.jsonl").write_text('{"text": "w1 w2"\nnonsense')
    Dataset.from_dict({"words": ["w1 w2"]}).to_json(places["COLUMNS"] / "train.jsonl")
    TopKSAE(TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K)).save_model(places["TOPK"])
    sae_lens_flex.export_sparsify(SAE.load_from_disk(trained), tmp_path / "sparsify", budget=2)
    (tmp_path / "file").write_text("")
    places |= {
        "SPARSIFY": tmp_path / "sparsify",
        "SAE": trained,
        "MISSING": tmp_path / "missing",
        "FILE": tmp_path / "file",
        "TMP": tmp_path,
    }
    for name, path in places.items():
        arguments = arguments.replace(name, str(path))
    assert_refused(run(*shlex.split(arguments)), *words)
    assert not (tmp_path / "new").exists()
    assert SAE.load_from_disk(trained).cfg.architecture() == "hierarchical_topk"


def test_image_that_cannot_be_drawn_is_refused_before_anything_is_measured(
    trained: Path, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_chrome(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no browser\nhere")

    monkeypatch.setattr(go.Figure, "to_image", no_chrome)
    monkeypatch.setattr(sae_lens_flex.cli, "load_model", None)  # It would raise a TypeError.
    path = tmp_path / "sweep.png"
    result = run("sweep", trained, "--figure", path)
    assert_refused(
        result, "--figure", "kaleido", "Chrome", ".html", "RuntimeError: no browser here"
    )
    assert not path.exists()


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("cfg.json", "{nonsense", []),
        ("cfg.json", "", []),
        ("cfg.json", "[]", []),
        ("cfg.json", {"architecture": "nonsense"}, ["nonsense"]),
        ("cfg.json", {"architecture": None}, []),
        ("cfg.json", {"k": 0}, ["k is 0"]),
        ("cfg.json", {"k": "8"}, ["k is '8'"]),
        ("cfg.json", {"d_in": 7}, []),
        ("cfg.json", {"dtype": "float99"}, ["float99"]),
        ("sae_weights.safetensors", "nonsense", []),
        ("sae_weights.safetensors", "", []),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["sweep", "export"])
def test_corrupted_sae_is_refused(
    command, file, content, words, trained: Path, run, tmp_path: Path
) -> None:
    path = shutil.copytree(trained, tmp_path / "broken")
    if isinstance(content, dict):
        content = json.dumps(json.loads((path / file).read_text()) | content)
    (path / file).write_text(content)
    more = [] if command == "sweep" else ["--budget", 1, "--output", tmp_path / "new"]
    assert_refused(run(command, path, *more), "broken", *words)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("model_name", ["--model"]),
        ("dataset_path", ["--dataset"]),
        ("hook_name", ["hook_name"]),
        ("context_size", ["context_size"]),
    ],
)
def test_sae_that_does_not_say_what_it_reads_is_refused(
    field, words, trained: Path, run, tmp_path: Path
) -> None:
    path = shutil.copytree(trained, tmp_path / "sae")
    cfg = json.loads((path / "cfg.json").read_text())
    cfg["metadata"][field] = None
    (path / "cfg.json").write_text(json.dumps(cfg))
    assert_refused(run("sweep", path), *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"--architecture": "hierarchical"}, ["hierarchical"]),
        ({"--nonsense": 1}, ["--nonsense"]),
        ({"--k": "many"}, ["k", "many"]),
        ({"--k": 0}, ["k is 0"]),
        ({"--k": 2.5}, ["2.5"]),
        ({"--k": D_SAE + 1}, ["k is 33"]),
        ({"--budgets": 3}, ["budgets is [3]"]),
        ({"--budgets": 99}, ["budgets", "99"]),
        ({"--backend": "cuda"}, ["backend"]),
        ({"--backend": "triton"}, ["Triton"]),
        ({"--aux_loss_coefficient": -1}, ["aux_loss_coefficient"]),
        ({"--normalize_activations": "layer_norm"}, ["normalize_activations"]),
        ({"--d_in": D_IN + 1}, ["d_in is 17, expected 16"]),
        ({"--lr": "fast"}, ["lr", "fast"]),
        ({"--model_class_name": "Transformer"}, ["Transformer"]),
        ({"--model_name": "MISSING"}, ["missing"]),
        ({"--model_class_name": "HookedTransformer", "--model_name": "gpt9"}, ["gpt9 not found"]),
        ({"--hook_name": "transformer.h.9"}, ["transformer.h.9"]),
        ({"--dataset_path": "MISSING"}, ["missing"]),
        ({"--dataset_path": None}, ["dataset_path"]),
        ({"--context_size": 10**5}, ["100000"]),
        (
            {"--n_batches_in_buffer": BATCH_SIZE // toy.CONTEXT_SIZE - 1},
            ["--n_batches_in_buffer is 3", "at least 4", "--context_size", "--train_batch_size"],
        ),
        ({"--hook_name": ""}, []),
        ({"--hook_name": "transformer.h.10"}, ["expected a hook point", "transformer.h.1,"]),
        ({"--hook_name": "blocks.0.hook_resid_post"}, ["transformer.h.0, transformer.h.1"]),
        ({"--traning_tokens": 9}, ["--traning_tokens is no flag", "--training_tokens?"]),
        ({"--training-token": 9}, ["--training-token is no flag", "--training_tokens?"]),
        ({"--lr-warm-up-steps": 9}, ["--lr-warm-up-steps is no flag", "--lr_warm_up_steps?"]),
        ({"--budget": 8}, ["--budget is no flag, did you mean --budgets?"]),
        ({"--training_tok": 8}, ["--training_tok is no flag, did you mean --training_tokens?"]),
        ({"--nonsense": 1, "--wandb_projekt": 9}, ["--wandb_project?"]),
        ({"--architecture": None}, ["--architecture is missing", "--k", "hierarchical_topk"]),
        (
            {"--architecture": None, "--architeture": "hierarchical_topk"},
            ["did you mean --architecture?"],
        ),
        (
            {"--architecture": None, "--k": None, "--budgets": 8},
            ["--architecture is missing", "--budgets is a flag of hierarchical_topk, not of"],
        ),
        (
            {"--architecture": "topk", "--budgets": 8},
            ["--budgets is a flag of hierarchical_topk, not of --architecture topk"],
        ),
        ({"--architecture": "hierarchical_topK"}, ["did you mean hierarchical_topk?"]),
        ({"--budgets": "[1,4,8]"}, ["--budgets is '[1,4,8]'", "--budgets 1 4 8"]),
        ({"--budgets": "1,4,8"}, ["--budgets is '1,4,8'", "--budgets 1 4 8"]),
        ({"--budgets": "1 4 8"}, ["--budgets is '1 4 8'", "without quotes: --budgets 1 4 8"]),
        ({"--level_weights": "1, 0.5"}, ["--level_weights 1 0.5"]),
        *(
            ({f"--{name}": lowest - 1}, [f"--{name} is {lowest - 1}", f"at least {lowest}"])
            for name, lowest in LOWEST.items()
        ),
        # These have an effect with the other flag alone.
        *(
            ({f"--{name}": 0} | used, [f"--{name} is 0, expected at least 1"])
            for name, used in (
                ("n_eval_batches", {"--log_to_wandb": "true"}),
                ("eval_every_n_wandb_logs", {"--log_to_wandb": "true"}),
                ("n_restart_cycles", {"--lr_scheduler_name": "cosineannealingwarmrestarts"}),
                (
                    "n_batches_for_norm_estimate",
                    {"--normalize_activations": "expected_average_only_in"},
                ),
            )
        ),
        ({"--lr_end": "nan"}, ["--lr_end is nan, expected a finite number of at least 0"]),
        ({"--lr": 0}, ["--lr is 0.0, expected a finite number above 0"]),
        ({"--lr": "inf"}, ["--lr is inf, expected a finite number above 0"]),
        *(
            ({f"--{name}": 0, "--verbose": "true"}, [f"--{name} is 0, expected at least 1"])
            for name in ("train_batch_size_tokens", "wandb_log_frequency")
        ),
        ({"--k": None}, ["--k is missing"]),
        ({"--d_sae": None, "--hook_name": None}, ["--hook_name, --d_sae are missing"]),
        ({"--architecture": "standard", "--k": None, "--d_in": None}, ["--d_in is missing"]),
        ({"--resume_from_checkpoint": "MISSING"}, ["resume_from_checkpoint is", "there is none"]),
        ({"--budgets": "one"}, ["--budgets", "one"]),
        ({"--output_path": "FILE"}, ["file"]),
        ({"--device": "gpu"}, ["gpu"]),
    ],
    ids=str,
)
def test_wrong_training_flags_are_refused(
    flags: dict[str, Any], words: list[str], train_flags, run, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(sae_lens_flex.ops.kernels.launch, "INTERPRETED", False)
    (tmp_path / "file").write_text("")
    places = {"MISSING": tmp_path / "missing", "FILE": tmp_path / "file"}
    flags = {
        flag: places.get(value, value) if isinstance(value, str) else value
        for flag, value in flags.items()
    }
    assert_refused(run("train", *as_arguments(train_flags | flags)), *words)


@pytest.mark.parametrize(
    ("flags", "begin"),
    [
        ({"--model_name": "MISSING"}, "model MISSING (not a directory here): "),
        ({"--model_class_name": "Transformer"}, "model MODEL: Unknown model class"),
        (
            {"--model_class_name": "HookedTransformer"},
            "model MODEL (a directory, which --model_class_name AutoModelForCausalLM takes): ",
        ),
        ({"--dataset_path": "MISSING"}, "dataset MISSING: "),
        ({"--hook_name": "transformer.h.9"}, "hook_name is 'transformer.h.9', expected"),
        # a list of layers, which no model calls
        (
            {"--hook_name": "transformer.h"},
            "hook_name is 'transformer.h', expected a hook point of the model, such as "
            "transformer.h.1, transformer.h.0, transformer, ",
        ),
        ({"--d_sae": 10**13}, f"an SAE with d_in {D_IN} and d_sae 10000000000000 on cpu: Runtime"),
        ({"--d_in": D_IN + 1}, "d_in is 17, expected 16"),
        ({"--dtype": "float99"}, "Invalid dtype: float99"),
        ({"--device": "gpu"}, "device gpu: RuntimeError: "),
        ({"--llm_device": "gpu"}, "llm_device gpu: RuntimeError: "),
        ({"--act_store_device": "gpu"}, "act_store_device gpu: RuntimeError: "),
    ],
    ids=str,
)
def test_an_error_of_training_begins_with_what_it_is_about(
    flags: dict[str, Any], begin: str, train_flags, run, tmp_path: Path
) -> None:
    places = {"MISSING": str(tmp_path / "missing"), "MODEL": str(train_flags["--model_name"])}
    result = run(
        "train",
        *as_arguments(train_flags | {flag: places.get(each, each) for flag, each in flags.items()}),
    )
    for name, path in places.items():
        begin = begin.replace(name, path)
    assert_refused(result)
    assert result.err.startswith(f"sae-lens-flex train: error: {begin}")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["sweep", ""], "PATH_OR_REPO"),
        (["sweep", "sae", "--json", ""], "--json"),
        (["sweep", "sae", "--figure", ""], "--figure"),
        (["export", "", "--budget", 1, "--output", "new"], "PATH_OR_REPO"),
        (["export", "sae", "--budget", 1, "--output", ""], "--output"),
    ],
)
def test_empty_path_is_not_the_current_directory(arguments, name, run) -> None:
    assert_refused(run(*arguments), name, "empty")


def test_warnings_are_one_line_without_a_place_in_the_code(run, monkeypatch) -> None:
    # pytest keeps the warnings themselves.
    formats = []
    monkeypatch.setattr(
        sae_lens_flex.cli,
        "sweep",
        lambda _: formats.append(warnings.formatwarning("a\nb", UserWarning, "cli.py", 527)) or 0,
    )
    assert run("sweep").code == run("--traceback", "sweep").code == 0
    assert formats[0] == "sae-lens-flex sweep: warning: a b\n"
    assert "cli.py:527: UserWarning: a" in formats[1]
    assert "cli.py:527" in warnings.formatwarning("a", UserWarning, "cli.py", 527)


def test_traceback_is_shown_when_asked_for(run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no directory"):
        run("--traceback", "sweep", tmp_path / "missing")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, InterruptedException])
def test_interrupted_training_says_so(
    interruption, train_flags, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Any) -> None:
        raise interruption

    monkeypatch.setattr(LanguageModelSAETrainingRunner, "run", interrupted)
    result = run("train", *as_arguments(train_flags))
    assert result.code == 130
    assert result.err.splitlines() == ["sae-lens-flex train: interrupted, nothing saved"]


@pytest.fixture
def signals_in_steps(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """Return a dictionary of the signals that a run sends itself in its steps, by step from 1."""
    signals: dict[int, list[int]] = {}
    step = SAETrainer.step

    def signalling_step(self: Any, batch: torch.Tensor) -> Any:
        for number in signals.get(self.n_training_steps + 1, []):
            os.kill(os.getpid(), number)
        return step(self, batch)

    monkeypatch.setattr(SAETrainer, "step", signalling_step)
    return signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_signal_ends_training_after_the_step_with_a_checkpoint_to_go_on_from(
    number, signals_in_steps, train_flags, run, tmp_path: Path
) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    flags = train_flags | {"--checkpoint_path": tmp_path / "new", "--output_path": tmp_path / "sae"}
    signals_in_steps[3] = [number]
    result = run("train", *as_arguments(flags))
    assert result.code == 128 + number
    (checkpoint,) = (tmp_path / "new").glob("*/*")
    assert checkpoint.name == str(3 * BATCH_SIZE)
    assert result.err.splitlines()[-1] == (
        f"sae-lens-flex train: interrupted after {3 * BATCH_SIZE} tokens, saved {checkpoint} (go "
        f"on with the same flags and --resume_from_checkpoint {checkpoint})"
    )
    assert not any((tmp_path / "sae").iterdir())
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    signals_in_steps.clear()
    before = SAE.load_from_disk(checkpoint).W_dec
    result = run("train", *as_arguments(flags | {"--resume_from_checkpoint": checkpoint}))
    assert result.code == 0, result.err
    assert "differ" not in result.err
    assert torch.load(checkpoint / "trainer_state.pt")["n_training_steps"] == 3
    assert not torch.equal(SAE.load_from_disk(tmp_path / "sae").W_dec, before)
    # Of what is changed meanwhile the run says what it does not take.
    changed = flags | {"--resume_from_checkpoint": checkpoint.parent, "--lr": 1e-3}
    assert_refused(run("train", *as_arguments(changed)), f"below it: {checkpoint}")
    changed |= {"--resume_from_checkpoint": checkpoint, "--training_tokens": BATCH_SIZE}
    nothing = (
        f"^no step is left to take: training_tokens is {BATCH_SIZE}, .*{3 * BATCH_SIZE} tokens"
    )
    with (
        pytest.warns(UserWarning, match=nothing),
        pytest.warns(UserWarning, match=r"lr is 0\.003, not 0\.001"),
    ):
        assert run("train", *as_arguments(changed)).code == 0


@pytest.mark.parametrize(
    ("flags", "signals", "message"),
    [
        # The flag without a path stands for none.
        ({"--checkpoint_path": None}, {3: 1}, "interrupted, nothing saved"),
        # The second signal does not wait for the step.
        ({}, {3: 2}, "interrupted, nothing saved"),
        ({"--n_checkpoints": 3}, {9: 2}, "interrupted, nothing saved since CHECKPOINT"),
    ],
    ids=["without-checkpoints", "two-signals", "two-signals-after-a-checkpoint"],
)
def test_interruption_that_saves_nothing_says_what_is_there(
    flags, signals, message, signals_in_steps, train_flags, run, tmp_path: Path
) -> None:
    flags = train_flags | {"--checkpoint_path": tmp_path / "new"} | flags
    signals_in_steps |= {step: n * [signal.SIGTERM] for step, n in signals.items()}
    no_path = ["--checkpoint_path"] if flags["--checkpoint_path"] is None else []
    result = run("train", *as_arguments(flags), *no_path)
    assert result.code == 128 + signal.SIGTERM
    checkpoints = [str(path) for path in (tmp_path / "new").glob("*/*")]
    assert len(checkpoints) == ("--n_checkpoints" in flags)
    message = message.replace("CHECKPOINT", "".join(checkpoints))
    assert result.err.splitlines()[-1] == f"sae-lens-flex train: {message}"


def test_signal_while_a_model_loads_ends_the_command(
    train_flags, trained: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sae_lens_flex.cli, "_quietly", lambda: os.kill(os.getpid(), signal.SIGTERM))
    result = run("train", *as_arguments(train_flags))
    assert (result.code, result.err) == (143, "sae-lens-flex train: interrupted, nothing saved\n")
    result = run("sweep", trained)
    assert (result.code, result.err) == (143, "sae-lens-flex sweep: interrupted\n")


def test_repository_that_cannot_be_reached_is_refused(run, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    result = run("sweep", "someone/saes", "--sae-id", "layer_0")
    assert_refused(result, "someone/saes layer_0: ")


@pytest.mark.parametrize("raised", [ValueError("it failed"), KeyboardInterrupt("it was ended")])
def test_signal_after_a_failure_does_not_keep_it_from_being_told(
    raised: BaseException, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(arguments: list[str]) -> int:
        raise raised

    def end_process() -> bool:  # as a launcher does, once another process has failed
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    monkeypatch.setattr(sae_lens_flex.cli, "sweep", fail)
    monkeypatch.setattr(sae_lens_flex.cli, "is_first_to_fail", end_process)
    received: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        result = run("sweep", "SAE")
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert str(raised) in result.err
    assert received == []
