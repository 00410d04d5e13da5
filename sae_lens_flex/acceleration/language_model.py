"""Hugging Face's model in SAELens's wrapper, up to the hooked modules, as one function."""

import inspect
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from sae_lens.load_model import HookedProxyLM, StopForward
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel, masking_utils

_OF_SAELENS = HookedProxyLM.run_with_cache
_FORWARD_OF_SAELENS = HookedProxyLM.forward
_UNDERSTOOD = {"names_filter", "stop_at_layer", "prepend_bos"}  # what the store and evals pass
_KEY = "sae_lens_flex"  # under which a tap hangs on a hook point

# A call changes what all threads see: the hooks of the model and functions of transformers.
_lock = threading.RLock()


class _Taps:
    """Hooks that keep what modules return, and stop the model when all have returned.

    The same ones are used in every call, because torch.compile compiles anew for others.

    Attributes:
        hooks: by the modules' names.
        kept: what modules returned in this call, by their names.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.hooks = {name: self._hook(name) for name in names}
        self.kept: dict[str, torch.Tensor] = {}

    def _hook(self, name: str) -> Callable[[Any, Any, torch.Tensor], None]:
        def tap(module: Any, inputs: Any, output: torch.Tensor) -> None:
            self.kept[name] = output
            if len(self.kept) == len(self.hooks):
                raise StopForward

        return tap


_taps: WeakKeyDictionary[HookedProxyLM, dict[tuple[str, ...], _Taps]] = WeakKeyDictionary()


# torch.compile leaves these two alone, and compiles what they call: `compile_llm` compiles
# `run_with_cache`, and what depends on hooks must be looked at in every call.
@torch.compiler.disable(recursive=False)
def run_with_cache(proxy: HookedProxyLM, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Return what `HookedProxyLM.run_with_cache` returns.

    SAELens hangs hooks on the model in every call, and leaves it by an exception of one of them.
    torch.compile compiles such a model in pieces. Here everything up to the last module is one
    function, which `compile_llm` compiles as one graph. Keys and values are not stored for a next
    token, and a causal mask is not written out where PyTorch's attention can do without.

    It is SAELens's own function that runs where anyone else has hooks on the model, where the model
    is not stopped (`stop_at_layer` is None) and where other arguments are given.
    """
    with _lock:
        outputs = _as_one_function(proxy, args, kwargs)
    return _OF_SAELENS(proxy, *args, **kwargs) if outputs is None else (None, outputs)


@torch.compiler.disable(recursive=False)
def _as_one_function(
    proxy: HookedProxyLM, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, torch.Tensor] | None:
    """Return what the modules return, or None where SAELens has to run the model."""
    if not _is_plain(proxy, args, kwargs):
        return None
    names = tuple(dict.fromkeys(kwargs["names_filter"]))
    known = _taps.setdefault(proxy, {})
    if names not in known:
        known[names] = _Taps(names)
    taps = known[names]
    without_cache = _can_do_without_cache(proxy.model)
    replaced = _MASKING if without_cache else {}
    theirs = {name: getattr(masking_utils, name) for name in replaced}
    points = [proxy.hook_dict[name]._forward_hooks for name in names]
    try:
        for point, hook in zip(points, taps.hooks.values(), strict=True):
            point[_KEY] = hook  # type: ignore[index]
        for name, ours in replaced.items():
            setattr(masking_utils, name, ours)
        outputs = _outputs(proxy.model, args[0], taps, without_cache)
    finally:
        taps.kept = {}
        for point in points:
            point.pop(_KEY, None)  # type: ignore[call-overload]
        for name, function in theirs.items():
            setattr(masking_utils, name, function)
    if outputs is None:  # The model has run to its end without one of them.
        return None
    return {name: output.detach() for name, output in zip(names, outputs, strict=True)}


def _outputs(
    model: Any, tokens: torch.Tensor, taps: _Taps, without_cache: bool
) -> list[torch.Tensor] | None:
    """Return what the tapped modules return, or None if the model runs to its end."""
    taps.kept = {}
    try:
        if without_cache:
            model(tokens, use_cache=False)
        else:
            model(tokens)
    except StopForward:
        return [taps.kept[name] for name in taps.hooks]
    return None


@torch.compiler.disable(recursive=False)
def _is_plain(proxy: HookedProxyLM, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether the call is for what modules return, and nobody else has hooks."""
    names = kwargs.get("names_filter")
    if (
        len(args) != 1
        or not isinstance(names, list)
        or not names
        or kwargs.get("stop_at_layer") is None
        or kwargs.keys() - _UNDERSTOOD
        or type(proxy).forward is not _FORWARD_OF_SAELENS
        or "forward" in vars(proxy)
    ):
        return False
    for name in names:
        if name not in proxy.hook_dict:
            return False
    for point in proxy.hook_dict.values():
        if point._forward_hooks or point._forward_pre_hooks:
            return False
    of_saelens = {id(module) for module in proxy.named_modules_dict.values()}
    for module in proxy.modules():
        if len(module._forward_hooks) != (id(module) in of_saelens) or module._forward_pre_hooks:
            return False
    return not (torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


@torch.compiler.disable(recursive=False)
def _can_do_without_cache(model: Any) -> bool:
    """Return whether the model would store keys and values, and has an option not to."""
    return (
        isinstance(model, PreTrainedModel)
        and getattr(model.config, "use_cache", None) is True
        and "use_cache" in inspect.signature(model.forward).parameters
    )


def _is_tracing(tensor: Any = None) -> bool:
    """Take the place of transformers' function of this name, and let causal masks be left out.

    PyTorch's attention takes `is_causal` in place of a mask, and is several times as fast with it.
    While a model is compiled transformers makes the mask, because an exported model may get fewer
    queries than keys. `torch.compile` compiles anew for other shapes.
    """
    return False


def _find_packed_sequence_indices(position_ids: Any) -> None:
    """Take the place of transformers' function of this name: a prompt is one sequence.

    Where keys and values are stored, as in SAELens, transformers does not look for several.
    """


_MASKING = {
    name: ours
    for name, ours in (
        ("is_tracing", _is_tracing),
        ("find_packed_sequence_indices", _find_packed_sequence_indices),
    )
    if hasattr(masking_utils, name)
}
