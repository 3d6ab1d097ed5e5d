"""The worker of a model, seen from the main process."""

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
    """The traceback of a worker, as the cause of an error in the main process."""


class Worker:
    """A process that measures one model. `started` makes one."""

    def __init__(self, model: str, process: SpawnProcess, connection: Connection) -> None:
        self._model, self._process, self._connection = model, process, connection

    def facts(self) -> Facts:
        """Wait for the facts about the model, which the worker sends first.

        Raises:
            AptError: the worker failed or was killed.
        """
        found = self._answer()
        assert isinstance(found, Facts)
        return found

    def turn(self, run: BenchRun, seed: int) -> Turn:
        """Let the worker load and measure its model, and wait.

        Args:
            run: the options.
            seed: the seed of the prompts.

        Raises:
            AptError: the worker failed or was killed.
        """
        with suppress(BrokenPipeError):  # it has ended, which the answer tells
            self._connection.send(Turns(run, seed))
        found = self._answer()
        assert isinstance(found, Turn)
        return found

    def _answer(self) -> Facts | Turn:
        try:
            found: Facts | Turn | Fault = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._death() from None
        if isinstance(found, Fault):
            raise AptError(found.message, found.hint, found.options) from _RemoteTraceback(
                found.traceback
            )
        return found

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
        ended = signal.Signals(-status).name if status < 0 else f"status {status}"
        return AptError(f"the process of {self._model} ended with {ended}")


@contextmanager
def started(source: Source, run: BenchRun) -> Iterator[Worker]:
    """A worker, which is killed on exit: it has nothing to save."""
    context = get_context("spawn")  # a fork would share memory with this process
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, source, run), daemon=True)
    try:
        with _ctrl_c_blocked():
            process.start()
        theirs.close()
        yield Worker(source.reference, process, ours)
    finally:
        if process.pid is not None:
            process.kill()
            process.join()
        ours.close()


@contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """While entered, SIGINT waits, and processes that are started never receive it.

    Ctrl-C in a terminal goes to all processes, and only the main process handles it.
    """
    resource_tracker.ensure_running()  # its start would unblock SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
