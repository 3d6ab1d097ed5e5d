"""What a block's sites are multiplied by, as the oracle sees it."""

from apt.adapter import Site
from apt.conformance.checks.subject import Step, Subject
from apt.conformance.oracle import Oracle, Seen


def products(subject: Subject, step: Step) -> dict[Site, Seen]:
    """What the sites that are multiplied in a step are multiplied by."""
    oracle = Oracle({site: site.weight(step.block).data for site in step.sites})
    with oracle:
        subject.step(step)
    return oracle.seen
