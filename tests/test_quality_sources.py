"""Where the quality benchmark's activations come from."""

from itertools import islice

import pytest
import torch

from benchmarks.quality.sources import (
    FIRST_PART,
    Parts,
    Sizes,
    SyntheticSource,
    small_synthetic,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    source = SyntheticSource(small_synthetic(256), Sizes(601, 8, 8), "cpu", 2, cache)
    for part in range(2):
        source.collect(part)
    return source


def drawn(source):
    """What SAELens's generator draws for the two parts, with their seeds."""
    parts = []
    for part, n in enumerate((301, 300)):
        torch.manual_seed(FIRST_PART + part)
        parts.append(source.model.sample(n))
    return torch.cat(parts)


def test_batches_are_what_the_generator_draws(source):
    expected = drawn(source)[:600].reshape(6, 100, -1)
    batches = list(islice(source.batches(100, seed=0), 6))
    # Batches come in another order. The 601st makes no whole one.
    order = [int((expected - each).abs().sum((1, 2)).argmin()) for each in batches]
    assert sorted(order) == list(range(6))
    torch.testing.assert_close(torch.stack(batches), expected[order])
    assert source.about["mean_firing"] == pytest.approx(len(source._train[0]) / 601, abs=0.01)


def test_seeds_and_epochs_are_other_orders(source):
    first, second = (list(islice(source.batches(100, seed), 12)) for seed in (0, 1))
    assert any(not torch.equal(a, b) for a, b in zip(first[:6], second[:6], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first[:6], first[6:], strict=True))
    again = list(islice(source.batches(100, 0), 12))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_parts_that_share_nothing(source):
    x = torch.cat([drawn(source), source.validation])
    firing = x[(x != source.model.feature_dict.bias).any(-1)]
    assert len(firing) > 400
    assert len(firing.unique(dim=0)) == len(firing)


def test_several_parts_need_a_cache():
    with pytest.raises(ValueError, match="parts is 2 and cache is None, expected a directory"):
        Parts(2, None, "cpu")


def test_a_part_that_is_there_is_not_made_again(tmp_path):
    made = []

    def make(part):
        made.append(part)
        return {"x": torch.full((part + 1, 2), part)}

    parts = Parts(2, tmp_path, "cpu")
    for part in (0, 1, 0, 1):
        parts.collect(part, make)
    assert made == [0, 1]
    assert parts.joined("x").tolist() == [[0, 0], [1, 1], [1, 1]]
