"""The hierarchical loss over a BatchTopK code, and at which budgets each kind is measured."""

from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from torch._subclasses.fake_tensor import FakeTensorMode

import sae_lens_flex
from benchmarks.quality import hierarchical_batch
from benchmarks.quality.hierarchical_batch import Ranked
from benchmarks.quality.kinds import BATCH_SCHEMES, make_kind
from benchmarks.quality.worker import Training, Worker, as_hierarchical
from sae_lens_flex import MeanBudget
from sae_lens_flex.ops.codes import Code
from sae_lens_flex.saes.fused_topk import FusedTopKTrainingSAE

K, N, D, F = 4, 12, 6, 40


def make_sae(name, dtype="float64", **fields):
    torch.manual_seed(0)
    kind = make_kind(name, K, F, [1, 2, 4])
    config = {"architecture": kind.architecture, "d_in": D, "d_sae": F, "k": K, "dtype": dtype}
    is_experiment = kind.architecture == hierarchical_batch.ARCHITECTURE
    new_sae = hierarchical_batch.new_training_sae if is_experiment else TrainingSAE.from_dict
    sae = new_sae({**config, "device": "cpu", **kind.fields, **fields})
    for parameter in sae.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return sae


def make_samples():
    """Samples of unlike size: rows of the code are empty, longer than K, and between."""
    torch.manual_seed(1)
    x = torch.randn(N, D).double() * torch.logspace(-1.5, 0.5, N).double().unsqueeze(-1)
    x[0] = 0
    return x


def step_input(x):
    return TrainStepInput(
        sae_in=x, dead_neuron_mask=None, coefficients={}, n_training_steps=0, is_logging_step=False
    )


def definition(sae, x):
    """The loss as the module states it, by dense tensors and autograd."""
    ranked = sae.cfg.ranked()
    levels, budgets, weights = ranked.levels, ranked.budgets, ranked.weights
    sae_in = x - sae.b_dec if sae.cfg.apply_b_dec_to_input else x
    hidden = sae_in @ sae.W_enc + sae.b_enc
    norms = sae.W_dec.norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else torch.ones(F)
    acts = (hidden * norms.detach()).relu()
    ranks = acts.flatten().argsort(descending=True).argsort().view(N, F)
    ranks = ranks.where(acts > 0, N * F)  # a latent's number in the batch
    loss, lengths = x.new_zeros(()), []
    for b in range(N):
        n = int((ranks[b] < K * N).sum())
        latents = acts[b].argsort(descending=True)[:n]
        if levels == "even":
            of_levels = [(j, 1 / n) for j in range(1, n + 1)] or [(0, 1.0)]
        elif levels == "ranks":
            pairs = zip(budgets, weights, strict=True)
            of_levels = [(n if m == K else min(m, n), c) for m, c in pairs]
        else:
            pairs = zip(budgets, weights, strict=True)
            of_levels = [(int((ranks[b] < m * N).sum()), c) for m, c in pairs]
        for j, c in of_levels:
            kept = latents[:j]
            x_hat = hidden[b, kept].relu() @ sae.W_dec[kept] + sae.b_dec
            loss = loss + c * (x_hat - x[b]).square().sum() / N
        lengths.append(n)
    return loss, lengths


@pytest.mark.parametrize("rescales", [False, True], ids=["", "rescaled"])
@pytest.mark.parametrize("name", BATCH_SCHEMES)
def test_loss_and_gradients_match_float64_definition(name, rescales):
    sae, x = make_sae(name, rescale_acts_by_decoder_norm=rescales), make_samples()
    expected, lengths = definition(sae, x)
    assert min(lengths) == 0
    assert max(lengths) > K
    assert any(0 < length < K for length in lengths)
    expected_gradients = torch.autograd.grad(expected, list(sae.parameters()))
    output = sae.training_forward_pass(step_input(x))
    gradients = torch.autograd.grad(output.loss, list(sae.parameters()))
    torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=0)
    for one, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        pytest.param(
            *("hierarchical_batch_shared", "cpu"),
            marks=pytest.mark.skipif(
                torch.cuda.is_available(), reason="kernels are compiled where there is a GPU"
            ),
        ),
        *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in BATCH_SCHEMES),
    ],
)
def test_kernels_take_its_step(name, device):
    other, x = make_sae(name), make_samples()
    expected = other.training_forward_pass(step_input(x))
    expected.loss.backward()
    sae = make_sae(name, "float32", backend="triton").to(device)
    sae.load_state_dict({name: each.float() for name, each in other.state_dict().items()})
    output = sae.training_forward_pass(step_input(x.float().to(device)))
    output.loss.backward()
    torch.testing.assert_close(output.loss.cpu().double(), expected.loss, rtol=1e-4, atol=0)
    for one, another in zip(sae.parameters(), other.parameters(), strict=True):
        scale = float(another.grad.abs().max())
        torch.testing.assert_close(one.grad.cpu().double(), another.grad, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("levels", ["even", "ranks", "batch"])
def test_weights_of_each_row_sum_to_one(levels):
    starts = torch.tensor([0, 0, 9, 10, 13])
    values = torch.cat((torch.rand(13) + 0.1, torch.zeros(3)))  # three pairs of no sample
    code = Code(torch.zeros(16, dtype=torch.int64), values, starts)
    ordered, weights = Ranked(levels, (1, 2, 4), (0.2, 0.3, 0.5))(code, None)
    assert len(weights) == 16 + 4
    rows = [weights[0:1], weights[1:11], weights[11:13], weights[13:17]]
    for row in rows:
        torch.testing.assert_close(row.sum(), torch.tensor(1.0))
    assert not weights[17:].any()
    for start, end in pairwise(starts.tolist()):
        row = ordered.values[start:end]
        assert torch.equal(row, row.sort(descending=True).values)


@pytest.mark.parametrize("levels", ["even", "ranks", "batch"])
def test_ranking_waits_for_nothing(levels):
    # Tensors without values: whatever asks for one, or whose shape depends on one, raises.
    caches = (hierarchical_batch._tables, hierarchical_batch._of_batch)
    try:
        with FakeTensorMode():
            code = Code(torch.zeros(16, dtype=torch.int64), torch.zeros(16), torch.arange(5))
            ordered, weights = Ranked(levels, (1, 2, 4), (0.2, 0.3, 0.5))(code, torch.ones(F))
    finally:
        for cache in caches:
            cache.cache_clear()
    assert ordered.latents.shape == ordered.values.shape == (16,)
    assert weights.shape == (20,)


class FakeSource:
    """Activations without a model, whose test is the validation."""

    def __init__(self, device="cpu"):
        self.metadata = {"hook_name": "hook"}
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(16, D, generator=generator)
        self.train, self.validation = (
            ((torch.rand(n, 16, generator=generator) < 0.1).float() @ features).to(device)
            for n in (2048, 512)
        )

    def batches(self, size, seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            rows = torch.randint(len(self.train), (size,), generator=generator)
            yield self.train[rows.to(self.train.device)]

    def measure(self, sae, budgets):
        assert sae.cfg.metadata.hook_name == "hook"  # by which a language model's source finds it
        budgets = None if budgets == [None] else budgets
        sweep = sae_lens_flex.sweep_budgets(
            sae, [self.validation], budgets=budgets, show_progress=False
        )
        return [asdict(row) for row in sweep.metrics]


@pytest.fixture(scope="module", autouse=True)
def matmul_precision():
    """A worker sets it, for all tests that come after."""
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="module")
def worker():
    return Worker(FakeSource, Training(F, 2048, 256, "cpu", autocast=False, tuning=0))


@pytest.mark.parametrize(
    ("name", "budgets", "means"),
    [
        ("hierarchical_batch", [], [1, 2, 4]),
        ("hierarchical_batch_shared", [], [1, 2, 4]),
        ("doubling_rising", [1, 2, 4], [1, 2, 4]),
        ("topk_4", [1, 2, 4], [4]),
        ("topk_2", [2], [2]),
        ("batchtopk_2", [None], [2]),
        ("matryoshka_2", [None], [2]),
    ],
)
def test_kind_is_measured_at_its_budgets_and_thresholds(worker, tmp_path, name, budgets, means):
    kind = make_kind(name, K, F, [1, 2, 4])
    known = worker.train(kind, 1e-3, 0, tmp_path)
    of_all = kind.architecture.startswith("hierarchical")
    assert len(known["validation_at_budgets"]) == (3 if of_all else 1)
    rows = worker.measure(kind, known, tmp_path)
    assert [row["budget"] for row in rows if row["threshold"] is None] == budgets
    of_thresholds = [row for row in rows if row["threshold"] is not None]
    assert [row["mean"] for row in of_thresholds] == means
    for row in of_thresholds:
        assert row["l0"] == pytest.approx(row["mean"], rel=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BATCH_SCHEMES)
def test_recorded_steps_train_the_same(name, tmp_path, monkeypatch):
    kind, found = make_kind(name, K, F, [1, 2, 4]), []
    for is_recorded in (True, False):
        monkeypatch.setattr(FusedTopKTrainingSAE, "use_cuda_graph", is_recorded)
        training = Training(F, 32 * 256, 256, "cuda", autocast=False, tuning=0)
        worker = Worker(lambda: FakeSource("cuda"), training)
        path = tmp_path / str(is_recorded)
        found.append(worker.train(kind, 1e-3, 0, path)["validation_at_budgets"])
    # The order of additions differs from run to run.
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def test_saved_sae_keeps_what_training_kept(tmp_path):
    sae, x = make_sae("hierarchical_batch"), make_samples()
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path, device="cpu")
    kept = sae.training_forward_pass(step_input(x)).feature_acts.to_dense()
    budget = sae_lens_flex.mean_budget(loaded, x, K)
    assert budget.mean == pytest.approx(float((kept > 0).sum()) / N)
    with loaded.at_budget(budget):
        torch.testing.assert_close(loaded.encode(x), kept.detach())


def test_batchtopk_with_its_own_threshold_is_the_same(tmp_path):
    sae = make_sae("batchtopk_2", "float32")
    sae.topk_threshold.fill_(0.3)
    sae.save_inference_model(tmp_path)
    jumprelu, x = SAE.load_from_disk(tmp_path, device="cpu"), make_samples().float()
    other = as_hierarchical(jumprelu)
    other.budget = MeanBudget(2, 0.3)
    assert 0 < int((other.encode(x) > 0).sum()) < N * F
    torch.testing.assert_close(other(x), jumprelu(x))
