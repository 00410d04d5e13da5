import itertools
import os
from collections import Counter, defaultdict
from typing import Any

import pytest
import torch

# Without a GPU the kernels run in Triton's interpreter. Triton reads the variable when it is
# imported. With a GPU the kernels are compiled.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import quick_interpreter

    quick_interpreter.install()

# The tests' tensors are too small for two threads. Where the second one finds no free core, the
# first one spins until it has run, and a step takes fifty times as long.
torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    left_out = combinations_left_out(items)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    # Its one long test would keep the other processes waiting at the end.
    items.sort(key=lambda item: item.path.name != "test_readme.py")


def combinations_left_out(items: list[pytest.Item]) -> set[Any]:
    """Return items of the tests marked `pairs` without which every two values still meet."""
    by_test = defaultdict(list)
    for item in items:
        if item.get_closest_marker("pairs") and not item.get_closest_marker("gpu"):
            by_test[item.nodeid.partition("[")[0]].append(item)
    left_out = set()
    for combinations in by_test.values():
        left_out.update(combinations)
        pairs = {item: set(itertools.combinations(values(item), 2)) for item in combinations}
        missing, n_kept = set().union(*pairs.values()), Counter()

        def worth(item: Any, pairs=pairs, missing=missing, n_kept=n_kept) -> tuple[int, int]:
            """How many missing pairs an item has, then how seldom its values were kept."""
            return len(pairs[item] & missing), -sum(n_kept[value] for value in values(item))

        while missing:
            best = max(combinations, key=worth)  # the first one: every process keeps the same
            missing -= pairs[best]
            n_kept.update(values(best))
            left_out.remove(best)
    return left_out


def values(item: Any) -> list[tuple[str, int]]:
    """Return the parameters of an item, each with the identity of its value."""
    return sorted((name, id(value)) for name, value in item.callspec.params.items())
