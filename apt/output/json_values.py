"""Values as JSON can say them. Nothing here imports torch."""

import math
from typing import Any


def plain(value: Any) -> Any:
    """A value as JSON can say it: numbers that are not finite become strings."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity"
    return value
