"""When the thread that makes batches ahead begins, and that it ends."""

import threading
from collections.abc import Iterator

import pytest
from sae_lens import llm_sae_training_runner, multi_sae_training_runner
from sae_lens.training import prefetch

import sae_lens_flex
from sae_lens_flex.acceleration.prefetch import PrefetchingIterator


def source(begun: threading.Event) -> Iterator[int]:
    begun.set()
    yield from range(5)


def test_nothing_is_made_before_it_is_asked_for() -> None:
    begun = threading.Event()
    batches = PrefetchingIterator(source(begun), prefetch=2)
    with batches.paused():
        assert not begun.wait(0.1)
    assert list(batches) == list(range(5))
    batches.close()


def test_what_was_not_asked_for_can_be_closed() -> None:
    begun = threading.Event()
    batches = PrefetchingIterator(source(begun))
    batches.close()
    assert not begun.is_set()
    assert list(batches) == []


@pytest.mark.parametrize("module", [llm_sae_training_runner, multi_sae_training_runner])
def test_evaluators_pause_what_was_made_before_the_block(module) -> None:
    batches = prefetch.PrefetchingIterator(iter(range(5)))
    with sae_lens_flex.accelerate():
        assert isinstance(batches, module.PrefetchingIterator)
        assert not isinstance(iter(range(5)), module.PrefetchingIterator)
    batches.close()
