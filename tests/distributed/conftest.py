from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

from .ranks import Ranks


@pytest.fixture(scope="session")
def make_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Ranks]]:
    made = []

    @cache
    def make(size: int, device: str = "cpu") -> Ranks:
        made.append(Ranks(size, tmp_path_factory.mktemp("ranks"), device))
        return made[-1]

    yield make
    for processes in made:
        processes.close()


@pytest.fixture(params=[2, 3], ids=["w2", "w3"])
def ranks(request: pytest.FixtureRequest, make_ranks: Callable[..., Ranks]) -> Ranks:
    return make_ranks(request.param)


@pytest.fixture
def two_ranks(make_ranks: Callable[..., Ranks]) -> Ranks:
    return make_ranks(2)


@pytest.fixture
def gpu_ranks(make_ranks: Callable[..., Ranks]) -> Ranks:
    """A process for each GPU."""
    n_gpus = torch.cuda.device_count()
    if n_gpus < 2:
        pytest.skip("needs two CUDA devices")
    return make_ranks(n_gpus, "cuda")
