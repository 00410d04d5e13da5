"""Whether a training step can take the fused path: what a user changed is honoured.

The fused path computes what SAELens's own methods and functions would. So it is right only while
these are what the SAE resolves to: on the object, in a subclass, in a mixin before the base.
"""

from typing import Any

import torch
from sae_lens.saes import sae as saelens
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import TrainingSAE
from sae_lens.saes.topk_sae import SparseHookPoint, TopK, TopKSAE, TopKTrainingSAE
from transformer_lens.hook_points import HookPoint

from . import normalization
from .budgets import RuntimeTopK
from .normalization import is_own_function

# Methods that the fused path computes instead of calling.
METHODS = (
    "encode_with_hidden_pre",
    "decode",
    "process_sae_in",
    "calculate_aux_loss",
    "calculate_topk_aux_loss",
)
# Functions that SAELens sets on the object, by the method of SAELens's SAE that makes them.
FUNCTIONS = {
    "reshape_fn_in": "SAE.turn_off_forward_pass_hook_z_reshaping.",
    "reshape_fn_out": "SAE.turn_off_forward_pass_hook_z_reshaping.",
    **dict.fromkeys(normalization.FUNCTIONS, normalization.MAKER),
}
# With one of these replaced, an output at a lower level is not a prefix of SAELens's sum.
OF_DECODING = ("decode", "mse_loss_fn", "reshape_fn_out", "run_time_activation_norm_fn_out")
SKIPPED_HOOK_POINTS = ("hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons")

OF_SAMPLES = (TopK, RuntimeTopK)
OF_BATCHES = (BatchTopK,)
_FORWARD = {activation: activation.forward for activation in (*OF_SAMPLES, *OF_BATCHES)}


def replaced(sae: Any, own: dict[str, Any], activations: tuple[type, ...]) -> list[str]:
    """Return the names of what is not SAELens's own, or ours, any more.

    Args:
        sae: a training SAE.
        own: our architecture's functions for each name of METHODS, and for what else it computes
            instead of calling.
        activations: OF_SAMPLES or OF_BATCHES: the classes of which its activation function is.
    """
    attributes = vars(sae)
    names = [
        name for name in own if name in attributes or getattr(type(sae), name) is not own[name]
    ]
    names += [name for name, maker in FUNCTIONS.items() if not is_own_function(sae, name, maker)]
    if sae.mse_loss_fn is not saelens.mse_loss:
        names.append("mse_loss_fn")
    if not _is_own(sae.activation_fn, activations):
        names.append("activation_fn")
    return names


def hooked(sae: Any) -> list[str]:
    """Return the hook points that the fused path skips and on which something hangs."""
    return [name for name in SKIPPED_HOOK_POINTS if not _is_bare(getattr(sae, name))]


ENCODING = {
    "encode": (TopKSAE.encode, TrainingSAE.encode),
    "encode_with_hidden_pre": (TopKTrainingSAE.encode_with_hidden_pre,),
}


def keeps_prefixes(sae: Any) -> bool:
    """Return whether a budget keeps the first latents of a larger one, with their activations.

    Args:
        sae: an SAE with a run-time budget. What a user replaced or hooked may act otherwise on the
            latents of each budget.
    """
    is_own = all(
        name not in vars(sae) and getattr(type(sae), name, own[0]) in own
        for name, own in ENCODING.items()
    )
    return is_own and _is_own(sae.activation_fn, OF_SAMPLES) and _is_bare(sae.hook_sae_acts_post)


def _is_own(activation_fn: Any, activations: tuple[type, ...]) -> bool:
    return (
        type(activation_fn) in activations
        and type(activation_fn).forward is _FORWARD[type(activation_fn)]
        and "forward" not in vars(activation_fn)
        and not _has_hooks(activation_fn)
    )


def _is_bare(point: Any) -> bool:
    return (
        type(point) in (HookPoint, SparseHookPoint)
        and "forward" not in vars(point)
        and not _has_hooks(point)
    )


def _has_hooks(module: torch.nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
