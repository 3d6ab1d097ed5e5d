"""Slow tests: they have the marker ``slow``, and run first.

Two processes then end at about the same time. ``pytest --record-durations`` on an idle machine
writes the file of durations anew.
"""

import json
from collections import Counter

import pytest

from tests.helpers import ROOT

FILE = ROOT / "tests/durations.json"
SLOW = 2  # seconds


def pytest_addoption(parser):
    parser.addoption("--record-durations", action="store_true", help=f"Write {FILE.name}.")


def pytest_configure(config):
    if config.getoption("record_durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder())


@pytest.hookimpl(tryfirst=True)  # before tests are left out by their markers
def pytest_collection_modifyitems(items):
    seconds = json.loads(FILE.read_text())
    for item in items:
        if item.nodeid in seconds:
            item.add_marker("slow")
    items.sort(key=lambda item: -seconds.get(item.nodeid, 0))


class _Recorder:
    def __init__(self):
        self._seconds = Counter()

    def pytest_runtest_logreport(self, report):
        self._seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self):
        slow = {name: round(s, 1) for name, s in self._seconds.most_common() if s >= SLOW}
        FILE.write_text(json.dumps(slow, indent=1) + "\n")
