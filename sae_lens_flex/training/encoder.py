"""What the two losses of a step share of the encoder."""

import torch

from ..ops.policy import in_dtype
from .requests import Spec


def encoder_rows(x: torch.Tensor, b_dec: torch.Tensor, spec: Spec) -> torch.Tensor:
    """Return what is multiplied with W_enc, [B, D], contiguous, in the dtype of the product."""
    centered = x - b_dec if spec.apply_b_dec_to_input else x
    return in_dtype(centered, spec.product_dtype).contiguous()


def minus_product(
    grad_b_dec: torch.Tensor, W_enc: torch.Tensor, grad_b_enc: torch.Tensor
) -> torch.Tensor:
    """Return grad_b_dec - W_enc @ grad_b_enc, [D], for W_enc of shape [D, F]."""
    if W_enc.dtype == grad_b_enc.dtype:
        return torch.addmv(grad_b_dec, W_enc, grad_b_enc, alpha=-1)
    return grad_b_dec - W_enc @ grad_b_enc.to(W_enc.dtype)
