"""The inputs of a block's sites, observed by the oracle."""

from apt.adapter import Site
from apt.conformance.checks.subject import Step, Subject
from apt.conformance.oracle import Oracle, Seen


def products(subject: Subject, step: Step) -> dict[Site, Seen]:
    """The products with each site that runs in a step."""
    oracle = Oracle({site: site.weight(step.block).data for site in step.sites})
    with oracle:
        subject.step(step)
    return oracle.seen
