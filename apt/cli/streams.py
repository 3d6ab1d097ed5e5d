"""Standard output and error that take any text, and whose faults are told in one line."""

import codecs
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

_BROKEN_PIPE = 141  # what a shell says of a program that SIGPIPE has ended
_PLAIN = {"→": "->", "×": "x", "–": "-", "—": "-", "−": "-", "…": "...", "·": "*", "‖": "|",
          "‘": "'", "’": "'", "“": '"', "”": '"'}  # fmt: skip


def program() -> str:
    """What this was called as: ``apt`` where it was, else the name that nothing else has."""
    return "apt" if os.path.basename(sys.argv[0]) == "apt" else "apt-prune"


class LostOutput(Exception):
    """Standard output cannot be written to.

    Args:
        error: what the system said.
    """

    def __init__(self, error: OSError) -> None:
        self.error = error
        super().__init__(f"cannot write to standard output: {error.strerror}")


class _Guard:
    """A stream whose faults go to ``fault``."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write ``text``; characters that the stream's encoding lacks are spelled otherwise."""
        try:
            return int(self._stream.write(text))
        except OSError as error:
            self.fault(error)
            return len(text)

    def flush(self) -> None:
        """Write what is waiting."""
        try:
            self._stream.flush()
        except OSError as error:
            self.fault(error)

    def fault(self, error: OSError) -> None:
        """What happens when it cannot be written to."""
        raise NotImplementedError

    def silence(self) -> None:
        """Let nothing more come of it, nor of what is waiting."""
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


class _Output(_Guard):
    def fault(self, error: OSError) -> None:
        raise LostOutput(error)


class _Messages(_Guard):
    def fault(self, error: OSError) -> None:
        self.silence()  # there is nobody to tell, and the work is worth more


@contextmanager
def guarded() -> Iterator[None]:
    """Standard output and error as they should be, for as long as the program runs.

    Where nobody reads standard output any more, the program ends without a word, as others do.
    """
    before = sys.stdout, sys.stderr
    out, messages = _Output(_sound(sys.stdout)), _Messages(_sound(sys.stderr))
    sys.stdout, sys.stderr = out, messages
    try:
        try:
            yield
        finally:
            out.flush()
    except LostOutput as lost:
        out.silence()
        _leave(lost)
    finally:
        messages.flush()
        sys.stdout, sys.stderr = before


def _leave(lost: LostOutput) -> NoReturn:
    if lost.error.errno == errno.EPIPE:
        raise SystemExit(_BROKEN_PIPE) from None
    sys.stderr.write(f"{program()}: {lost}; write it to a place that has room\n")
    raise SystemExit(1) from None  # not 2: what was to be done has been done


def _sound(stream: Any) -> Any:
    """A stream that is there, and that has a spelling for every character."""
    if stream is None:  # closed by who started this
        return open(os.devnull, "w", encoding="utf-8")
    with suppress(AttributeError, ValueError, OSError):
        stream.reconfigure(errors=_spelled.__name__)
    return stream


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """Characters that an encoding lacks, in ASCII."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    spelled = (_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking)
    return "".join(spelled), error.end


codecs.register_error(_spelled.__name__, _spelled)
