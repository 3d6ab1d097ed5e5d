"""A function that waits, in a thread of its own, whenever it calls back."""

from collections.abc import Callable, Iterator
from contextvars import copy_context
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import Generic, TypeVar

from apt.pruning.openmp import release_team

T = TypeVar("T")
R = TypeVar("R")


class _Closed(BaseException):
    """Unwinds a function that is not to go on."""


class Suspended(Iterator[T], Generic[T, R]):
    """What ``work`` calls back with, one after the other; it waits until the next is asked for.

    Only one thread runs at a time. What the function raises, the iterator raises.

    Args:
        work: called with the callback, which is for the function's own thread alone: see `here`.

    Attributes:
        result: what the function returned; there once the iterator has ended.
    """

    result: R

    def __init__(self, work: Callable[[Callable[[T], None]], R]) -> None:
        self._go_on: SimpleQueue[bool] = SimpleQueue()
        self._happened: SimpleQueue[Callable[[], T]] = SimpleQueue()
        self._thread = Thread(target=copy_context().run, args=(self._run, work), daemon=True)

    @property
    def here(self) -> bool:
        """Whether the calling thread is the function's."""
        return current_thread() is self._thread

    def __next__(self) -> T:
        release_team()
        if self._thread.ident is None:
            self._thread.start()
        elif self._thread.is_alive():
            self._go_on.put(True)
        else:
            raise StopIteration
        return self._happened.get()()

    def close(self) -> None:
        """Unwind the function where it waits."""
        if self._thread.is_alive():
            self._go_on.put(False)
            self._thread.join()

    def _run(self, work: Callable[[Callable[[T], None]], R]) -> None:
        try:
            self.result = work(self._call_back)
        except _Closed:
            pass
        except BaseException as error:  # whatever it is, it belongs to who asked for the next
            self._end(error)
        else:
            self._end(StopIteration())

    def _call_back(self, item: T) -> None:
        release_team()
        self._happened.put(lambda: item)
        if not self._go_on.get():
            raise _Closed

    def _end(self, error: BaseException) -> None:
        def raised() -> T:
            self._thread.join()
            raise error

        self._happened.put(raised)
