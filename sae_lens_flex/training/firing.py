"""The latents that a step kept, in the form in which SAELens's trainer counts them."""

from typing import Any

import torch

from ..ops.codes import Code


def feature_acts(
    code: Code, n_latents: int, *, is_sparse: bool, at: torch.Tensor | None = None
) -> torch.Tensor:
    """Return a code as a [B, F] tensor.

    Args:
        code: latents and activations.
        n_latents: F.
        is_sparse: whether to return a sparse COO tensor where the device has them; elsewhere, as on
            MPS, a dense one.
        at: the `coordinates` of the code where they are at hand. The sparse tensor keeps them.
    """
    shape = (code.n_samples, n_latents)
    if is_sparse and code.latents.device.type in ("cpu", "cuda"):
        at = coordinates(code) if at is None else at
        return SparseActs.of(at, code.values.flatten(), shape)
    acts = code.values.new_zeros(shape)
    if code.starts is None:
        return acts.scatter_(-1, code.latents, code.values)
    # Pairs of no sample, of value 0, share a place with another one.
    return acts.index_put_((code.samples(), code.latents), code.values, accumulate=True)


def fired(code: Code, n_latents: int) -> torch.Tensor:
    """Return on how many samples each latent has a positive activation, [F], float32.

    Args:
        code: latents and pre-activations, [B, K] each.
        n_latents: F.
    """
    # As in SAELens a pre-activation that is not a number counts.
    has_fired = (code.values.relu() != 0).flatten().float()
    return has_fired.new_zeros(n_latents).index_add_(0, code.latents.flatten(), has_fired)


def coordinates(code: Code) -> torch.Tensor:
    """Return sample and latent of each pair, [2, n]."""
    if code.starts is not None:
        return torch.stack((code.samples(), code.latents))
    samples = torch.arange(code.n_samples, device=code.latents.device).unsqueeze(-1)
    return torch.stack((samples.expand_as(code.latents), code.latents)).flatten(1)


class SparseActs(torch.Tensor):
    """
    A sparse COO tensor, [batch, d_sae], whose sum over the batch is a dense tensor.

    The trainer counts firing by two such sums a step. PyTorch's own result is sparse: to make it,
    it sorts all coordinates and waits for the device.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.sum and (*args[1:], *kwargs.values()) in ((0,), (-2,)):
                values = args[0]._values()
                if values.is_floating_point():
                    # In 16 bits a sum of ones would stop at 256 or 2048.
                    dtype = torch.promote_types(values.dtype, torch.float32)
                    sums = values.new_zeros(args[0].shape[1], dtype=dtype)
                    sums.index_add_(0, args[0]._indices()[1], values.to(dtype))
                    return sums.to(values.dtype)
            if func in (torch.Tensor.bool, torch.Tensor.float) and len(args) == 1 and not kwargs:
                acts = args[0]  # The result shares its indices.
                return cls.of(acts._indices(), func(acts._values()), acts.shape)
            return func(*args, **kwargs)

    @classmethod
    def of(
        cls, indices: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]
    ) -> torch.Tensor:
        """Return the tensor of `shape` with `values`, [n], at `indices`, [2, n]."""
        acts = torch.sparse_coo_tensor(indices, values, shape, check_invariants=False)
        return torch.Tensor._make_subclass(cls, acts)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().__reduce_ex__(protocol)  # An ordinary tensor is copied and saved.

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.detach().clone()
