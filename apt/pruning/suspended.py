"""A function in a greenlet of its own, which is suspended at every call of its callback."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import cache, partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from greenlet import getcurrent, greenlet

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


# c10::WarningUtils::get_warning_handler() and set_warning_handler(WarningHandler*), as GCC and
# Clang name them.
_GET = "_ZN3c1012WarningUtils19get_warning_handlerEv"
_SET = "_ZN3c1012WarningUtils19set_warning_handlerEPNS_14WarningHandlerE"


@contextmanager
def preserved_handler() -> Iterator[None]:
    """Set torch's handler of warnings on exit to that on entry, if torch allows it.

    During some of its functions, torch keeps the handler on the function's C stack and a pointer to
    it in a thread-local variable. The weight tap calls back from inside such a function. When the
    greenlet is suspended, its C stack is moved away. Without protection, the pointer would then
    refer to other data, and the next warning would corrupt it.
    """
    functions = _functions()
    if functions is None:
        yield
        return
    get, put = functions
    handler = get()
    try:
        yield
    finally:
        put(handler)


def can_preserve_handler() -> bool:
    """True if the handler can be read and set in this build of torch."""
    return _functions() is not None


@cache
def _functions() -> tuple[Any, Any] | None:
    for library in Path(torch.__file__).with_name("lib").glob("libc10.*"):
        with suppress(OSError, AttributeError):
            c10 = ctypes.PyDLL(str(library))
            get, put = getattr(c10, _GET), getattr(c10, _SET)
            get.restype, put.argtypes, put.restype = ctypes.c_void_p, [ctypes.c_void_p], None
            return get, put
    return None
