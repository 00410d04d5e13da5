"""A batch computed in chunks, on a CPU each by one thread.

PyTorch shares every operation out among all threads, and the first to finish waits for the last.
A step has hundreds of operations on chunks. Beside busy processes one of the threads is often not
running, and each operation waits until it runs again. Here a thread computes whole chunks. What a
chunk adds to what the chunks share waits for its turn; the thread goes on to the next chunk.

The caller's thread is one of them. The others are kept: a new thread would fetch new memory for its
tensors and matrix products, page by page.
"""

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import torch

from .policy import no_autocast

Add = Callable[[], None]
"""Adds a chunk's part to what the chunks share."""

# Chunks a thread that may be computed before their turn. Each holds its part in memory until then.
AHEAD = 4


def for_each_chunk(
    compute: Callable[[slice], Add | None], n_samples: int, n_rows: int, device: torch.device
) -> None:
    """Compute chunks of a batch. They add to what they share in the order of the batch.

    So sums do not depend on which thread is faster, nor on the number of threads.

    Args:
        compute: called with the samples of each chunk, without autograd and autocast. What it
            returns is called in the order of the chunks.
        n_samples: B.
        n_rows: samples in a chunk.
        device: where the chunks are computed.
    """
    chunks = [slice(start, start + n_rows) for start in range(0, n_samples, n_rows)]
    for_each(compute, chunks, device)


def for_each(
    compute: Callable[[slice], Add | None], chunks: list[slice], device: torch.device
) -> None:
    """Compute chunks of a batch, as `for_each_chunk` does, of whichever sizes."""
    n_before = torch.get_num_threads()
    n_threads = min(n_before, len(chunks)) if device.type == "cpu" else 1
    if n_threads <= 1:
        with torch.no_grad(), no_autocast(device):
            for chunk in chunks:
                if (add := compute(chunk)) is not None:
                    add()
        return
    turns = _Turns(chunks, AHEAD * n_threads)
    is_inference = torch.is_inference_mode_enabled()

    def work() -> None:
        # A new thread takes the common number of threads when it is first asked for it.
        torch.get_num_threads()
        torch.set_num_threads(1)
        with torch.inference_mode(is_inference), torch.no_grad(), no_autocast(device):
            for number, chunk in turns:
                turns.add_in_turn(number, compute(chunk))

    work = turns.stopping(work)
    try:
        helpers = [_helpers(n_before - 1).submit(work) for _ in range(n_threads - 1)]
        try:
            work()
        finally:
            # One that has not begun, because all were busy, is not needed any more.
            begun = [helper for helper in helpers if not helper.cancel()]
            wait(begun)
        for helper in begun:
            helper.result()
    finally:
        torch.set_num_threads(n_before)  # of this thread, and of those that start later


@functools.cache
def _helpers(n: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, thread_name_prefix="sae_lens_flex")


if sys.platform != "win32":  # A forked process has none of its parent's threads.
    os.register_at_fork(after_in_child=_helpers.cache_clear)


class _Turns:
    """Chunks that threads take one after the other, and whose parts are added in that order."""

    def __init__(self, chunks: list[slice], most_ahead: int) -> None:
        self._chunks = chunks
        self._most_ahead = most_ahead
        self._n_taken = 0
        self._n_added = 0
        self._parts: dict[int, Add | None] = {}  # of computed chunks, by number
        self._is_adding = False  # whether a thread is
        self._has_failed = False
        self._changed = threading.Condition()

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._has_failed or self._n_taken - self._n_added < self._most_ahead
                )
                number = self._n_taken
                if self._has_failed or number == len(self._chunks):
                    return
                self._n_taken += 1
            yield number, self._chunks[number]

    def add_in_turn(self, number: int, add: Add | None) -> None:
        """Leave a chunk's part, and add all whose turn it is, unless another thread does so."""
        with self._changed:
            self._parts[number] = add
            if self._is_adding:
                return
            self._is_adding = True
        while True:
            with self._changed:
                if self._n_added not in self._parts:
                    self._is_adding = False
                    return
                add = self._parts.pop(self._n_added)
            if add is not None:
                add()
            with self._changed:
                self._n_added += 1
                self._changed.notify_all()

    def stopping(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return `work`, which also ends the other threads where it raises."""

        def stop_where_it_raises() -> None:
            try:
                work()
            except BaseException:
                with self._changed:
                    self._has_failed = True
                    self._changed.notify_all()
                raise

        return stop_where_it_raises
