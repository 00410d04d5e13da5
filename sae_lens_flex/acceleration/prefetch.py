"""Batches that are made ahead, from when the first one is asked for."""

import threading
from collections.abc import Iterator
from typing import Any, TypeVar

from sae_lens.training import prefetch
from typing_extensions import override

T = TypeVar("T")


class PrefetchingIterator(prefetch.PrefetchingIterator[T]):
    """
    SAELens's, whose thread makes no batch before one is asked for.

    SAELens's thread begins at once. A run that resumes skips the text that it was trained on, and
    the thread would read that text at the same time, from the same generator.
    """

    @classmethod
    @override
    def __subclasshook__(cls, other: type) -> Any:
        # SAELens's evaluators ask within the block whether what they pause is of this class. An
        # iterator that was made before the block is of SAELens's.
        return prefetch.PrefetchingIterator in other.__mro__ or NotImplemented

    @override
    def __init__(self, source: Iterator[T], prefetch: int = 4) -> None:
        self._is_asked = threading.Event()
        self._is_closed = False
        super().__init__(source, prefetch)

    @override
    def _run(self, source: Iterator[T]) -> None:
        self._is_asked.wait()
        super()._run(iter(()) if self._is_closed else source)

    @override
    def __next__(self) -> T:
        self._is_asked.set()
        return super().__next__()

    @override
    def close(self) -> None:
        self._is_closed = True
        self._is_asked.set()
        if hasattr(prefetch.PrefetchingIterator, "close"):  # SAELens 6.54.0 has none.
            super().close()
