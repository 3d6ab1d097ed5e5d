"""Errors for want of memory, which are no bugs."""

from apt.errors import AptError, first_line

_ALLOCATION = ("can't allocate memory", "out of memory", "cannot allocate memory")
_LIBRARY = ("failed to map segment", "cannot allocate memory", "cannot open shared object")


def resource_error(error: Exception) -> AptError | None:
    """The line for an error for want of memory, or of a library; None for another error."""
    text = str(error).lower()
    if isinstance(error, ImportError) and any(part in text for part in _LIBRARY):
        return AptError(
            f"a library cannot be loaded: {first_line(error)}",
            "is there too little memory, or a limit (ulimit -v)?",
        )
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(part in text for part in _ALLOCATION)
    ):
        return AptError(
            f"there is too little memory: {first_line(error)}",
            "use fewer samples, or stream the model",
            ("samples", "stream"),
        )
    return None
