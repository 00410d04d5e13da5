"""How many latents are dead at most, known without waiting for the device.

A latent is dead when it has not fired for more than `window` steps. In m steps the number of steps
since it fired grows by m at most, so the latents dead at step t are among those with

    since_fired(t - m) > window - m.

Their number is counted every few steps, and has long arrived when it is read.
"""

from collections import deque
from typing import Any, NamedTuple

import torch

HORIZON = 32  # m, for how many steps a count holds
PERIOD = 8  # steps from one count to the next


class _Count(NamedTuple):
    """A count that is on its way.

    Attributes:
        step: at which it was taken.
        n: where it arrives.
        copied: the event after which it has arrived, or None where it has already.
    """

    step: int
    n: torch.Tensor
    copied: Any

    def has_arrived(self) -> bool:
        return self.copied is None or self.copied.query()

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()


class DeadBound:
    """Bounds the number of dead latents at every step of one trainer."""

    def __init__(self) -> None:
        self._since_fired: torch.Tensor | None = None
        # Of the counters, as the last step left them; None from when a step begins.
        self._version: int | None = None
        self._window = float("nan")
        self._step = 0
        self._posted: deque[_Count] = deque()
        self._known: tuple[int, int] | None = None  # the step of a count, and the count

    def at_step(self, since_fired: torch.Tensor, window: float) -> int | None:
        """Return at least the number of dead latents at a step that begins, or None if unknown.

        It is unknown until the first count has arrived, and again after anyone but the steps has
        changed the counters.

        Args:
            since_fired: how many steps ago each latent fired, [F].
            window: more of them and it is dead.
        """
        is_as_left = since_fired is self._since_fired and since_fired._version == self._version
        if not is_as_left or window != self._window:
            self.__init__()
            self._since_fired, self._window = since_fired, window
        self._version = None
        step = self._step
        self._step += 1
        if step % PERIOD == 0:
            count, copied = (since_fired > window - HORIZON).sum(), None
            if count.is_cuda:
                count = count.to("cpu", non_blocking=True)
                copied = torch.cuda.current_stream(since_fired.device).record_event()
            self._posted.append(_Count(step, count, copied))
        while self._posted and self._posted[0].has_arrived():
            self._take()
        if self._known is None:
            return None
        while step - self._known[0] > HORIZON:
            # The device is that many steps behind. It has others to take while the host waits.
            self._posted[0].wait()
            self._take()
        return self._known[1]

    def after_step(self) -> None:
        """Take note that the step that began has changed the counters, each by 1 or to 0."""
        if self._version is None and self._since_fired is not None:
            self._version = self._since_fired._version

    def _take(self) -> None:
        arrived = self._posted.popleft()
        self._known = arrived.step, int(arrived.n)
