"""The interface of the main process to the workers, one for each model."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from apt.errors import AptError
from apt.extending import Source
from apt_lab.benchmark.measures import Facts, Turn
from apt_lab.benchmark.worker import Fault, Turns, serve
from apt_lab.options import BenchRun


class _RemoteTraceback(Exception):
    """The traceback of a worker, attached as the cause of an error in the main process."""


class Worker:
    """A process that measures one model, made by `started`."""

    def __init__(self, model: str, process: SpawnProcess, connection: Connection) -> None:
        self._model, self._process, self._connection = model, process, connection

    def facts(self) -> Facts:
        """The facts about the model, which the worker sends first.

        Raises:
            AptError: the worker failed or was killed.
        """
        answer = self._answer()
        assert isinstance(answer, Facts)
        return answer

    def turn(self, run: BenchRun, seed: int) -> Turn:
        """Let the worker load and measure its model, and wait.

        Args:
            run: the options.
            seed: the seed of the prompts.

        Raises:
            AptError: the worker failed or was killed.
        """
        with suppress(BrokenPipeError):  # the worker has ended; reading the answer reports it
            self._connection.send(Turns(run, seed))
        measures = self._answer()
        assert isinstance(measures, Turn)
        return measures

    def _answer(self) -> Facts | Turn:
        try:
            answer: Facts | Turn | Fault = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._death() from None
        if isinstance(answer, Fault):
            raise AptError(answer.message, answer.hint, answer.options) from _RemoteTraceback(
                answer.traceback
            )
        return answer

    def _death(self) -> AptError:
        """The error for a worker that ended without an answer."""
        self._process.join()
        status = self._process.exitcode or 0
        if status == -signal.SIGKILL:
            return AptError(
                f"the process of {self._model} was killed",
                "the system kills a process if memory runs out: use a smaller batch, or fewer "
                "tokens",
                ("batch", "prompt", "generate"),
            )
        reason = signal.Signals(-status).name if status < 0 else f"status {status}"
        return AptError(f"the process of {self._model} ended with {reason}")


@contextmanager
def started(source: Source, run: BenchRun) -> Iterator[Worker]:
    """A worker, which is killed on exit: it has nothing to save."""
    context = get_context("spawn")  # a fork would share memory with this process
    own_end, worker_end = context.Pipe()
    process = context.Process(target=serve, args=(worker_end, source, run), daemon=True)
    try:
        with _ctrl_c_blocked():
            process.start()
        worker_end.close()
        yield Worker(source.reference, process, own_end)
    finally:
        if process.pid is not None:
            process.kill()
            process.join()
        own_end.close()


@contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """While entered, SIGINT is delayed, and new processes never receive it.

    Ctrl-C in a terminal goes to all processes, and only the main process handles it.
    """
    resource_tracker.ensure_running()  # its start would unblock SIGINT
    mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask_before)
