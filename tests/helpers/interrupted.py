"""Interrupted runs, and the comparison of a resumed run with an uninterrupted one."""

import json
import os
from pathlib import Path

import apt.checkpoints.safetensors_io as apt_shards
import apt.files.journal as apt_journal
import apt.output.staging as apt_staging
from tests.helpers import TEXT

SMALL = ("--samples", 4, "--seqlen", 24, "--pattern", "2:4", "--calibration", TEXT)
PLACES = {
    "write": (apt_shards.os, "pwrite"),
    "journal": (apt_journal.Journal, "add"),
    "appear": (apt_staging, "rename_new"),
}


class KilledError(BaseException):
    """An exception in place of a killed process, which no code catches."""


def cut(monkeypatch, place, count, error):
    """Let the ``count``-th call of a function of the journal or the shards fail."""
    owner, name = place
    original, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


def signalled(count, number):
    """A journal's ``add`` that sends this process a signal after its ``count``-th line."""
    original, calls = apt_journal.Journal.add, []

    def add(self, line, data=None):
        original(self, line, data)
        calls.append(line)
        if len(calls) == count:
            os.kill(os.getpid(), number)

    return add


def weights(folder):
    """All files of an output, without the times in its report."""
    files = {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name != "apt_report.json"}
    report = json.loads((Path(folder) / "apt_report.json").read_text())
    return files, [(s["name"], s["zeros"], s["relative_error"]) for s in report["sites"]]


def check_full_disk(result, command, apt, whole):
    """Check that a run on a full disk ends with a message, and can be resumed."""
    assert result.code == 2
    assert "No space left on device" in result.err
    assert "--resume" in result.err
    assert apt(*command, "-o", "out", "--resume").code == 0
    assert weights("out") == weights(whole)
