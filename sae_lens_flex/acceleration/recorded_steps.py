"""When a step of SAELens's trainer is taken as a whole, and how.

The step of a small SAE is recorded and replayed. The step of a large SAE is launched piece by
piece, because the host is done with it before the device is.

Whatever a user may have changed that the whole step would pass by makes the step an ordinary one.
"""

from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer

from ..ops.kernels.adam import Adam
from ..ops.kernels.launch import cdiv
from ..saes.fused_topk import FusedTopKTrainingSAE, StepRequest
from ..saes.sharded import ShardedTrainingSAE
from ..training.graph import Recorder, place
from ..training.node import Losses
from ..training.requests import Weights
from ..training.shards import local_part
from .adam import FusedAdam, are_same, is_unseen_after, is_unseen_before
from .dead_bound import DeadBound
from .whole_step import Moments, Settings, Trained, whole_step

OWN_STEPS = (
    FusedTopKTrainingSAE.training_forward_pass,
    ShardedTrainingSAE.training_forward_pass,
)
LEAST_CAPACITY = 256  # of steps with an auxiliary loss, in dead latents

# The recorders of steps in which several processes exchange tensors. They are kept here so that
# their recordings can be freed: while one exists NCCL does not end the group of processes, and
# `destroy_process_group` would wait for ever.
_of_several: WeakSet[Recorder] = WeakSet()

_steps: WeakKeyDictionary[SAETrainer[Any, Any], "RecordedSteps"] = WeakKeyDictionary()


def forget_recordings_of_several() -> None:
    """Free the recordings that hold exchanges between processes."""
    for recorder in list(_of_several):
        recorder.forget()


class RecordedSteps:
    """The whole steps of one trainer."""

    @classmethod
    def of(cls, trainer: SAETrainer[Any, Any]) -> "RecordedSteps":
        """Return a trainer's; it has the same ones in every step."""
        steps = _steps.get(trainer)
        if steps is None:
            steps = _steps[trainer] = cls()
        return steps

    def __init__(self) -> None:
        self._bound = DeadBound()
        self._n_dead = 0
        self._capacity = 0
        self._learning_rate: torch.Tensor | None = None
        self._filled_with = float("nan")

    def most_dead(self, trainer: SAETrainer[Any, Any], sae: FusedTopKTrainingSAE) -> int:
        """Return for how many dead latents a step that begins is taken, 0 for none.

        Of an SAE in several processes it is the number for each of them.
        """
        if sae._auxiliary_coefficient() == 0:
            return 0
        since_fired = trainer.n_forward_passes_since_fired
        parts = sae._shards.latents_of_all(len(since_fired))
        self._n_dead = self._bound.at_step(since_fired, trainer.cfg.dead_feature_window, parts)
        return self._capacity_for(self._n_dead, len(since_fired))

    def take(
        self, trainer: SAETrainer[Any, Any], request: StepRequest, most_dead: int
    ) -> TrainStepOutput | None:
        """Take a step, statistics and all; None where it has to be an ordinary one.

        Args:
            trainer: one that `may_take_whole_steps`.
            request: what its SAE made of the activations.
            most_dead: what `most_dead` returned at this step.
        """
        sae, optimizer, shards = trainer.sae, trainer.optimizer, request.shards
        # All dead latents may be of one width, so the loss of every width is of so many. That is
        # several times the work of one loss.
        is_for_small_ones = most_dead > 0 and sae._auxiliary_by_width()
        # The SAE's recorder, so that it does not keep a recording of its own beside this one.
        recorder = sae._recorder_of(request, is_whole=not is_for_small_ones)
        since_fired = trainer.n_forward_passes_since_fired
        if any(request.wanted[4:]):
            return None
        if recorder is None and not shards.is_sharded:
            if is_for_small_ones or not is_worth_launching(sae, request):
                return None
            if most_dead > 0:
                # In a window of a few steps nothing is known of how many latents are dead.
                if self._n_dead == len(since_fired):
                    return None
                # Without a recording another number costs nothing, so it is closer to the bound.
                most_dead = LEAST_CAPACITY * cdiv(self._n_dead, LEAST_CAPACITY)
                most_dead = min(most_dead, len(since_fired))
        (group,) = optimizer.param_groups
        moments = _moments(optimizer, request, sae)
        if moments is None:
            return None
        settings = Settings(
            adam=Adam(
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                maximize=group["maximize"],
                decoupled_weight_decay=group["decoupled_weight_decay"],
            ),
            dead_feature_window=trainer.cfg.dead_feature_window,
            aux_loss_coefficient=sae._auxiliary_coefficient(),
            aux_loss_by_width=sae._auxiliary_by_width(),
            threshold_lr=0.0 if (threshold := sae._threshold()) is None else threshold.lr,
        )
        learning_rate = self._learning_rate_on(since_fired.device, group["lr"])
        moved = [] if threshold is None else [threshold.value]
        trained = Trained(request.weights, moments, since_fired, learning_rate, *moved)
        spec, wanted = request.spec, request.wanted
        tensors = [*trained.weights, since_fired, learning_rate, *moved]
        for each in moments:
            tensors += each or ()
        arguments = spec, wanted, settings, most_dead
        if request.is_logging_step or recorder is None:
            # Metrics are of the weights before the step, so a step that logs is not replayed.
            reports = []
            result = whole_step(
                trained,
                request.inputs,
                *arguments,
                shards=shards,
                before_update=lambda main, at: reports.append(sae._reported(request, main, at)),
            )
            (reported,), losses = reports, result.losses
        else:
            if shards.is_sharded:
                _of_several.add(recorder)
            result, is_replay = recorder(
                lambda inputs: whole_step(trained, inputs, *arguments, shards=shards),
                request.inputs,
                (whole_step, *map(place, tensors), spec, wanted, settings, shards),
                form=most_dead,
            )
            main, losses, at = result.main, result.losses, result.at
            if is_replay:
                main = main._replace(hidden_pre=main.hidden_pre.clone())
                losses, at = losses.clone(), at.clone()
            reported = sae._reported(request, main, at)
        written = [w for w, each in zip(parameters(sae), moments, strict=True) if each is not None]
        torch.autograd.graph.increment_version([*written, since_fired, *moved])
        self._bound.after_step()
        trainer.act_freq_scores += result.counts
        trainer.n_frac_active_samples += trainer.cfg.train_batch_size_samples
        total, mse, auxiliary, *of_widths = losses.unbind()
        return sae._output(reported, Losses(total, mse, auxiliary, tuple(of_widths)))

    def after_step(self) -> None:
        """Take note that an ordinary step has counted what fired."""
        self._bound.after_step()

    def _learning_rate_on(self, device: torch.device, value: float) -> torch.Tensor:
        tensor = self._learning_rate
        if tensor is None or tensor.device != device:
            tensor = self._learning_rate = torch.empty((), dtype=torch.float32, device=device)
            self._filled_with = float("nan")
        if value != self._filled_with:
            tensor.fill_(value)
            self._filled_with = value
        return tensor

    def _capacity_for(self, n_dead: int, n_latents: int) -> int:
        """Return for how many dead latents a step is recorded: at least `n_dead`, or 0 for none.

        The same number serves until it is too small, or twice too large: another one takes another
        recording. It is at most an eighth too large at first, because the loss on dead latents
        takes time in proportion to it, and a quarter more once it was too small.
        """
        if n_dead == 0:
            return 0
        least = _rounded_up(n_dead)
        if not n_dead <= self._capacity <= 2 * least:
            has_grown = 0 < self._capacity < n_dead
            self._capacity = _rounded_up(n_dead + n_dead // 4) if has_grown else least
        return min(self._capacity, n_latents)


def _rounded_up(n: int) -> int:
    """Return the least number from n on that is some eighths of a power of two."""
    unit = max(LEAST_CAPACITY, 1 << max(0, n.bit_length() - 4))
    return unit * cdiv(n, unit)


def is_worth_launching(sae: FusedTopKTrainingSAE, request: StepRequest) -> bool:
    """Return whether a step that is not recorded is faster as a whole than as an ordinary one.

    Autograd is left out, the gradients are not written a second time, and nothing waits for the
    number of dead latents.
    """
    return request.weights.W_dec.is_cuda and sae._asks_nothing(request)


def parameters(sae: Any) -> Weights:
    """Return an SAE's weights as its optimizer has them, in several processes as DTensors."""
    return Weights(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)


def may_take_whole_steps(trainer: SAETrainer[Any, Any], sae: Any) -> bool:
    """Return whether nobody sees what a whole step does not do."""
    optimizer = trainer.optimizer
    return (
        isinstance(sae, FusedTopKTrainingSAE)
        and sae is trainer.sae
        and sae.use_cuda_graph
        and type(sae).training_forward_pass in OWN_STEPS
        and "training_forward_pass" not in vars(sae)
        and type(trainer).dead_neurons is SAETrainer.dead_neurons
        and _has_no_more_parameters(sae)
        and sae._learns_as_it_was_written()
        and sae.cfg.d_in > 1
        and torch.is_grad_enabled()
        and not torch.is_anomaly_enabled()
        and type(optimizer) is FusedAdam
        and is_unseen_before(optimizer)
        and is_unseen_after(optimizer)
        and _is_plain(optimizer, parameters(sae), sae._weights())
    )


def _has_no_more_parameters(sae: FusedTopKTrainingSAE) -> bool:
    return len(sae._parameters) == 4 and not any(
        module._parameters or module._modules for module in sae._modules.values() if module
    )


def _is_plain(optimizer: FusedAdam, weights: Weights, local: Weights) -> bool:
    """Return whether an optimizer is Adam of an SAE's weights, each without hooks or gradient.

    Args:
        weights: as the optimizer has them.
        local: what of them lies in this process.
    """
    if len(optimizer.param_groups) != 1:
        return False
    (group,) = optimizer.param_groups
    return (
        not (group["amsgrad"] or group["differentiable"] or group["foreach"])
        and not isinstance(group["lr"], torch.Tensor)
        and are_same(group["params"], weights)
        and all(
            weight.dtype == torch.float32
            and weight.grad is None
            and not weight._backward_hooks
            and not weight._post_accumulate_grad_hooks  # type: ignore[attr-defined]
            for weight in weights
        )
        # as the gradients are
        and all(each.is_contiguous() for each in local._replace(W_enc=local.W_enc.T))
    )


def _moments(
    optimizer: Any, request: StepRequest, sae: FusedTopKTrainingSAE
) -> tuple[Moments | None, ...] | None:
    """Return Adam's state of each weight, None for one without gradient; None if there is none."""
    moments = []
    each_weight = zip(parameters(sae), request.weights, request.wanted, strict=False)
    for parameter, weight, is_wanted in each_weight:
        if not is_wanted:
            moments.append(None)
            continue
        state = optimizer.state.get(parameter)
        if not state or "max_exp_avg_sq" in state:
            return None
        tensors = (state["exp_avg"], state["exp_avg_sq"], state["step"])
        moments.append(Moments(*map(local_part, tensors)))
        if any(each.stride() != weight.stride() for each in moments[-1][:2]):
            return None
    return tuple(moments)
