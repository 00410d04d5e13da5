"""Record how one SAE for every budget compares with a TopK SAE trained for each.

    python benchmarks/pareto.py

runs examples/choose_a_budget.py, keeps what it measured in benchmarks/results/pareto_tiny_lm.json
and draws benchmarks/figures/pareto_tiny_lm.png, for which plotly needs the package kaleido and a
Chrome.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from sae_lens_flex import BudgetSweep

HERE = Path(__file__).parent
COMMAND = ["examples/choose_a_budget.py", "--n-batches", "32"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    if find_spec("kaleido") is None:
        parser.error("the figure needs the package kaleido: pip install kaleido")
    with TemporaryDirectory() as output:
        subprocess.run([sys.executable, *COMMAND, "--output", output], cwd=HERE.parent, check=True)
        sweep = BudgetSweep.from_json(Path(output, "sweep.json").read_text())
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "sae-lens", "sae-lens-flex")},
        "command": " ".join(["python", *COMMAND]),
        **json.loads(sweep.to_json()),
    }
    (HERE / "results" / "pareto_tiny_lm.json").write_text(json.dumps(record, indent=2) + "\n")
    sweep.plot(HERE / "figures" / "pareto_tiny_lm.png")


if __name__ == "__main__":
    main()
