"""Conformance checks: functions that report each fault of an adapter in one line.

A check takes a `Subject` and raises `Nonconformance`. Each check tests one promise of
`apt.adapter.Adapter` independently of the adapter: by the module tree, and by the operators that
run (`apt.conformance.oracle`). A small random model is enough.
"""

from apt.conformance.checks.blocks import check_batches, check_blocks, check_stream
from apt.conformance.checks.declared import check_declaration, check_kinds, check_model_types
from apt.conformance.checks.effects import check_effects
from apt.conformance.checks.flow import (
    check_capture,
    check_gradients,
    check_in_time,
    check_order,
    check_residual,
)
from apt.conformance.checks.groups import check_groups
from apt.conformance.checks.logits import check_logits
from apt.conformance.checks.permutations import check_permutable
from apt.conformance.checks.promise import Check, Fault, Nonconformance, promise
from apt.conformance.checks.pruning import check_identity, check_pruning, check_saving
from apt.conformance.checks.sites import check_names, check_orientation, check_sites
from apt.conformance.checks.subject import Subject
from apt.conformance.checks.tidy import (
    check_exception,
    check_repeat,
    check_running,
    check_untouched,
)

# The first call of each method is in a check for side effects, since later calls may have none.
CHECKS: dict[str, Check] = {
    function.__name__.removeprefix("check_"): function
    for function in (
        check_declaration, check_model_types, check_kinds, check_running, check_names,
        check_untouched, check_exception, check_repeat, check_blocks, check_batches, check_stream,
        check_logits, check_sites, check_orientation, check_capture, check_order, check_residual,
        check_gradients, check_in_time, check_effects, check_identity, check_pruning, check_saving,
        check_groups, check_permutable,
    )
}  # fmt: skip
"""All checks by name, in the order in which they are run."""

ALONE = [CHECKS[name] for name in ("declaration", "model_types", "kinds", "running")]
"""The checks that are not run within `Adapter.running`."""

__all__ = ["ALONE", "CHECKS", "Check", "Fault", "Nonconformance", "Subject", "promise"]
