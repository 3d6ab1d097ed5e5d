"""The conformance kit: checks that an adapter is correct, and models for other tests.

In Python, call `check_adapter` or the single checks in `apt.testing.CHECKS`. Under pytest, subclass
`AdapterConformance`. At a shell, run ``apt-prune check ADAPTER``. For tests of methods, metrics and
so on, `embedded` returns a small trained model. `check_pattern` checks a pattern. A name is
imported on its first use: pytest imports this package in each of its sessions.
"""

from typing import TYPE_CHECKING

from apt.lazy_names import lazy_names

if TYPE_CHECKING:
    from apt.conformance.checks import CHECKS, Nonconformance, Subject
    from apt.conformance.checks.declared import every_kind
    from apt.conformance.outcomes import Outcome, check_adapter
    from apt.conformance.patterns import check_pattern
    from apt.testing.suite import AdapterConformance, embedded, random_tokens

__all__ = [
    "CHECKS", "AdapterConformance", "Nonconformance", "Outcome", "Subject", "check_adapter",
    "check_pattern", "embedded", "every_kind", "random_tokens",
]  # fmt: skip
__getattr__ = lazy_names(__name__, {
    "apt.conformance.checks": ("CHECKS", "Nonconformance", "Subject"),
    "apt.conformance.checks.declared": ("every_kind",),
    "apt.conformance.outcomes": ("Outcome", "check_adapter"),
    "apt.conformance.patterns": ("check_pattern",),
    "apt.testing.suite": ("AdapterConformance", "embedded", "random_tokens"),
})  # fmt: skip
