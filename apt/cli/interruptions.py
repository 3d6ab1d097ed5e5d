"""Ctrl-C, SIGTERM and SIGHUP: the command cleans up, says that it was interrupted, and ends."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import typer

_TERMINATION_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class TerminatedError(KeyboardInterrupt):
    """The process received SIGTERM or SIGHUP. It cleans up as after Ctrl-C.

    Args:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """While entered, SIGTERM and SIGHUP raise an exception, so that temporary files are removed.

    A signal that the caller ignores, as ``nohup`` does with SIGHUP, stays ignored.
    """

    def stop(number: int, frame: object) -> None:
        raise TerminatedError(number)

    default_signals = [
        number for number in _TERMINATION_SIGNALS if signal.getsignal(number) is signal.SIG_DFL
    ]
    for number in default_signals:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in default_signals:
            signal.signal(number, signal.SIG_DFL)


def interrupted(error: KeyboardInterrupt, state: str = "") -> typer.Exit:
    """Print that the command was interrupted; returns the exception that ends it.

    Args:
        error: the interruption.
        state: the state of the output, or how to continue.
    """
    from apt.cli.output import show_error

    show_error(f"interrupted; {state}" if state else "interrupted")
    number = error.number if isinstance(error, TerminatedError) else signal.SIGINT
    return typer.Exit(128 + number)
