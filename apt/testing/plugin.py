"""The pytest plugin: ``pytest --apt-adapter NAME`` adds an adapter's conformance checks."""

from collections.abc import Iterator
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
        help="check the installed adapter of that name; can be repeated",
    )
    group.addoption(
        "--apt-model", metavar="MODEL", help="check it with this model, not with its own example"
    )  # fmt: skip


def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Add one test for each check of each adapter that is asked for."""
    for name in config.getoption("apt_adapter"):
        items += _Checks.from_parent(session, name=f"apt-{name}", nodeid=name).collect()


class _Checks(pytest.Collector):
    def collect(self) -> list[pytest.Item]:
        from apt.testing.checks import CHECKS

        return list(self._items(CHECKS))

    def _items(self, checks: dict[str, Any]) -> Iterator[pytest.Item]:
        for name, check in checks.items():
            yield _Item.from_parent(self, name=name, check=check)

    def subject(self) -> Any:
        from apt.plugins import registry
        from apt.testing.example import subject

        if not hasattr(self, "_subject"):
            self._subject = subject(registry(), self.nodeid, self.config.getoption("apt_model"))
        return self._subject


class _Item(pytest.Item):
    def __init__(self, *, check: Any, **options: Any) -> None:
        super().__init__(**options)
        self._check = check

    def runtest(self) -> None:
        assert isinstance(self.parent, _Checks)
        self._check(self.parent.subject())

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        from apt.errors import AptError
        from apt.testing.checks import Nonconformance

        if isinstance(excinfo.value, (Nonconformance, AptError)):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self.path, None, f"{self.parent.name if self.parent else ''}: {self.name}"
