"""Where Triton or its device is missing: what works, and what raises an error that says why."""

import json
import re
from typing import Any

import pytest
from fresh_process import run_new_python, run_python

SCRIPT = """
    import json, sys
    import torch
    from sae_lens import TrainingSAE
    from sae_lens.saes.sae import TrainStepInput
    import sae_lens_flex

    def message(call):
        try:
            call()
        except Exception as error:
            return [type(error).__name__, str(error)]
        return ["", ""]

    def step(architecture, backend):
        torch.manual_seed(0)
        sae = TrainingSAE.from_dict(
            {"architecture": architecture, "d_in": 8, "d_sae": 32, "k": 4, "backend": backend}
        )
        output = sae.training_forward_pass(
            TrainStepInput(
                sae_in=torch.randn(16, 8),
                coefficients={},
                dead_neuron_mask=torch.arange(32) < 16,
                n_training_steps=0,
                is_logging_step=False,
            )
        )
        output.loss.backward()
        return [output.loss.item(), sae.W_dec.grad.norm().item(), sae.W_enc.grad.norm().item()]

    indices = torch.randint(32, (16, 4))
    arguments = (
        indices, torch.randn(32, 8), torch.randn(16, 4), torch.randn(8), torch.randn(16, 8)
    )
    report = {}
    for architecture in ("hierarchical_topk", "flex_topk"):
        report[architecture] = {
            "auto": step(architecture, "auto"),
            "torch": step(architecture, "torch"),
            "triton": message(lambda: step(architecture, "triton")),
        }
    for loss in ("hierarchical_sae_loss", "topk_sae_loss"):
        report[loss] = {
            "plain": getattr(sae_lens_flex, loss)(*arguments).item(),
            "triton": message(lambda: getattr(sae_lens_flex, "triton_" + loss)(*arguments)),
        }
    print("REPORT" + json.dumps(report))
"""
REASONS = {
    "not installed": "triton, which there is for Linux, is not installed",
    "no device": r"CUDA.*the tensors are on 'cpu'",
}


@pytest.fixture(scope="module", params=REASONS)
def report(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return what a process without Triton found, or one without a device for it."""
    if request.param == "not installed":
        printed = run_new_python(f"    import sys; sys.modules['triton'] = None\n{SCRIPT}")
    else:
        printed = run_python(SCRIPT, CUDA_VISIBLE_DEVICES="")
    (line,) = (line for line in printed.splitlines() if line.startswith("REPORT"))
    return json.loads(line.removeprefix("REPORT")) | {"reason": REASONS[request.param]}


@pytest.mark.parametrize("architecture", ["hierarchical_topk", "flex_topk"])
def test_both_architectures_train_through_the_torch_backend(
    report: dict[str, Any], architecture: str
):
    loss, *gradient_norms = report[architecture]["auto"]
    assert loss > 0
    assert all(norm > 0 for norm in gradient_norms)
    assert report[architecture]["torch"] == report[architecture]["auto"]


@pytest.mark.parametrize("architecture", ["hierarchical_topk", "flex_topk"])
def test_triton_backend_raises_at_the_first_step_and_says_why(
    report: dict[str, Any], architecture: str
):
    kind, message = report[architecture]["triton"]
    assert kind == "RuntimeError"
    assert re.search(report["reason"], message)
    assert "backend='auto'" in message


@pytest.mark.parametrize("loss", ["hierarchical_sae_loss", "topk_sae_loss"])
def test_triton_functions_raise_and_say_why(report: dict[str, Any], loss: str):
    assert report[loss]["plain"] > 0
    kind, message = report[loss]["triton"]
    assert kind == "RuntimeError"
    assert re.search(report["reason"], message)
