"""What the two fused architectures share: the checks of a config, and the training step."""

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple, Self, cast

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopK, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.util import dtype_to_str, str_to_dtype
from transformer_lens.hook_points import HookPoint
from typing_extensions import override

from ..ops.dead_latents import DeadLatents, DictionaryLater, dead_latents_loss, nonzero_later
from ..ops.encode import Encoded, compute_dtype, encode, latent_major
from ..ops.fused_loss import (
    BACKENDS,
    CHECKS_INDICES,
    accumulation_dtype,
    computes_by_triton,
    fused_loss,
    is_traced,
    with_gradients,
)
from ..ops.norms import norms_and_copy
from .normalization import OutputMap, forget_output_map, read_output_map
from .step_graph import StepGraph

# Up to these sizes of the dictionary, d_sae * d_in, and of its product with a batch, launching a
# step takes the host longer than computing it takes an H200; benchmarks/README.md has the times.
MOST_RECORDED_WEIGHTS = 2**25
MOST_RECORDED_PRODUCTS = 2**38


def check_integer(name: str, value: Any, highest: int | None = None, highest_name: str = "") -> int:
    """Return `value` as an int in 1..highest, or raise a ValueError that names it."""
    bound = "at least 1" if highest is None else f"within 1..{highest_name} ({highest})"
    message = f"{name} is {value!r}, expected an integer {bound}"
    if value is None:
        raise ValueError(f"{name} is missing, expected an integer {bound}")
    if isinstance(value, bool):
        raise ValueError(message)
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(message) from None
    if number < 1 or (highest is not None and number > highest):
        raise ValueError(message)
    return number


def check_number(name: str, value: Any, *, is_positive: bool = False) -> float:
    """Return `value` as a finite float >= 0 (> 0), or raise a ValueError that names it."""
    bound = "above 0" if is_positive else "of at least 0"
    message = f"{name} is {value!r}, expected a finite number {bound}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(message)
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(message) from None
    if not math.isfinite(number) or number < 0 or (is_positive and number == 0):
        raise ValueError(message)
    return number


def sum_of(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the total of a step's losses."""
    first, *others = losses.values()
    return sum(others, start=first)


def check_bool(name: str, value: Any) -> None:
    """Raise a ValueError that names `value` where it is no bool."""
    if value is None:
        raise ValueError(f"{name} is missing, expected true or false")
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, expected true or false")


@dataclass
class CheckedTopKSAEConfig(TopKSAEConfig):
    """
    Configuration class for TopKSAE inference, as it is read from what this package has saved.

    `k` and `rescale_acts_by_decoder_norm` have no default: a wrong guess would give a wrong SAE.

    Args:
        k (int): Number of latents to keep active, 1..d_sae; with a run-time budget, the largest.
        rescale_acts_by_decoder_norm (bool): Whether latents are chosen and reported as if the
            decoder was normalized. Must be as the SAE was trained.
        d_in (int): Input dimension. Inherited from SAEConfig.
        d_sae (int): SAE latent dimension. Inherited from SAEConfig.
        dtype (str): Data type of the SAE's parameters. Inherited from SAEConfig.
        device (str): Device to place the SAE on. Inherited from SAEConfig.
        apply_b_dec_to_input (bool): Whether to subtract the decoder bias from the input before
            encoding. Inherited from SAEConfig.
        normalize_activations (Literal): Normalization strategy for input activations. Inherited
            from SAEConfig.
        reshape_activations (Literal["none", "hook_z"]): How to reshape activations. Inherited from
            SAEConfig.
        metadata (SAEMetadata): Metadata about the SAE. Inherited from SAEConfig.
    """

    k: int = cast(int, None)
    rescale_acts_by_decoder_norm: bool = cast(bool, None)

    @override
    def __post_init__(self) -> None:
        self.d_in = check_integer("d_in", self.d_in)
        self.d_sae = check_integer("d_sae", self.d_sae)
        self.k = check_integer("k", self.k, self.d_sae, "d_sae")
        check_bool("rescale_acts_by_decoder_norm", self.rescale_acts_by_decoder_norm)
        check_bool("apply_b_dec_to_input", self.apply_b_dec_to_input)
        super().__post_init__()


@dataclass
class FusedTopKTrainingSAEConfig(TopKTrainingSAEConfig):
    """
    Configuration shared by the architectures that train through fused kernels.

    Args:
        use_sparse_activations (bool): Whether the `feature_acts` that a training step reports are
            a sparse COO tensor, which the trainer counts faster. Devices without sparse COO tensors
            get a dense one. `encode()` returns a dense tensor either way.
        backend (Literal["auto", "triton", "torch"]): What computes the decoder loss. "auto" takes
            the Triton kernels on a CUDA device that has them, PyTorch elsewhere.
        k (int): Number of latents to keep active, 1..d_sae. Inherited from TopKTrainingSAEConfig.
        aux_loss_coefficient (float): Coefficient of the auxiliary loss on dead latents, 0 to turn
            it off. Inherited from TopKTrainingSAEConfig.
        rescale_acts_by_decoder_norm (bool): Treat the decoder as if it was already normalized.
            Inherited from TopKTrainingSAEConfig.
        decoder_init_norm (float | None): Norm to initialize decoder weights to. None to disable.
            Inherited from TrainingSAEConfig.
        d_in (int): Input dimension. Inherited from SAEConfig.
        d_sae (int): SAE latent dimension. Inherited from SAEConfig.
        dtype (str): Data type of the SAE's parameters. Inherited from SAEConfig.
        device (str): Device to place the SAE on. Inherited from SAEConfig.
        apply_b_dec_to_input (bool): Whether to subtract the decoder bias from the input before
            encoding. Inherited from SAEConfig.
        normalize_activations (Literal): Normalization strategy for input activations. "layer_norm"
            and "constant_norm_rescale" need aux_loss_coefficient=0. Inherited from SAEConfig.
        reshape_activations (Literal["none", "hook_z"]): How to reshape activations. Inherited from
            SAEConfig.
        metadata (SAEMetadata): Metadata about the SAE training. Inherited from SAEConfig.
    """

    use_sparse_activations: bool = True
    backend: Literal["auto", "triton", "torch"] = "auto"

    @override
    def __post_init__(self) -> None:
        self.d_in = check_integer("d_in", self.d_in)
        self.d_sae = check_integer("d_sae", self.d_sae)
        self.k = check_integer("k", self.k, self.d_sae, "d_sae")
        check_bool("rescale_acts_by_decoder_norm", self.rescale_acts_by_decoder_norm)
        check_bool("use_sparse_activations", self.use_sparse_activations)
        check_bool("apply_b_dec_to_input", self.apply_b_dec_to_input)
        if not isinstance(self.dtype, (str, torch.dtype)):
            raise ValueError(f"dtype is {self.dtype!r}, expected the name of one")
        self.dtype = dtype_to_str(str_to_dtype(self.dtype))  # raises on an unknown one
        if self.backend not in BACKENDS:
            raise ValueError(f"backend is {self.backend!r}, expected one of {', '.join(BACKENDS)}")
        self.aux_loss_coefficient = check_number("aux_loss_coefficient", self.aux_loss_coefficient)
        if self.decoder_init_norm is not None:
            self.decoder_init_norm = check_number(
                "decoder_init_norm", self.decoder_init_norm, is_positive=True
            )
        if (
            self.normalize_activations in ("layer_norm", "constant_norm_rescale")
            and self.aux_loss_coefficient != 0
        ):
            raise ValueError(
                f"normalize_activations is {self.normalize_activations!r} and aux_loss_coefficient "
                f"is {self.aux_loss_coefficient!r}, expected aux_loss_coefficient=0 with this "
                "normalization: SAELens's auxiliary loss does not support it and would end the run "
                "as soon as a latent is dead"
            )
        super().__post_init__()

    @override
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> Self:
        """
        Make a config from a dictionary, that of a saved SAE for instance.

        The config of an SAE saved for inference has no fields of training. SAELens keeps them in
        its metadata. They are taken from there if this architecture has trained the SAE.

        Raises:
            ValueError: if a saved config lacks what must not be guessed, or a value is impossible.
        """
        if "metadata" in config_dict:  # the SAE was saved, so a default would be a guess
            for name in ("k", "rescale_acts_by_decoder_norm"):
                if name not in config_dict:
                    raise ValueError(f"{name} is missing from the saved config")
            metadata = config_dict["metadata"]
            architecture = config_dict.get("architecture", cls.architecture())
            if metadata.get("training_architecture") == architecture:
                details = metadata.get("training_architecture_details", {})
                if not isinstance(details, dict):
                    raise ValueError(
                        f"training_architecture_details is {details!r} in the saved config's "
                        "metadata, expected a dictionary"
                    )
                config_dict = {**details, **config_dict}
        return super().from_dict(config_dict)


class Weights(NamedTuple):
    """An SAE's parameters, or what stands for them in a step."""

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor


class Decoded(NamedTuple):
    """What a fused step computes before it looks at the dead latents.

    Attributes:
        mse_loss: scalar.
        residual: reconstruction minus target at level k, [batch, d_in].
        indices: the kept latents in the order of the levels, [batch, k].
        hidden: their pre-activations, [batch, k], and hidden_pre: the same with the norms.
        norms: by which latents are compared, [d_sae], or None for 1.
    """

    mse_loss: torch.Tensor
    residual: torch.Tensor
    indices: torch.Tensor
    hidden: torch.Tensor
    hidden_pre: torch.Tensor
    norms: torch.Tensor | None


class Decoding(NamedTuple):
    """What the decoder is to do: bias + sum_i vals[:, i] * W_dec[indices[:, i]] = target.

    Attributes:
        vals: the kept latents' decode coefficients, [batch, k].
        bias: [d_in], or None where it is part of the target.
        target: [batch, d_in].
    """

    vals: torch.Tensor
    bias: torch.Tensor | None
    target: torch.Tensor

    def without_bias(self) -> torch.Tensor:
        """Return what the kept latents alone are to reconstruct, [batch, d_in]."""
        return self.target if self.bias is None else self.target - self.bias


class FusedTopKTrainingSAE(TopKTrainingSAE):
    """
    SAELens's TopK training SAE in three fused operators: encoder, decoder loss, auxiliary loss.

    A training step selects the k largest pre-activations h (of h * ||W_dec|| with
    `rescale_acts_by_decoder_norm`) and hands the decoder loss their latents and relu(h): the norm
    that the reported activations carry cancels against the one that decoding divides by, in the
    value and in the gradient. The auxiliary loss computes the dead latents' pre-activations alone.
    Nothing of shape [batch, d_sae] outlives a chunk of the batch.

    Of a fused step's `TrainStepOutput`, `loss` and `losses` carry gradients; `sae_out`,
    `feature_acts` and `hidden_pre` do not, and `hidden_pre` holds the pre-activations of the k kept
    latents alone, [batch, k], in descending order (SAELens reads none). What needs more takes the
    unfused path, in which all of them do, `hidden_pre` and `feature_acts` are dense, and speed and
    memory are SAELens's. A subclass that overrides `calculate_aux_loss`, `encode_with_hidden_pre`,
    `decode` or `process_sae_in` takes it unless it says `use_fused_path = True`, with which a
    training step calls none of these; any other says `use_fused_path = False`. Steps with hooks on
    the points that the fused path skips (`hook_sae_acts_pre`, `hook_sae_acts_post`,
    `hook_sae_recons`) take it by themselves.

    On a GPU steps of small SAEs (d_in * d_sae up to 2^25, as 768 x 24,576, and with the batch up to
    2^38) are recorded as a CUDA graph and replayed in one launch, for launching them one by one
    takes longer than computing them. Nothing else changes: a step that does not fit the recording,
    of another batch size or dtype, with frozen weights or a gradient of the input, is an ordinary
    one. A recording keeps the memory of a step's intermediates until `eval()`; `use_cuda_graph =
    False` does without.

    `W_enc` is [d_in, d_sae], as everywhere in SAELens, but stored latent by latent (it is not
    contiguous, its transpose is), which is how its gradient comes. Saved files are ordinary.
    """

    cfg: FusedTopKTrainingSAEConfig  # type: ignore[assignment]

    use_fused_path: bool = True
    use_cuda_graph: bool = True

    _step_graph: StepGraph | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        overridden = {
            "calculate_aux_loss",
            "encode_with_hidden_pre",
            "decode",
            "process_sae_in",
        } & cls.__dict__.keys()
        if overridden and "use_fused_path" not in cls.__dict__:
            cls.use_fused_path = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # SAELens's normalization functions hold the SAE that made them: a copy needs its own.
        self._setup_activation_normalization()

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self._store_latent_major()

    @override
    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        incompatible_keys = super().load_state_dict(state_dict, strict, assign)
        self._store_latent_major()
        return incompatible_keys

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()  # safetensors takes no other

    def _store_latent_major(self) -> None:
        self.W_enc.data = latent_major(self.W_enc.data)

    @override
    def train(self, mode: bool = True) -> Self:
        if not mode:
            self._step_graph = None
        return super().train(mode)

    @override
    def get_activation_fn(self) -> TopK:
        return TopK(self.cfg.k, use_sparse_activations=False)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Compute a training step's losses from activations of shape [batch, d_in]."""
        if self._needs_unfused_path(step_input):
            return self._unfused_training_forward_pass(step_input)

        x = step_input.sae_in
        if x.shape[0] == 0 or x.shape[1] != self.cfg.d_in:
            raise ValueError(
                f"sae_in has shape {list(x.shape)}, expected [batch, {self.cfg.d_in}] with an "
                "activation at least"
            )
        find_dead = self._watch_dead(step_input.dead_neuron_mask)
        normalized = self._normalize(x)
        output_map = read_output_map(self)
        forget_output_map(self)

        weights, dictionary, gradients = self._weights(), None, None
        if self._is_recorded(x, normalized):
            decoded, gradients = self._replay(x)
        else:
            if find_dead is not None:
                weights, dictionary = self._add_later(weights)
            decoded = self._encode_and_decode(weights, normalized, x, output_map)
        feature_acts = self._report_feature_acts(decoded.indices, decoded.hidden_pre.relu())
        sae_out = (x.detach() + decoded.residual).to(self.dtype)
        metrics = {}
        if step_input.is_logging_step:
            decoding = self._decoding(decoded.hidden.relu(), x, self.b_dec, output_map)
            metrics = self._logging_metrics(decoded.indices, decoding, x)

        mse_loss = decoded.mse_loss
        if gradients is not None:
            if find_dead is not None and len(find_dead()) > 0:
                weights, dictionary = self._add_later(weights)
            outputs = mse_loss, None, *gradients
            mse_loss, _ = with_gradients("training_forward_pass", lambda: outputs, weights)
        aux_loss = None
        if find_dead is not None and dictionary is not None:
            aux_loss = self._dead_latents_loss(normalized, decoded, find_dead, dictionary)
        losses = {
            "mse_loss": mse_loss,
            "auxiliary_reconstruction_loss": (
                mse_loss.new_zeros(()) if aux_loss is None else aux_loss
            ),
        }
        return TrainStepOutput(
            sae_in=x,
            sae_out=sae_out,
            feature_acts=feature_acts,
            hidden_pre=decoded.hidden_pre,
            loss=mse_loss if aux_loss is None else sum_of(losses),
            losses=losses,
            metrics={**metrics},
        )

    def _weights(self) -> Weights:
        return Weights(self.W_enc, self.b_enc, self.W_dec, self.b_dec)

    def _b_dec_of_input(self, weights: Weights) -> torch.Tensor | None:
        """Return what is subtracted from the input, or None."""
        return weights.b_dec if self.cfg.apply_b_dec_to_input else None

    def _encode_and_decode(
        self, weights: Weights, normalized: torch.Tensor, x: torch.Tensor, output_map: OutputMap
    ) -> Decoded:
        norms, low_decoder = self._norms_and_low_decoder()
        kept = encode(
            normalized,
            weights.W_enc,
            weights.b_enc,
            self._b_dec_of_input(weights),
            norms,
            self.cfg.k,
            backend=self.cfg.backend,
        )
        decoding = self._decoding(kept.hidden.relu(), x, weights.b_dec, output_map)
        mse_loss, residual = self._decoder_loss(kept, weights.W_dec, low_decoder, decoding)
        hidden = kept.hidden.detach()
        hidden_pre = hidden if norms is None else hidden * norms.take(kept.indices)
        return Decoded(mse_loss, residual, kept.indices, hidden, hidden_pre, norms)

    def _is_recorded(self, x: torch.Tensor, normalized: torch.Tensor) -> bool:
        """Return whether a step is to be recorded as a CUDA graph, and replayed."""
        return (
            self.use_cuda_graph
            and normalized is x  # no hook edited it, no normalization is to be undone
            and x.is_cuda
            and not is_traced(x)
            and x.is_contiguous()
            and not x.requires_grad
            and torch.is_grad_enabled()
            and all(weight.requires_grad for weight in self._weights())
            and self.W_dec.numel() <= MOST_RECORDED_WEIGHTS
            and self.W_dec.numel() * x.shape[0] <= MOST_RECORDED_PRODUCTS
            and computes_by_triton(self.cfg.backend, self.W_dec, x)
            and not CHECKS_INDICES
            and not torch.cuda.is_current_stream_capturing()
        )

    def _replay(self, x: torch.Tensor) -> tuple[Decoded, list[torch.Tensor]]:
        """Return what `_encode_and_decode` does, without autograd, and the weights' gradients.

        Of the former `residual`, `hidden` and `norms` last until the next step.
        """
        if self._step_graph is None:
            self._step_graph = StepGraph()
        decoded, gradients = self._step_graph(
            self._differentiate,
            x,
            *((w.data_ptr(), w.dtype, w.shape, w.stride()) for w in self._weights()),
            compute_dtype(self.W_dec),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            (self.cfg.k, self.cfg.backend),
            (self.cfg.rescale_acts_by_decoder_norm, self.cfg.apply_b_dec_to_input),
        )
        lasting = decoded._replace(
            mse_loss=decoded.mse_loss.clone(),
            indices=decoded.indices.clone(),
            hidden_pre=decoded.hidden_pre.clone(),
        )
        return lasting, [gradient.clone() for gradient in gradients]

    @torch.enable_grad()
    def _differentiate(self, x: torch.Tensor) -> tuple[Decoded, tuple[torch.Tensor, ...]]:
        # Without the hooks that the parameters may have: they get the gradients later on.
        weights = Weights(*(weight.detach().requires_grad_() for weight in self._weights()))
        decoded = self._encode_and_decode(weights, x, x, OutputMap(None, None))
        gradients = torch.autograd.grad(decoded.mse_loss, weights)
        return decoded._replace(mse_loss=decoded.mse_loss.detach()), gradients

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: torch.Tensor,
        hidden_pre: torch.Tensor,
        sae_out: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        if self.cfg.aux_loss_coefficient == 0:
            return {"auxiliary_reconstruction_loss": sae_out.new_zeros((), dtype=torch.float32)}
        return super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)

    def _normalize(self, x: torch.Tensor) -> torch.Tensor:
        """Return what `process_sae_in` subtracts the decoder bias from."""
        x = self.hook_sae_input(self.reshape_fn_in(x.to(self.dtype)))
        return self.run_time_activation_norm_fn_in(x)

    def _norms_and_low_decoder(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the norms by which latents are compared, and W_dec in autocast's lower precision.

        None where there are none, and where the decoder loss would not gain by reading the copy.
        """
        decoder, rescales = self.W_dec.detach(), self.cfg.rescale_acts_by_decoder_norm
        dtype = compute_dtype(decoder)
        if dtype.itemsize < decoder.itemsize and computes_by_triton(self.cfg.backend, decoder):
            norms, low_decoder = norms_and_copy(decoder, dtype)
            return norms if rescales else None, low_decoder
        return decoder.norm(dim=-1) if rescales else None, None

    @torch.compiler.disable()  # the number of dead latents changes from step to step
    def _watch_dead(self, mask: torch.Tensor | None) -> Callable[[], torch.Tensor] | None:
        """Return a function that returns the dead latents, or None if there is no loss on them.

        The host, which has to know how many there are, waits only in that function: until then it
        goes on to launch the step.
        """
        if mask is None or self.cfg.aux_loss_coefficient == 0:
            return None
        if mask.shape != (self.cfg.d_sae,):
            raise ValueError(
                f"dead_neuron_mask has shape {list(mask.shape)}, expected [{self.cfg.d_sae}], one "
                "element a latent"
            )
        return nonzero_later(mask)

    @torch.compiler.disable()
    def _add_later(self, weights: Weights) -> tuple[Weights, DictionaryLater]:
        """Return weights that take the gradients of `_dead_latents_loss` too."""
        dictionary = DictionaryLater(weights.W_enc, weights.W_dec)
        return weights._replace(W_enc=dictionary.W_enc, W_dec=dictionary.W_dec), dictionary

    @torch.compiler.disable()
    def _dead_latents_loss(
        self,
        normalized: torch.Tensor,
        decoded: Decoded,
        find_dead: Callable[[], torch.Tensor],
        dictionary: DictionaryLater,
    ) -> torch.Tensor | None:
        """Return the auxiliary loss, the same as SAELens's `calculate_topk_aux_loss`.

        None where no latent is dead.
        """
        latents = find_dead()
        if len(latents) == 0:
            return None
        n_dead, half_width = len(latents), self.cfg.d_in // 2
        encoder_rows, decoder = dictionary.take(latents)
        dead = DeadLatents(
            encoder_rows,
            self.b_enc.index_select(0, latents),
            decoder,
            None if decoded.norms is None else decoded.norms[latents],
        )
        return dead_latents_loss(
            normalized,
            dead,
            self._b_dec_of_input(self._weights()),
            -decoded.residual,
            min(n_dead, half_width),
            factor=self.cfg.aux_loss_coefficient * min(n_dead / half_width, 1.0),
            backend=self.cfg.backend,
        )

    def _decoder_loss(
        self,
        kept: Encoded,
        decoder: torch.Tensor,
        low_decoder: torch.Tensor | None,
        decoding: Decoding,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `mse_loss` and the residual of level k.

        Args:
            kept: the kept latents.
            decoder: W_dec, [d_sae, d_in].
            low_decoder: a copy of it in a lower precision, to be read in its place, or None.
            decoding: what it is to do.
        """
        return fused_loss(
            "topk_loss",
            kept.indices,
            decoder,
            *decoding,
            low_weight=low_decoder,
            index=kept.inverted,
            factor=self.cfg.d_in,  # SAELens sums over d_in, where the operator averages
            backend=self.cfg.backend,
            needs_residual=True,
        )

    def _logging_metrics(
        self,
        indices: torch.Tensor,
        decoding: Decoding,
        x: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Return the metrics of a logging step.

        Args:
            indices: kept latents, [batch, k], in the order of the levels.
            decoding: as in `_decoder_loss`.
            x: activations, [batch, d_in].
        """
        return {}

    def _unfused_training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        return super().training_forward_pass(step_input)

    def _needs_unfused_path(self, step_input: TrainStepInput) -> bool:
        skipped = (self.hook_sae_acts_pre, self.hook_sae_acts_post, self.hook_sae_recons)
        return (
            not self.use_fused_path
            or step_input.sae_in.ndim != 2
            or any(_has_hooks(point) for point in skipped)
        )

    def _decoding(
        self, vals: torch.Tensor, x: torch.Tensor, b_dec: torch.Tensor, output_map: OutputMap
    ) -> Decoding:
        """Return what the decoder is to do with the activations `vals` of the kept latents.

        Output normalization, of every sample by itself, moves to the target's side with the bias:
        `scale * vals` are to reconstruct `x - shift - scale * b_dec`.
        """
        dtype = accumulation_dtype(self.W_dec, x)
        if output_map.scale is None:
            return Decoding(vals, b_dec, x.to(dtype))
        offset = output_map.apply(b_dec.to(dtype))
        # whose gradient is summed before it is negated
        return Decoding(vals * output_map.scale, None, x.to(dtype) + -offset)

    def _report_feature_acts(self, indices: torch.Tensor, acts: torch.Tensor) -> torch.Tensor:
        """Return the activations [batch, k] of `indices` as a [batch, d_sae] tensor."""
        shape = (indices.shape[0], self.cfg.d_sae)
        # MPS, for one, has no sparse COO tensors.
        if self.cfg.use_sparse_activations and indices.device.type in ("cpu", "cuda"):
            return _sparse_rows(indices, acts, shape)
        return acts.new_zeros(shape).scatter_(-1, indices, acts)


class SparseActs(torch.Tensor):
    """
    A sparse COO tensor, [batch, d_sae], whose sum over the batch is a dense tensor.

    The trainer counts firing by two such sums a step. For a sparse result PyTorch sorts all
    coordinates and waits for the device.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.sum and (*args[1:], *kwargs.values()) in ((0,), (-2,)):
                values = args[0]._values()
                if values.is_floating_point():
                    sums = values.new_zeros(args[0].shape[1])
                    return sums.index_add_(0, args[0]._indices()[1], values)
            if func in (torch.Tensor.bool, torch.Tensor.float) and len(args) == 1 and not kwargs:
                acts = args[0]  # whose indices the result shares
                return cls.of(acts._indices(), func(acts._values()), acts.shape)
            return func(*args, **kwargs)

    @classmethod
    def of(
        cls, indices: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]
    ) -> torch.Tensor:
        """Return the tensor of `shape` with `values` at `indices`, [2, n]."""
        acts = torch.sparse_coo_tensor(indices, values, shape, check_invariants=False)
        return torch.Tensor._make_subclass(cls, acts)

    def __reduce_ex__(self, protocol: Any) -> Any:  # copied and saved as an ordinary one
        return self.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.detach().clone()


@torch.compiler.disable()  # torch.compile has no sparse tensors
def _sparse_rows(indices: torch.Tensor, acts: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    rows = torch.arange(shape[0], device=indices.device).unsqueeze(-1).expand_as(indices)
    coordinates = torch.stack((rows, indices)).flatten(1)
    return SparseActs.of(coordinates, acts.flatten(), shape)


def _has_hooks(point: HookPoint) -> bool:
    return bool(
        point._forward_hooks
        or point._forward_pre_hooks
        or point._backward_hooks
        or point._backward_pre_hooks
    )
