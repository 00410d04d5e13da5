"""At which budgets and thresholds each kind is measured."""

from dataclasses import asdict

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE

import sae_lens_flex
from benchmarks.quality.kinds import make_kind
from benchmarks.quality.worker import Training, Worker, as_hierarchical
from sae_lens_flex import MeanBudget

K, N, D, F = 4, 12, 6, 40


class FakeSource:
    """Activations without a model, whose test is the validation."""

    def __init__(self):
        self.metadata = {"hook_name": "hook"}
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(16, D, generator=generator)
        self.train, self.validation = (
            (torch.rand(n, 16, generator=generator) < 0.1).float() @ features for n in (2048, 512)
        )

    def batches(self, size, seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            rows = torch.randint(len(self.train), (size,), generator=generator)
            yield self.train[rows]

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


def test_batchtopk_with_its_own_threshold_is_the_same(tmp_path):
    torch.manual_seed(0)
    kind = make_kind("batchtopk_2", K, F, [1, 2, 4])
    config = {"architecture": kind.architecture, "d_in": D, "d_sae": F, "k": kind.k}
    sae = TrainingSAE.from_dict({**config, "device": "cpu"})
    for parameter in sae.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    sae.topk_threshold.fill_(0.3)
    sae.save_inference_model(tmp_path)
    jumprelu, x = SAE.load_from_disk(tmp_path, device="cpu"), torch.randn(N, D)
    other = as_hierarchical(jumprelu)
    other.budget = MeanBudget(2, 0.3)
    assert 0 < int((other.encode(x) > 0).sum()) < N * F
    torch.testing.assert_close(other(x), jumprelu(x))
