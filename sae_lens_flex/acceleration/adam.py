"""SAELens's optimizer, with a step that is one kernel and clips the gradients on its way."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.optim import Adam, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

MAX_NORM = 1.0  # SAELens's
_OWN_CLIPPING = torch.nn.utils.clip_grad_norm_


class FusedAdam(Adam):
    """
    `Adam(fused=True)` whose state is that of any other Adam.

    It loads the state of an Adam that was not fused, and such an Adam loads its state.
    """

    grad_scale: torch.Tensor | None = None  # Adam's kernel divides the gradients by it.

    own_hooks: tuple[RemovableHandle, RemovableHandle] | None = None  # before and after a step

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, fused=True)
        self._hook_steps()

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy comes through here. It has the state of the original, but none of its hooks.
        self._hook_steps()

    def _hook_steps(self) -> None:
        # Hooks, because torch runs the hooks of an optimizer around every class's `step`: an
        # overridden one, which calls Adam's, would run each of them twice.
        if self.own_hooks is None:
            self.own_hooks = (
                self.register_step_pre_hook(_match_layouts),
                self.register_step_post_hook(_raise_versions),
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        return _with_fused(super().state_dict(), None)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(_with_fused(state_dict, True))


def _match_layouts(optimizer: Any, args: Any, kwargs: Any) -> None:
    """Store gradients and moments in the order of memory in which their parameter is.

    The kernel reads all of them in the order of memory. It would mix up others: silently on a CPU.
    SAELens stores W_enc in another order than our SAEs, so the moments of a checkpoint may be
    others. A user may also give a parameter other data.
    """
    _leave_gaps_to_torch(optimizer)
    for parameter in _with_gradients(_parameters(optimizer)):
        stride = parameter.stride()
        if parameter.grad.stride() != stride:
            parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
        state = optimizer.state.get(parameter, {})
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            if name in state and state[name].stride() != stride:
                state[name] = torch.empty_like(parameter).copy_(state[name])


def _leave_gaps_to_torch(optimizer: Any) -> None:
    """Step without the fused kernel where a parameter's memory has gaps, such as a slice's columns.

    The kernel would write into the gaps: silently on a CPU.
    """
    for group in optimizer.param_groups:
        if not all(_is_without_gaps(p) for p in group["params"]):
            group["fused"] = None


def _is_without_gaps(parameter: torch.Tensor) -> bool:
    last = sum(
        (n - 1) * stride for n, stride in zip(parameter.shape, parameter.stride(), strict=True)
    )
    return last + 1 == parameter.numel()


def _raise_versions(optimizer: Any, args: Any, kwargs: Any) -> None:
    """Tell autograd what a step wrote: the parameters and, if it clipped, their gradients.

    Autograd raises an error if a backward pass needs a saved tensor that has changed since. It
    knows so from the tensor's version, which the fused kernel does not raise.
    """
    parameters = _with_gradients(_parameters(optimizer))
    torch.autograd.graph.increment_version(parameters)
    if optimizer.grad_scale is not None:
        torch.autograd.graph.increment_version([p.grad for p in parameters])


def _parameters(optimizer: Optimizer) -> Iterator[Any]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _with_gradients(parameters: Iterable[Any]) -> list[Any]:
    return [p for p in parameters if p.grad is not None]


def _with_fused(state_dict: dict[str, Any], fused: bool | None) -> dict[str, Any]:
    groups = [{**group, "fused": fused} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def clip_and_step(optimizer: Optimizer, parameters: Iterable[torch.Tensor]) -> None:
    """Clip the gradients of the parameters to norm 1, all together, and take a step.

    The result is that of `torch.nn.utils.clip_grad_norm_(parameters, 1.0)` and `optimizer.step()`.
    With a `FusedAdam` of these parameters, in float32, one pass over the gradients computes their
    norm, and the kernel of the step divides by it: g / max(norm + 1e-6, 1). SAELens's way
    multiplies: g * min(1 / (norm + 1e-6), 1). The two differ by at most 2 units in the last
    place, and by nothing where the norm is below 1. A norm that is infinite or not a number does
    the same to the gradients either way.
    """
    parameters = list(parameters)
    if not _can_clip_in_step(optimizer, parameters):
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        return
    assert isinstance(optimizer, FusedAdam)
    norm = torch.nn.utils.get_total_norm([p.grad for p in _with_gradients(parameters)])
    optimizer.grad_scale = clipping_scale(norm)
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale


def clipping_scale(norm: torch.Tensor) -> torch.Tensor:
    """Return what gradients of a norm are divided by so that it is 1 at most, scalars."""
    return (norm + 1e-6).clamp(min=MAX_NORM)


def _can_clip_in_step(optimizer: Any, parameters: Sequence[torch.Tensor]) -> bool:
    """Return whether nobody sees that the step clips, and whether it can."""
    clipped = _with_gradients(parameters)
    return (
        type(optimizer) is FusedAdam
        and len(clipped) > 0
        # The kernel takes a scale in float32 only, on the device of all gradients.
        and all(p.grad.dtype == torch.float32 for p in clipped)
        and len({p.grad.device for p in clipped}) == 1
        and are_same(clipped, _with_gradients(_parameters(optimizer)))
        # The unfused step of a weight with gaps does not clip.
        and all(map(_is_without_gaps, _parameters(optimizer)))
        and is_unseen_before(optimizer)
    )


def are_same(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    """Return whether two sequences hold the same tensors, in any order."""
    return len(some) == len(others) and {id(p) for p in some} == {id(p) for p in others}


def is_unseen_before(optimizer: FusedAdam) -> bool:
    """Return whether nobody looks at the gradients before the step, expecting clipped ones."""
    step = vars(optimizer).get("step")
    own_hooks = [hook.id for hook in optimizer.own_hooks or ()]
    return (
        all(group["fused"] for group in optimizer.param_groups)
        and torch.nn.utils.clip_grad_norm_ is _OWN_CLIPPING
        and list(optimizer._optimizer_step_pre_hooks) == own_hooks[:1]
        and not _global_optimizer_pre_hooks
        # torch's schedules replace the step on the object by one that counts.
        and (step is None or hasattr(step, "_wrapped_by_lr_sched"))
    )


def is_unseen_after(optimizer: FusedAdam) -> bool:
    """Return whether nobody looks at the gradients after the step."""
    own_hooks = [hook.id for hook in optimizer.own_hooks or ()]
    return (
        list(optimizer._optimizer_step_post_hooks) == own_hooks[1:]
        and not _global_optimizer_post_hooks
        and "zero_grad" not in vars(optimizer)
    )
