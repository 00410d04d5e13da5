"""The two architectures in SAELens's own command line."""

import json
from pathlib import Path

import pytest
from sae_lens import SAE, LanguageModelSAERunnerConfig
from sae_lens.llm_sae_training_runner import _parse_cfg_args, _run_cli

from sae_lens_flex import (
    FlexTopKTrainingSAEConfig,
    HierarchicalTopKSAE,
    HierarchicalTopKTrainingSAEConfig,
)

from .flows import BATCH_SIZE, CONTEXT_SIZE, D_IN, D_SAE, K, assert_losses_fall

QUIET = ["--log_to_wandb", "false", "--verbose", "false"]


def test_arguments_give_the_hierarchical_config():
    arguments = (
        "--architecture hierarchical_topk --d_in 16 --d_sae 64 --k 8 --budgets 1 2 8 "
        "--level_weights 1 0.5 2e0 --backend torch --aux_loss_coefficient 0.5 "
        "--apply_b_dec_to_input false "
        "--rescale_acts_by_decoder_norm false --use_sparse_activations false "
        "--normalize_activations expected_average_only_in --decoder_init_norm 0.2 "
        "--model_name gpt2 --hook_name blocks.4.hook_resid_pre --lr 0.001 --autocast"
    )
    cfg = _parse_cfg_args(arguments.split() + QUIET)
    assert cfg.sae == HierarchicalTopKTrainingSAEConfig(
        d_in=16,
        d_sae=64,
        k=8,
        budgets=[1, 2, 8],
        level_weights=[1.0, 0.5, 2.0],
        backend="torch",
        aux_loss_coefficient=0.5,
        apply_b_dec_to_input=False,
        rescale_acts_by_decoder_norm=False,
        use_sparse_activations=False,
        normalize_activations="expected_average_only_in",
        decoder_init_norm=0.2,
    )
    assert (cfg.model_name, cfg.hook_name) == ("gpt2", "blocks.4.hook_resid_pre")
    assert (cfg.lr, cfg.autocast) == (0.001, True)


def test_arguments_left_out_give_the_defaults():
    cfg = _parse_cfg_args(["--architecture", "hierarchical_topk", "--k", "8", *QUIET])
    # SAELens's command line has the defaults 512 and 1024 for every architecture.
    assert cfg.sae == HierarchicalTopKTrainingSAEConfig(d_in=512, d_sae=1024, k=8)
    assert (cfg.sae.budgets, cfg.sae.level_weights) == (None, None)


def test_arguments_give_the_flex_config():
    arguments = "--architecture flex_topk --d_in 16 --d_sae 64 --k 8 --backend triton"
    cfg = _parse_cfg_args(arguments.split() + QUIET)
    assert cfg.sae == FlexTopKTrainingSAEConfig(d_in=16, d_sae=64, k=8, backend="triton")


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("k", "--k 0"),
        ("k", "--k -3"),
        ("k", "--k 2.5"),
        ("k", "--k 2048"),
        ("d_in", "--d_in 0"),
        ("d_sae", "--d_sae -64"),
        ("budgets", "--k 8 --budgets 2 1 8"),
        ("budgets", "--k 8 --budgets 1 1 8"),
        ("budgets", "--k 8 --budgets 1 2"),
        ("budgets", "--k 8 --budgets 1 8 16"),
        ("budgets", "--k 8 --budgets 0 8"),
        ("budgets", "--k 8 --budgets one 8"),
        ("budgets", "--k 8 --budgets"),
        ("level_weights", "--k 8 --budgets 1 8 --level_weights 1"),
        ("level_weights", "--k 8 --budgets 1 8 --level_weights 1 2 3"),
        ("level_weights", "--k 8 --budgets 1 8 --level_weights 1 -2"),
        ("level_weights", "--k 8 --budgets 1 8 --level_weights 1 two"),
        ("level_weights", "--k 8 --budgets 1 8 --level_weights 0 0"),
        ("level_weights", "--k 8 --budgets 1 8 --level_weights"),
        ("level_weights", "--k 8 --level_weights 1 8"),
        ("backend", "--backend cuda"),
        ("aux_loss_coefficient", "--aux_loss_coefficient nan"),
        ("aux_loss_coefficient", "--aux_loss_coefficient -1"),
        ("aux_loss_coefficient", "--normalize_activations layer_norm"),
        ("decoder_init_norm", "--decoder_init_norm 0"),
        ("rescale_acts_by_decoder_norm", "--rescale_acts_by_decoder_norm maybe"),
    ],
)
def test_impossible_values_fail_with_the_name_of_the_field(field: str, arguments: str):
    # An error of argparse is no ValueError.
    with pytest.raises(Exception, match=rf"\b{field}\b"):
        _parse_cfg_args(["--architecture", "hierarchical_topk", *arguments.split(), *QUIET])


def test_parsed_config_survives_its_dictionary():
    arguments = "--architecture hierarchical_topk --d_in 16 --d_sae 64 --k 8 --budgets 1 2 8"
    cfg = _parse_cfg_args(arguments.split() + QUIET)
    dictionary = json.loads(json.dumps(cfg.to_dict()))
    assert LanguageModelSAERunnerConfig.from_dict(dictionary).sae == cfg.sae


def test_command_line_trains_on_a_local_model_and_saves(
    hf_model_dir: Path, text_dir: Path, tmp_path: Path, step_losses: dict[str, list[float]]
):
    _run_cli(
        f"--architecture hierarchical_topk --d_in {D_IN} --d_sae {D_SAE} --k {K} --budgets 1 2 {K} "
        f"--model_class_name AutoModelForCausalLM --model_name {hf_model_dir} "
        f"--hook_name transformer.h.0 --dataset_path {text_dir} --context_size {CONTEXT_SIZE} "
        f"--store_batch_size_prompts 8 --n_batches_in_buffer 4 --lr 3e-3 "
        f"--train_batch_size_tokens {BATCH_SIZE} --training_tokens {40 * BATCH_SIZE} "
        f"--output_path {tmp_path}".split()
        + QUIET
    )
    assert_losses_fall(step_losses["hierarchical_topk"])
    sae = SAE.load_from_disk(tmp_path)
    assert type(sae) is HierarchicalTopKSAE
    assert sae.cfg.k == K
    assert sae.cfg.metadata.hook_name == "transformer.h.0"
