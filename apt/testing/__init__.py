"""The conformance kit: what proves that an adapter is right.

As functions, `check_adapter` or the single checks in `apt.testing.CHECKS`; under pytest,
subclass `AdapterConformance`; at a shell, ``apt-prune check ADAPTER``.
"""

from apt.conformance.checks import CHECKS, Nonconformance, Subject
from apt.conformance.layer_kinds import every_kind
from apt.conformance.outcomes import Outcome, check_adapter
from apt.testing.suite import AdapterConformance, random_tokens

__all__ = [
    "CHECKS",
    "AdapterConformance",
    "Nonconformance",
    "Outcome",
    "Subject",
    "check_adapter",
    "every_kind",
    "random_tokens",
]
