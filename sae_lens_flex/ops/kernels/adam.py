"""Adam's step with clipped gradients: a pass over the gradients, then one over everything.

    |g|^2 = sum of the squares of all gradients
    clip  = min(1 / (|g| + 1e-6), 1)
    t     = t + 1                                   of each weight
    g     = clip g,  or -clip g to maximize;        g = g + decay w   if the decay is coupled
    w     = w - lr decay w                          if it is decoupled
    m     = beta1 m + (1 - beta1) g
    v     = beta2 v + (1 - beta2) g^2
    w     = w - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

This is Adam (Kingma and Ba, arXiv 1412.6980) and AdamW (Loshchilov and Hutter, arXiv 1711.05101) as
`torch.optim` has them, after `torch.nn.utils.clip_grad_norm_`. The second pass reads w, g, m, v and
writes w, m, v: 28 bytes a weight. torch's fused kernel writes the clipped gradient too.

The squares, lr and t lie on the device, so a recorded step is also right when it is replayed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .launch import cdiv, launch, tl, triton


@triton.jit
def _squares_of(gradient, n, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, stride):
        i = start + tl.arange(0, BLOCK)
        g = tl.load(gradient + i, mask=i < n, other=0.0).to(tl.float32)
        total += g * g
    return total


@triton.jit
def _squares_kernel(squares, a, b, c, d, n_a, n_b, n_c, n_d, BLOCK: tl.constexpr):
    total = _squares_of(a, n_a, BLOCK) + _squares_of(b, n_b, BLOCK)
    total += _squares_of(c, n_c, BLOCK) + _squares_of(d, n_d, BLOCK)
    tl.store(squares + tl.program_id(0), tl.sum(total))


@triton.jit
def _count_step(t, of_weight, lr, log_beta1, log_beta2):
    # In float64, for 1 - beta^t cancels. A logarithm in float32 is good enough: 1 - beta^t has no
    # larger a relative error than it.
    now = tl.load(t) + 1.0
    tl.store(t, now)
    correction1 = 1.0 - tl.exp(now.to(tl.float64) * log_beta1)
    correction2 = 1.0 - tl.exp(now.to(tl.float64) * log_beta2)
    tl.store(of_weight, (lr / correction1).to(tl.float32))
    tl.store(of_weight + 1, (1.0 / tl.sqrt(correction2)).to(tl.float32))


@triton.jit(do_not_specialize=["n_squares"])
def _begin_kernel(
    factors,  # [10]: clip, lr decay, and of each weight lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
    squares,
    learning_rate,
    t_a,
    t_b,
    t_c,
    t_d,
    log_beta1,
    log_beta2,
    decay,
    n_squares,
    N_WEIGHTS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_squares, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(squares + i, mask=i < n_squares, other=0.0)
    clip = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(total)) + 1e-6)
    clip = tl.where(clip > 1.0, 1.0, clip)  # A clip that is not a number stays so.
    if MAXIMIZE:
        clip = -clip
    tl.store(factors, clip)
    lr = tl.load(learning_rate)
    tl.store(factors + 1, lr * decay)
    _count_step(t_a, factors + 2, lr, log_beta1, log_beta2)
    if N_WEIGHTS > 1:
        _count_step(t_b, factors + 4, lr, log_beta1, log_beta2)
    if N_WEIGHTS > 2:
        _count_step(t_c, factors + 6, lr, log_beta1, log_beta2)
    if N_WEIGHTS > 3:
        _count_step(t_d, factors + 8, lr, log_beta1, log_beta2)


@triton.jit
def _average(old, new, share, IS_LONG: tl.constexpr):
    # One factor in place of two, whose rounding would not add up to 1: with beta = 0.999 the
    # average of many steps would be wrong by 3e-5. The smaller one, so that nothing is lost where
    # one of the values is much larger than the other.
    if IS_LONG:
        return old + share * (new - old)
    else:
        return new + share * (old - new)


@triton.jit
def _step_of(
    weight,
    gradient,
    exp_avg,
    exp_avg_sq,
    n,
    factors,
    of_weight,
    share1,  # the smaller of beta1 and 1 - beta1
    share2,
    eps,
    decay,
    IS_LONG1: tl.constexpr,  # whether it is 1 - beta1
    IS_LONG2: tl.constexpr,
    DECAY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    clip, lr_decay = tl.load(factors), tl.load(factors + 1)
    size, root = tl.load(of_weight), tl.load(of_weight + 1)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, stride):
        i = start + tl.arange(0, BLOCK)
        mask = i < n
        g = tl.load(gradient + i, mask=mask).to(tl.float32)
        m = tl.load(exp_avg + i, mask=mask).to(tl.float32)
        v = tl.load(exp_avg_sq + i, mask=mask).to(tl.float32)
        w = tl.load(weight + i, mask=mask).to(tl.float32)
        g *= clip
        if DECAY == "coupled":
            g += decay * w
        if DECAY == "decoupled":
            w -= lr_decay * w
        m = _average(m, g, share1, IS_LONG1)
        v = _average(v, g * g, share2, IS_LONG2)
        w -= tl.div_rn(size * m, tl.sqrt_rn(v) * root + eps)
        tl.store(exp_avg + i, m, mask=mask)
        tl.store(exp_avg_sq + i, v, mask=mask)
        tl.store(weight + i, w, mask=mask)


@triton.jit
def _adam_kernel(
    factors,
    w_a,
    g_a,
    m_a,
    v_a,
    w_b,
    g_b,
    m_b,
    v_b,
    w_c,
    g_c,
    m_c,
    v_c,
    w_d,
    g_d,
    m_d,
    v_d,
    share1,
    share2,
    eps,
    decay,
    n_a,
    n_b,
    n_c,
    n_d,
    IS_LONG1: tl.constexpr,
    IS_LONG2: tl.constexpr,
    DECAY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _step_of(
        w_a, g_a, m_a, v_a, n_a, factors, factors + 2,
        share1, share2, eps, decay, IS_LONG1, IS_LONG2, DECAY, BLOCK,
    )  # fmt: skip
    _step_of(
        w_b, g_b, m_b, v_b, n_b, factors, factors + 4,
        share1, share2, eps, decay, IS_LONG1, IS_LONG2, DECAY, BLOCK,
    )  # fmt: skip
    _step_of(
        w_c, g_c, m_c, v_c, n_c, factors, factors + 6,
        share1, share2, eps, decay, IS_LONG1, IS_LONG2, DECAY, BLOCK,
    )  # fmt: skip
    _step_of(
        w_d, g_d, m_d, v_d, n_d, factors, factors + 8,
        share1, share2, eps, decay, IS_LONG1, IS_LONG2, DECAY, BLOCK,
    )  # fmt: skip


# One H200, 302 million weights, ms, by a script that is not kept. Adam, whose bytes take 1.99:
# blocks of 2048 take 2.25 with evict_first on all but the weight, 2.08 with it on the weight too,
# and 2.08 without it. Blocks of 1024 take 2.12 and of 512 2.11, both with it on all but the weight.
# Where a program walks several blocks it is 2.25 to 2.38. The squares, whose bytes take 0.28: 0.27
# to 0.29 with blocks of 2048 to 8192 and 1024 to 2048 programs. As they stand, blocks of 1024
# without a hint, Adam and the squares take 2.29. torch takes 0.44 for the norm and 3.06 for Adam.
MOST_WEIGHTS = 4  # as many as an SAE has
BLOCK = 1024
NUM_WARPS = 4
MOST_PROGRAMS = 2**31 - 1
SQUARES_BLOCK = 8192
SQUARES_NUM_WARPS = 8
MOST_SQUARES = 1024  # programs, and numbers that they leave
BEGIN_BLOCK = 1024


class Updated(NamedTuple):
    """A weight and what a step changes it by.

    Attributes:
        weight: contiguous, or the transpose of a contiguous matrix.
        gradient, exp_avg, exp_avg_sq: in the shape and strides of the weight.
        step: the number of steps before this one, a scalar, float32.
    """

    weight: torch.Tensor
    gradient: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: torch.Tensor


@dataclass(frozen=True)
class Adam:
    """Settings, in the words of `torch.optim.Adam`."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float = 0.0
    maximize: bool = False
    decoupled_weight_decay: bool = False


def squares(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return numbers whose sum is that of the squares of all elements, [n], float32.

    They are the same from run to run. Squares that float32 does not hold are infinite, as in
    `torch.nn.utils.get_total_norm`.

    Args:
        gradients: at most MOST_WEIGHTS, each contiguous or the transpose of a contiguous matrix.
    """
    sizes = [gradient.numel() for gradient in gradients]
    n_absent = MOST_WEIGHTS - len(gradients)
    n_programs = max(1, min(MOST_SQUARES, cdiv(max(sizes), SQUARES_BLOCK)))
    out = gradients[0].new_empty(n_programs, dtype=torch.float32)
    launch(
        _squares_kernel,
        (n_programs,),
        (out, *gradients, *(out,) * n_absent),
        (),
        (*sizes, *(0,) * n_absent),
        BLOCK=SQUARES_BLOCK,
        num_warps=SQUARES_NUM_WARPS,
    )
    return out


def adam_(
    updated: Sequence[Updated],
    squares: torch.Tensor,
    learning_rate: torch.Tensor,
    settings: Adam,
) -> None:
    """Take a step with gradients clipped to norm 1, all together. The gradients stay as they are.

    A norm that is infinite or not a number does to the weights what it does by
    `torch.nn.utils.clip_grad_norm_`.

    Args:
        updated: at most MOST_WEIGHTS, of one device; weights, moments and steps are changed.
        squares: numbers whose sum is the squared norm of all gradients, [n], float32.
        learning_rate: a scalar, float32.
        settings: Adam's.

    Raises:
        ValueError: for a tensor in another layout than its weight.
    """
    for each in updated:
        _check_layout(each)
    n_absent = MOST_WEIGHTS - len(updated)
    sizes = [each.weight.numel() for each in updated]
    factors = squares.new_empty(2 + 2 * MOST_WEIGHTS)
    log_betas = [math.log(beta) if beta > 0 else -math.inf for beta in settings.betas]
    launch(
        _begin_kernel,
        (1,),
        (factors, squares, learning_rate, *(each.step for each in updated), *(factors,) * n_absent),
        (*log_betas, settings.weight_decay),
        (len(squares),),
        N_WEIGHTS=len(updated),
        MAXIMIZE=settings.maximize,
        BLOCK=BEGIN_BLOCK,
    )
    beta1, beta2 = settings.betas
    shares = min(beta1, 1 - beta1), min(beta2, 1 - beta2)
    decay = "decoupled" if settings.decoupled_weight_decay else "coupled"
    launch(
        _adam_kernel,
        (max(1, min(MOST_PROGRAMS, cdiv(max(sizes), BLOCK))),),
        (factors, *(t for each in updated for t in each[:4]), *(factors,) * (4 * n_absent)),
        (*shares, settings.eps, settings.weight_decay),
        (*sizes, *(0,) * n_absent),
        IS_LONG1=beta1 >= 0.5,
        IS_LONG2=beta2 >= 0.5,
        DECAY=decay if settings.weight_decay != 0 else "none",
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )


def _check_layout(updated: Updated) -> None:
    """Raise a ValueError unless all have the same order in memory, without gaps."""
    weight = updated.weight
    for name, tensor in zip(updated._fields[1:4], updated[1:4], strict=True):
        if tensor.shape != weight.shape or _steps_in_memory(tensor) != _steps_in_memory(weight):
            raise ValueError(
                f"{name} has shape {list(tensor.shape)} and strides {tensor.stride()}, expected "
                f"those of its weight, {list(weight.shape)} and {weight.stride()}"
            )
    if not (weight.is_contiguous() or (weight.ndim == 2 and weight.T.is_contiguous())):
        raise ValueError(
            f"weight has shape {list(weight.shape)} and strides {weight.stride()}, expected a "
            "contiguous tensor or the transpose of one"
        )


def _steps_in_memory(tensor: torch.Tensor) -> list[int]:
    """Return the strides that are ever taken."""
    each = zip(tensor.shape, tensor.stride(), strict=True)
    return [stride for size, stride in each if size > 1 and tensor.numel() > 0]
