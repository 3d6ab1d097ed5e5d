"""A function in a greenlet of its own, which is suspended at every call of its callback."""

from collections.abc import Callable, Iterator
from contextvars import copy_context
from functools import partial
from typing import Any, Generic, TypeVar

from greenlet import getcurrent, greenlet

from apt.pruning.warning_handler import preserved_handler

T = TypeVar("T")
R = TypeVar("R")


class Suspended(Iterator[T], Generic[T, R]):
    """An iterator over the values that ``work`` passes to its callback.

    ``work`` is suspended in the callback until the next value is requested. Its exceptions are
    raised by the iterator. It runs in the thread of the iterator's caller, which must always be the
    same.

    Args:
        work: the function; its argument is the callback.

    Attributes:
        result: the return value of the function, set when the iterator has ended.
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
        """End the suspended function: GreenletExit is raised in its callback."""
        self._enter(self._greenlet.throw)

    def _enter(self, switch: Callable[[], Any]) -> Any:
        self._greenlet.parent = getcurrent()
        with preserved_handler():
            return switch()

    def _run(self, work: Callable[[Callable[[T], None]], R]) -> None:
        self.result = work(self._call_back)

    def _call_back(self, item: T) -> None:
        with preserved_handler():
            self._greenlet.parent.switch(item)
