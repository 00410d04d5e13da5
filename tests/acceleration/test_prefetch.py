"""When the thread that makes batches ahead begins, and that it ends."""

import threading
from collections.abc import Iterator

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
