"""Random programs of what a user does between steps, done alike to two SAEs that have to agree.

`flex_topk` runs against SAELens's `topk`, the architectures of a batch against SAELens's of a
batch, `hierarchical_topk` against its own unfused path. After every action a step's losses,
gradients, outputs and what its hooks saw are compared, and weights, thresholds and `encode`.

Where two latents are compared whose pre-activations nearly tie, rounding decides, and both SAEs are
right. So a batch takes, of many random activations, those whose latents are well apart.
"""

import copy
import dataclasses
import re
import tempfile
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import hypothesis
import pytest
import safetensors.torch
import torch
from comparison import (
    BATCH,
    D_IN,
    D_SAE,
    EVERY_ARCHITECTURE,
    FEW_DEAD,
    MANY_DEAD,
    TRAINING_CLASSES,
    K,
    assert_close,
    copy_weights,
    dead_mask,
    random_activations,
    step_input,
    trained_sae,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sae_lens import SAE
from sae_lens.saes.batchtopk_sae import BatchTopK, BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopK
from torch.utils.checkpoint import checkpoint

N_PROGRAMS, LEAST_PROGRAMS, N_ACTIONS = 100, 25, 20
SHARE_OF_BATCHES = 8  # One program of so many: they share most with the others.
# On a GPU: twenty times as many, in parts that may run beside each other.
N_PARTS, N_PROGRAMS_PER_PART = 8, 250

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 1e-1}
AUTOCAST_TOLERANCE = 5e-2
# How far apart latents have to be that are compared, relative to the largest pre-activation.
MARGIN, LOW_MARGIN = 1e-4, 2e-2
N_CANDIDATES = 8  # random activations for each of a batch
N_LOW_CANDIDATES = 30

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")

# On a GPU PyTorch does not differentiate `mse_loss` of two dtypes. Our step does.
MIXED_DTYPES = "Found dtype"
REASONS_TO_RAISE = (
    f"{MIXED_DTYPES}|backward through the graph a second time"
    "|does not require grad"
    "|doesn't require gradient"
    "|loss does not support activation normalization|normalize_activations is"
    # of [b, n, d_in] in SAELens's Matryoshka
    "|mat1 and mat2 shapes cannot be multiplied|Expected size for first two dimensions of batch2"
)
HOOK_POINTS = ("hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons")


# --- what may be overridden: functions of the original and its arguments, as SAELens passes them


def aux_loss_with_l1(original, *, step_input, feature_acts, hidden_pre, sae_out) -> Any:
    losses = original(
        step_input=step_input, feature_acts=feature_acts, hidden_pre=hidden_pre, sae_out=sae_out
    )
    losses = losses if isinstance(losses, dict) else {"auxiliary_loss": losses}
    return {**losses, "l1_loss": 0.1 * feature_acts.to_dense().abs().sum(-1).mean()}


def aux_loss_as_tensor(original, *, step_input, feature_acts, hidden_pre, sae_out) -> Any:
    return 0.01 * hidden_pre.square().mean() + sae_out.square().mean()


def topk_aux_loss_and_norm(original, *, sae_in, sae_out, hidden_pre, dead_neuron_mask) -> Any:
    loss = original(
        sae_in=sae_in,
        sae_out=sae_out,
        hidden_pre=hidden_pre,
        dead_neuron_mask=dead_neuron_mask,
    )
    return 0.5 * loss + 0.01 * hidden_pre.square().mean()


def encode_scaled(original, x) -> Any:
    return original(1.1 * x)


def decode_scaled(original, feature_acts) -> Any:
    return 0.9 * original(feature_acts)


def input_scaled(original, sae_in) -> Any:
    return original(1.2 * sae_in)


METHODS = {
    "calculate_aux_loss": aux_loss_with_l1,
    "calculate_aux_loss, a tensor": aux_loss_as_tensor,
    "calculate_topk_aux_loss": topk_aux_loss_and_norm,
    "encode_with_hidden_pre": encode_scaled,
    "decode": decode_scaled,
    "process_sae_in": input_scaled,
}


def absolute_error(original, preds, target) -> Any:
    return (preds - target).abs()


def scaled(original, x) -> Any:
    return 1.05 * original(x)


def shifted(original, x) -> Any:
    return original(x) + 0.5


def shifted_heads(original, x, d_head) -> Any:
    return original(x, d_head) + 0.5


FUNCTIONS = {
    "mse_loss_fn": absolute_error,
    "reshape_fn_in": scaled,
    "reshape_fn_out": shifted_heads,
    "run_time_activation_norm_fn_in": scaled,
    "run_time_activation_norm_fn_out": shifted,
}


class DoubledTopK(TopK):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class DoubledBatchTopK(BatchTopK):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def doubled_activation_fn(sae: Any, k: float) -> Any:
    return (DoubledBatchTopK if isinstance(sae, BatchTopKTrainingSAE) else DoubledTopK)(k)


def replace_by_subclass(sae: Any) -> None:
    sae.activation_fn = doubled_activation_fn(sae, sae.activation_fn.k)


def replace_by_relu(sae: Any) -> None:
    sae.activation_fn = torch.nn.ReLU()


def patch_forward(sae: Any) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * type(self).forward(self, x)

    sae.activation_fn.forward = types.MethodType(forward, sae.activation_fn)


def hook_activation_fn(sae: Any) -> None:
    sae.activation_fn.register_forward_hook(lambda module, inputs, acts: 2 * acts)


ACTIVATION_FUNCTIONS = {
    "subclass": replace_by_subclass,
    "relu": replace_by_relu,
    "patched forward": patch_forward,
    "forward hook": hook_activation_fn,
}


class DoublesActivations:
    """Goes before an SAE's class."""

    def get_activation_fn(self) -> Any:
        return doubled_activation_fn(self, self.cfg.k)  # type: ignore[attr-defined]


def override(sae: Any, name: str, how: str, function: Callable[..., Any]) -> None:
    """Make `function`, which gets the original first, a method of the SAE."""
    if how == "object":

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            original = types.MethodType(getattr(type(self), name), self)
            return function(original, *args, **kwargs)

        setattr(sae, name, types.MethodType(method, sae))
        return

    def method_of_class(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(getattr(super(defined_in, self), name), *args, **kwargs)

    members, base = {name: method_of_class}, type(sae)
    if how == "subclass":
        defined_in = type(f"Overridden{base.__name__}", (base,), members)
        sae.__class__ = defined_in
    else:
        defined_in = type("Mixin", (), members)
        sae.__class__ = type(f"Mixed{base.__name__}", (defined_in, base), {})


# --- ways to differentiate: each calls `forward` and returns what the steps returned


def through_loss(forward: Callable[[], TrainStepOutput]) -> list[TrainStepOutput]:
    output = forward()
    output.loss.backward()
    return [output]


def entries(output: TrainStepOutput) -> list[torch.Tensor]:
    """Return the losses that can be differentiated.

    SAELens computes an auxiliary loss to multiply it by a coefficient of 0, ours does not.
    """
    losses = [loss for loss in output.losses.values() if loss.requires_grad and loss != 0]
    return losses or [output.loss]


def through_weighted_losses(forward: Callable[[], TrainStepOutput]) -> list[TrainStepOutput]:
    output = forward()
    torch.stack([w * loss for w, loss in enumerate(entries(output), 2)]).sum().backward()
    return [output]


def one_loss_after_the_other(forward: Callable[[], TrainStepOutput]) -> list[TrainStepOutput]:
    output = forward()
    for weight, loss in enumerate(reversed(entries(output)), 2):
        (loss / weight).backward(retain_graph=True)
    return [output]


def first_loss_alone(forward: Callable[[], TrainStepOutput]) -> list[TrainStepOutput]:
    output = forward()
    entries(output)[0].backward()
    return [output]


def last_loss_alone(forward: Callable[[], TrainStepOutput]) -> list[TrainStepOutput]:
    output = forward()
    entries(output)[-1].backward()
    return [output]


def loss_and_one_entry(forward: Callable[[], TrainStepOutput]) -> list[TrainStepOutput]:
    output = forward()
    (output.loss + 0.5 * entries(output)[-1]).backward()
    return [output]


def twice(forward: Callable[[], TrainStepOutput]) -> list[TrainStepOutput]:
    output = forward()
    (2 * output.loss).backward(retain_graph=True)
    output.loss.backward()
    return [output]


def two_steps_then_backward(forward: Callable[[], TrainStepOutput]) -> list[TrainStepOutput]:
    outputs = [forward(), forward()]
    (outputs[0].loss + 3 * outputs[1].loss).backward()
    return outputs


def two_steps_backward_in_turn(forward: Callable[[], TrainStepOutput]) -> list[TrainStepOutput]:
    outputs = [forward(), forward()]
    outputs[0].loss.backward()
    (3 * outputs[1].loss).backward()
    return outputs


def through_checkpoint(forward: Callable[[], TrainStepOutput]) -> list[TrainStepOutput]:
    outputs = []

    def loss() -> torch.Tensor:
        outputs.append(forward())
        return outputs[-1].loss

    checkpoint(loss, use_reentrant=False).backward()
    return outputs


def without_gradients(forward: Callable[[], TrainStepOutput]) -> list[TrainStepOutput]:
    with torch.no_grad():
        return [forward()]


def without_backward(forward: Callable[[], TrainStepOutput]) -> list[TrainStepOutput]:
    return [forward()]


def twice_through_a_freed_graph(forward: Callable[[], TrainStepOutput]) -> list[TrainStepOutput]:
    output = forward()
    output.loss.backward()
    output.loss.backward()
    return [output]


WAYS = {
    way.__name__: way
    for way in (
        through_loss,
        through_weighted_losses,
        one_loss_after_the_other,
        first_loss_alone,
        last_loss_alone,
        loss_and_one_entry,
        twice,
        two_steps_then_backward,
        two_steps_backward_in_turn,
        through_checkpoint,
        without_gradients,
        without_backward,
        twice_through_a_freed_graph,
    )
}


# --- the machines


class Seen(NamedTuple):
    """What a hook was called with: where it hangs, and the tensor."""

    name: str
    tensor: torch.Tensor


class Undo(NamedTuple):
    """Takes back what was done to an SAE, once `n_actions` more actions are done."""

    n_actions: int
    function: Callable[[Any], Any]


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "fused adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
}


class Lasting(NamedTuple):
    """How many more actions see what was done, and whether the SAEs are copied at once."""

    n_actions: int
    is_copied: bool


lasting = st.builds(Lasting, st.sampled_from((0, 1, 3, 6)), st.sampled_from((False, False, True)))
seeds = st.integers(0, 2**16)


class TwinMachine(RuleBasedStateMachine):
    """Does the same to two SAEs, ours and the reference, and compares them after every action."""

    architecture: ClassVar[str]
    reference: ClassVar[str]
    device: ClassVar[str] = "cpu"
    order_matters: ClassVar[bool]  # of the latents that are kept
    counts: ClassVar[Counter[str]] = Counter()
    share: ClassVar[int] = 1  # of the programs one of so many is run

    saes: list[Any]

    def n_kept(self) -> int:
        """Return how many latents a step keeps."""
        raise NotImplementedError

    def use_activation_fn(self, sae: Any) -> None:
        """Make an activation function fit that was set."""

    def new_saes(self, **fields: Any) -> list[Any]:
        saes = [
            trained_sae(name, device=self.device, **fields)
            for name in (self.architecture, self.reference)
        ]
        saes[1].use_fused_path = False
        return saes

    @initialize(
        normalization=st.sampled_from((*("none",) * 4, "layer_norm", "constant_norm_rescale")),
        aux_loss_coefficient=st.sampled_from((0.5, 1.0)),
        k=st.sampled_from((1, 5, K, K)),
        n_dead=st.sampled_from((None, FEW_DEAD, MANY_DEAD)),
        rescale=st.booleans(),
        activation=st.sampled_from((*(None,) * 6, "subclass", "mixin")),
    )
    def begin(self, normalization, aux_loss_coefficient, k, n_dead, rescale, activation) -> None:
        self.counts["programs"] += 1
        self.saes = self.new_saes(
            k=k,
            normalize_activations=normalization,
            aux_loss_coefficient=aux_loss_coefficient if normalization == "none" else 0.0,
            rescale_acts_by_decoder_norm=rescale,
        )
        if activation is not None:
            self.saes = [with_doubled_activations(sae, activation) for sae in self.saes]
        self.batch_size: int = BATCH
        self.n_dead: int | None = None
        self.set_n_dead(n_dead)
        self.autocasts = False
        self.optimizers: dict[str, list[torch.optim.Optimizer]] = {}
        self.seen: tuple[list[Seen], list[Seen]] = ([], [])
        self.returned: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.n_checks = 0
        self.forget_what_was_done()

    def forget_what_was_done(self) -> None:
        """Start anew, with SAEs that are as new."""
        self.classes = [type(sae) for sae in self.saes]
        self.undos: list[Undo] = []
        self.changed: set[str] = set()
        self.optimizers = {}

    def refuse_impossible_k(self, k: int, activation: type) -> None:
        """Give ours a k that a step has to refuse, where it has an activation function of k."""
        ours = self.saes[0]
        if not isinstance(ours.activation_fn, activation):
            return
        previous, ours.activation_fn.k = ours.activation_fn.k, k
        x = random_activations().to(self.device, self.dtype)
        with pytest.raises((ValueError, RuntimeError), match=r"\bk\b"):
            ours.training_forward_pass(step_input(x))
        ours.activation_fn.k = previous
        forget_normalization(ours)
        self.forget_seen()

    # --- the same to both

    def each(self, action: Callable[[Any], Any]) -> list[Any]:
        """Return what the action returns for ours and for the reference.

        Where SAELens has a reason to raise, both do, and the result is [None, None].
        """
        results: list[Any] = []
        errors: list[Exception | None] = []
        for sae in self.saes:
            try:
                results.append(action(sae))
                errors.append(None)
            except Exception as error:
                results.append(None)
                errors.append(error)
        error, expected_error = errors
        if expected_error is None and error is None:
            return results
        if expected_error is None:
            raise AssertionError("ours raises, the reference does not") from error
        if error is None and not str(expected_error).startswith(MIXED_DTYPES):
            raise AssertionError("the reference raises, ours does not") from expected_error
        if not re.search(REASONS_TO_RAISE, str(expected_error)):
            raise expected_error
        self.counts[f"both raise {type(expected_error).__name__}: {expected_error}"[:90]] += 1
        for sae in self.saes:
            sae.zero_grad()
            forget_normalization(sae)
        self.forget_seen()
        return [None, None]

    def side(self, sae: Any) -> int:
        return 0 if sae is self.saes[0] else 1

    def take_back(self, lasting: Lasting, function: Callable[[Any], Any]) -> None:
        self.undos.append(Undo(lasting.n_actions, function))
        if lasting.is_copied:
            self.saes = self.each(copy.deepcopy)
            self.optimizers = {}

    def is_first_change(self, what: str) -> bool:
        """Return whether nothing is to be taken back that changed the same, and note it."""
        is_first = what not in self.changed
        self.changed.add(what)
        return is_first

    @contextmanager
    def precision(self) -> Iterator[None]:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocasts):
            yield

    @property
    def dtype(self) -> torch.dtype:
        return self.saes[1].dtype

    @property
    def is_low(self) -> bool:
        """Return whether products are rounded to bfloat16."""
        return self.dtype == torch.bfloat16 or (self.autocasts and self.dtype == torch.float32)

    @property
    def tolerance(self) -> float:
        if self.autocasts and self.dtype == torch.float32:
            return AUTOCAST_TOLERANCE
        return TOLERANCE[self.dtype]

    # --- batches

    def dead(self) -> torch.Tensor | None:
        return None if self.n_dead is None else dead_mask(self.n_dead).to(self.device)

    def set_n_dead(self, n_dead: int | None) -> None:
        # With a normalization SAELens refuses dead latents, whatever the coefficient.
        is_stock = self.reference != self.architecture
        is_refused = is_stock and self.saes[1].cfg.normalize_activations != "none"
        self.n_dead = 0 if is_refused and n_dead else n_dead

    def batch(self, n: int, seed: int) -> torch.Tensor | None:
        """Return activations, [n, d_in]: fewer where too few are clear, None where none is."""
        n_candidates = n * (N_LOW_CANDIDATES if self.is_low else N_CANDIDATES)
        candidates = random_activations(n_candidates, D_IN, seed=seed)
        candidates = candidates.bfloat16().to(self.device, self.dtype)  # that any dtype holds them
        margins = self.margins(candidates)
        best = margins.argsort(descending=True)[:n]
        best = best[margins[best] > (LOW_MARGIN if self.is_low else MARGIN)]
        self.counts["activations asked for"] += n
        self.counts["activations"] += len(best)
        return candidates[best] if len(best) > 0 else None

    @torch.no_grad()
    def hidden_pre(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the reference compares, in float64."""
        reference, n_seen = self.saes[1], len(self.seen[1])
        with self.precision():
            _, hidden_pre = reference.encode_with_hidden_pre(x)
        forget_normalization(reference)
        del self.seen[1][n_seen:]
        return hidden_pre.double()

    def margins(self, x: torch.Tensor) -> torch.Tensor:
        """Return how far each activation is from a tie, relative to its largest pre-activation."""
        hidden_pre = self.hidden_pre(x)
        n_kept, n_encoded = self.n_kept(), getattr(self.saes[1].activation_fn, "k", D_SAE)
        levels = hidden_pre.sort(descending=True).values
        gaps = (levels[:, :-1] - levels[:, 1:]).where(levels[:, :-1] > 0, torch.inf)
        boundaries = {k - 1 for k in (n_kept, n_encoded) if k < D_SAE}
        if self.order_matters:
            boundaries |= set(range(n_kept - 1))
        of_relu = levels[:, : max(n_kept, n_encoded)].abs()  # from zero
        margins = torch.cat((gaps[:, sorted(boundaries)], of_relu), dim=-1).amin(-1)
        return torch.minimum(margins, self.gaps_of_dead(hidden_pre)) / hidden_pre.abs().amax(-1)

    def gaps_of_dead(self, hidden_pre: torch.Tensor) -> torch.Tensor:
        """Return of each activation how far apart those dead latents are that are compared."""
        dead = self.dead()
        smallest = hidden_pre.new_full((len(hidden_pre),), torch.inf)
        for part in [] if dead is None else self.parts_of_dead(dead):
            if part.sum() > D_IN // 2:
                levels = hidden_pre[:, part].sort(descending=True).values
                smallest = smallest.minimum(levels[:, D_IN // 2 - 1] - levels[:, D_IN // 2])
        return smallest

    def parts_of_dead(self, dead: torch.Tensor) -> list[torch.Tensor]:
        """Return the dead latents, [F], that are compared with each other."""
        return [dead]

    # --- comparisons

    def step(
        self,
        way: Callable[[Callable[[], TrainStepOutput]], list[TrainStepOutput]] | None,
        seed: int,
        input_gradient: bool = False,
        input_dtype: torch.dtype | None = None,
        layout: str = "rows",
        is_logging_step: bool = False,
    ) -> None:
        """Compare a step, differentiated in the given way, or None to leave `grad` alone."""
        x, dead = self.batch(self.batch_size, seed), self.dead()
        self.counts["steps"] += 1
        if x is None:
            self.counts["steps left out"] += 1
            return
        x = x.to(input_dtype or self.dtype)
        if layout == "columns":
            x = x.T.contiguous().T
        elif layout == "3-D" and len(x) % 2 == 0:
            x = x.view(2, -1, D_IN)

        def run(sae: Any) -> tuple[list[TrainStepOutput], list[torch.Tensor | None]]:
            sae_in = x.clone().requires_grad_(input_gradient)

            def forward() -> TrainStepOutput:
                with self.precision():
                    return sae.training_forward_pass(
                        TrainStepInput(
                            sae_in=sae_in,
                            coefficients={},
                            dead_neuron_mask=dead,
                            n_training_steps=0,
                            is_logging_step=is_logging_step and len(x) > 1,
                        )
                    )

            if way is not None:
                return way(forward), [sae_in.grad, *(getattr(sae, n).grad for n in WEIGHTS)]
            output = forward()
            weights = [w for n in WEIGHTS if (w := getattr(sae, n)).requires_grad]
            if not weights:
                return [output], []
            return [output], [*torch.autograd.grad(output.loss, weights, allow_unused=True)]

        ours, expected = self.each(run)
        if expected is None:
            return
        for output, expected_output in zip(ours[0], expected[0], strict=True):
            self.compare_outputs(output, expected_output)
        self.compare_gradients(ours[1], expected[1])
        if (gradient := self.saes[1].b_dec.grad) is not None and self.saes[0].b_dec.grad is None:
            self.saes[0].b_dec.grad = gradient.clone()  # of zeros
        self.compare_seen()
        # What a step returned stays as it is, whatever comes after it.
        self.returned = [
            (tensor, tensor.detach().to_dense().clone())
            for output in ours[0]
            for tensor in (*output.losses.values(), output.sae_out, output.feature_acts)
        ]

    def compare(self, value: torch.Tensor, expected: torch.Tensor, name: str) -> None:
        # On a GPU autocast computes norms in float32. So what SAELens makes of a bfloat16 SAE is
        # float32 wherever a norm is a factor.
        is_widened = self.device == "cuda" and self.autocasts and self.dtype == torch.bfloat16
        assert value.dtype == expected.dtype or (is_widened and value.dtype == self.dtype), (
            f"{name} is {value.dtype}, expected {expected.dtype}"
        )
        assert_close(value, expected, self.tolerance, name)

    def compare_outputs(self, output: TrainStepOutput, expected: TrainStepOutput) -> None:
        assert list(output.losses) == list(expected.losses)
        losses, expected_losses = ({"loss": o.loss, **o.losses} for o in (output, expected))
        for name, expected_loss in expected_losses.items():
            loss = losses[name]
            if expected_loss == 0:
                assert loss == 0, name
                continue
            # That of a bfloat16 SAE is not rounded to bfloat16.
            assert loss.dtype == torch.promote_types(loss.dtype, expected_loss.dtype), name
            assert_close(loss, expected_loss, self.tolerance, name)
            assert loss.requires_grad == expected_loss.requires_grad, name
        self.compare(output.sae_out, expected.sae_out, "sae_out")
        acts, expected_acts = (o.feature_acts.to_dense() for o in (output, expected))
        self.compare(acts, expected_acts, "feature_acts")
        assert list(output.metrics) == list(expected.metrics)
        for name, metric in expected.metrics.items():
            assert_close(output.metrics[name], metric, self.tolerance, name)

    def compare_gradients(
        self, gradients: list[torch.Tensor | None], expected: list[torch.Tensor | None]
    ) -> None:
        norms = [float(gradient.norm()) for gradient in expected if gradient is not None]
        for place, (gradient, expected_gradient) in enumerate(
            zip(gradients, expected, strict=True)
        ):
            name = f"gradient {place} of {len(expected)}"
            if gradient is None or expected_gradient is None:
                is_b_dec = place == len(expected) - 1 and self.saes[1].b_dec.requires_grad
                if gradient is None and is_b_dec and not self.saes[1].cfg.apply_b_dec_to_input:
                    # SAELens's encoder subtracts 0 * b_dec, ours nothing.
                    assert expected_gradient is None or expected_gradient.norm() == 0, name
                    continue
                assert gradient is expected_gradient, name
                continue
            assert gradient.dtype == expected_gradient.dtype, name
            # Two parts of a bfloat16 input's gradient may be rounded before they are added.
            is_rounded = expected_gradient.dtype == torch.bfloat16
            tolerance = TOLERANCE[torch.bfloat16] if is_rounded else self.tolerance
            # A small gradient may be what large terms leave that cancel.
            scale = max(norms) / 100
            if expected_gradient.norm() >= scale:
                assert_close(gradient, expected_gradient, tolerance, name)
            else:
                assert (gradient - expected_gradient).norm() <= tolerance * scale, name
            gradient.copy_(expected_gradient)  # that small differences do not add up

    def compare_seen(self) -> None:
        seen, expected = (sorted(each, key=lambda seen: seen.name) for each in self.seen)
        assert [each.name for each in seen] == [each.name for each in expected]
        for each, expected_each in zip(seen, expected, strict=True):
            assert_close(each.tensor, expected_each.tensor, self.tolerance, each.name)
        self.forget_seen()

    def forget_seen(self) -> None:
        self.seen[0].clear()
        self.seen[1].clear()

    def compare_weights(self) -> None:
        ours, reference = self.saes
        for name in WEIGHTS:
            weight, expected = getattr(ours, name), getattr(reference, name)
            assert isinstance(weight, torch.nn.Parameter), name
            assert weight.dtype == expected.dtype, name
            assert weight.requires_grad == expected.requires_grad, name
            assert torch.equal(weight, expected), name

    def compare_calls(self, call: Callable[[Any], torch.Tensor], name: str) -> None:
        ours, expected = self.each(call)
        if expected is not None:
            self.compare(ours, expected, name)
            self.compare_seen()
        for sae in self.saes:
            forget_normalization(sae)

    @torch.no_grad()
    def compare_encode(self, seed: int) -> None:
        x = self.batch(5, seed)
        if x is not None:
            with self.precision():
                self.compare_calls(lambda sae: sae.encode(x), "encode")

    @invariant()
    def agree(self) -> None:
        for tensor, value in self.returned:
            assert torch.equal(tensor.to_dense(), value), (
                "what an earlier step returned has changed"
            )
        self.n_checks += 1
        self.compare_weights()
        self.step(None, 2**20 + self.n_checks)
        self.compare_encode(2**21 + self.n_checks)
        self.undos = [undo._replace(n_actions=undo.n_actions - 1) for undo in self.undos]
        for undo in self.undos:
            if undo.n_actions < 0:
                self.each(undo.function)
        self.undos = [undo for undo in self.undos if undo.n_actions >= 0]
        if not self.undos:
            self.changed = set()

    # --- steps

    @rule(
        seed=seeds,
        zero=st.sampled_from(("none", "zeros", "accumulate")),
        input_gradient=st.booleans(),
        input_dtype=st.sampled_from((None, None, torch.bfloat16, torch.float64)),
        layout=st.sampled_from(("rows", "rows", "columns", "3-D")),
        is_logging_step=st.booleans(),
    )
    def train(self, seed, zero, input_gradient, input_dtype, layout, is_logging_step) -> None:
        if zero != "accumulate":
            self.each(lambda sae: sae.zero_grad(set_to_none=zero == "none"))
        self.step(through_loss, seed, input_gradient, input_dtype, layout, is_logging_step)

    @rule(
        way=st.sampled_from(sorted(WAYS)),
        seed=seeds,
        accumulates=st.booleans(),
        input_gradient=st.booleans(),
    )
    def differentiate(self, way, seed, accumulates, input_gradient) -> None:
        if not accumulates:
            self.each(lambda sae: sae.zero_grad())
        self.step(WAYS[way], seed, input_gradient)

    @rule(n_steps=st.integers(2, 8), seed=seeds, optimizer=st.sampled_from(sorted(OPTIMIZERS)))
    def train_on(self, n_steps, seed, optimizer) -> None:
        # On a GPU so many steps of a kind come to be recorded and replayed.
        for step in range(n_steps if self.device == "cuda" else 2):
            self.each(lambda sae: sae.zero_grad())
            self.step(through_loss, seed + step)
            self.step_optimizer(optimizer)

    @rule(optimizer=st.sampled_from(sorted(OPTIMIZERS)))
    def step_optimizer(self, optimizer) -> None:
        if optimizer not in self.optimizers:
            build = OPTIMIZERS[optimizer]
            self.optimizers[optimizer] = [build(sae.parameters()) for sae in self.saes]
        for each in self.optimizers[optimizer]:
            each.step()
        ours, reference = self.saes
        for name in WEIGHTS:
            weight, expected = getattr(ours, name), getattr(reference, name)
            assert_close(weight, expected, TOLERANCE[self.dtype], name)
        copy_weights(reference, ours)

    @rule(
        batch_size=st.just(BATCH) | st.integers(1, 40),
        n_dead=st.sampled_from((None, 0, 1, FEW_DEAD, D_IN // 2, MANY_DEAD, D_SAE)),
    )
    def set_data(self, batch_size, n_dead) -> None:
        self.batch_size = batch_size
        self.set_n_dead(n_dead)

    @rule(lasting=lasting)
    def autocast(self, lasting) -> None:
        self.autocasts = True
        self.take_back(lasting, lambda sae: setattr(self, "autocasts", False))

    @rule(is_training=st.booleans())
    def set_mode(self, is_training) -> None:
        self.each(lambda sae: sae.train(is_training) and None)

    @rule(switch=st.sampled_from(("use_fused_path", "use_cuda_graph")), lasting=lasting)
    def switch_off(self, switch, lasting) -> None:
        setattr(self.saes[0], switch, False)
        self.take_back(lasting, lambda sae: sae is self.saes[0] and vars(sae).pop(switch, None))

    @rule(
        call=st.sampled_from(("encode", "decode", "forward")),
        shape=st.sampled_from(((D_IN,), (0, D_IN), (4, D_IN), (2, 3, D_IN))),
        mode=st.sampled_from((torch.no_grad, torch.inference_mode, torch.enable_grad)),
        seed=seeds,
    )
    def evaluate(self, call, shape, mode, seed) -> None:
        n = torch.Size(shape[:-1]).numel()
        x = self.batch(max(n, 1), seed)
        if x is None or len(x) < n:
            return
        x = x[:n].view(shape)
        with mode(), self.precision():
            acts = self.saes[1].encode(x).detach() if call == "decode" else None
            self.forget_seen()
            argument = x if acts is None else acts
            # `decode` undoes the normalization of the `encode` before it.
            if call == "decode":
                self.each(lambda sae: sae.process_sae_in(x))
                self.forget_seen()
            self.compare_calls(lambda sae: getattr(sae, call)(argument), call)

    # --- weights

    @rule(names=st.sets(st.sampled_from(WEIGHTS), min_size=1), lasting=lasting)
    def freeze(self, names, lasting) -> None:
        def set_trained(sae: Any, is_trained: bool) -> None:
            for name in names:
                getattr(sae, name).requires_grad_(is_trained)

        self.each(lambda sae: set_trained(sae, False))
        self.take_back(lasting, lambda sae: set_trained(sae, True))

    @rule(
        name=st.sampled_from(WEIGHTS),
        how=st.sampled_from(("in place", "in data", "data", "parameter", "transposed parameter")),
        factor=st.sampled_from((0.9, 1.1)),
    )
    def edit_weight(self, name, how, factor) -> None:
        @torch.no_grad()
        def edit(sae: Any) -> None:
            weight = getattr(sae, name)
            if how == "in place":
                weight.mul_(factor)
            elif how == "in data":
                weight.data.mul_(factor)
            elif how == "data":
                weight.data = factor * weight.data.contiguous()
            else:
                values = (factor * weight.detach()).contiguous()
                if how == "transposed parameter" and sae is self.saes[0]:
                    values = values.T.contiguous().T  # which SAELens could not save
                setattr(sae, name, torch.nn.Parameter(values, weight.requires_grad))

        self.each(edit)
        if "parameter" in how:
            self.optimizers = {}
        if how == "transposed parameter" and name == "W_dec":
            self.take_back(Lasting(0, False), make_contiguous)  # else it could not be saved

    @rule(
        name=st.sampled_from(WEIGHTS),
        kind=st.sampled_from(("look", "edit", "after accumulation")),
        lasting=lasting,
    )
    def hook_weight(self, name, kind, lasting) -> None:
        handles: list[Any] = []

        def add(sae: Any) -> None:
            weight, seen = getattr(sae, name), self.seen[self.side(sae)]

            def hook(gradient: torch.Tensor) -> torch.Tensor | None:
                seen.append(Seen(f"hook of {name}", gradient.detach().clone()))
                return 0.5 * gradient if kind == "edit" else None

            def hook_after(weight: torch.Tensor) -> None:
                assert weight.grad is not None
                seen.append(Seen(f"hook of {name} after accumulation", weight.grad.clone()))

            if kind == "after accumulation":
                handles.append(weight.register_post_accumulate_grad_hook(hook_after))
            else:
                handles.append(weight.register_hook(hook))

        self.each(add)
        self.take_back(lasting, lambda sae: handles and handles.pop().remove())

    # --- hooks, overridden methods, patched functions

    @rule(
        point=st.sampled_from(HOOK_POINTS),
        direction=st.sampled_from(("fwd", "bwd")),
        edits=st.booleans(),
        lasting=lasting,
    )
    def add_hook(self, point, direction, edits, lasting) -> None:
        def add(sae: Any) -> None:
            seen = self.seen[self.side(sae)]

            def hook(tensor: torch.Tensor, hook: Any) -> torch.Tensor | None:
                seen.append(Seen(f"{point} {direction}", tensor.detach().to_dense().clone()))
                return 0.7 * tensor if edits else None

            sae.add_hook(point, hook, dir=direction)

        self.each(add)
        self.take_back(lasting, lambda sae: sae.reset_hooks())

    @rule(
        what=st.sampled_from(sorted(METHODS)),
        how=st.sampled_from(("object", "subclass", "mixin")),
        lasting=lasting,
    )
    def override_method(self, what, how, lasting) -> None:
        name = what.split(",")[0]
        if not self.is_first_change(name if how == "object" else "class"):
            return
        self.each(lambda sae: override(sae, name, how, METHODS[what]))

        def restore(sae: Any) -> None:
            if how == "object":
                vars(sae).pop(name, None)
            else:
                sae.__class__ = self.classes[self.side(sae)]

        self.take_back(lasting, restore)

    @rule(name=st.sampled_from(sorted(FUNCTIONS)), lasting=lasting)
    def replace_function(self, name, lasting) -> None:
        if not self.is_first_change(name):
            return
        originals: list[Any] = []

        def replace(sae: Any) -> None:
            original = getattr(sae, name)
            originals.append(original)
            setattr(sae, name, lambda *args: FUNCTIONS[name](original, *args))

        self.each(replace)
        self.take_back(lasting, lambda sae: setattr(sae, name, originals[self.side(sae)]))

    @rule(how=st.sampled_from(sorted(ACTIVATION_FUNCTIONS)), lasting=lasting)
    def change_activation_fn(self, how, lasting) -> None:
        if self.architecture == "hierarchical_topk" and how == "relu":
            how = "subclass"  # a budget is TopK's
        if not self.is_first_change("activation_fn"):
            return
        for sae in self.saes:
            vars(sae)["put_aside"] = sae.activation_fn  # so that a copy has its own
        self.each(ACTIVATION_FUNCTIONS[how])
        self.each(self.use_activation_fn)

        def restore(sae: Any) -> None:
            if how == "patched forward":
                vars(sae.activation_fn).pop("forward", None)
            elif how == "forward hook":
                sae.activation_fn._forward_hooks.clear()
            else:
                sae.activation_fn = vars(sae)["put_aside"]
                self.use_activation_fn(sae)

        self.take_back(lasting, restore)

    # --- what a step reads besides

    @rule(
        field=st.sampled_from(
            ("rescale_acts_by_decoder_norm", "apply_b_dec_to_input", "use_sparse_activations")
        )
    )
    def switch_field(self, field) -> None:
        for sae in self.saes:
            # SAELens's own sparse activations are for another purpose.
            if field != "use_sparse_activations" or sae.cfg.architecture() in EVERY_ARCHITECTURE:
                setattr(sae.cfg, field, not getattr(sae.cfg, field))

    @rule(coefficient=st.sampled_from((0.0, 0.25, 1.0, 2)))
    def set_aux_loss_coefficient(self, coefficient) -> None:
        self.each(lambda sae: setattr(sae.cfg, "aux_loss_coefficient", coefficient))
        if self.saes[1].cfg.normalize_activations != "none":
            # The pair is refused, by SAELens as soon as a latent is dead.
            if coefficient != 0:
                previous, self.n_dead = self.n_dead, FEW_DEAD
                self.step(without_backward, 0)
                self.n_dead = previous
            self.each(lambda sae: setattr(sae.cfg, "aux_loss_coefficient", 0.0))

    # --- copies, files, dtypes

    @rule(goes_on_with_copy=st.booleans(), seed=seeds)
    def deepcopy(self, goes_on_with_copy, seed) -> None:
        copies = [copy.deepcopy(sae) for sae in self.saes]
        originals = self.saes
        # The other pair goes its own way, which this one must not notice.
        self.saes = originals if goes_on_with_copy else copies
        self.step(through_loss, seed)
        for sae in self.saes:
            for name in WEIGHTS:
                getattr(sae, name).data.mul_(1.5)
            sae.zero_grad()
        self.step(through_loss, seed + 1)
        self.saes = copies if goes_on_with_copy else originals
        self.returned = []
        self.each(lambda sae: sae.zero_grad())
        if goes_on_with_copy:
            self.optimizers = {}

    @rule(how=st.sampled_from(("file", "new", "copy", "assigned", "in place", "safetensors")))
    def save_and_load(self, how) -> None:
        @torch.no_grad()
        def reload(sae: Any) -> Any:
            state = sae.state_dict()
            if how == "safetensors":
                state = safetensors.torch.load(safetensors.torch.save(state))
                state = {name: value.to(self.device) for name, value in state.items()}
            elif how == "in place":  # as torch.distributed.checkpoint loads
                for value in state.values():
                    value.mul_(1.05)
            elif how == "assigned":
                state = {name: 1.05 * value for name, value in state.items()}
            loaded = sae
            if how == "new":
                loaded = TRAINING_CLASSES[sae.cfg.architecture()][0](sae.cfg)
            elif how == "copy":
                loaded = copy.deepcopy(sae)
            loaded.load_state_dict(state, assign=how == "assigned")
            return loaded

        def save(sae: Any) -> Any:
            with tempfile.TemporaryDirectory() as path:
                sae.save_model(path)
                sae_class = TRAINING_CLASSES[sae.cfg.architecture()][0]
                return sae_class.load_from_disk(path, device=self.device)

        requires_grad = {n: getattr(self.saes[1], n).requires_grad for n in WEIGHTS}
        loaded = self.each(save if how == "file" else reload)
        if loaded[1] is None:
            return
        self.saes = loaded
        self.saes[1].use_fused_path = False
        if how in ("file", "new"):
            self.forget_what_was_done()
        elif how == "assigned":
            for sae in self.saes:
                for name, value in requires_grad.items():
                    getattr(sae, name).requires_grad_(value)
        self.optimizers = {}
        self.forget_seen()

    @rule(seed=seeds)
    def save_for_inference(self, seed) -> None:
        def save(sae: Any) -> Any:
            with tempfile.TemporaryDirectory() as path:
                sae.save_inference_model(path)
                return SAE.load_from_disk(path, device=self.device)

        loaded = self.each(save)
        x = random_activations(3, D_IN, seed=seed).to(self.device, self.dtype)
        with torch.no_grad():
            acts, expected_acts = (sae.encode(x) for sae in loaded)
            assert_close(acts, expected_acts, TOLERANCE[self.dtype], "encode")
            outputs = [sae.decode(expected_acts) for sae in loaded]
        assert_close(*outputs, TOLERANCE[self.dtype], "decode")

    @rule(dtype=st.sampled_from((torch.float32, torch.float64, torch.bfloat16)))
    def set_dtype(self, dtype) -> None:
        self.each(lambda sae: sae.to(dtype=dtype) and None)
        self.optimizers = {}


def with_doubled_activations(sae: Any, how: str) -> Any:
    """Return an SAE whose class makes its activation function another."""
    if how == "mixin":
        bases, members = (DoublesActivations, type(sae)), {}
    else:
        bases = (type(sae),)
        members = {"get_activation_fn": DoublesActivations.get_activation_fn}
    made = type(f"Doubled{type(sae).__name__}", bases, members)(sae.cfg)
    made.load_state_dict(sae.state_dict())
    if "use_fused_path" in vars(sae):
        made.use_fused_path = sae.use_fused_path
    return made


def make_contiguous(sae: Any) -> None:
    sae.W_dec.data = sae.W_dec.data.contiguous()


def forget_normalization(sae: Any) -> None:
    """Remove what SAELens's `process_sae_in` leaves for the `decode` after it."""
    for name in ("ln_mu", "ln_std", "x_norm_coeff"):
        vars(sae).pop(name, None)


class FlexMachine(TwinMachine):
    architecture, reference = "flex_topk", "topk"
    order_matters = False

    def n_kept(self) -> int:
        return getattr(self.saes[1].activation_fn, "k", D_SAE)

    @rule(k=st.integers(1, D_SAE), of=st.sampled_from(("activation_fn", "activation_fn", "cfg")))
    def set_k(self, k, of) -> None:
        self.each(lambda sae: setattr(getattr(sae, of), "k", k))

    @rule(k=st.sampled_from((-1, D_SAE + 1)))
    def set_impossible_k(self, k) -> None:
        self.refuse_impossible_k(k, TopK)


class HierarchicalMachine(TwinMachine):
    architecture = reference = "hierarchical_topk"
    order_matters = True

    budget: int | None = None  # as it was set

    def n_kept(self) -> int:
        return self.saes[1].cfg.k

    def forget_what_was_done(self) -> None:
        super().forget_what_was_done()
        self.budget = None

    def use_activation_fn(self, sae: Any) -> None:
        # Its k is a budget that was set.
        self.budget = sae.activation_fn.k if self.budget is None else self.budget
        sae.activation_fn.k = self.budget

    @rule(
        k=st.integers(1, 12),
        below=st.none() | st.sets(st.integers(1, 11)),
        weights=st.none() | st.lists(st.integers(0, 3), min_size=11, max_size=11),
        seed=seeds,
    )
    def set_levels(self, k, below, weights, seed) -> None:
        budgets = None if below is None else [*sorted(n for n in below if n < k), k]
        self.set_cfg_k(k)
        for sae in self.saes:
            sae.cfg.budgets = budgets
            n_below = len(budgets or range(k)) - 1
            sae.cfg.level_weights = None if weights is None else [*weights[:n_below], 0.5]
        self.compare_with_new_sae(seed)

    @rule(k=st.integers(1, 12), seed=seeds)
    def set_k(self, k, seed) -> None:
        previous, budgets = self.saes[0].cfg.k, self.saes[0].cfg.budgets
        of_levels = ("budgets", budgets), ("level_weights", self.saes[0].cfg.level_weights)
        given = [name for name, value in of_levels if value is not None]
        if k == previous or not given:
            self.set_cfg_k(k)
            self.compare_with_new_sae(seed)
            return
        for sae in self.saes:
            sae.cfg.k = k
        self.expect_error(given[0])
        for sae in self.saes:
            sae.cfg.k = previous

    def set_cfg_k(self, k: int) -> None:
        for sae in self.saes:
            sae.cfg.k = k
            if self.budget is not None and self.budget > k:
                sae.budget = k
        self.budget = None if self.budget is None else min(self.budget, k)

    @rule(
        field_and_value=st.sampled_from(
            (
                ("k", 0),
                ("k", D_SAE + 1),
                ("budgets", []),
                ("budgets", [2, 1]),
                ("budgets", [0, 1]),
                ("budgets", [1, D_SAE]),
                ("budgets", "1"),
                ("level_weights", []),
                ("level_weights", [-1.0]),
                ("level_weights", 1.0),
            )
        )
    )
    def set_impossible_levels(self, field_and_value) -> None:
        field, value = field_and_value
        previous = getattr(self.saes[0].cfg, field)
        for sae in self.saes:
            setattr(sae.cfg, field, value)
        self.expect_error(field)
        for sae in self.saes:
            setattr(sae.cfg, field, previous)

    def expect_error(self, field: str) -> None:
        x = random_activations().to(self.device, self.dtype)
        for sae in self.saes:
            with pytest.raises(ValueError, match=field):
                sae.training_forward_pass(step_input(x))
            forget_normalization(sae)
        self.forget_seen()

    @rule(budget=st.integers(1, 12), of_activation_fn=st.booleans())
    def set_budget(self, budget, of_activation_fn) -> None:
        if budget > self.saes[1].cfg.k:
            return
        self.budget = budget
        for sae in self.saes:
            if of_activation_fn:
                sae.activation_fn.k = budget
            else:
                sae.budget = budget

    @rule(budget=st.integers(1, 12), seed=seeds)
    def train_at_budget(self, budget, seed) -> None:
        """A budget is for `encode`: a step keeps cfg.k latents, whatever it is."""
        if budget > self.saes[1].cfg.k:
            return
        with self.saes[0].at_budget(budget), self.saes[1].at_budget(budget):
            self.compare_encode(seed)
            self.step(through_loss, seed)
        self.each(lambda sae: sae.zero_grad())

    def compare_with_new_sae(self, seed: int) -> None:
        """Compare ours with an SAE that is made with the config as it is now."""
        x, dead, ours = self.batch(BATCH, seed), self.dead(), self.saes[0]
        is_plain = type(ours) is TRAINING_CLASSES[self.architecture][0] and not self.undos
        if x is None or not is_plain or ours.cfg.normalize_activations != "none":
            return
        made = type(ours)(dataclasses.replace(ours.cfg))
        copy_weights(ours, made)
        with torch.no_grad(), self.precision():
            outputs = [each.training_forward_pass(step_input(x, dead)) for each in (ours, made)]
            self.compare_outputs(*outputs)
            if self.budget is None:
                self.compare(ours.encode(x), made.encode(x), "encode")


class BatchMachine(TwinMachine):
    architecture, reference = "flex_batchtopk", "batchtopk"
    share = SHARE_OF_BATCHES

    def new_saes(self, k: float, **fields: Any) -> list[Any]:
        return super().new_saes(k=k - 0.3, **fields)

    def batch(self, n: int, seed: int) -> torch.Tensor | None:
        """Return activations, [n, d_in], no pre-activation of which is near the last one kept.

        None where there are none such. Each activation is clear of a common bound. As many
        pre-activations are above it as are kept.
        """
        n_candidates = max(60, n * (N_LOW_CANDIDATES if self.is_low else N_CANDIDATES))
        candidates = random_activations(n_candidates, D_IN, seed=seed)
        candidates = candidates.bfloat16().to(self.device, self.dtype)
        hidden_pre = self.hidden_pre(candidates)
        k = getattr(self.saes[1].activation_fn, "k", D_SAE)
        n_above = max(1, int(k * n_candidates))
        bound = hidden_pre.flatten().sort(descending=True).values[n_above - 1].clamp(min=0)
        gaps = (hidden_pre - bound).abs().amin(-1).minimum(self.gaps_of_dead(hidden_pre))
        is_clear = gaps / hidden_pre.abs().amax(-1) > (LOW_MARGIN if self.is_low else MARGIN)
        counts = (hidden_pre > bound).sum(-1)
        chosen = self.that_add_up(counts.tolist(), is_clear.tolist(), n, int(k * n), bound == 0)
        self.counts["activations asked for"] += n
        self.counts["activations"] += 0 if chosen is None else n
        return None if chosen is None else candidates[chosen]

    @staticmethod
    def that_add_up(
        counts: list[int], is_clear: list[bool], n: int, total: int, fewer_will_do: bool
    ) -> list[int] | None:
        """Return n of the clear ones, whose counts add up to `total`; None if none are found."""
        left = [i for i, clear in enumerate(is_clear) if clear]
        if len(left) < n:
            return None
        chosen: list[int] = []
        missing = total
        for n_left in range(n, 0, -1):
            wanted = 0 if fewer_will_do else missing / n_left
            best = min(left, key=lambda i: abs(counts[i] - wanted))
            left.remove(best)
            chosen.append(best)
            missing -= counts[best]
        if missing == 0 or (fewer_will_do and missing > 0):
            return chosen
        for i in chosen:  # One is exchanged for another.
            for j in left:
                if counts[j] - counts[i] == missing:
                    return [j if each == i else each for each in chosen]
        return None

    @invariant()
    def agree(self) -> None:
        super().agree()
        assert_close(*(sae.topk_threshold for sae in self.saes), 10 * self.tolerance, "threshold")

    moves_again_in_checkpoints: ClassVar[bool] = False  # SAELens's threshold

    def step(self, way: Any, *args: Any, **kwargs: Any) -> None:
        super().step(way, *args, **kwargs)
        ours, reference = self.saes
        assert ours.topk_threshold.dtype == reference.topk_threshold.dtype
        if not (way is through_checkpoint and self.moves_again_in_checkpoints):
            assert_close(ours.topk_threshold, reference.topk_threshold, self.tolerance, "threshold")
        ours.topk_threshold.copy_(reference.topk_threshold)  # that differences do not add up

    @rule(
        k=st.sampled_from((0.01, 0.4, 1, 2.7, K, 23.5, D_SAE)),
        of=st.sampled_from(("activation_fn", "activation_fn", "cfg")),
    )
    def set_k(self, k, of) -> None:
        self.each(lambda sae: setattr(getattr(sae, of), "k", k))

    @rule(lr=st.sampled_from((0.0, 0.01, 0.7)))
    def set_threshold_lr(self, lr) -> None:
        self.each(lambda sae: setattr(sae.cfg, "topk_threshold_lr", lr))

    @rule(k=st.sampled_from((-1, D_SAE + 1)))
    def set_impossible_k(self, k) -> None:
        self.refuse_impossible_k(k, BatchTopK)

    @rule(value=st.sampled_from((0.0, 0.3)), how=st.sampled_from(("in place", "tensor")))
    def set_threshold(self, value, how) -> None:
        for sae in self.saes:
            if how == "in place":
                sae.topk_threshold.fill_(value)
            else:
                sae.topk_threshold = torch.full_like(sae.topk_threshold, value)


class MatryoshkaMachine(BatchMachine):
    architecture, reference = "flex_matryoshka_batchtopk", "matryoshka_batchtopk"
    # SAELens's losses of widths come after its threshold's update. So a checkpoint, which computes
    # a step again up to what it has to know, updates it again.
    moves_again_in_checkpoints = True

    def new_saes(self, k: float, **fields: Any) -> list[Any]:
        # It takes no normalization of a sample.
        return super().new_saes(k=k, **{**fields, "normalize_activations": "none"})

    def parts_of_dead(self, dead: torch.Tensor) -> list[torch.Tensor]:
        cfg = self.saes[1].cfg
        if not cfg.use_matryoshka_aux_loss:
            return [dead]
        latent = torch.arange(D_SAE, device=dead.device)
        bounds = zip((0, *cfg.matryoshka_widths), cfg.matryoshka_widths, strict=False)
        return [dead & (first <= latent) & (latent < width) for first, width in bounds]

    @rule(by_width=st.booleans())
    def set_aux_loss_by_width(self, by_width) -> None:
        self.each(lambda sae: setattr(sae.cfg, "use_matryoshka_aux_loss", by_width))


# --- the tests


def run_programs(machine: type[TwinMachine], device: str, n_programs: int) -> Counter[str]:
    """Run random programs, and return what was counted."""
    counts: Counter[str] = Counter()
    made = type(f"{machine.__name__}On{device}", (machine,), {"device": device, "counts": counts})
    run_state_machine_as_test(
        made,
        settings=settings(
            max_examples=n_programs,
            stateful_step_count=N_ACTIONS,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )
    # Few were left out because latents nearly tied.
    assert counts["programs"] >= n_programs
    assert counts["activations"] > 0.8 * counts["activations asked for"]
    assert counts["steps left out"] < 0.05 * counts["steps"]
    return counts


MACHINES = (FlexMachine, HierarchicalMachine, BatchMachine, MatryoshkaMachine)
machines = pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.architecture)


@pytest.mark.filterwarnings("ignore::UserWarning")  # a step says why it takes the slow path
@machines
def test_any_program_gives_what_the_reference_gives(machine) -> None:
    run_programs(machine, "cpu", max(LEAST_PROGRAMS, N_PROGRAMS // machine.share))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("part", range(N_PARTS))
@machines
def test_any_program_gives_what_the_reference_gives_with_replays(
    machine, part, monkeypatch
) -> None:
    replay, n_replays = torch.cuda.CUDAGraph.replay, 0

    def counted_replay(graph: torch.cuda.CUDAGraph) -> None:
        nonlocal n_replays
        n_replays += 1
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted_replay)
    seeded = hypothesis.seed(part)(type(f"Part{part}{machine.__name__}", (machine,), {}))
    n_programs = N_PROGRAMS_PER_PART // machine.share
    run_programs(seeded, "cuda", n_programs)
    assert n_replays > n_programs
