"""The architectures of a batch in SAELens's flows, beside SAELens's own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    TrainingSAE,
)
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.saes.jumprelu_sae import JumpReLUSAE

from sae_lens_flex import (
    FlexBatchTopKTrainingSAEConfig,
    FlexMatryoshkaBatchTopKTrainingSAEConfig,
    accelerate,
    from_topk,
)

from .flows import (
    BATCH_SIZE,
    D_IN,
    D_SAE,
    activation_batches,
    make_trainer,
    runner_config,
    training_sae_config,
)

OWN_FIELDS: dict[str, dict[str, Any]] = {
    "batchtopk": {"k": 4.5},
    "matryoshka_batchtopk": {"k": 4.5, "matryoshka_widths": [8, 24, D_SAE]},
}
every_stock = pytest.mark.parametrize("stock", OWN_FIELDS)


def config(architecture: str, **fields: Any) -> Any:
    own = OWN_FIELDS[architecture.removeprefix("flex_")]
    return training_sae_config(architecture, **own, **fields)


def run(cfg: Any, model: HookedSAETransformer, dataset: Dataset, **fields: Any) -> Any:
    torch.manual_seed(0)
    return LanguageModelSAETrainingRunner(
        runner_config(cfg, **fields), override_model=model, override_dataset=dataset
    ).run()


@every_stock
def test_runner_trains_what_it_trains_of_stock(
    stock: str, language_model: HookedSAETransformer, token_dataset: Dataset, tmp_path: Path
):
    loaded = {}
    for architecture in (stock, f"flex_{stock}"):
        output = tmp_path / architecture
        trained = run(config(architecture), language_model, token_dataset, output_path=str(output))
        assert trained.cfg.architecture() == architecture
        loaded[architecture] = SAE.load_from_disk(output)
        assert type(loaded[architecture]) is JumpReLUSAE
        saved = json.loads((output / "cfg.json").read_text())
        assert saved["architecture"] == "jumprelu"  # which SAELens loads without this package
        metadata = loaded[architecture].cfg.metadata
        assert metadata.training_architecture == architecture
    expected, mine = (sae.state_dict() for sae in loaded.values())
    for name, value in expected.items():
        # 40 steps of Adam, in which rounding may now and then keep another latent
        torch.testing.assert_close(mine[name], value, rtol=0, atol=3e-3)
    assert expected["threshold"].min() > 1e-3


@every_stock
def test_checkpoints_go_on(
    stock: str,
    language_model: HookedSAETransformer,
    token_dataset: Dataset,
    step_losses: dict[str, list[float]],
    tmp_path: Path,
):
    architecture = f"flex_{stock}"
    fields = {"n_checkpoints": 1, "checkpoint_path": str(tmp_path)}
    run(config(architecture), language_model, token_dataset, **fields)
    (checkpoint,) = next(tmp_path.iterdir()).iterdir()
    losses = list(step_losses[architecture])
    step_losses.clear()
    run(
        config(architecture),
        language_model,
        token_dataset,
        resume_from_checkpoint=str(checkpoint),
    )
    resumed = step_losses[architecture]
    assert len(resumed) == len(losses) - int(checkpoint.name) // BATCH_SIZE
    assert resumed[0] < losses[0]
    loaded = TrainingSAE.load_from_disk(checkpoint)
    assert loaded.cfg.architecture() == architecture
    assert loaded.topk_threshold > 0
    with pytest.raises(TypeError, match="expected an SAE of one of the architectures topk, hier"):
        from_topk(loaded)


@pytest.mark.parametrize("normalization", ["expected_average_only_in", "covariance_whitening"])
@every_stock
def test_trainer_with_normalization_and_accelerate_is_that_of_stock(stock: str, normalization: str):
    thresholds = []
    for architecture in (stock, f"flex_{stock}"):
        torch.manual_seed(0)
        cfg = config(architecture, normalize_activations=normalization)
        batches = activation_batches(24)
        sae = TrainingSAE.from_dict(cfg.to_dict())
        with accelerate():
            trainer = make_trainer(sae, batches[4:], n_batches_for_norm_estimate=4)
            trainer.data_provider = iter(batches)
            trained = trainer.fit()
        state = trained.state_dict()
        trained.process_state_dict_for_saving_inference(state)
        thresholds.append(state["threshold"])
    torch.testing.assert_close(thresholds[1], thresholds[0], rtol=1e-3, atol=1e-5)
    assert thresholds[0].min() > 1e-4


def test_arguments_of_the_command_line_give_the_config():
    quiet = ["--log_to_wandb", "false", "--verbose", "false"]
    arguments = "--architecture flex_batchtopk --d_in 16 --d_sae 64 --k 8.5 --backend torch"
    cfg: LanguageModelSAERunnerConfig[Any] = _parse_cfg_args(arguments.split() + quiet)
    assert cfg.sae == FlexBatchTopKTrainingSAEConfig(d_in=16, d_sae=64, k=8.5, backend="torch")
    arguments = (
        "--architecture flex_matryoshka_batchtopk --d_in 16 --d_sae 64 --k 8 "
        "--matryoshka_widths 4 16 64 --use_matryoshka_aux_loss true --topk_threshold_lr 0.1"
    )
    cfg = _parse_cfg_args(arguments.split() + quiet)
    assert cfg.sae == FlexMatryoshkaBatchTopKTrainingSAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        k=8,
        matryoshka_widths=[4, 16, 64],
        use_matryoshka_aux_loss=True,
        topk_threshold_lr=0.1,
    )
