"""Rows of a pretokenized dataset for SAELens's activations store, many at a time."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from sae_lens.training.activations_store import ActivationsStore

_OF_SAELENS = ActivationsStore._iterate_tokenized_sequences
_RAW_OF_SAELENS = ActivationsStore._iterate_raw_dataset
ROWS = 32  # read at a time: SAELens's default batch of prompts


def tokenized_sequences(store: ActivationsStore) -> Iterator[torch.Tensor]:
    """Yield the sequences that `ActivationsStore._iterate_tokenized_sequences` yields.

    SAELens decodes row by row, makes a tensor of each and copies it to the store's device. This
    reads `ROWS` rows of Arrow's memory at a time, and copies them to the device together. Only a
    pretokenized `datasets.Dataset` is read so, with lists of whole numbers in the column of tokens.

    As in SAELens, `n_dataset_processed` counts the rows before the one that was yielded last.
    """
    if not _is_plain(store):
        yield from _OF_SAELENS(store)
        return
    dataset: Any = store.dataset
    table = dataset.with_format("arrow", columns=[store.tokens_column])
    for start in range(0, len(table), ROWS):
        column = table[start : start + ROWS][store.tokens_column].combine_chunks()
        if _has_nulls(column):
            # What SAELens makes of a missing number is its own affair.
            sequences = (
                torch.tensor(
                    dataset[row][store.tokens_column][: store.context_size],
                    dtype=torch.long,
                    device=store.device,
                )
                for row in range(start, start + len(column))
            )
        else:
            sequences = _sequences(column, store.context_size, store.device)
        for sequence in sequences:
            yield sequence
            store.n_dataset_processed += 1


def _is_plain(store: ActivationsStore) -> bool:
    """Return whether SAELens reads nothing but lists of whole numbers from an Arrow table."""
    dataset = store.dataset
    if (
        not store.is_dataset_tokenized
        or type(dataset) is not Dataset
        or type(store)._iterate_raw_dataset is not _RAW_OF_SAELENS
        or "_iterate_raw_dataset" in vars(store)
    ):
        return False
    # This format SAELens sets. Another one, or options of it, may change what a row holds.
    chosen = dataset.format
    if chosen["type"] != "torch" or chosen["format_kwargs"]:
        return False
    if store.tokens_column not in chosen["columns"]:
        return False
    of_column = dataset.data.schema.field(store.tokens_column).type
    is_list = (
        pa.types.is_list(of_column)
        or pa.types.is_large_list(of_column)
        or pa.types.is_fixed_size_list(of_column)
    )
    return is_list and (
        pa.types.is_signed_integer(of_column.value_type)
        or (pa.types.is_unsigned_integer(of_column.value_type) and of_column.value_type != "uint64")
    )


def _has_nulls(column: Any) -> bool:
    return column.null_count > 0 or column.flatten().null_count > 0


def _sequences(column: Any, n: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return the first n tokens of each row, or all of a shorter one, as int64 on the device."""
    lengths: Any = pc.list_value_length(column)  # type: ignore[attr-defined]
    lengths = lengths.to_numpy(zero_copy_only=False)
    ends = np.cumsum(lengths)
    tokens = column.flatten().to_numpy()
    starts = ends - lengths
    taken = np.minimum(lengths, n)
    rows = [tokens[start : start + length] for start, length in zip(starts, taken, strict=True)]
    together = torch.from_numpy(np.concatenate(rows).astype(np.int64)).to(device)
    return together.split(taken.tolist())
