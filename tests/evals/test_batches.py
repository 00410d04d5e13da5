"""What counts of a batch of tokens, and what the model runs on elsewhere."""

import torch

from sae_lens_flex.evals.batches import ModelBatch, ModelRuns

from .comparison import make_sae


def test_activations_of_extreme_norm_do_not_count_and_stay_the_models_own(make_store) -> None:
    sae = make_sae()
    store = make_store(sae)
    tokens = store.get_batch_tokens()
    whole = ModelBatch(tokens, [sae], ModelRuns(store.model, [], True, True, {}))
    x = whole.activations(sae)
    norms = x.norm(dim=-1)
    limit = float(norms.median())

    runs = ModelRuns(store.model, [], True, True, {}, max_norm=limit)
    batch = ModelBatch(tokens, [sae], runs)
    assert torch.equal(batch.mask, norms <= limit)
    without_model = ModelBatch(tokens, [sae], ModelRuns(store.model, [], False, False, {}, limit))
    assert torch.equal(without_model.mask, norms <= limit)

    x_hat = torch.where(batch.mask.unsqueeze(-1), 0.5 * x, torch.nan)
    metrics = batch.model_metrics(sae, x_hat)
    n_counted = int(batch.mask[:, :-1].sum())
    assert len(metrics["ce_loss_with_sae"]) == n_counted
    assert metrics["ce_loss_with_sae"].isfinite().all()
    assert metrics["kl_div_with_sae"].isfinite().all()
    # The model's own cross-entropy is that of the same positions of the whole batch.
    expected = whole.without_sae["ce_loss_without_sae"].view(len(tokens), -1)[batch.mask[:, :-1]]
    torch.testing.assert_close(metrics["ce_loss_without_sae"], expected)
