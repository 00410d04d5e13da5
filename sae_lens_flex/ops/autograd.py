"""One autograd node for results whose gradients come with them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from .kernels import launch
from .kernels.scale import scale_in_place as scale_by_triton

Give = Callable[[Sequence[torch.Tensor | None], Callable[[], Any]], Sequence[torch.Tensor | None]]
"""Returns the inputs' gradients in a backward pass. It is called with the gradient of each output,
None for an output on which nothing depends, and with a function that returns the saved inputs."""


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, give: Give, compute: Any, saves: bool, *inputs: Any) -> Any:
        ctx.name, ctx.give = name, give
        ctx.set_materialize_grads(False)  # They would be zeros where nothing depends on an output.
        if saves:
            ctx.save_for_backward(*inputs)
        return compute()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        check_is_first_derivative(ctx.name)
        # A kernel reads what lies in memory. With a negative bit that has the other sign.
        factors = [
            grad if grad is None or not grad.is_neg() else grad.resolve_neg()
            for grad in grad_outputs
        ]
        return None, None, None, None, *ctx.give(factors, lambda: ctx.saved_tensors)


def attach(
    name: str,
    compute: Callable[[], tuple[torch.Tensor, ...]],
    inputs: Sequence[torch.Tensor | None],
    give: Give,
    *,
    saves: bool,
) -> tuple[torch.Tensor, ...]:
    """Return scalars as outputs of one autograd node, whose backward pass calls `give`.

    Args:
        name: of the function that the user called, for errors.
        compute: returns the scalars. It is called without autograd.
        inputs: what they depend on.
        give: returns the inputs' gradients.
        saves: whether `give` may ask for the inputs. Autograd then keeps them, and raises where one
            was changed in place meanwhile.
    """
    return _Node.apply(name, give, compute, saves, *inputs)  # pyright: ignore[reportReturnType]


def check_is_first_derivative(name: str) -> None:
    """Raise where a backward pass is asked for a graph of its own."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has no second derivative: its backward pass was asked for a graph "
            "(create_graph=True). The definitions hierarchical_sae_loss and topk_sae_loss have one."
        )


def check_has_no_tangent(name: str, *tensors: torch.Tensor | None) -> None:
    """Raise where forward-mode automatic differentiation asks for a derivative.

    The kernels would drop it.
    """
    # Asking each tensor takes 1 us. The level is PyTorch's own affair, so it may have another name.
    if getattr(forward_ad, "_current_level", 0) < 0:
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{name} has no forward-mode derivative, and one of its inputs has a tangent: use "
                "backward(). The definitions hierarchical_sae_loss and topk_sae_loss have one."
            )


def scale_in_place(gradients: Sequence[torch.Tensor | None], factor: torch.Tensor) -> None:
    """Multiply gradients that nothing else holds by a scalar tensor, without waiting for it."""
    some = [gradient for gradient in gradients if gradient is not None]
    if not some:
        return
    if launch.is_available(factor.device):
        scale_by_triton(some, factor)
    elif factor.device.type != "cpu" or factor.item() != 1:
        for gradient in some:
            gradient.mul_(factor)
