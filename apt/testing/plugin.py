"""The pytest plugin: ``pytest --apt-adapter NAME`` adds an adapter's conformance checks."""

from functools import cached_property
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--apt-adapter`` and ``--apt-model``."""
    group = parser.getgroup("apt", "conformance of APT's adapters")
    group.addoption(
        "--apt-adapter",
        action="append",
        default=[],
        metavar="NAME",
        help="check the installed adapter of that name; repeatable",
    )
    group.addoption(
        "--apt-model", metavar="MODEL", help="check it with this model, not with its own example"
    )  # fmt: skip


def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Add one test for each check of each adapter that ``--apt-adapter`` names."""
    for name in config.getoption("apt_adapter"):
        items += _Checks.from_parent(session, name=f"apt-{name}", nodeid=name).collect()


class _Checks(pytest.Collector):
    """The checks of one adapter. A fault that several checks find is reported once."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._seen: dict[str, str] = {}

    def collect(self) -> list[pytest.Item]:
        from apt.conformance.checks import CHECKS

        return [_Item.from_parent(self, name=name) for name in CHECKS]

    @cached_property
    def subject(self) -> Any:
        """The subject of the checks, or the `AptError` with the reason why it cannot be made."""
        from apt.errors import AptError
        from apt.plugin.registry import registry
        from apt.testing.example import subject

        try:
            return subject(registry(), self.nodeid, self.config.getoption("apt_model"))
        except AptError as error:
            return error

    def outcome(self, name: str) -> Any:
        """The outcome of the check of that name."""
        from apt.conformance.outcomes import Outcome, outcome, without_known_faults
        from apt.errors import AptError

        if isinstance(self.subject, AptError):
            problem = "\n".join(self.subject.faults)
            return without_known_faults(Outcome(name, "", problem), self._seen)
        return without_known_faults(outcome(name, self.subject), self._seen)


class _Item(pytest.Item):
    def runtest(self) -> None:
        assert isinstance(self.parent, _Checks)
        outcome = self.parent.outcome(self.name)
        if outcome.kept_by:
            pytest.skip(f"a fault that '{outcome.kept_by}' has found prevents this check")
        if outcome.problem:
            pytest.fail(outcome.problem, pytrace=False)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self.path, None, f"{self.parent.name if self.parent else ''}: {self.name}"
