"""A unit of the comparison: SAEs that are trained on the same activations, and measured."""

import json
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from time import monotonic
from typing import Any

from .kinds import SCHEMES, Entry, Kind
from .processes import Job
from .sources import Later


@dataclass
class Search:
    """
    Where an entry of the plan stands.

    Args:
        entry (Entry): What is to be trained.
        kind (Kind | None): Its kind, None for "best_1" as long as it is not known.
        grid (list[float] | None): Learning rates so far, None as long as they are not known.
        waiting (list[float]): Those of them that no process has begun.
        running (int): How many are being trained.
        extended (int): How often the grid was.
        is_cut (bool): Whether rates of the grid were not tried for want of time.
        best (dict[str, Any] | None): What is known of the best SAE so far.
        rows (Any): Its metrics on the test.
        state (str): "training", "trained", "measuring" or "done".
    """

    entry: Entry
    kind: Kind | None = None
    grid: list[float] | None = None
    waiting: list[float] = field(default_factory=list)
    running: int = 0
    extended: int = 0
    is_cut: bool = False
    best: dict[str, Any] | None = None
    rows: Any = None
    state: str = "training"


class Unit:
    """
    Decides which SAE is trained or measured next, and gathers the results.

    Of a grid of learning rates each kind gets the one that explains most variance of the validation
    activations. Where it is the grid's smallest or largest, the grid is extended by a factor of 2.
    Further seeds of the kind, and what is trained longer, take the learning rate of its first entry
    in the plan.

    Args:
        plan: what is to be trained, the most important first.
        make_kind: makes a kind of its name and `longer`.
        rates: the learning rates of a kind, by its name.
        parts: in how many parts the activations are made.
        directory: for the SAEs that are not measured yet.
        write: called with the results so far.
        extensions: how often a grid is extended at most.
        seconds: by which all training should have ended. What would take longer is not begun.
    """

    def __init__(
        self,
        plan: list[Entry],
        make_kind: Callable[[str, int], Kind],
        rates: Callable[[str], list[float]],
        parts: int,
        directory: Path,
        write: Callable[[dict[str, Any]], None],
        extensions: int = 2,
        seconds: float = math.inf,
    ):
        self.make_kind, self.rates, self.directory = make_kind, rates, directory
        self.write, self.extensions = write, extensions
        self.deadline = monotonic() + seconds
        self.searches = [Search(entry) for entry in plan]
        self.uncollected = list(range(parts))
        self.collecting = 0
        self.about: dict[str, Any] | None = None
        self.about_is_asked = False
        self.tried: list[dict[str, Any]] = []
        self.failed: list[dict[str, Any]] = []
        self.pool: Executor | None = None
        self.of_jobs: dict[int, Search] = {}
        self.begun: dict[int, float] = {}
        self.took: dict[str, float] = {}  # seconds, by architecture

    # --- what comes next

    def next_job(self) -> Job | None:
        """Return what a process that is idle is to do, None where it has to wait."""
        if self.uncollected:
            self.collecting += 1
            return Job("collect", (self.uncollected.pop(0),))
        if self.collecting:
            return None
        if not self.about_is_asked:
            self.about_is_asked = True
            return Job("about")
        for search in self.searches:
            if search.state == "training" and search.waiting and not self._fits_in(search):
                self._cut(search)
            if search.state == "trained":
                assert search.kind is not None
                assert search.best is not None
                search.state = "measuring"
                known = {name: each for name, each in search.best.items() if name != "path"}
                return self._job(search, "measure", search.kind, known, search.best["path"])
        for search in self.searches:
            if (
                search.state == "training"
                and self._is_known(search)
                and search.waiting
                and self._fits_in(search)
            ):
                assert search.kind is not None
                search.running += 1
                lr, seed = search.waiting.pop(0), search.entry.seed
                path = self.directory / f"{search.kind.name}_{seed}_{lr:g}"
                return self._job(search, "train", search.kind, lr, seed, path)
        return None

    def _fits_in(self, search: Search) -> bool:
        """Return whether there is time to train another SAE of the search."""
        assert search.kind is not None
        # A guess: another architecture may take longer than those that were trained.
        unknown = 3 * max(self.took.values(), default=0)
        took = self.took.get(search.kind.architecture, unknown) * search.kind.longer
        return monotonic() + took <= self.deadline

    def _cut(self, search: Search) -> None:
        """Let the best so far count, though rates of the grid were not tried for want of time."""
        if search.best is not None and not search.running:
            search.is_cut, search.state = True, "trained"

    def _job(self, search: Search, method: str, *args: Any) -> Job:
        job = Job(method, args)
        self.of_jobs[id(job)], self.begun[id(job)] = search, monotonic()
        return job

    def _is_known(self, search: Search) -> bool:
        """Return whether the entry's kind and learning rates are known, and enter them."""
        if search.grid is not None:
            return True
        name, longer, _ = search.entry
        if search.entry.rank is not None:
            ranked = self._ranked(search)
            if ranked is None:
                return False
            if search.entry.rank > len(ranked):
                search.state = "done"
                return False
            name = ranked[search.entry.rank - 1]
        base = self._base(name)
        if base is None or base is search:
            search.grid = sorted(self.rates(name))
        elif base.best is not None and base.state != "training":
            search.grid = [base.best["lr"]]
        else:
            return False
        search.kind, search.waiting = self.make_kind(name, longer), list(search.grid)
        return True

    def _base(self, name: str) -> Search | None:
        """Return the search that decides a kind's learning rate: the first of its name."""
        found = [s for s in self.searches if s.entry.name == name and s.entry.longer == 1]
        return found[0] if found else None

    def _ranked(self, best: Search) -> list[str] | None:
        """Return the schemes that a "best_1" may be, best first, None as long as that is open.

        They stand before it in the plan, and not by their own name with its seed. A scheme's rank
        is that of its worst budget: there the variance that it leaves unexplained, divided by what
        TopK for that k leaves. Both are of the validation activations.
        """
        before = self.searches[: self.searches.index(best)]
        first = {s.entry.name: s for s in reversed(before) if s.entry.longer == 1}
        topk = {name: s for name, s in first.items() if name.startswith("topk_")}
        schemes = {name: s for name, s in first.items() if name in SCHEMES}
        if any(s.state == "training" for s in (topk | schemes).values()):
            return None
        left: dict[int, float] = {}
        for search in topk.values():
            if search.kind is not None and search.best is not None:
                left[search.kind.k] = 1 - search.best["validation_at_budgets"][0]

        def worst(search: Search) -> float:
            assert search.kind is not None
            assert search.best is not None
            pairs = zip(search.kind.budgets, search.best["validation_at_budgets"], strict=True)
            return max((1 - each) / left.get(k, 1.0) for k, each in pairs)

        named = {s.entry.name for s in self.searches if s.entry[1:] == best.entry[1:]}
        open_to = {n: worst(s) for n, s in schemes.items() if n not in named and s.best is not None}
        return sorted(open_to, key=lambda name: open_to[name])

    # --- what came

    def done(self, job: Job, result: Any, error: str | None) -> None:
        """Take the result of a job, or the error in place of it.

        Raises:
            RuntimeError: if there are no activations.
        """
        search = self.of_jobs.pop(id(job), None)
        if search is None:
            if error is not None:
                raise RuntimeError(f"{job.method} failed: {error}")
            if job.method == "collect":
                self.collecting -= 1
            else:
                self.about = result
            return
        assert search.kind is not None
        took = (monotonic() - self.begun.pop(id(job))) / search.kind.longer
        if error is not None:
            lr = job.args[1] if job.method == "train" else None
            failure = {"kind": search.kind.name, "seed": search.entry.seed, "lr": lr}
            self.failed.append(failure | {"job": job.method, "error": error})
            print(f"{search.kind.name} failed: {error}", flush=True)
        if job.method == "train":
            search.running -= 1
            self.took[search.kind.architecture] = took
            if error is None:
                self._take(search, result, job.args[-1])
            if not search.waiting and not search.running:
                self._extend_or_end(search)
        else:
            search.state = "done"
            shutil.rmtree(job.args[-1])
            if error is None:
                search.rows = self._started(result)
                print(summary(search), flush=True)
        self._write()

    def _take(self, search: Search, known: dict[str, Any], path: Path) -> None:
        """Keep an SAE if it is the best of its kind so far."""
        self.tried.append(known)
        best = search.best
        if (
            best is None
            or known["validation"] > best["validation"]
            or math.isnan(best["validation"])
        ):
            if best is not None:
                shutil.rmtree(best["path"])
            search.best = known | {"path": path}
        else:
            shutil.rmtree(path)

    def _extend_or_end(self, search: Search) -> None:
        assert search.grid is not None
        if search.best is None:
            search.state = "done"
            return
        lr, grid = search.best["lr"], search.grid
        if len(grid) > 1 and search.extended < self.extensions and lr in (grid[0], grid[-1]):
            search.waiting = [lr / 2 if lr == grid[0] else lr * 2]
            search.grid = sorted(grid + search.waiting)
            search.extended += 1
        else:
            search.state = "trained"

    def _started(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Begin the calls that rows hold in place of a value; rows may share one."""
        futures: dict[int, Future[Any]] = {}
        for row in rows:
            for name, value in row.items():
                if isinstance(value, Later):
                    if self.pool is None:
                        self.pool = ProcessPoolExecutor(
                            max(4, (os.cpu_count() or 1) // 8), mp_context=get_context("spawn")
                        )
                    if id(value) not in futures:
                        futures[id(value)] = self.pool.submit(value.function, *value.args)
                    row[name] = futures[id(value)]
        return rows

    def result(self, waits: bool = True) -> dict[str, Any]:
        """Return what is known so far. Values that are still computed are None if not `waits`."""

        def settled(value: Any) -> Any:
            if isinstance(value, Future):
                return value.result() if waits or value.done() else None
            return value

        measured = []
        for search in self.searches:
            if search.rows is not None and search.kind is not None and search.best is not None:
                known = {name: each for name, each in search.best.items() if name != "path"}
                rows = [{name: settled(v) for name, v in row.items()} for row in search.rows]
                if search.kind.longer > 1:
                    known["longer"] = search.kind.longer
                if search.is_cut:
                    known["grid_is_cut"] = True
                measured.append(known | {"k": search.kind.k, "metrics": rows})
        left_out = [
            f"{s.kind.name if s.kind else s.entry.name}@{s.entry.seed}"
            for s in self.searches
            if s.rows is None
        ]
        return {
            "tried": self.tried,
            "measured": measured,
            "failed": self.failed,
            "left_out": left_out,
        }

    def _write(self) -> None:
        if self.about is not None:
            self.write({"source": self.about} | self.result(waits=False))

    def end(self) -> None:
        """Write the whole result.

        Raises:
            RuntimeError: if something failed. What did not is written.
        """
        assert self.about is not None
        self.write({"source": self.about} | self.result())
        if self.pool is not None:
            self.pool.shutdown()
        if self.failed:
            raise RuntimeError(f"{len(self.failed)} SAEs failed: {self.failed}")


def summary(search: Search) -> str:
    assert search.kind is not None
    assert search.best is not None
    one = search.best
    values = " ".join(
        f"{row['budget'] or round(row['l0'], 1)}:{row['explained_variance']:.4f}"
        for row in search.rows
        if not row.get("tuned")
    )
    name = f"{search.kind.name}@{search.entry.seed}"
    return f"{name} lr {one['lr']:g} {one['seconds']:.0f} s  {values}"


def chosen_rates(paths: list[Path], others: list[float]) -> Callable[[str], list[float]]:
    """Return the learning rate of each kind that earlier units chose, and `others` of any other."""
    units = [json.loads(path.read_text()) for path in paths]
    chosen = {one["kind"]: one["lr"] for unit in units for one in unit["measured"]}

    def rates(name: str) -> list[float]:
        return [chosen[name]] if name in chosen else others

    return rates
