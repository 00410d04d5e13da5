"""SAELens's optimizer in one kernel a step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sae_lens.training import sae_trainer
from torch.optim import Adam
from typing_extensions import override


class _FusedAdam(Adam):
    """Adam(fused=True) that goes on from the state of any Adam, and any Adam from its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, fused=True)

    @override
    def state_dict(self) -> dict[str, Any]:
        return _with_fused(super().state_dict(), None)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(_with_fused(state_dict, True))
        # The kernel takes it for granted that a parameter's moments lie in memory as it does. Those
        # of an SAELens SAE, which stores W_enc otherwise than ours, would be mixed up silently.
        for parameter, state in self.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if state[name].stride() != parameter.stride():
                    state[name] = torch.empty_like(parameter).copy_(state[name])


def _with_fused(state_dict: dict[str, Any], fused: bool | None) -> dict[str, Any]:
    groups = [{**group, "fused": fused} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


@contextmanager
def fused_adam() -> Iterator[None]:
    """Make SAELens's trainer build `torch.optim.Adam(fused=True)` within the `with` block.

        with sae_lens_flex.fused_adam():
            sae = LanguageModelSAETrainingRunner(cfg).run()

    The same Adam up to rounding, whose step reads and writes every tensor once. It acts on the
    optimizers, of whatever SAE, that are built within the block, and they stay fused after it.

    A checkpoint is the same with and without it. `Adam.load_state_dict` would take the setting from
    the file; here it is the block that decides: a run resumed within it is fused, one resumed
    outside is not, however it was begun.
    """
    module: Any = sae_trainer
    adam = module.Adam
    module.Adam = _FusedAdam
    try:
        yield
    finally:
        module.Adam = adam
