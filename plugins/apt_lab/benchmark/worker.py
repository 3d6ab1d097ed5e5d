"""The process that measures one model: it answers requests until its pipe is closed.

This module imports no torch, since the main process imports it too.
"""

import os
import traceback
import warnings
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any

from apt.errors import AptError, describe
from apt.extending import Source
from apt.locations.paths import user_error
from apt_lab.options import BenchRun

_NO_MEMORY = ("out of memory", "allocate memory")  # of CUDA and of the CPU


@dataclass(frozen=True)
class Turns:
    """A request for the measures of one round, see `apt_lab.benchmark.subject.Subject.turn`."""

    run: BenchRun
    seed: int


@dataclass(frozen=True)
class Fault:
    """An error of a worker: the arguments of an `AptError`, and the traceback."""

    message: str
    hint: str
    options: tuple[str, ...]
    traceback: str


def serve(connection: Connection, source: Source, run: BenchRun) -> None:
    """The main function of a worker.

    It sends the facts about the model, then the measures for each request, or a `Fault`.
    """
    Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")  # the main process has shown the warnings of plugins
    with suppress(BrokenPipeError):  # the main process has ended
        try:
            from transformers.utils.logging import disable_progress_bar

            from apt_lab.benchmark.subject import Subject

            disable_progress_bar()
            subject = Subject(source, run)
            connection.send(subject.facts())
            while (request := _received(connection)) is not None:
                connection.send(subject.turn(request.run, request.seed))
        except BrokenPipeError:
            raise
        except Exception as error:
            connection.send(fault(error, source.reference))


def _end_with_parent() -> None:
    """End this process, even in the middle of a measurement, when the main process has ended."""
    if parent := parent_process():
        parent.join()
        os._exit(1)


def _received(connection: Connection) -> Turns | None:
    """The next request; None at the end."""
    with suppress(EOFError):
        request: Turns = connection.recv()
        return request
    return None


def fault(error: Exception, reference: str) -> Fault:
    """The record of an error, as one line and a traceback.

    Args:
        error: the error. The code of a model may raise any type.
        reference: the user's name for the model.
    """
    summary = _for_the_user(error, reference)
    return Fault(
        summary.message, summary.hint, summary.options, "".join(traceback.format_exception(error))
    )


def _for_the_user(error: Exception, reference: str) -> AptError:
    chain: list[Any] = [error, error.__cause__]
    texts = [str(link).lower() for link in chain]
    if any(isinstance(link, MemoryError) for link in chain) or any(
        part in text for part in _NO_MEMORY for text in texts
    ):
        return AptError(
            f"there is too little memory to run {reference}",
            "use a smaller batch, or fewer tokens",
            ("batch", "prompt", "generate"),
        )
    if isinstance(error, AptError):
        return error
    if isinstance(error, OSError) and (path_error := user_error(error)):
        return path_error
    return AptError(
        f"{reference} failed: {describe(error)}", "does transformers run it on this machine?"
    )
