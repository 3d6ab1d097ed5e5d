"""Values in a form that JSON can express. This module imports no torch."""

import math
from typing import Any


def json_value(value: Any) -> Any:
    """A value that JSON can express: numbers that are not finite become strings."""
    if isinstance(value, dict):
        return {str(key): json_value(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity"
    return value
