"""What a sharded SAE is besides its steps: made, made whole again, saved, refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sae_lens.saes.sae import TrainStepInput
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import sae_lens_flex
from sae_lens_flex.saes import sharded
from sae_lens_flex.saes.registration import TRAINING_CLASSES

from .ranks import Ranks
from .steps import NAMES, Case, forward, whole

CASE = Case(n_samples=6)


def step_input(x: torch.Tensor, **changes: Any) -> TrainStepInput:
    settings = {
        "coefficients": {},
        "dead_neuron_mask": None,
        "n_training_steps": 0,
        "is_logging_step": False,
    }
    return TrainStepInput(sae_in=x, **{**settings, **changes})


def message(function: Any, *arguments: Any, **options: Any) -> str:
    """Return the error that a call raises."""
    try:
        function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def samples(n: int = 2) -> torch.Tensor:
    return torch.randn(n, CASE.d_in, dtype=torch.float64)


# --- what the ranks run


def parts_and_whole() -> dict[str, Any]:
    sae = CASE.sae()
    sae.b_enc.requires_grad_(False)
    if dist.get_rank() > 0:  # whose weights do not matter
        for name, weight in list(sae.named_parameters()):
            empty = torch.nn.Parameter(weight.to("meta"), requires_grad=weight.requires_grad)
            setattr(sae, name, empty)
    sharded: Any = sae_lens_flex.shard(sae, init_device_mesh("cpu", (dist.get_world_size(),)))
    assert sharded is sae
    again = sae_lens_flex.unshard(sharded)
    nothing = sae_lens_flex.unshard(sharded, keep=dist.get_rank() == 0)
    assert (nothing is None) == (dist.get_rank() > 0)
    x = samples()
    return {
        "type": type(again).__name__,
        "training": type(sharded).__name__,
        "config": again.cfg.to_dict() == CASE.sae().cfg.to_dict(),
        "weights": {name: getattr(again, name).detach() for name in NAMES},
        "DTensors": all(isinstance(weight, DTensor) for weight in sharded.parameters()),
        "elements": sum(weight.to_local().numel() for weight in sharded.parameters()),
        "latent major": sharded.W_enc.to_local().T.is_contiguous(),
        "requires_grad": [getattr(again, name).requires_grad for name in NAMES],
        "encodes": torch.equal(again.encode(x), CASE.sae().encode(x)),
        "budget": again.budget,
        "histogram": sharded.log_histograms()["weights/W_dec_norms"],
    }


def drawn(device: str) -> dict[str, Any]:
    """Return an SAE that was drawn in parts, and whether the generator was left as it has to be."""
    sharded.PIECE_BYTES = 5 * 40  # five latents
    torch.manual_seed(3 if dist.get_rank() == 0 else 8)
    before = torch.get_rng_state()
    sae = sae_lens_flex.shard(new_sae(device))
    weights = {name: getattr(sae_lens_flex.unshard(sae), name).detach() for name in NAMES}
    after = torch.get_rng_state()
    return {"weights": weights, "device": str(sae.device), "drew": not torch.equal(before, after)}


def new_sae(device: str) -> Any:
    sae_class, config_class = TRAINING_CLASSES["hierarchical_topk"]
    return sae_class(config_class(d_in=10, d_sae=37, k=5, device=device))


def own_weights() -> str:
    sae = new_sae("meta")
    sae.initialize_weights = lambda: None
    return message(sae_lens_flex.shard, sae)


def folded() -> dict[str, torch.Tensor]:
    sae: Any = sae_lens_flex.shard(CASE.sae())
    sae.fold_activation_norm_scaling_factor(3.0)
    return {name: getattr(sae_lens_flex.unshard(sae), name).detach() for name in NAMES}


def refusals() -> dict[str, str]:
    rank = dist.get_rank()
    found = {
        "type": message(sae_lens_flex.shard, torch.nn.Linear(2, 2)),
        "whole": message(sae_lens_flex.unshard, CASE.sae()),
        "few latents": message(sae_lens_flex.shard, Case(d_sae=1, k=1).sae()),
        "config": message(sae_lens_flex.shard, Case(k=5 - (rank == 1)).sae()),
    }
    found["no mesh"] = message(sae_lens_flex.shard, CASE.sae(), "cpu")
    found["no cfg"] = message(sae_lens_flex.ShardedTrainingRunner, None)
    plane = init_device_mesh("cpu", (1, dist.get_world_size()))
    found["mesh"] = message(sae_lens_flex.shard, CASE.sae(), plane)
    hooked: Any = CASE.sae()
    if rank == 1:
        hooked.hook_sae_acts_post.add_hook(lambda acts, hook: acts)
    found["hooked"] = message(sae_lens_flex.shard, hooked)
    sae: Any = sae_lens_flex.shard(CASE.sae())
    found["twice"] = message(sae_lens_flex.shard, sae)
    found["from_topk"] = message(sae_lens_flex.from_topk, sae)
    found["export_topk"] = message(sae_lens_flex.export_topk, sae, "nowhere", budget=1)
    x, step = samples(), sae.training_forward_pass
    for name in ("encode", "decode", "forward", "save_model", "fold_W_dec_norm"):
        found[name] = message(getattr(sae, name), x)
    found["deepcopy"] = message(copy.deepcopy, sae)
    found["load"] = message(sae.load_state_dict, {"b_dec": torch.zeros(CASE.d_in)})
    found["gradient"] = message(step, step_input(x.clone().requires_grad_()))
    found["complex on rank 1"] = message(step, step_input(x + 1j if rank == 1 else x))
    found["width of rank 1"] = message(step, step_input(x[:, rank == 1 :]))
    found["no samples"] = message(step, step_input(x[:0] if rank == 1 else x))
    found["logging"] = message(step, step_input(x, is_logging_step=rank == 1))
    mask = torch.zeros(CASE.d_sae, dtype=torch.bool)
    mask[rank] = True
    found["mask"] = message(step, step_input(x, dead_neuron_mask=mask))
    found["one mask"] = message(step, step_input(x, dead_neuron_mask=mask if rank == 1 else None))
    sae.mse_loss_fn = lambda *_: None
    found["replaced"] = message(step, step_input(x))
    del sae.mse_loss_fn
    return found


def unlogged() -> dict[str, Any]:
    sae: Any = sae_lens_flex.shard(CASE.sae())
    output = forward(CASE, sae, samples(1 + dist.get_rank()), is_logging_step=False)
    with torch.no_grad():
        evaluated = sae.training_forward_pass(step_input(samples()))
    return {
        "sae_out": output.sae_out,
        "metrics": output.metrics,
        "requires_grad": evaluated.loss.requires_grad,
    }


def compiled() -> bool:
    sae: Any = sae_lens_flex.shard(CASE.sae())
    x = samples()
    loss = forward(CASE, sae, x).loss
    sae.training_forward_pass = torch.compile(sae.training_forward_pass)  # as `compile_sae` does
    ordinary = sae_lens_flex.unshard(sae)
    forward(CASE, ordinary, x)
    return torch.equal(forward(CASE, sae, x).loss, loss)


def second_backward() -> bool:
    case = Case(n_samples=6, n_dead=9)
    sae: Any = sae_lens_flex.shard(case.sae())
    x = torch.randn(2, case.d_in, dtype=torch.float64)
    output = sae.training_forward_pass(step_input(x, dead_neuron_mask=case.mask()))
    output.losses["mse_loss"].backward(retain_graph=True)
    output.losses["auxiliary_reconstruction_loss"].backward(retain_graph=True)
    first = {name: whole(getattr(sae, name).grad).clone() for name in NAMES}
    sae.zero_grad()
    output.loss.backward()
    return all(
        torch.allclose(whole(getattr(sae, name).grad), first[name], rtol=1e-12) for name in NAMES
    )


def trained(steps: int = 3) -> tuple[Any, Any]:
    sae: Any = sae_lens_flex.shard(CASE.sae())
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(2, CASE.d_in, dtype=torch.float64, generator=generator)
        forward(CASE, sae, x)
        optimizer.step()
    return sae, optimizer


def state_of(sae: Any, optimizer: Any) -> dict[str, Any]:
    moments = {
        f"{name}.{moment}": optimizer.state[getattr(sae, name)][moment]
        for name in NAMES
        for moment in ("exp_avg", "exp_avg_sq")
    }
    return {**sae.state_dict(), **moments}


def save(directory: Path) -> dict[str, torch.Tensor]:
    sae, optimizer = trained()
    state = state_of(sae, optimizer)
    save_distributed(state, checkpoint_id=directory / "dcp")
    ordinary = sae_lens_flex.unshard(sae)
    if dist.get_rank() == 0:
        ordinary.save_model(directory / "sae")
    dist.barrier()
    return {name: whole(value.detach()) for name, value in state.items()}


def load(directory: Path) -> dict[str, torch.Tensor]:
    sae, optimizer = trained(steps=1)
    state = state_of(sae, optimizer)
    load_distributed(state, checkpoint_id=directory / "dcp")
    sae.load_state_dict({name: state[name] for name in NAMES})
    return {name: whole(value.detach()) for name, value in state_of(sae, optimizer).items()}


def load_file(directory: Path) -> dict[str, torch.Tensor]:
    sae, _ = trained(steps=0)
    sae.load_weights_from_checkpoint(directory / "sae")
    return {name: whole(getattr(sae, name).detach()) for name in NAMES}


# --- tests


def test_each_rank_holds_its_part_of_rank_0s_weights(ranks: Ranks) -> None:
    original = CASE.sae()
    found = ranks.call(parts_and_whole)
    for each in found:
        assert each["type"] == "HierarchicalTopKTrainingSAE"
        assert each["training"] == "ShardedHierarchicalTopKTrainingSAE"
        assert each["config"]
        assert each["DTensors"]
        assert each["latent major"]
        assert each["requires_grad"] == [True, False, True, True]
        assert each["encodes"]
        assert each["budget"] == CASE.k
        for name, weight in each["weights"].items():
            assert torch.equal(weight, getattr(original, name))
        expected = original.log_histograms()["weights/W_dec_norms"]
        assert each["histogram"] == pytest.approx(expected, rel=1e-6)
    n_weights = sum(weight.numel() for weight in original.parameters())
    elements = [each["elements"] for each in found]
    assert sum(elements) == n_weights + (ranks.size - 1) * CASE.d_in
    assert max(elements) < 1.2 * n_weights / ranks.size


def test_weights_without_memory_are_drawn_as_the_whole_would_be(ranks: Ranks) -> None:
    torch.manual_seed(3)
    expected = new_sae("cpu")
    for rank, each in enumerate(ranks.call(drawn, "meta")):
        assert each["device"] == "cpu"
        assert each["drew"] == (rank == 0)
        for name, weight in expected.named_parameters():
            assert torch.equal(each["weights"][name], weight), name
    for error in ranks.call(own_weights):
        assert error.startswith("NotImplementedError: initialize_weights is not SAELens's own")


def test_a_scaling_factor_is_folded_in(ranks: Ranks) -> None:
    expected = CASE.sae()
    expected.fold_activation_norm_scaling_factor(3.0)
    for each in ranks.call(folded):
        for name, weight in each.items():
            assert torch.equal(weight, getattr(expected, name))


def test_what_cannot_work_is_refused_on_every_rank(ranks: Ranks) -> None:
    found = ranks.call(refusals)
    expected = {
        "type": "TypeError: sae is a Linear, expected a flex_topk or hierarchical_topk",
        "whole": "TypeError: sae is a HierarchicalTopKTrainingSAE, expected one that `shard` made",
        "from_topk": "TypeError: sae lies in parts in several processes: call",
        "export_topk": "TypeError: sae lies in parts in several processes: call",
        "few latents": "ValueError: d_sae is 1, which leaves one of",
        "config": "ValueError: ranks differ, expected the same on all: k is 5 on rank 0, 4 on",
        "mesh": "ValueError: mesh has 2 dimensions, expected 1",
        "twice": "TypeError: sae has been sharded already",
        "encode": "NotImplementedError: encode needs the whole SAE",
        "decode": "NotImplementedError: decode needs the whole SAE",
        "forward": "NotImplementedError: forward needs the whole SAE",
        "save_model": "NotImplementedError: save_model needs the whole SAE",
        "fold_W_dec_norm": "NotImplementedError: fold_W_dec_norm needs the whole SAE",
        "deepcopy": "TypeError: a sharded SAE cannot be copied",
        "load": "TypeError: b_dec is a Tensor, expected a DTensor",
        "no mesh": "TypeError: mesh is a str, expected a DeviceMesh or None",
        "no cfg": "TypeError: cfg is a NoneType, expected a LanguageModelSAERunnerConfig",
        "gradient": "NotImplementedError: sae_in requires a gradient",
        "logging": "ValueError: ranks differ, expected the same on all: is_logging_step is False",
        "mask": "ValueError: ranks differ, expected the same on all: dead_neuron_mask is ",
        "one mask": "expected the same on all: dead_neuron_mask is 'None' on rank 0",
        "replaced": "NotImplementedError: a step of several processes calls SAELens's own methods "
        "alone, but mse_loss_fn is not SAELens's own",
    }
    on_rank_1 = {
        "hooked": "NotImplementedError: an SAE of several processes calls SAELens's own methods "
        "alone, but hook_sae_acts_post has hooks",
        "complex on rank 1": "TypeError: sae_in has dtype torch.complex",
        "width of rank 1": "ValueError: sae_in has shape [2, 14], expected [batch, 15]",
        "no samples": "ValueError: sae_in has shape [0, 15], expected [batch, 15]",
    }
    for rank, each in enumerate(found):
        for name, text in expected.items():
            assert text in each[name], name
        for name, text in on_rank_1.items():
            prefix = "" if rank == 1 else "RuntimeError: rank 1 raised "
            assert each[name].startswith(prefix + text), name
        assert each.keys() == expected.keys() | on_rank_1.keys()


def test_sae_out_of_a_step_that_is_not_logged_is_nan(ranks: Ranks) -> None:
    for rank, each in enumerate(ranks.call(unlogged)):
        assert each["sae_out"].shape == (1 + rank, CASE.d_in)
        assert each["sae_out"].isnan().all()
        assert each["metrics"] == {}
        assert not each["requires_grad"]


def test_steps_can_be_compiled(two_ranks: Ranks) -> None:
    assert all(two_ranks.call(compiled))


def test_losses_are_differentiated_apart_and_again(ranks: Ranks) -> None:
    assert all(ranks.call(second_backward))


def test_checkpoints_load_on_another_number_of_ranks(
    ranks: Ranks, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    saved = ranks.call(save, tmp_path)[0]
    others = Ranks(5 - ranks.size, tmp_path_factory.mktemp("others"))
    try:
        for each in others.call(load, tmp_path):
            for name, value in saved.items():
                assert torch.equal(each[name], value), name
        for each in others.call(load_file, tmp_path):
            for name, value in each.items():
                assert torch.equal(value, saved[name]), name
    finally:
        others.close()
