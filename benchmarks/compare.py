"""Compare two result files of one machine, cell by cell: after over before.

    python -m benchmarks.compare BEFORE.json AFTER.json

They are results of `benchmarks.train_step` or of `benchmarks.decoder_loss`, measured in one run on
one card. It prints each cell's times and peak memory, and exits with 1 where the device works more
than 2 % longer or the peak is higher.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .train_step import name_of

SLOWER, MORE_MEMORY = 1.02, 1.005
MEASURED = ("ms", "device_ms", "graph_ms", "peak_gib")


def cells(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return what was measured of each cell, by its name."""
    found = {}
    for case, content in record.get("cases", {}).items():
        for result in content["results"]:
            found[f"{case} {name_of(result)}"] = result
    names = ("implementation", "loss", *"BKFD", "indices", "weight", "deterministic")
    for table in record.values():
        for row in table.get("rows", []) if isinstance(table, dict) else []:
            found[" ".join(str(row[name]) for name in names if name in row)] = row
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    arguments = parser.parse_args()
    before, after = (
        cells(json.loads(path.read_text())) for path in (arguments.before, arguments.after)
    )
    shared = [name for name in before if name in after]
    if not shared:
        parser.error("the files have no cell in common")
    worse = []
    for name in shared:
        line = f"{name:60}"
        for what in MEASURED:
            old, new = before[name].get(what), after[name].get(what)
            if not old or not new:
                continue
            line += f"  {what} {old:.3f} -> {new:.3f} ({new / old:.3f})"
            is_of_device = what in ("device_ms", "graph_ms")
            limit = MORE_MEMORY if what == "peak_gib" else SLOWER if is_of_device else None
            if limit is not None and new / old > limit:
                worse.append(f"{name}: {what} {new / old:.3f}")
        print(line)
    print("\n".join(["", "worse:", *worse] if worse else ["", "none is worse"]))
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
