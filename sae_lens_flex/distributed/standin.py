from typing import Any

import torch
import torch.distributed as dist
from sae_lens.saes.sae import TrainStepInput
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

PLACEMENTS = {"W_enc": Shard(1), "b_enc": Shard(0), "W_dec": Shard(1), "b_dec": Replicate()}
_classes: dict[type, type] = {}


class _Sharded:
    def _weights(self):
        from ..training.requests import Weights

        return Weights(
            *(getattr(self, n).full_tensor() for n in ("W_enc", "b_enc", "W_dec", "b_dec"))
        )

    def initialize_weights(self):
        pass

    def training_forward_pass(self, step_input):
        size = self._mesh.size()
        group = self._mesh.get_group()
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(size)]
        dist.all_gather(sizes, torch.tensor([len(step_input.sae_in)]), group=group)
        sizes = [int(s) for s in sizes]
        x = step_input.sae_in
        padded = torch.cat((x, x.new_zeros(max(sizes) - len(x), x.shape[1])))
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        whole = torch.cat([p[:n] for p, n in zip(parts, sizes)])
        full = TrainStepInput(
            sae_in=whole,
            dead_neuron_mask=step_input.dead_neuron_mask,
            coefficients=step_input.coefficients,
            n_training_steps=step_input.n_training_steps,
            is_logging_step=step_input.is_logging_step,
        )
        own = unshard(self)
        names = ("W_enc", "b_enc", "W_dec", "b_dec")
        for n in names:
            del own._parameters[n]
            setattr(own, n, getattr(self, n).full_tensor())
        out = type(own).training_forward_pass(own, full)
        rank = self._mesh.get_local_rank()
        start = sum(sizes[:rank])
        out.sae_in = x
        out.sae_out = out.sae_out[start : start + len(x)]
        return out

    def load_weights_from_checkpoint(self, path):
        from safetensors.torch import load_file
        from pathlib import Path

        sd = load_file(Path(path) / "sae_weights.safetensors")
        self.process_state_dict_for_loading(sd)
        for n, p in PLACEMENTS.items():
            getattr(self, n).data.copy_(distribute_tensor(sd[n], self._mesh, [p]))

    def log_histograms(self):
        return {"weights/W_dec_norms": self.W_dec.full_tensor().detach().norm(dim=1).cpu().numpy()}


def shard(sae: Any, mesh: Any) -> Any:
    cls = type(sae)
    if cls not in _classes:
        _classes[cls] = type(f"Sharded{cls.__name__}", (_Sharded, cls), {})
    weights = {n: getattr(sae, n).data for n in PLACEMENTS}
    out = _classes[cls](sae.cfg)
    out._mesh = mesh
    for n, _ in sae.named_parameters():
        p = PLACEMENTS[n]
        d = distribute_tensor(weights[n], mesh, [p], src_data_rank=None)
        out._parameters[n] = nn.Parameter(d)
    return out


def unshard(sae: Any) -> Any:
    cls = type(sae).__mro__[2]
    out = cls(sae.cfg)
    with torch.no_grad():
        for n in PLACEMENTS:
            getattr(out, n).copy_(getattr(sae, n).full_tensor())
    return out
