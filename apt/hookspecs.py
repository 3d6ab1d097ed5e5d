"""The names that every plugin imports: the hook marker, the version of the hooks, all specs.

Importing this module imports neither torch nor transformers.
"""

from apt.plugin.hookspecs import API, OLDEST_API, hookimpl
from apt.plugin.specs import (
    AdapterSpec,
    AllocationSpec,
    CalibrationSpec,
    CommandSpec,
    EvaluatorSpec,
    ExportSpec,
    FormatSpec,
    MethodSpec,
    PatternSpec,
    QuantisedFormatSpec,
    RecoverySpec,
    ShrinkMethodSpec,
)

__all__ = [
    "API", "OLDEST_API", "AdapterSpec", "AllocationSpec", "CalibrationSpec", "CommandSpec",
    "EvaluatorSpec", "ExportSpec", "FormatSpec", "MethodSpec", "PatternSpec", "QuantisedFormatSpec",
    "RecoverySpec", "ShrinkMethodSpec", "hookimpl",
]  # fmt: skip
