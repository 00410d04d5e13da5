"""SAELens's optimizer in one kernel a step."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from sae_lens.training import sae_trainer


@contextmanager
def fused_adam() -> Iterator[None]:
    """Make SAELens's trainer build `torch.optim.Adam(fused=True)` within the `with` block.

        with sae_lens_flex.fused_adam():
            sae = LanguageModelSAETrainingRunner(cfg).run()

    The same Adam up to rounding, whose step reads and writes every tensor once. It acts on the
    optimizers, of whatever SAE, that are built within the block, and they stay fused after it. A
    resumed checkpoint goes on as it was begun, within the block or outside it: the optimizer is
    built anew, but `Adam.load_state_dict` then takes the setting from the file.
    """
    module: Any = sae_trainer
    adam = module.Adam
    module.Adam = partial(adam, fused=True)
    try:
        yield
    finally:
        module.Adam = adam
