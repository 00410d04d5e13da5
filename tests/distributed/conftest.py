from collections.abc import Callable, Iterator
from functools import cache

import pytest

from .ranks import Ranks


@pytest.fixture(scope="session")
def make_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Ranks]]:
    made = []

    @cache
    def make(size: int) -> Ranks:
        made.append(Ranks(size, tmp_path_factory.mktemp("ranks")))
        return made[-1]

    yield make
    for processes in made:
        processes.close()


@pytest.fixture(params=[2, 3], ids=["w2", "w3"])
def ranks(request: pytest.FixtureRequest, make_ranks: Callable[[int], Ranks]) -> Ranks:
    return make_ranks(request.param)


@pytest.fixture
def two_ranks(make_ranks: Callable[[int], Ranks]) -> Ranks:
    return make_ranks(2)
