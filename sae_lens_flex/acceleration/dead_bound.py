"""How many latents of each part of the dictionary are dead at most, without waiting for the device.

A latent is dead when it has not fired for more than `window` steps. In m steps the number of steps
since it fired grows by m at most, so the latents dead at step t are among those with

    since_fired(t - m) > window - m.

Their number is counted every few steps, and read some steps later, when it has long arrived.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

PERIOD = 8  # steps from one count to the next, and from a count to its first use
HORIZON = 2 * PERIOD  # m, for how many steps a count holds


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


class DeadBound:
    """Bounds the number of dead latents at every step of one trainer.

    The bound depends on the counters alone, not on when a count arrives. So several processes with
    equal counters have equal bounds.
    """

    def __init__(self) -> None:
        self._since_fired: torch.Tensor | None = None
        # Of the counters, as the last step left them; None from when a step begins.
        self._version: int | None = None
        self._window = float("nan")
        self._step = 0
        self._posted: deque[_Count] = deque()
        self._known: int | None = None

    def at_step(
        self, since_fired: torch.Tensor, window: float, parts: Sequence[slice] = (slice(None),)
    ) -> int:
        """Return at least the number of dead latents of every part, at a step that begins.

        The host waits for the device at the first step, and at one before which anyone but the
        steps has changed the counters.

        Args:
            since_fired: how many steps ago each latent fired, [F].
            window: more of them and it is dead.
            parts: of the latents; the same at every step.
        """
        is_as_left = since_fired is self._since_fired and since_fired._version == self._version
        if not is_as_left or window != self._window:
            self.__init__()
            self._since_fired, self._window = since_fired, window
        self._version = None
        step = self._step
        self._step += 1
        if step % PERIOD == 0:
            may_be_dead, copied = since_fired > window - HORIZON, None
            count = torch.stack([may_be_dead[part].sum() for part in parts]).amax()
            if count.is_cuda:
                count = count.to("cpu", non_blocking=True)
                copied = torch.cuda.current_stream(since_fired.device).record_event()
            self._posted.append(_Count(step, count, copied))
        if self._known is None or (self._posted and self._posted[0].step + PERIOD <= step):
            oldest = self._posted.popleft()
            if oldest.copied is not None:
                oldest.copied.synchronize()
            self._known = int(oldest.n)
        return self._known

    def after_step(self) -> None:
        """Take note that the step that began has changed the counters, each by 1 or to 0."""
        if self._version is None and self._since_fired is not None:
            self._version = self._since_fired._version
