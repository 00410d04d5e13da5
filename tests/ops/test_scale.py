"""Gradients times a factor on the device, against float64."""

import pytest
import torch

from sae_lens_flex.ops.kernels.scale import BLOCK, scale_in_place

from .comparison import KERNEL_DEVICES, TOLERANCE, relative_error

ROUNDING = {**TOLERANCE, torch.float64: 1e-15}


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("factor", [1.0, 1.5, -1 / 3])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_gradients_of_every_dtype_are_scaled_in_it(dtype, factor, device) -> None:
    sizes = [1, 5, 3, BLOCK + 7, 2]  # more than a launch takes, and more than a program
    originals = [torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes]
    gradients = [original.to(device, copy=True) for original in originals]
    scale_dtype = torch.promote_types(dtype, torch.float32)
    scale_in_place(gradients, torch.tensor(factor, dtype=scale_dtype, device=device))
    for gradient, original in zip(gradients, originals, strict=True):
        assert gradient.dtype == dtype
        is_cut_off = dtype == torch.bfloat16 and device == "cpu"  # by Triton's interpreter
        tolerance = ROUNDING[dtype] + (2**-8 if is_cut_off else 0)
        assert relative_error(gradient.cpu(), factor * original.double()) <= tolerance
