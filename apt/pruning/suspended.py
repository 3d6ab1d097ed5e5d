"""A function that waits, in a greenlet of its own, whenever it calls back."""

from collections.abc import Callable, Iterator
from contextvars import copy_context
from functools import partial
from typing import Any, Generic, TypeVar

from greenlet import getcurrent, greenlet

from apt.pruning.warning_handler import kept_handler

T = TypeVar("T")
R = TypeVar("R")


class Suspended(Iterator[T], Generic[T, R]):
    """What ``work`` calls back with, one after the other; it waits until the next is asked for.

    What the function raises, the iterator raises. It runs in the thread that asks, which must be
    the same each time.

    Args:
        work: called with the callback.

    Attributes:
        result: what the function returned; there once the iterator has ended.
    """

    result: R

    def __init__(self, work: Callable[[Callable[[T], None]], R]) -> None:
        self._greenlet: Any = greenlet(partial(self._run, work))
        self._greenlet.gr_context = copy_context()

    def __next__(self) -> T:
        if self._greenlet.dead:
            raise StopIteration
        item: T = self._enter(self._greenlet.switch)
        if self._greenlet.dead:
            raise StopIteration
        return item

    def close(self) -> None:
        """Unwind the function where it waits."""
        self._enter(self._greenlet.throw)

    def _enter(self, switch: Callable[[], Any]) -> Any:
        self._greenlet.parent = getcurrent()
        with kept_handler():
            return switch()

    def _run(self, work: Callable[[Callable[[T], None]], R]) -> None:
        self.result = work(self._call_back)

    def _call_back(self, item: T) -> None:
        with kept_handler():
            self._greenlet.parent.switch(item)
