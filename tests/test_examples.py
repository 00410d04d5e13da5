"""The presets of examples/run_sae_lens.py for models of the hub, to their first batches.

`.ci/run` runs the third one, which needs no stand-ins.
"""

import runpy
import sys
from pathlib import Path

import pytest
import stand_ins
from sae_lens import SAE

import sae_lens_flex

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "run_sae_lens.py"
PRESETS = runpy.run_path(str(SCRIPT))["PRESETS"]


@pytest.mark.parametrize(
    ("preset", "arguments", "hook_name"),
    [
        (
            "hub",
            "--model gpt2 --dataset monology/pile-uncopyrighted",
            "blocks.6.hook_resid_post",
        ),
        ("gemma-2-2b", "--preset gemma-2-2b", "blocks.12.hook_resid_post"),
    ],
    ids=[name for name in PRESETS if name != "tiny"],
)
def test_preset_trains_saves_and_measures(
    preset: str,
    arguments: str,
    hook_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = PRESETS[preset]
    monkeypatch.chdir(tmp_path)
    stand_ins.install(width=64, put=monkeypatch.setattr)
    # Triton's interpreter takes minutes for a batch of a preset's size.
    monkeypatch.setattr(sae_lens_flex.ops.kernels.launch, "INTERPRETED", False)
    flags = ["--d-sae", "256", "--tokens", str(2 * settings["batch_size"]), "--output", "sae"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments.split(), *flags])
    runpy.run_path(str(SCRIPT), run_name="__main__")

    table = capsys.readouterr().out.partition("ce_loss_score\n")[2].split("\n\n")[0]
    budgets = [int(line.split()[0]) for line in table.splitlines()]
    assert budgets == [2**i for i in range(settings["k"].bit_length())]
    sae = SAE.load_from_disk(tmp_path / "sae")
    assert isinstance(sae, sae_lens_flex.HierarchicalTopKSAE)
    assert sae.cfg.k == settings["k"]
    assert sae.cfg.metadata.context_size == settings["context_size"]
    assert sae.cfg.metadata.hook_name == hook_name
