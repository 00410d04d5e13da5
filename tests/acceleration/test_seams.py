"""What accelerate() puts into SAELens, that it is taken out again, and what it leaves alone."""

import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens import (
    ActivationsStore,
    SAETrainer,
    llm_sae_training_runner,
    multi_sae_training_runner,
)
from sae_lens.load_model import HookedProxyLM
from sae_lens.training import activations_store, mixing_buffer, sae_trainer
from torch.optim import Adam, AdamW

import sae_lens_flex
from sae_lens_flex.acceleration.seams import fingerprint

from .trainers import new_trainer, take_steps

PLACES = {
    "Adam": (sae_trainer, "Adam"),
    "_train_step": (SAETrainer, "_train_step"),
    "load_trainer_state": (SAETrainer, "load_trainer_state"),
    "mixing_buffer of one": (activations_store, "mixing_buffer"),
    "mixing_buffer of several": (mixing_buffer, "mixing_buffer"),
    "prefetching of one": (llm_sae_training_runner, "PrefetchingIterator"),
    "prefetching of several": (multi_sae_training_runner, "PrefetchingIterator"),
    "sequences": (ActivationsStore, "_iterate_tokenized_sequences"),
    "run_with_cache": (HookedProxyLM, "run_with_cache"),
}
every_place = pytest.mark.parametrize("place", PLACES)


def in_place() -> dict[str, Any]:
    return {key: vars(owner).get(name) for key, (owner, name) in PLACES.items()}


SAELENS = in_place()


@pytest.fixture(autouse=True)
def _saelens_is_as_it_was():
    yield
    assert in_place() == SAELENS


def test_this_saelens_has_every_place() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with sae_lens_flex.accelerate():
            changed = in_place()
    assert all(changed[place] is not SAELENS[place] for place in PLACES)
    assert all(theirs.__module__.startswith(("sae_lens.", "torch.")) for theirs in SAELENS.values())


def test_fused_adam_changes_the_optimizer_alone() -> None:
    with sae_lens_flex.fused_adam():
        changed = in_place()
    assert [place for place in PLACES if changed[place] is not SAELENS[place]] == ["Adam"]


def test_error_within_the_block_leaves_saelens_as_it_was() -> None:
    with pytest.raises(ValueError, match="within"), sae_lens_flex.accelerate():
        raise ValueError("within")
    assert in_place() == SAELENS


@pytest.mark.parametrize("inner", ["accelerate", "fused_adam"])
@pytest.mark.parametrize("outer", ["accelerate", "fused_adam"])
def test_blocks_nest(outer, inner) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with getattr(sae_lens_flex, outer)():
            before = in_place()
            with getattr(sae_lens_flex, inner)():
                within = in_place()
            assert in_place() == before
            with pytest.raises(ValueError, match="within"), getattr(sae_lens_flex, inner)():
                raise ValueError("within")
            assert in_place() == before
    assert in_place() == SAELENS
    changed = [place for place in PLACES if within[place] is not SAELENS[place]]
    assert changed == (list(PLACES) if "accelerate" in (outer, inner) else ["Adam"])


@contextmanager
def block_that_warns(match: str, block: Any = sae_lens_flex.accelerate) -> Iterator[None]:
    with ExitStack() as stack:
        with pytest.warns(UserWarning, match=match) as caught:
            stack.enter_context(block())
        (warning,) = caught
        assert isinstance(warning.message, UserWarning)
        yield


@every_place
def test_place_that_saelens_lacks_is_left_out_with_a_warning(place, monkeypatch) -> None:
    owner, name = PLACES[place]
    saelens = f"SAELens {re.escape(sae_lens.__version__)} has no {owner.__name__}.{name}"
    with monkeypatch.context() as patch:
        patch.delattr(owner, name)
        with block_that_warns(rf"^accelerate\(\) leaves out .*: {saelens}$"):
            others = [each for each in PLACES if each != place]
            assert all(in_place()[each] is not SAELENS[each] for each in others)
            assert in_place()[place] is None
        assert in_place()[place] is None


def test_warning_points_at_the_block(monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.delattr(activations_store, "mixing_buffer")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with sae_lens_flex.accelerate():
                pass
    assert [warning.filename for warning in caught] == [__file__]


def of_another_version(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("not called")


@every_place
def test_other_code_in_a_place_stays_with_a_warning(place, monkeypatch) -> None:
    owner, name = PLACES[place]
    other = AdamW if place == "Adam" else of_another_version
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, other)
        with block_that_warns(f"has an unknown {owner.__name__}.{name}"):
            assert in_place()[place] is other
        assert in_place()[place] is other


def test_trainer_works_without_the_step(monkeypatch) -> None:
    step = SAETrainer._train_step

    def another_step(self: Any, sae: Any, sae_in: torch.Tensor) -> Any:
        return step(self, sae, sae_in)

    with monkeypatch.context() as patch:
        patch.setattr(SAETrainer, "_train_step", another_step)
        with block_that_warns("clipping"):
            trainer = new_trainer()
            take_steps(trainer, 4)
    assert trainer.optimizer.param_groups[0]["fused"]
    expected = new_trainer()
    take_steps(expected, 4)
    for name, parameter in expected.sae.named_parameters():
        torch.testing.assert_close(trainer.sae.get_parameter(name), parameter, rtol=0, atol=2e-5)


@pytest.mark.parametrize("block", [sae_lens_flex.accelerate, sae_lens_flex.fused_adam])
def test_trainer_works_without_the_optimizer(block, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sae_trainer, "Adam", AdamW)
        with block_that_warns(rf"{block.__name__}\(\) leaves out the fused optimizer", block):
            trainer = new_trainer()
            take_steps(trainer, 4)
        expected = new_trainer()
        take_steps(expected, 4)
    assert type(trainer.optimizer) is AdamW
    for name, parameter in expected.sae.named_parameters():
        torch.testing.assert_close(trainer.sae.get_parameter(name), parameter, rtol=0, atol=0)
    assert type(new_trainer().optimizer) is Adam


def plain_function() -> Any:
    def add(x: int) -> int:
        return x + 1

    return add


def function_with_words() -> Any:
    def add(
        x: int,
    ) -> int:
        """Add one."""
        return x + 1  # as it says

    return add


def other_function() -> Any:
    def add(x: int) -> int:
        return x + 2

    return add


def test_fingerprint_tells_code_apart_and_nothing_else() -> None:
    add = fingerprint(plain_function())
    assert add is not None
    assert add == fingerprint(function_with_words())
    assert add == fingerprint(torch.no_grad()(plain_function()))
    assert add != fingerprint(other_function())
    for without_source in (len, SAETrainer, None, 3):
        assert fingerprint(without_source) is None
