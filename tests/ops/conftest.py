import pytest
import torch

from .comparison import LOSSES, Implementation, implementation_named


@pytest.fixture(
    params=[
        pytest.param((name, device), id=f"{name}-{device}", marks=marks)
        for name in LOSSES
        for device, marks in (("cpu", ()), ("cuda", pytest.mark.gpu))
    ]
)
def implementation(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Implementation:
    name, device = request.param
    if name.startswith("triton") and device == "cpu" and torch.cuda.is_available():
        pytest.skip("the kernels are compiled where there is a CUDA device")
    return implementation_named(name, device, monkeypatch)
