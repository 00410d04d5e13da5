"""Runs jobs in this process, or in several at once, each with a GPU of its own."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch


class Job(NamedTuple):
    """A call of a worker's method."""

    method: str
    args: tuple[Any, ...] = ()


# Takes the next job, None where there is none as yet.
NextJob = Callable[[], Job | None]
# Is told a job's result, or the error in place of it.
Done = Callable[[Job, Any, str | None], None]


def run_here(make_worker: Callable[[], Any], next_job: NextJob, done: Done) -> None:
    """Run jobs by a worker in this process until there is none."""
    worker = make_worker()
    while (job := next_job()) is not None:
        done(job, *_result(worker, job))


def run_in_processes(n: int, make_worker: Callable[[], Any], next_job: NextJob, done: Done) -> None:
    """Run jobs in `n` processes until there is none and none is running.

    Where there are GPUs, each process sees one of them, in turn. The job of a process that dies is
    given to another one, once.

    Args:
        n: number of processes.
        make_worker: called in each of them. It and what jobs take and return can be pickled.
        next_job: called in this process, whenever a process is idle.
        done: called in this process, in the order in which jobs end.

    Raises:
        RuntimeError: if every process has died.
    """
    processes = {}
    for number in range(n):
        connection, theirs = get_context("spawn").Pipe()
        with _only_gpu(number):
            process = get_context("spawn").Process(target=_serve, args=(theirs, make_worker))
            process.start()
        theirs.close()  # so that the process's death is seen at this end
        processes[connection] = process
    running: dict[Connection, Job] = {}
    again: list[Job] = []
    given_twice: list[Job] = []
    try:
        while True:
            for connection in processes.keys() - running.keys():
                job = again.pop() if again else next_job()
                if job is None:
                    break
                running[connection] = job
                with suppress(BrokenPipeError):  # what died while idle is seen below
                    connection.send(job)
            if not running:
                return
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                job = running.pop(connection)
                try:
                    result, error = connection.recv()
                except (EOFError, ConnectionResetError):
                    process = processes.pop(connection)
                    process.join()
                    error = f"the process ended with exit code {process.exitcode}"
                    print(f"{job.method}: {error}", file=sys.stderr, flush=True)
                    if processes and not any(job is each for each in given_twice):
                        given_twice.append(job)
                        again.append(job)
                        continue
                    result = None
                done(job, result, error)
            if not processes:
                raise RuntimeError(f"all {n} processes have died")
    finally:
        for connection, process in processes.items():
            connection.close()
            process.terminate()
            process.join()


@contextmanager
def _only_gpu(number: int) -> Iterator[None]:
    """Let a process that is started here see one of the visible GPUs, if there are any."""
    count = torch.cuda.device_count()
    if count == 0:
        yield
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(each) for each in range(count)]
    os.environ["CUDA_VISIBLE_DEVICES"] = names[number % count]
    try:
        yield
    finally:
        if visible is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


def _serve(connection: Connection, make_worker: Callable[[], Any]) -> None:
    """Do the jobs that come, until the connection is closed at the other end."""
    with suppress(EOFError, KeyboardInterrupt):
        worker = make_worker()
        while True:
            result, error = _result(worker, connection.recv())
            connection.send((result, error))
            if error is not None and torch.cuda.is_initialized():
                # After some errors a process cannot use its GPU any more. Its death tells that.
                torch.cuda.synchronize()


def _result(worker: Any, job: Job) -> tuple[Any, str | None]:
    try:
        return getattr(worker, job.method)(*job.args), None
    except Exception as error:
        traceback.print_exc()
        return None, f"{type(error).__name__}: {error}"
