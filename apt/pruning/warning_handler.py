"""torch's handler of warnings, which a greenlet that waits within a function of torch would take.

While one of its functions runs, torch has a handler of warnings on the function's C stack, and
points to it from a variable of the thread. A tap calls back from there. The stack of a greenlet
that waits is moved away, and the next warning would be given to whatever lies there by then.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

# c10::WarningUtils::get_warning_handler() and set_warning_handler(WarningHandler*), as GCC and
# Clang name them.
_GET = "_ZN3c1012WarningUtils19get_warning_handlerEv"
_SET = "_ZN3c1012WarningUtils19set_warning_handlerEPNS_14WarningHandlerE"


@contextmanager
def kept_handler() -> Iterator[None]:
    """On leaving, the handler is the one that it was on entering, where it can be set."""
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


def can_keep() -> bool:
    """Whether the handler can be got and set."""
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
