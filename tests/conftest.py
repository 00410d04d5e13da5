import os

import pytest
import torch

# Without a GPU the kernels run in Triton's interpreter. Triton reads the variable when it is
# imported. With a GPU the kernels are compiled.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The tests' tensors are too small for two threads. On busy cores a second one makes a step many
# times slower, because the first waits for it.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
