"""Output directories appear complete or not at all."""

import errno
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

from apt.errors import AptError
from apt.files import locking, renaming
from apt.output import staging
from apt.output.location import check_output
from apt.output.report import Report
from apt.output.staging import Staging, staged_directory, write_errors
from tests.helpers.interrupted import KilledError


def write_and_fail(target, error):
    with staged_directory(target) as work, write_errors(target):
        (work.out / "a").write_text("x")
        raise error


def test_directory_appears_at_the_end(tmp_path):
    target = tmp_path / "deep" / "out"
    umask = os.umask(0o022)
    os.umask(umask)
    with staged_directory(target) as work:
        (work.out / "a").write_text("x")
        (work.out / "a").chmod(0o600)
        assert not target.exists()
    assert (target / "a").read_text() == "x"
    assert (target / "a").stat().st_mode & 0o444 == 0o444 & ~umask
    assert target.stat().st_mode & 0o555 == 0o555 & ~umask
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def test_nothing_is_left_after_an_error(tmp_path):
    with pytest.raises(KeyError):
        write_and_fail(tmp_path / "out", KeyError())
    assert list(tmp_path.iterdir()) == []


def test_old_directory_stays_until_the_new_one_is_complete(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    Report({}, {"reference": "m"}, {}).write(target)
    with pytest.raises(KeyError):
        write_and_fail(target, KeyError())
    assert (target / "old").read_text() == "old"
    with staged_directory(target, overwrite=True) as work:
        (work.out / "new").write_text("new")
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_full_disk_is_an_apt_error(tmp_path):
    with pytest.raises(AptError, match="cannot write .*No space left"):
        write_and_fail(tmp_path / "out", OSError(28, os.strerror(28)))
    assert list(tmp_path.iterdir()) == []


def test_check_output_accepts_and_refuses_places(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "weights").write_text("x")
    Report({}, {"reference": "m"}, {}).write(tmp_path / "full")
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", False)
    check_output(tmp_path / "full", True)
    check_output(tmp_path / "new" / "deep", False)
    with pytest.raises(AptError, match="exists and is not a directory"):
        check_output(tmp_path / "file", True)
    with pytest.raises(AptError, match="overwrite it"):
        check_output(tmp_path / "full", False)
    with pytest.raises(AptError, match="not a directory"):
        check_output(tmp_path / "file" / "out", False)
    (tmp_path / "full" / "weights").write_text("of a fine-tuning")
    with pytest.raises(AptError, match="was changed since APT wrote it: weights; APT never del"):
        check_output(tmp_path / "full", True)


def cut(monkeypatch, step, *, after):
    """End the process before or after one numbered step that changes folders.

    Returns:
        The steps so far.
    """
    steps = []

    def wrapped(function):
        def stepping(*given, **named):
            steps.append(function.__name__)
            number = len(steps)
            if number == step and not after:
                raise KilledError
            result = function(*given, **named)
            if number == step:
                raise KilledError
            return result

        return stepping

    monkeypatch.setattr(shutil, "rmtree", wrapped(shutil.rmtree))
    monkeypatch.setattr(Path, "rename", wrapped(Path.rename))
    monkeypatch.setattr(renaming, "_system_rename", wrapped(renaming._system_rename))
    return steps


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("step", range(1, 7))
def test_replacing_out_is_complete_after_a_kill_at_any_step(
    step, after, exchanges, tmp_path, monkeypatch
):
    work = Staging(tmp_path / "out")
    with work.locked():
        work.begin({"model": "m"})
        (work.out / "blocks").write_text("with zeros")
        work.journal.keep({"block": "1"})
        small = work.fresh("small")
        (small / "weights").write_text("few")
        Report({}, {"reference": "m"}, {}).write(small)
        if not exchanges:
            monkeypatch.setattr(renaming, "_system_rename", lambda *given: False)
        with monkeypatch.context() as patch:
            steps = cut(patch, step, after=after)
            try:
                work.replace_out(small)
            except KilledError:
                pass
            else:
                assert len(steps) < step
    again = Staging(tmp_path / "out")
    with again.locked():
        if again.finished_output is None:  # the blocks are there, from which the run makes it again
            assert (again.out / "blocks").read_text() == "with zeros"
            assert again.journal.has_work
        else:
            assert again.finished_output == again.out
            again.finish()
            assert (tmp_path / "out/weights").read_text() == "few"


@pytest.fixture
def flushed(monkeypatch):
    """The flushed paths, in order."""
    paths, real = [], os.fsync

    def fsync(descriptor):
        paths.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return paths


@pytest.mark.parametrize("data", ["file", "folder"])
def test_files_are_flushed_before_their_line_in_the_journal(data, tmp_path, flushed):
    work = Staging(tmp_path / "out")
    with work.locked():
        work.begin({})
        assert flushed[-1] == str(work.folder)  # which has a new journal
        flushed.clear()
        inside = [work.out / "config.json", work.out / "deep", work.out / "deep/weights"]
        inside[1].mkdir()
        tokens = work.folder / "tokens"
        for path in (inside[0], inside[2], tokens):
            path.write_text("x")
        work.journal.add({"copied": 1}, work.out if data == "folder" else tokens)
        expected = {*inside, work.out} if data == "folder" else {tokens}
        assert {*flushed[:-1]} == {str(path) for path in (*expected, work.folder)}
        assert flushed[-1].endswith("journal.jsonl")


def test_published_output_and_its_name_are_flushed(tmp_path, flushed):
    with staged_directory(tmp_path / "out") as work:
        (work.out / "index.json").write_text("x")
    assert "index.json" in {Path(path).name for path in flushed[:-1]}
    assert flushed[-1] == str(tmp_path)


def test_file_system_that_keeps_an_open_lock_is_no_error(tmp_path, monkeypatch):
    """NFS renames a deleted file that is open, and deletes it when it is closed."""
    real, kept = os.unlink, Staging(tmp_path / "out").folder / ".nfs0001"

    def unlink(path, *given, **named):
        if Path(path).name == kept.name:
            raise OSError(errno.EBUSY, "Device or resource busy")
        real(path, *given, **named)
        if Path(path).name == "lock":
            kept.touch()

    class Lock:
        def __init__(self, file):
            self.fileno, self._file = file.fileno, file

        def close(self):
            self._file.close()
            real(kept)

    @contextmanager
    def locked(path):
        with locking.locked(path) as lock:
            yield Lock(lock)

    monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.setattr(staging, "locked", locked)
    with staged_directory(tmp_path / "out") as work:
        (work.out / "a").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
