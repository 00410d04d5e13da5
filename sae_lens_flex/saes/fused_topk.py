"""What the fused architectures share: the training step, seen from SAELens."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopK, TopKTrainingSAE
from typing_extensions import override

from ..ops.autograd import check_has_no_tangent
from ..ops.codes import Code
from ..ops.policy import (
    CHECKS_INDICES,
    accumulation_dtype,
    computes_by_triton,
    is_deterministic,
    product_dtype,
)
from ..ops.requests import Levels
from ..training.dead import Dead, counts_below_later, nonzero_later
from ..training.firing import feature_acts
from ..training.graph import Recorder, is_worth_recording, reconstruct_by
from ..training.node import Losses, attach_step
from ..training.requests import Inputs, Spec, WantedGradients, Weights
from ..training.shards import WHOLE, Whole
from ..training.step import Reconstruction, begin_step, finish_step
from ..training.threshold import Threshold
from .checks import (
    check_bool,
    check_config_class,
    check_number,
    check_real,
    warn_of_other_settings,
)
from .configs import SWITCHES, FusedTopKTrainingSAEConfig, check_auxiliary_loss
from .fused_path import METHODS, OF_SAMPLES, hooked, replaced
from .normalization import PER_SAMPLE, OutputMap, OwnNormalization, take_output_map


class StepRequest(NamedTuple):
    """A fused step to compute.

    Attributes:
        x: this process's activations, [B_r, d_in].
        weights, inputs, spec, wanted, shards: as in `training.step.step`.
        output_map: how the output undoes the normalization of the input.
        is_logging_step: whether metrics are wanted.
    """

    x: torch.Tensor
    weights: Weights
    inputs: Inputs
    spec: Spec
    wanted: WantedGradients
    shards: Whole
    output_map: OutputMap
    is_logging_step: bool


class FusedTopKTrainingSAE(OwnNormalization, TopKTrainingSAE):
    """
    SAELens's TopK training SAE, whose step is one function of tensors: `training.step.step`.

    Of a fused step's `TrainStepOutput`, `loss` and each entry of `losses` carry gradients. They are
    SAELens's, whether the losses are summed, weighted apart or differentiated one after the other.
    `sae_out`, `feature_acts` and `hidden_pre` carry none, and `hidden_pre` holds the
    pre-activations of the kept latents alone, [batch, k], in descending order (SAELens reads none).

    What needs more takes the unfused path: there all of them carry gradients, `hidden_pre` and
    `feature_acts` are dense, and speed and memory are SAELens's. A step takes it by itself

    - where one of `encode_with_hidden_pre`, `decode`, `process_sae_in`, `calculate_aux_loss`,
      `calculate_topk_aux_loss`, `activation_fn`, `mse_loss_fn`, `reshape_fn_in`, `reshape_fn_out`,
      `run_time_activation_norm_fn_in` and `run_time_activation_norm_fn_out` is not SAELens's own:
      overridden in a subclass or a mixin, or replaced on the object;
    - where hooks are on `hook_sae_acts_pre`, `hook_sae_acts_post` or `hook_sae_recons`;
    - for activations that are not [batch, d_in].

    It then warns once, and names the reason. `use_fused_path` decides otherwise: with False every
    step is unfused; with True a step calls none of the methods and functions above, whatever they
    are.

    On a GPU steps of small SAEs (d_in * d_sae up to 2^25, as 768 x 24,576, and with the batch up to
    2^38) are recorded as a CUDA graph and replayed in one launch, because launching them one by one
    takes longer than computing them. Nothing else changes: a step that does not fit the recording,
    of another batch size or dtype for instance, is an ordinary one. A recording keeps the memory of
    a step's intermediates until `eval()`. Within `accelerate()` a trainer's recording is of its
    whole step, Adam included, and of SAEs up to 16 times as large; larger steps are taken as a
    whole without a recording. The losses of such a step carry no gradients, because they have been
    applied. `use_cuda_graph = False` does without recordings and without whole steps.

    `W_enc` is [d_in, d_sae], as everywhere in SAELens, but stored latent by latent, which is how
    its gradient comes. So it is not contiguous; its transpose is. In a `state_dict` it is an
    ordinary, contiguous tensor, and therefore a copy: what is loaded into it reaches the weights by
    `load_state_dict`.
    """

    cfg: FusedTopKTrainingSAEConfig  # type: ignore[assignment]
    config_class: type = FusedTopKTrainingSAEConfig

    use_fused_path: bool | None = None
    use_cuda_graph: bool = True

    _normalization: str | None = None  # with which the SAE was made
    _recorder: Recorder | None = None
    _shards: Whole = WHOLE  # of which process the SAE is
    _unfused_reasons: tuple[str, ...] = ()

    @override
    def __init__(self, cfg: Any, *args: Any, **kwargs: Any) -> None:
        check_config_class(self, cfg, self.config_class)
        super().__init__(cfg, *args, **kwargs)
        self._normalization = self.cfg.normalize_activations

    @override
    def load_weights_from_checkpoint(self, checkpoint_path: Path | str) -> None:
        """Load weights. Warn if the checkpoint was trained with other settings."""
        warn_of_other_settings(self.cfg, checkpoint_path)
        super().load_weights_from_checkpoint(checkpoint_path)

    # --- W_enc latent by latent

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self._store_latent_major()

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state_dict = super().state_dict(*args, **kwargs)
        if not kwargs.get("keep_vars", False):
            for name, _ in self.named_parameters(prefix=kwargs.get("prefix", "").rstrip(".")):
                state_dict[name] = state_dict[name].contiguous()
        return state_dict

    @override
    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        incompatible_keys = super().load_state_dict(state_dict, strict, assign)
        self._store_latent_major()
        return incompatible_keys

    def _store_latent_major(self) -> None:
        self.W_enc.data = self.W_enc.data.T.contiguous().T

    # --- the training step

    @override
    def train(self, mode: bool = True) -> Self:
        if not mode:
            self._recorder = None
        return super().train(mode)

    @override
    def get_activation_fn(self) -> TopK:
        return TopK(self.cfg.k, use_sparse_activations=False)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Compute a training step's losses from activations of shape [batch, d_in]."""
        if self._takes_fused_path(step_input):
            return self._fused_training_forward_pass(step_input)
        self._check_config()
        check_real("sae_in", step_input.sae_in)
        return self._unfused_training_forward_pass(step_input)

    @override
    def calculate_topk_aux_loss(
        self,
        sae_in: torch.Tensor,
        sae_out: torch.Tensor,
        hidden_pre: torch.Tensor,
        dead_neuron_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        # SAELens's own computes what is then multiplied by 0, and refuses some normalizations.
        if check_number("aux_loss_coefficient", self.cfg.aux_loss_coefficient) == 0:
            return sae_out.new_zeros(())
        return super().calculate_topk_aux_loss(
            sae_in=sae_in,
            sae_out=sae_out,
            hidden_pre=hidden_pre,
            dead_neuron_mask=dead_neuron_mask,
        )

    def _unfused_training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        return super().training_forward_pass(step_input)

    @torch.compiler.disable()  # torch.compile calls the step as it is
    def _fused_training_forward_pass(
        self, step_input: TrainStepInput, shards: Whole = WHOLE
    ) -> TrainStepOutput:
        request = self._request(step_input, shards)
        return self._differentiable_step(request, step_input.dead_neuron_mask)

    def _shards_of(self, step_input: TrainStepInput, *, whole_step_for: int | None = None) -> Whole:
        """Return which of several processes this one is, with how many samples each brings.

        Args:
            step_input: of a step that begins.
            whole_step_for: for how many dead latents the trainer would take the step as a whole;
                None for an ordinary step.
        """
        return self._shards

    def _request(self, step_input: TrainStepInput, shards: Whole = WHOLE) -> StepRequest:
        """Return what a fused step is to compute. It normalizes the activations."""
        self._check_config()
        x, weights = step_input.sae_in, self._weights()
        check_real("sae_in", x)
        d_in = self.W_dec.shape[1]
        if x.shape[0] == 0 or x.shape[1] != d_in:
            raise ValueError(
                f"sae_in has shape {list(x.shape)}, expected [batch, {d_in}] with an "
                "activation at least"
            )
        inputs, output_map = self._inputs(x)
        k = self._step_k(len(x))
        levels = self._levels(k, inputs.target)
        if isinstance(levels, torch.Tensor):
            inputs, levels = inputs._replace(level_weights=levels), "every"
        spec = Spec(
            k=k,
            over_batch=self._over_batch,
            widths=self._widths(),
            levels=levels,
            n_samples=shards.n_samples(len(x)),
            rescale_acts_by_decoder_norm=self.cfg.rescale_acts_by_decoder_norm,
            apply_b_dec_to_input=self.cfg.apply_b_dec_to_input,
            product_dtype=product_dtype(weights.W_dec),
            use_triton=computes_by_triton(self.cfg.backend, weights.W_dec, x),
            deterministic=is_deterministic(),
            matmul_precision=torch.get_float32_matmul_precision(),
        )
        return StepRequest(
            x,
            weights,
            inputs,
            spec,
            wanted=_wanted(weights, inputs),
            shards=shards,
            output_map=output_map,
            is_logging_step=step_input.is_logging_step,
        )

    def _differentiable_step(
        self, request: StepRequest, dead_mask: torch.Tensor | None
    ) -> TrainStepOutput:
        """Take a step whose losses autograd differentiates."""
        arguments = request.weights, request.inputs, request.spec
        check_has_no_tangent("a fused training step", *request.weights, *request.inputs[:3])
        dead, wanted, shards = self._dead(dead_mask), request.wanted, request.shards
        recorder = None if shards.is_sharded else self._recorder_of(request)
        by = None if recorder is None else reconstruct_by(recorder)
        main = begin_step(*arguments, wanted=wanted, by=by, shards=shards)
        # What is reported is launched before the host waits for the number of dead latents.
        reported = self._reported(request, main)
        result = finish_step(main, *arguments, wanted=wanted, dead=dead, shards=shards)
        losses = attach_step(result, *arguments, wanted=wanted, dead=dead, shards=shards)
        # After the losses, as in SAELens: `torch.utils.checkpoint` computes again up to them only.
        self._learn(reported["feature_acts"])
        return self._output(reported, losses)

    def _reported(
        self, request: StepRequest, main: Reconstruction, at: torch.Tensor | None = None
    ) -> dict[str, Any]:
        """Return what a step reports beside its losses: fields of `TrainStepOutput`.

        They lie in memory of their own, except `main.hidden_pre`, and `at`, the `coordinates` of
        the code where these are at hand.
        """
        x, shards, is_logging_step = request.x, request.shards, request.is_logging_step
        metrics = {}
        if is_logging_step:
            metrics = self._logging_metrics(x, main.code, request.output_map, shards)
        return {
            "sae_in": x,
            "sae_out": self._reported_output(x, main.residual, shards, is_logging_step),
            "feature_acts": feature_acts(
                main.code.with_values(main.hidden_pre.relu()),
                len(self.W_dec),
                is_sparse=self.cfg.use_sparse_activations,
                at=at,
            ),
            "hidden_pre": main.hidden_pre,
            "metrics": metrics,
        }

    def _output(self, reported: dict[str, Any], losses: Losses) -> TrainStepOutput:
        auxiliary = losses.auxiliary
        if auxiliary is None:
            auxiliary = reported["sae_out"].new_zeros(())
        return TrainStepOutput(
            loss=losses.total,
            losses={
                "mse_loss": losses.mse,
                "auxiliary_reconstruction_loss": auxiliary,
                **{
                    f"inner_mse_loss_{width}": loss
                    for width, loss in zip(self._widths()[:-1], losses.of_widths, strict=True)
                },
            },
            **reported,
        )

    # --- what the architectures settle

    _over_batch = False

    def _step_k(self, n_samples: int) -> int:
        """Return the number of latents that a training step keeps of each sample.

        With `_over_batch` it is that of all samples together.
        """
        raise NotImplementedError

    def _levels(self, k: int, like: torch.Tensor) -> Levels:
        """Return how the loss weighs its levels; level weights have dtype and device of `like`."""
        return "last"

    def _widths(self) -> tuple[int, ...]:
        """Return the widths over which the loss is a sum, the last d_sae, or none."""
        return ()

    def _auxiliary_by_width(self) -> bool:
        """Return whether each width has an auxiliary loss of its own."""
        return False

    def _threshold(self) -> Threshold | None:
        """Return the threshold that a step moves, or None where there is none."""
        return None

    def _learn(self, feature_acts: torch.Tensor) -> None:
        """Learn from the `feature_acts` of a step what is no parameter."""

    def _learns_as_it_was_written(self) -> bool:
        """Return whether `_learn` moves the threshold and does nothing else."""
        return True

    def _logging_metrics(
        self, x: torch.Tensor, code: Code, output_map: OutputMap, shards: Whole
    ) -> dict[str, Any]:
        """Return the metrics of a logging step.

        Args:
            x: this process's activations, [B_r, d_in].
            code: kept latents and their pre-activations of the whole batch, [B, k] each, in the
                order of the levels.
            output_map: of these activations.
            shards: of which process they are.
        """
        return {}

    def _reported_output(
        self, x: torch.Tensor, residual: torch.Tensor, shards: Whole, is_logging_step: bool
    ) -> torch.Tensor:
        """Return the `sae_out` of activations [B_r, d_in] from the step's residual."""
        # Not `self.dtype`, which `double()`, unlike `to`, leaves as it was.
        return (x.detach() + shards.by_sample(residual)).to(self.W_dec.dtype)

    # --- what a step is made of

    def _replaced(self) -> list[str]:
        """Return the names of what a fused step computes and a user replaced."""
        return replaced(self, OWN, OF_SAMPLES)

    def _weights(self) -> Weights:
        return Weights(self.W_enc, self.b_enc, self.W_dec, self.b_dec)

    def _inputs(self, x: torch.Tensor) -> tuple[Inputs, OutputMap]:
        """Normalize activations as `process_sae_in` does; return also how the output undoes it.

        Output normalization, of every sample by itself, moves to the target's side: the output
        before it, times `scale`, is to be x - shift.
        """
        take_output_map(self)  # what an `encode` without a `decode` may have left
        encoder_input = self.hook_sae_input(self.reshape_fn_in(x.to(self.dtype)))
        encoder_input = self.run_time_activation_norm_fn_in(encoder_input)
        output_map = take_output_map(self)
        target = x.to(accumulation_dtype(self.W_dec, x))
        if output_map.shift is not None:
            target = target - output_map.shift
        return Inputs(encoder_input, target, output_map.scale), output_map

    def _check_config(self) -> None:
        """Raise a ValueError that names what was edited in the config to what it must not be.

        Numbers of numpy and of torch become plain ones, which a saved config can hold.

        SAELens makes the functions that normalize when it makes the SAE. Edited later,
        `normalize_activations` has no effect on training, but a saved SAE would be loaded with what
        it then says.
        """
        for name in SWITCHES:
            check_bool(name, getattr(self.cfg, name))
        made_with, now = self._normalization, self.cfg.normalize_activations
        # Of the others the SAE itself computes none: they are folded into the weights.
        if made_with != now and {made_with, now} & set(PER_SAMPLE) and made_with is not None:
            raise ValueError(
                f"normalize_activations is {now!r} in the config, expected {made_with!r}: it is "
                "settled when the SAE is made"
            )
        # At once: a run would else end much later, with the first dead latent.
        self.cfg.aux_loss_coefficient = self._auxiliary_coefficient()
        if self.cfg.aux_loss_coefficient != 0:
            check_auxiliary_loss(self.cfg)

    def _auxiliary_coefficient(self) -> float:
        """Return what multiplies the loss on dead latents."""
        return check_number("aux_loss_coefficient", self.cfg.aux_loss_coefficient)

    def _dead(self, mask: torch.Tensor | None) -> Dead | None:
        """Return the dead latents, which are known later, or None if there is no loss on them."""
        if mask is None or (coefficient := self._auxiliary_coefficient()) == 0:
            return None
        if mask.shape != (len(self.W_dec),):
            raise ValueError(
                f"dead_neuron_mask has shape {list(mask.shape)}, expected [{len(self.W_dec)}], one "
                "element a latent"
            )
        if mask.dtype != torch.bool:  # of other numbers the sum is not how many are dead
            raise TypeError(f"dead_neuron_mask has dtype {mask.dtype}, expected torch.bool")
        below = counts_below_later(mask, self._widths()) if self._auxiliary_by_width() else None
        return Dead(nonzero_later(mask), coefficient, below=below)

    def _asks_nothing(self, request: StepRequest) -> bool:
        """Return whether the step asks nothing of the device, and may be taken as a function."""
        return (
            self.use_cuda_graph
            and request.spec.use_triton
            and any(request.wanted)
            and not CHECKS_INDICES
            and not torch.cuda.is_current_stream_capturing()
        )

    def _recorder_of(self, request: StepRequest, *, is_whole: bool = False) -> Recorder | None:
        """Return what records the step as a CUDA graph, or None where it is not to be recorded.

        Args:
            request: of the step.
            is_whole: whether the step also changes the weights.
        """
        if not (
            is_worth_recording(request.weights, request.inputs, request.shards, is_whole=is_whole)
            and self._asks_nothing(request)
        ):
            return None
        if self._recorder is None:
            self._recorder = Recorder()
        return self._recorder

    def _takes_fused_path(self, step_input: TrainStepInput) -> bool:
        if self.use_fused_path is False:
            return False
        reasons = [f"{name} has hooks" for name in hooked(self)]
        if step_input.sae_in.ndim != 2:
            reasons.append(f"sae_in has {step_input.sae_in.ndim} dimensions, not 2")
        if self.use_fused_path is None:
            reasons += [f"{name} is not SAELens's own" for name in self._replaced()]
        self._warn_of_unfused(reasons)
        return not reasons

    def _warn_of_unfused(self, reasons: Sequence[str]) -> None:
        """Say why steps are slow, each reason once."""
        new = [reason for reason in reasons if reason not in self._unfused_reasons]
        if not new:
            return
        self._unfused_reasons = (*self._unfused_reasons, *new)
        warnings.warn(
            f"training steps take the unfused path, at SAELens's speed: {', '.join(new)} (see "
            "use_fused_path)",
            stacklevel=4,
        )


# What the architectures' methods are where nobody replaced them.
OWN = {name: getattr(FusedTopKTrainingSAE, name) for name in METHODS}


def _wanted(weights: Weights, inputs: Inputs) -> WantedGradients:
    """Return which gradients autograd will ask for."""
    is_enabled = torch.is_grad_enabled()
    return WantedGradients(
        *(
            is_enabled and tensor is not None and tensor.requires_grad
            for tensor in (*weights, *inputs[:3])
        )
    )
