from collections.abc import Iterator

import pytest

from .ranks import Ranks


@pytest.fixture(scope="package", params=[2, 3], ids=["w2", "w3"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    processes = Ranks(request.param, tmp_path_factory.mktemp("ranks"))
    yield processes
    processes.close()
