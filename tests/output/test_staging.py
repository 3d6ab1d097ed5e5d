"""Output directories appear whole or not at all."""

import os

import pytest

from apt.errors import AptError
from apt.output.location import check_output
from apt.output.report import Report
from apt.output.staging import whole_directory, write_errors


def write_and_fail(target, error):
    with whole_directory(target) as work, write_errors(target):
        (work.out / "a").write_text("x")
        raise error


def test_a_directory_appears_at_the_end(tmp_path):
    target = tmp_path / "deep" / "out"
    umask = os.umask(0o022)
    os.umask(umask)
    with whole_directory(target) as work:
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


def test_the_old_directory_stays_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    Report({}, {"reference": "m"}, {}).write(target)
    with pytest.raises(KeyError):
        write_and_fail(target, KeyError())
    assert (target / "old").read_text() == "old"
    with whole_directory(target, overwrite=True) as work:
        (work.out / "new").write_text("new")
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_an_error_for_the_user(tmp_path):
    with pytest.raises(AptError, match="cannot write .*No space left"):
        write_and_fail(tmp_path / "out", OSError(28, os.strerror(28)))
    assert list(tmp_path.iterdir()) == []


def test_outputs_are_checked_early(tmp_path):
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
