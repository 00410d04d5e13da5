"""SAELens's optimizer, with a step that is one kernel."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sae_lens.training import sae_trainer
from torch.optim import Adam, Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override


class _FusedAdam(Adam):
    """
    `Adam(fused=True)` whose state is that of any other Adam.

    It loads the state of an Adam that was not fused, and such an Adam loads its state.
    """

    _version_hook: RemovableHandle | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, fused=True)
        self._tell_autograd_after_steps()

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy comes through here. It has the state of the original, but none of its hooks.
        self._tell_autograd_after_steps()

    def _tell_autograd_after_steps(self) -> None:
        # A hook, because torch runs the hooks of an optimizer around every class's `step`: an
        # overridden one, which calls Adam's, would run each of them twice.
        if self._version_hook is None:
            self._version_hook = self.register_step_post_hook(_raise_versions)

    @override
    def state_dict(self) -> dict[str, Any]:
        return _with_fused(super().state_dict(), None)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(_with_fused(state_dict, True))
        # The kernel reads a parameter and its moments in the order of memory. SAELens stores W_enc
        # in another order than our SAEs, and the kernel would mix up such moments silently.
        for parameter, state in self.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if state[name].stride() != parameter.stride():
                    state[name] = torch.empty_like(parameter).copy_(state[name])


def _raise_versions(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Tell autograd that a step wrote the parameters.

    Autograd raises an error if a backward pass needs a saved parameter that has changed since. It
    knows so from the parameter's version, which the fused kernel does not raise.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.autograd.graph.increment_version([p for p in parameters if p.grad is not None])


def _with_fused(state_dict: dict[str, Any], fused: bool | None) -> dict[str, Any]:
    groups = [{**group, "fused": fused} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


@contextmanager
def fused_adam() -> Iterator[None]:
    """Make SAELens's trainer build `torch.optim.Adam(fused=True)` within the `with` block.

        with sae_lens_flex.fused_adam():
            sae = LanguageModelSAETrainingRunner(cfg).run()

    It is the same Adam up to rounding. Its step reads and writes every tensor once, so it is
    faster. An optimizer that is built within the block stays fused after it, whatever SAE it is
    for. An optimizer that was built before is left as it was.

    A checkpoint is the same with and without the block. The block decides, not the checkpoint: a
    run that is resumed within it is fused, one that is resumed outside is not. (`torch.optim.Adam`
    takes the setting from the checkpoint.)
    """
    module: Any = sae_trainer
    adam = module.Adam
    module.Adam = _FusedAdam
    try:
        yield
    finally:
        module.Adam = adam
