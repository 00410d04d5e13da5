"""Where `accelerate()` and `fused_adam()` change SAELens, and how that is undone."""

import ast
import hashlib
import inspect
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import sae_lens
from sae_lens import llm_sae_training_runner, load_model, multi_sae_training_runner
from sae_lens.load_model import HookedProxyLM
from sae_lens.training import activations_store, sae_trainer
from sae_lens.training import mixing_buffer as mixing_module
from sae_lens.training import prefetch as prefetch_module
from sae_lens.training.activations_store import ActivationsStore
from torch.optim import Adam

from .adam import FusedAdam
from .language_model import run_with_cache
from .mixing_buffer import mixing_buffer
from .prefetch import PrefetchingIterator
from .recorded_steps import forget_recordings_of_several
from .resumption import LOAD_TRAINER_STATE, load_trainer_state
from .tokens import tokenized_sequences
from .trainer_step import train_step


class _Seam(NamedTuple):
    """
    A name in SAELens that stands for something of ours within the block.

    Args:
        owner: module or class that has the name.
        name: the name.
        ours: what it stands for within the block.
        part: what a user loses where SAELens does not have it.
        is_known: whether what SAELens has there is what ours does the work of.
    """

    owner: Any
    name: str
    ours: Any
    part: str
    is_known: Callable[[Any], bool]


def fingerprint(function: Any) -> str | None:
    """Return a short digest of a function's code, whatever its comments, layout and docstring.

    It is None for what has no source.
    """
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
        (definition,) = ast.parse(source).body
    except (OSError, TypeError, ValueError, SyntaxError):
        return None
    if not isinstance(definition, ast.FunctionDef):
        return None
    if ast.get_docstring(definition) is not None:
        definition.body = definition.body[1:]
    return hashlib.sha256(ast.unparse(definition).encode()).hexdigest()[:16]


def _fingerprints(*functions: Any) -> tuple[str | None, ...]:
    return tuple(fingerprint(each) for each in functions)


# The code that ours is equal to, by its fingerprint: that of SAELens 6.54.0 to 6.54.12.
TRAIN_STEP = "ce659a0620700418"
MIXING_BUFFER = "42a84dd9b7985c08"
TOKENIZED_SEQUENCES = ("108e17958d51e94c", "7b3c0508de7841f1")
RUN_WITH_CACHE = ("94d2da907897c86f", "5187917b8003b861", "180f8a1638ac4788")

_OPTIMIZER = _Seam(
    sae_trainer, "Adam", FusedAdam, "the fused optimizer", is_known=lambda theirs: theirs is Adam
)
_SEAMS = (
    _OPTIMIZER,
    _Seam(
        sae_trainer.SAETrainer,
        "_train_step",
        train_step,
        "clipping within the optimizer's step, and one count of what fired",
        is_known=lambda theirs: fingerprint(theirs) == TRAIN_STEP,
    ),
    _Seam(
        sae_trainer.SAETrainer,
        "load_trainer_state",
        load_trainer_state,
        "warnings of what a checkpoint decides",
        is_known=lambda theirs: theirs is LOAD_TRAINER_STATE,
    ),
    *(
        _Seam(
            module,
            "mixing_buffer",
            mixing_buffer,
            f"the mixing buffer {of}",
            is_known=lambda theirs: fingerprint(theirs) == MIXING_BUFFER,
        )
        for module, of in (
            (activations_store, "of a run with one SAE"),
            (mixing_module, "of a run with several SAEs"),
        )
    ),
    *(
        _Seam(
            module,
            "PrefetchingIterator",
            PrefetchingIterator,
            f"a resumed run {of} that prefetches and waits until the text that was read is skipped",
            is_known=lambda theirs: (
                theirs is prefetch_module.PrefetchingIterator and hasattr(theirs, "_run")
            ),
        )
        for module, of in (
            (llm_sae_training_runner, "with one SAE"),
            (multi_sae_training_runner, "with several SAEs"),
        )
    ),
    _Seam(
        ActivationsStore,
        "_iterate_tokenized_sequences",
        tokenized_sequences,
        "reading a pretokenized dataset many rows at a time",
        is_known=lambda theirs: (
            _fingerprints(theirs, ActivationsStore._iterate_raw_dataset) == TOKENIZED_SEQUENCES
        ),
    ),
    _Seam(
        HookedProxyLM,
        "run_with_cache",
        run_with_cache,
        "Hugging Face's model as one function",
        is_known=lambda theirs: (
            _fingerprints(theirs, HookedProxyLM.forward, load_model.get_hook_fn) == RUN_WITH_CACHE
        ),
    ),
)


@contextmanager
def accelerate() -> Iterator[None]:
    """Make SAELens train faster within the `with` block: around a runner's making and running.

        with sae_lens_flex.accelerate():
            sae = LanguageModelSAETrainingRunner(cfg).run()

    `MultiSAETrainingRunner`, `SAETrainer` and `MultiSAETrainer` go faster likewise, whatever their
    SAEs are. A step's results are SAELens's up to rounding, and checkpoints are interchangeable.
    Eight things change:

    - A trainer that is made within the block has `torch.optim.Adam(fused=True)`, see `fused_adam`.
    - A trainer's step within the block clips the gradients in the pass in which Adam reads them.
      That saves SAELens's pass that reads and writes them all; the pass for their norm stays. The
      step also counts once, not twice, how often each latent fired. Hooks on parameters see the
      gradients before clipping, and hooks after the optimizer's step see clipped ones, as in
      SAELens. Gradients are clipped in SAELens's way where the optimizer is another one or has
      hooks before its step, where they are not float32, and where
      `torch.nn.utils.clip_grad_norm_` was replaced. A subclass's own `_train_step` is called.
    - On a GPU a step of one of our SAEs is one function, from the normalized activations to Adam
      and the statistics of firing. Adam's kernel there leaves the gradients as they are. The losses
      of such a step carry no graph, because the backward pass has been done. The number of dead
      latents is not waited for: the auxiliary loss takes all that may be dead by now, and those
      that are not add nothing to it. A step is an ordinary one where anyone would see the
      difference: with hooks on parameters or around the optimizer's step, with a gradient left on a
      parameter, with methods replaced on the SAE, the trainer or the optimizer, and with
      activations that need a gradient. The first step is one too, because it makes Adam's state,
      and every step where `sae.use_cuda_graph` is False. So is a step of more than 2^25 weights
      whose widths have auxiliary losses of their own, while latents may be dead. Up to d_in * d_sae
      = 2^29, and up to 2^42 with the batch, the function is recorded as one CUDA graph and replayed
      in one launch. Larger steps, and those that log, are launched piece by piece. Several
      processes record steps that are larger by their number, with what they exchange. These
      recordings end with the block: end the group of processes after it.
    - Activations are mixed in memory that is allocated once, on the device where they lie. It
      holds SAELens's buffer and one chunk from the language model. SAELens copies the buffer for
      every chunk. On a CPU the batches are the same, bit for bit. On a GPU the permutations are
      drawn there, so the batches are other ones of the same distribution. The dtype is that in
      which the activations come, as in SAELens: in a run of one SAE float32, whatever the config's
      `dtype`, and in a run of several the language model's.
    - With `prefetch_llm_batches` the thread that makes batches begins when the trainer asks for the
      first one. In SAELens it begins at once, while a run that resumes still skips the text that it
      was trained on. Such a run fails, or trains on that text again.
    - A pretokenized `datasets.Dataset` is read many rows at a time. The sequences, their order and
      what a checkpoint says of them are SAELens's. A dataset that is streamed (`streaming=True`,
      SAELens's default) or has something else than lists of whole numbers is read in SAELens's way.
    - Hugging Face's model (`model_class_name="AutoModelForCausalLM"`) runs up to the last hooked
      module as one function, which `compile_llm` compiles as one graph. SAELens's way falls into
      a piece a layer. The model does not store keys and values for a next token, and under
      `compile_llm` uses attention's causal flag where transformers would make a mask. Activations
      are the same. With hooks of other people on the model it runs in SAELens's way.
    - A run that goes on from a checkpoint is warned where SAELens loads other settings of the
      optimizer and of the learning rate's schedule than the config's, and where no token is left to
      train on. A `resume_from_checkpoint` that is no checkpoint names those in the folders below.

    After the block, also after an error, SAELens is as it was. A trainer that was made within it
    keeps its optimizer, a data loader that was begun within it its buffer and its way of reading,
    and a model that `compile_llm` compiled within it stays so. Blocks may be nested.

    Where SAELens lacks one of these places, or other code is there than is known here, because of
    another version or of a patch, that place stays as it is. A warning names what is left out. The
    rest works.
    """
    with ExitStack() as undo:
        undo.callback(forget_recordings_of_several)
        _put_in_place(_SEAMS, undo, "accelerate")
        yield


@contextmanager
def fused_adam() -> Iterator[None]:
    """Make SAELens's trainer build `torch.optim.Adam(fused=True)` within the `with` block.

        with sae_lens_flex.fused_adam():
            sae = LanguageModelSAETrainingRunner(cfg).run()

    It is the part of `accelerate` that changes the optimizer and nothing else. It is the same Adam
    up to rounding. Its step reads and writes every tensor once, so it is faster. An optimizer that
    is built within the block stays fused after it, whatever SAE it is for. An optimizer that was
    built before is left as it was.

    A checkpoint is the same with and without the block. The block decides, not the checkpoint: a
    run that is resumed within it is fused, one that is resumed outside is not. (`torch.optim.Adam`
    takes the setting from the checkpoint.)
    """
    with ExitStack() as undo:
        _put_in_place((_OPTIMIZER,), undo, "fused_adam")
        yield


def _put_in_place(seams: tuple[_Seam, ...], undo: ExitStack, caller: str) -> None:
    for owner, name, ours, part, is_known in seams:
        theirs = vars(owner).get(name)
        if theirs is ours:
            continue
        if theirs is None or not is_known(theirs):
            found = "no" if theirs is None else "an unknown"
            warnings.warn(
                f"{caller}() leaves out {part}: SAELens {sae_lens.__version__} has {found} "
                f"{owner.__name__}.{name}",
                stacklevel=4,
            )
            continue
        undo.callback(setattr, owner, name, theirs)
        setattr(owner, name, ours)
