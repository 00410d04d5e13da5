import os

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
