"""Keys: pre-activations as integers of the same order, for kernels that select."""

from .launch import tl, triton


@triton.jit
def sortable_key(values):
    """Map float32 to int32 so that the order stays; -0 equals 0, and NaN is the largest.

    No value has the smallest key, -(2**31).
    """
    bits = tl.where(values == 0.0, 0, values.to(tl.int32, bitcast=True))
    bits = tl.where(values != values, 2**31 - 1, bits)  # also where its sign is set
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def compared_key(products, bias, norms):
    """Return the keys of (products + bias) * norms; `norms` is None for 1."""
    values = products.to(tl.float32) + bias
    if norms is not None:
        values *= norms
    return sortable_key(values)
