"""Pretokenized datasets within accelerate(): the tokens are SAELens's, whatever the dataset."""

import contextlib
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from datasets import Array2D, Dataset, Features, Sequence, Value, concatenate_datasets
from sae_lens import ActivationsStore

import sae_lens_flex
from sae_lens_flex.acceleration import tokens as ours

N_ROWS, LENGTH = 75, 12  # more rows than are read at a time, twice


def rows(n: int = N_ROWS, length: int = LENGTH) -> list[list[int]]:
    return torch.arange(n * length).view(n, length).tolist()


def ragged(n: int = N_ROWS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(LENGTH, 3 * LENGTH, (n,), generator=generator).tolist()
    return [list(range(i, i + length)) for i, length in enumerate(lengths)]


def dataset(values: Any = None, feature: Any = None, name: str = "tokens") -> Dataset:
    features = None if feature is None else Features({name: feature})
    return Dataset.from_dict({name: rows() if values is None else values}, features=features)


def of_large_lists() -> Dataset:
    column = pa.array(rows(), type=pa.large_list(pa.int32()))
    return Dataset(pa.table({"tokens": column}))


PLAIN = {
    "int64": lambda: dataset(),
    "int32": lambda: dataset(feature=Sequence(Value("int32"))),
    "uint16": lambda: dataset(feature=Sequence(Value("uint16"))),
    "uint32": lambda: dataset(feature=Sequence(Value("uint32"))),
    "fixed length": lambda: dataset(feature=Sequence(Value("int32"), length=LENGTH)),
    "large lists": of_large_lists,
    "input_ids": lambda: dataset(name="input_ids"),
    "among other columns": lambda: (
        dataset().add_column("text", ["a"] * N_ROWS).add_column("input_ids", rows())
    ),
    "longer than the context": lambda: dataset(ragged()),
    "several pieces": lambda: concatenate_datasets([dataset(rows(n)) for n in (5, 40, 1, 30)]),
    "shuffled": lambda: dataset().shuffle(seed=0),
    "shuffled, longer": lambda: dataset(ragged()).shuffle(seed=0),
    "selected": lambda: dataset().select([3, 3, 70, *range(10, 60)]),
    "sliced": lambda: dataset(ragged()).select(range(9, 60)),
    "fixed length, sliced": lambda: dataset(feature=Sequence(Value("int32"), length=LENGTH)).select(
        range(9, 60)
    ),
    "one row": lambda: dataset(rows(1)),
    "as many as are read at a time": lambda: dataset(rows(ours.ROWS)),
}
every_plain = pytest.mark.parametrize("made", PLAIN.values(), ids=PLAIN)


def model() -> Any:
    return SimpleNamespace(W_E=torch.zeros(1), tokenizer=None)


def new_store(
    data: Any, *, store_class: type[ActivationsStore] = ActivationsStore, **fields: Any
) -> ActivationsStore:
    options: dict[str, Any] = {
        "model": model(),
        "dataset": data,
        "streaming": False,
        "hook_name": "blocks.0.hook_resid_post",
        "hook_head_index": None,
        "context_size": LENGTH,
        "d_in": 2,
        "n_batches_in_buffer": 2,
        "total_training_tokens": 1,
        "store_batch_size_prompts": 4,
        "train_batch_size_tokens": 4,
        "prepend_bos": True,
        "normalize_activations": "none",
        "device": torch.device("cpu"),
        "dtype": "float32",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SAELens's, of rows that are longer than the context
        return store_class(**(options | fields))


def batches(
    store: ActivationsStore, n: int = 32, sizes: tuple[int | None, ...] = (None, 1, 7, 40)
) -> list[Any]:
    """Return batches of several sizes over several epochs, and what a checkpoint says after each.

    Two of three calls ask for StopIteration at an epoch's end. It comes into the list.
    """
    found: list[Any] = []
    for i in range(n):
        try:
            batch = store.get_batch_tokens(sizes[i % len(sizes)], raise_at_epoch_end=i % 3 < 2)
        except StopIteration as stop:
            found.append(str(stop))
        else:
            assert batch.dtype == torch.long
            found.append(batch.tolist())
        found.append(store.state_dict()["n_dataset_processed"].item())
    return found


def stream(data: Any, *, accelerated: bool, **fields: Any) -> list[Any]:
    with sae_lens_flex.accelerate() if accelerated else contextlib.nullcontext():
        return batches(new_store(data, **fields))


@pytest.fixture
def read_by_us(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets how many rows were read together, each time."""
    counts: list[int] = []
    own = ours._sequences

    def counted(column: Any, *arguments: Any) -> Any:
        counts.append(len(column))
        return own(column, *arguments)

    monkeypatch.setattr(ours, "_sequences", counted)
    return counts


@every_plain
@pytest.mark.parametrize("context_size", [LENGTH, LENGTH - 5])
def test_tokens_are_saelens_over_epochs(made, context_size, read_by_us) -> None:
    expected = stream(made(), accelerated=False, context_size=context_size)
    assert not read_by_us
    assert stream(made(), accelerated=True, context_size=context_size) == expected
    assert len(read_by_us) > 2  # several epochs
    assert any(isinstance(each, str) for each in expected)  # which end


@every_plain
def test_run_goes_on_where_the_checkpoint_says(made, tmp_path) -> None:
    path = str(tmp_path / "state.safetensors")
    for n_before in (0, 3, 9):
        found = {}
        for accelerated in (False, True):
            with sae_lens_flex.accelerate() if accelerated else contextlib.nullcontext():
                store = new_store(made())
                batches(store, n_before)
                store.save(path)
                resumed = new_store(made())
                resumed.load(path)
                found[accelerated] = batches(resumed, 12)
        assert found[True] == found[False]


def test_epoch_that_begins_after_the_block_is_read_by_saelens(read_by_us) -> None:
    expected = stream(dataset(), accelerated=False)
    with sae_lens_flex.accelerate():
        store = new_store(dataset())
    assert batches(store) == expected
    assert sum(read_by_us) == N_ROWS


def test_row_can_be_changed_without_changing_another() -> None:
    with sae_lens_flex.accelerate():
        store = new_store(dataset())
        for row in rows()[:40]:
            sequence = next(store.iterable_sequences)
            assert sequence.tolist() == row
            sequence.zero_()


def test_shuffling_and_another_dataset_act_from_the_next_epoch_on() -> None:
    found = {}
    for accelerated in (False, True):
        with sae_lens_flex.accelerate() if accelerated else contextlib.nullcontext():
            store = new_store(dataset())
            found[accelerated] = batches(store, 2)
            store.shuffle_input_dataset(seed=1)
            found[accelerated] += batches(store, 30)
    assert found[True] == found[False]


class EveryOtherRow(ActivationsStore):
    def _iterate_raw_dataset(self) -> Iterator[Any]:
        yield from (row for i, row in enumerate(super()._iterate_raw_dataset()) if i % 2)


class OfAnotherKind(Dataset):
    pass


def with_a_transform() -> Dataset:
    """Return a dataset whose rows become others when they are read. SAELens ignores that."""
    data = dataset()
    data.set_transform(lambda batch: {"tokens": [row[::-1] for row in batch["tokens"]]})
    return data


OTHERS = {
    "streamed": (lambda: dataset().to_iterable_dataset(), {}),
    "numbers with a point": (lambda: dataset([[i + 0.5] * LENGTH for i in range(N_ROWS)]), {}),
    "of eight bytes without a sign": (lambda: dataset(feature=Sequence(Value("uint64"))), {}),
    "in two dimensions": (
        lambda: dataset(
            torch.arange(N_ROWS * LENGTH * 2).view(N_ROWS, LENGTH, 2).tolist(),
            Array2D((LENGTH, 2), "int64"),
        ),
        {},
    ),
    "of another kind": (lambda: OfAnotherKind(dataset().data), {}),
    "read by a subclass": (dataset, {"store_class": EveryOtherRow}),
}


@pytest.mark.parametrize(("made", "fields"), OTHERS.values(), ids=OTHERS)
def test_other_datasets_are_read_in_saelens_way(made, fields, read_by_us) -> None:
    expected = stream(made(), accelerated=False, **fields)
    assert stream(made(), accelerated=True, **fields) == expected
    assert not read_by_us


def test_transform_is_left_out_as_in_saelens() -> None:
    expected = stream(with_a_transform(), accelerated=False)
    assert stream(with_a_transform(), accelerated=True) == expected


@pytest.mark.parametrize("options", [{}, {"columns": ["tokens"], "dtype": torch.int16}])
def test_format_that_a_user_sets_afterwards_is_honoured(options, read_by_us) -> None:
    found = {}
    for accelerated in (False, True):
        with sae_lens_flex.accelerate() if accelerated else contextlib.nullcontext():
            data = dataset([[70_000 + i] * LENGTH for i in range(N_ROWS)])
            store = new_store(data)
            data.set_format("torch" if options else "numpy", **options)
            found[accelerated] = batches(store, 12)
    assert found[True] == found[False]
    assert not read_by_us


def test_reading_replaced_on_the_store_is_honoured(read_by_us) -> None:
    with sae_lens_flex.accelerate():
        store = new_store(dataset())
        store._iterate_raw_dataset = lambda: iter([[7] * LENGTH])  # type: ignore[method-assign]
        assert store.get_batch_tokens(1).tolist() == [[7] * LENGTH]
    assert not read_by_us


@pytest.mark.parametrize("place", [0, 40, N_ROWS - 1])
def test_missing_numbers_do_what_they_do_in_saelens(place) -> None:
    for missing in ([1] * (LENGTH - 1) + [None], None):
        values: list[Any] = rows()
        values[place] = missing
        if place == 0 and missing is None:
            continue  # The store is not made.
        found = {}
        for accelerated in (False, True):
            with sae_lens_flex.accelerate() if accelerated else contextlib.nullcontext():
                store = new_store(dataset(values))
                taken: list[Any] = []
                try:
                    taken.extend(next(store.iterable_sequences).tolist() for _ in range(N_ROWS))
                except Exception as error:
                    taken.append(type(error))
                found[accelerated] = taken
        assert found[True] == found[False]


@pytest.mark.parametrize("disable_concat_sequences", [False, True])
def test_text_is_tokenized_in_saelens_way(disable_concat_sequences) -> None:
    texts = Dataset.from_dict({"text": ["a" * n for n in range(1, 40)]})

    def to_tokens(text: str, **options: Any) -> torch.Tensor:
        return torch.arange(len(text))[None] + 1

    tokenizer = SimpleNamespace(bos_token_id=0, eos_token_id=99, sep_token_id=None)
    fields = {
        "model": SimpleNamespace(W_E=torch.zeros(1), tokenizer=tokenizer, to_tokens=to_tokens),
        "sequence_separator_token": "eos",
        "disable_concat_sequences": disable_concat_sequences,
    }
    expected = stream(texts, accelerated=False, **fields)
    assert stream(texts, accelerated=True, **fields) == expected


def test_first_row_that_is_too_short_is_refused_as_in_saelens() -> None:
    with sae_lens_flex.accelerate(), pytest.raises(ValueError, match="context_size 12"):
        new_store(dataset(), context_size=LENGTH + 1)


@pytest.mark.gpu
def test_tokens_on_a_gpu_are_the_same() -> None:
    fields = {"device": torch.device("cuda"), "model": SimpleNamespace(W_E=torch.zeros(1).cuda())}
    expected = stream(dataset(ragged()), accelerated=False, **fields)
    assert stream(dataset(ragged()), accelerated=True, **fields) == expected
