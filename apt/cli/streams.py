"""Standard output and error that accept any text. A write error is one line."""

import codecs
import errno
import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

_BROKEN_PIPE = 141  # the exit status in a shell of a program that SIGPIPE has ended
_PLAIN = {"→": "->", "×": "x", "–": "-", "—": "-", "−": "-", "…": "...", "·": "*", "‖": "|",
          "‘": "'", "’": "'", "“": '"', "”": '"'}  # fmt: skip


# Control characters, and characters that reorder or break a line. A name with such characters can
# clear the screen, hide text or write further lines.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """A line without control characters: names in it have no effect on the terminal."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def program() -> str:
    """The name of the command: ``apt`` if it was called so, else ``apt-prune``."""
    return "apt" if os.path.basename(sys.argv[0]) == "apt" else "apt-prune"


class LostOutput(Exception):
    """Standard output cannot be written to.

    Args:
        error: the write error.
    """

    def __init__(self, error: OSError) -> None:
        self.error = error
        super().__init__(f"cannot write to standard output: {error.strerror}")


class _GuardedStream:
    """A stream whose write errors are passed to `handle`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write ``text``. Characters that the encoding lacks are replaced."""
        try:
            return int(self._stream.write(text))
        except OSError as error:
            self.handle(error)
            return len(text)

    def flush(self) -> None:
        """Write the buffered text."""
        try:
            self._stream.flush()
        except OSError as error:
            self.handle(error)

    def handle(self, error: OSError) -> None:
        """Handle a write error."""
        raise NotImplementedError

    def silence(self) -> None:
        """Discard the buffered text and all further text."""
        with suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


class _ClosedStream(io.TextIOBase):
    """A stream that the parent process has closed."""

    def write(self, text: str) -> int:
        """Fail, as a write to the closed descriptor would."""
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def fileno(self) -> int:
        """The stream has no descriptor."""
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


class _GuardedOutput(_GuardedStream):
    def handle(self, error: OSError) -> None:
        raise LostOutput(error)


class _GuardedMessages(_GuardedStream):
    def handle(self, error: OSError) -> None:
        self.silence()  # the run goes on without messages


@contextmanager
def guarded() -> Iterator[None]:
    """While entered, standard output and error are guarded.

    If the reader of standard output has gone, the program ends without a message.
    """
    before = sys.stdout, sys.stderr
    out, messages = _GuardedOutput(_usable(sys.stdout)), _GuardedMessages(_usable(sys.stderr))
    sys.stdout, sys.stderr = out, messages
    try:
        try:
            yield
        finally:
            out.flush()
    except LostOutput as lost:
        out.silence()
        _exit(lost)
    finally:
        messages.flush()
        sys.stdout, sys.stderr = before


def _exit(lost: LostOutput) -> NoReturn:
    if lost.error.errno == errno.EPIPE:
        raise SystemExit(_BROKEN_PIPE) from None
    sys.stderr.write(f"{program()}: {lost}; write it to another place\n")
    raise SystemExit(1) from None  # not 2: the work has been done


def _usable(stream: Any) -> Any:
    """An open stream that can write every character."""
    if stream is None:
        return _ClosedStream()
    with suppress(AttributeError, ValueError, OSError):
        stream.reconfigure(errors=_replace_by_ascii.__name__)
    return stream


def _replace_by_ascii(error: UnicodeError) -> tuple[str, int]:
    """An error handler of `codecs`: replace characters that an encoding lacks by ASCII."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    ascii_text = (_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in missing)
    return "".join(ascii_text), error.end


codecs.register_error(_replace_by_ascii.__name__, _replace_by_ascii)
