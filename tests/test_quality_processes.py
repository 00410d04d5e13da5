"""Jobs in several processes. A file of its own: each process imports it, so it imports little."""

import os
from functools import partial
from pathlib import Path

import pytest

from benchmarks.quality.processes import Job, run_in_processes


class Counter:
    """A worker whose process dies of a job where no other one has before."""

    def __init__(self, path: Path):
        self.path = path

    def square(self, number):
        if number == 3 and not self.path.exists():
            self.path.touch()
            os._exit(7)
        if number == 4:
            raise ValueError("four")
        return number**2


def test_job_of_a_process_that_dies_is_done_by_another(tmp_path):
    jobs = [Job("square", (number,)) for number in range(6)]
    results = {}

    def next_job():
        return jobs.pop(0) if jobs else None

    def done(job, result, error):
        results[job.args[0]] = error or result

    run_in_processes(2, partial(Counter, tmp_path / "died"), next_job, done)
    assert results == {0: 0, 1: 1, 2: 4, 3: 9, 4: "ValueError: four", 5: 25}


def test_all_processes_dead_is_an_error(tmp_path):
    results = {}
    jobs = [Job("square", (3,))]
    with pytest.raises(RuntimeError, match="all 1 processes have died"):
        run_in_processes(
            1,
            partial(Counter, tmp_path / "died"),
            lambda: jobs.pop(0) if jobs else None,
            lambda job, result, error: results.update({job.args[0]: error}),
        )
    assert results == {3: "the process ended with exit code 7"}
