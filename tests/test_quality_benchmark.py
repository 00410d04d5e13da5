"""What the quality benchmark trains next, and how it gathers the results."""

from functools import partial

import pytest

from benchmarks.quality.kinds import Entry, make_kind, make_plan
from benchmarks.quality.processes import run_here
from benchmarks.quality.unit import Unit

BUDGETS = [2, 4, 8]


# Of the fake SAEs: the best learning rate, 2 for those that are not named, and the unexplained
# variance with it at each budget.
BEST_RATE = {"even": 4.0, "topk_8": 1.0}
LEFT = {
    "even": [0.6, 0.5, 0.4],
    "rising": [0.8, 0.5, 0.3],
    "doubling": [0.7, 0.6, 0.5],
    "topk_2": [0.6],
    "topk_4": [0.5],
    "topk_8": [0.3, 0.3, 0.3],
}


class Fake:
    """A worker that trains nothing."""

    def __init__(self, log=None, fails=()):
        self.log, self.fails = [] if log is None else log, fails

    def collect(self, part):
        self.log.append(("collect", part))

    def about(self):
        return {"train": 10}

    def train(self, kind, lr, seed, path):
        self.log.append((kind.name, lr, seed))
        if (kind.name, lr) in self.fails:
            raise ValueError("it fails")
        path.mkdir()
        left = LEFT.get(kind.name, [0.5] * len(kind.budgets))
        best = BEST_RATE.get(kind.name, 2.0)
        far = max(lr / best, best / lr) - 1
        variances = [1 - each - 0.01 * far for each in left]
        return {
            "kind": kind.name,
            "seed": seed,
            "lr": lr,
            "seconds": 1.0,
            "validation": sum(variances) / len(variances),
            "validation_at_budgets": variances,
        }

    def measure(self, kind, known, path):
        assert path.is_dir()
        assert known["kind"] == kind.name
        return [{"budget": k, "explained_variance": 0.5} for k in kind.budgets]


def run(tmp_path, words, rates=lambda name: [1.0, 2.0], fails=(), **options):
    log, written = [], []
    kind = partial(make_kind_of, k=8)
    unit = Unit(make_plan(words, BUDGETS), kind, rates, 1, tmp_path, written.append, **options)
    run_here(lambda: Fake(log, fails), unit.next_job, unit.done)
    return unit, log, written


def make_kind_of(name, longer, k):
    return make_kind(name, k, 64, BUDGETS, longer)


def test_plan_names_kinds_seeds_and_lengths():
    assert make_plan(["even", "topk@1", "evenx3", "best_1@2", "topk_8", "even"], BUDGETS) == [
        Entry("even", 1, 0),
        *[Entry(f"topk_{k}", 1, 1) for k in BUDGETS],
        Entry("even", 3, 0),
        Entry("best_1", 1, 2),
        Entry("topk_8", 1, 0),
    ]


@pytest.mark.parametrize("word", ["evn", "even_2", "best", "even@", "topk_", "x3"])
def test_plan_refuses_what_is_no_kind(word):
    with pytest.raises(ValueError, match=f"kinds has '{word}', expected one of even"):
        make_plan([word], BUDGETS)


def test_grid_goes_on_where_its_edge_wins(tmp_path):
    unit, log, _ = run(tmp_path, ["even", "topk_8", "rising"])
    assert [lr for name, lr, *_ in log if name == "even"] == [1.0, 2.0, 4.0, 8.0]
    assert [lr for name, lr, *_ in log if name == "topk_8"] == [1.0, 2.0, 0.5]
    assert [lr for name, lr, *_ in log if name == "rising"] == [1.0, 2.0, 4.0]
    measured = {one["kind"]: one["lr"] for one in unit.result()["measured"]}
    assert measured == {"even": 4.0, "topk_8": 1.0, "rising": 2.0}
    assert list(tmp_path.iterdir()) == []


def test_grid_is_extended_so_often_at_most(tmp_path):
    _, log, _ = run(tmp_path, ["even"], extensions=1)
    assert [lr for name, lr, *_ in log if name == "even"] == [1.0, 2.0, 4.0]


def test_further_seeds_and_longer_training_take_the_chosen_rate(tmp_path):
    unit, log, _ = run(tmp_path, ["even", "even@1", "evenx3", "topk_8@2"])
    assert [entry for entry in log if entry[0] == "even" and entry[2] == 1] == [("even", 4.0, 1)]
    assert [entry for entry in log if entry[0] == "even_x3"] == [("even_x3", 4.0, 0)]
    # The first seed in the plan decides, whichever it is.
    assert {lr for name, lr, *_ in log if name == "topk_8"} == {0.5, 1.0, 2.0}
    assert [one.get("longer") for one in unit.result()["measured"]] == [None, None, 3, None]


def test_best_scheme_is_that_whose_worst_budget_is_best(tmp_path):
    # Beside TopK, even leaves at most 0.4/0.3, rising 0.8/0.6 and doubling 0.5/0.3.
    words = ["topk", "even", "rising", "doubling", "best_1@1", "best_2@1", "best_4@1", "best_1@2"]
    unit, log, _ = run(tmp_path, [*words, "even@2", "every_eighth"])
    assert [entry[0] for entry in log if entry[-1] == 1 and len(entry) == 3] == ["even", "rising"]
    # Where even has this seed by its own name, the next one is the best.
    assert {entry[0] for entry in log if entry[-1] == 2 and len(entry) == 3} == {"even", "rising"}
    assert unit.result()["left_out"] == ["best_4@1"]


def test_what_does_not_fit_in_is_left_out(tmp_path):
    unit, log, _ = run(tmp_path, ["even", "topk_8"], seconds=0)
    assert [name for name, *_ in log] == ["collect"]
    assert unit.result()["left_out"] == ["even@0", "topk_8@0"]


def test_grid_that_does_not_fit_in_counts_as_far_as_it_came(tmp_path):
    plan, kind = make_plan(["even"], BUDGETS), partial(make_kind_of, k=8)
    unit = Unit(plan, kind, lambda name: [1.0, 2.0], 1, tmp_path, lambda result: None)

    def next_job():
        if len(unit.tried) == 2:
            unit.deadline = 0
        return unit.next_job()

    run_here(Fake, next_job, unit.done)
    (one,) = unit.result()["measured"]
    assert (one["lr"], one["grid_is_cut"]) == (2.0, True)
    assert unit.result()["left_out"] == []


def test_failure_is_told_and_the_rest_goes_on(tmp_path):
    unit, _, written = run(tmp_path, ["even", "topk_8"], fails=[("even", 1.0), ("topk_8", 1.0)])
    assert [one["kind"] for one in unit.result()["measured"]] == ["even", "topk_8"]
    with pytest.raises(RuntimeError, match=r"2 SAEs failed.*'even'.*it fails"):
        unit.end()
    assert [one["lr"] for one in written[-1]["failed"]] == [1.0, 1.0]
