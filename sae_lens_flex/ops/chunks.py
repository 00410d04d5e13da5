"""A batch computed in chunks, on a CPU each by one thread.

PyTorch shares every operation out among all threads, and the first to finish waits for the last.
A step has hundreds of operations on chunks. Beside busy processes one of the threads is often not
running, and each operation waits until it runs again. Here a thread computes whole chunks. It waits
only for its turn to add to what the chunks share, and sleeps meanwhile.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

Add = Callable[[], None]
"""Adds a chunk's part to what the chunks share."""


def for_each_chunk(
    compute: Callable[[slice], Add | None], n_samples: int, n_rows: int, device: torch.device
) -> None:
    """Compute chunks of a batch. They add to what they share in the order of the batch.

    So sums do not depend on which thread is faster, nor on the number of threads.

    Args:
        compute: called with the samples of each chunk, without autograd. What it returns is called
            in the order of the chunks.
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
    n_threads = min(torch.get_num_threads(), len(chunks)) if device.type == "cpu" else 1
    if n_threads <= 1:
        for chunk in chunks:
            if (add := compute(chunk)) is not None:
                add()
        return
    queue = _Queue(chunks)
    is_inference = torch.is_inference_mode_enabled()

    def work() -> None:
        # A new thread takes the common number of threads when it is first asked for it.
        torch.get_num_threads()
        torch.set_num_threads(1)
        with torch.inference_mode(is_inference), torch.no_grad():
            for number, chunk in queue:
                add = compute(chunk)
                if not queue.wait_for_turn(number):
                    return
                if add is not None:
                    add()
                queue.end_turn()

    n_before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(n_threads) as pool:
            for future in [pool.submit(queue.stopping(work)) for _ in range(n_threads)]:
                future.result()
    finally:
        torch.set_num_threads(n_before)  # for threads that start later


class _Queue:
    """Chunks that threads take one after the other, and whose turns come in that order."""

    def __init__(self, chunks: list[slice]) -> None:
        self._chunks = enumerate(chunks)
        self._turn = 0
        self._has_failed = False
        self._changed = threading.Condition()

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        while True:
            with self._changed:
                item = None if self._has_failed else next(self._chunks, None)
            if item is None:
                return
            yield item

    def wait_for_turn(self, number: int) -> bool:
        """Return whether the turn came: it does not where another thread has raised an error."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_failed or self._turn == number)
            return not self._has_failed

    def end_turn(self) -> None:
        with self._changed:
            self._turn += 1
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
