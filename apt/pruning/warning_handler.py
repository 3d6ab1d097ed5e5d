"""Preserves torch's handler of warnings while a greenlet is suspended in a function of torch.

During some of its functions, torch keeps a handler of warnings on the function's C stack and a
pointer to it in a thread-local variable. The weight tap calls back from inside such a function.
When the greenlet is suspended, its C stack is moved away. Without protection, the pointer would
then refer to other data, and the next warning would corrupt it.
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
def preserved_handler() -> Iterator[None]:
    """Set the handler on exit to the handler on entry, if torch allows it."""
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
