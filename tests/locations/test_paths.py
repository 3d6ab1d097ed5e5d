"""Paths that cannot be read or used are errors of one line in every command."""

import codecs
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from apt.errors import AptError
from apt.locations.paths import kind_at

LONG = "x" * 300
NOBODY = 65534
LOADED = "import apt.cli.pruning, apt.cli.plan, apt.checkpoints.offload, datasets, transformers"


@pytest.fixture
def no_rights(tmp_path):
    """While entered, this process has only the rights of other users."""
    if os.geteuid():
        yield
        return
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o055)
    exec(LOADED)  # what is imported later may not be readable
    codecs.lookup("utf-8-sig")  # a module too; Python remembers that it was not found
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        importlib.invalidate_caches()  # of folders that could not be listed


@pytest.fixture
def model(checkpoint, tmp_path):
    """A copy of a checkpoint, which everybody may look at."""
    path = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    path.chmod(0o755)
    return path


def test_kind_at_returns_the_kind_of_file(tmp_path):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "looping").symlink_to("looping")
    kinds = {name: kind_at(tmp_path / name) for name in ("", "file", "fifo", "dangling", "none")}
    assert list(kinds.values()) == ["directory", "file", "other", None, None]
    assert kind_at(tmp_path / "file" / "below") is None
    with pytest.raises(AptError, match="looping: Too many levels"):
        kind_at(tmp_path / "looping")
    with pytest.raises(AptError, match="File name too long; use a shorter name"):
        kind_at(tmp_path / LONG)
    with pytest.raises(AptError, match="is not a path"):
        kind_at(Path("a\0b"))


UNKNOWN = "~nobody-has-this-name/x"


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", UNKNOWN),
        ("eval", "zoo:llama", "--data", UNKNOWN),
        ("eval", "zoo:llama", "--tokenizer", UNKNOWN),
        ("convert", "zoo:llama", "-o", UNKNOWN),
        ("shrink", "zoo:llama", "-o", UNKNOWN),
        ("shrink", "zoo:llama", "--search", "--plot", f"{UNKNOWN}.png"),
        ("report", "none", "-o", f"{UNKNOWN}.html"),
    ],
    ids=" ".join,
)
def test_home_of_an_unknown_user_is_an_error_of_one_line(apt, arguments):
    run = apt(*arguments)
    assert run.code == 2
    assert "~nobody-has-this-name is no user's home directory" in run.err
    assert len(run.err.splitlines()) == 1


def test_tilde_is_expanded_in_all_paths(apt, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copytree(checkpoint("llama"), tmp_path / "home" / "model")
    run = apt("convert", "~/model", "--tokenizer", "~/model", "--output=~/out")
    assert run.code == 0, run.err
    assert (tmp_path / "home/out/tokenizer.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("prune", LONG),
        ("inspect", f"./{LONG}"),
        ("eval", f"/{LONG}"),
        ("convert", LONG, "-o", "out"),
        ("verify", LONG, "--pattern", "2:4"),
        ("eval", "zoo:llama", "--data", f"{LONG}.txt"),
        ("eval", "zoo:llama", "--data", f"~/{LONG}"),
        ("eval", "zoo:llama", "--tokenizer", f"./{LONG}"),
    ],
    ids=lambda words: " ".join(words)[:24],
)
def test_too_long_names_are_errors_of_one_line(apt, arguments):
    run = apt(*arguments)
    assert run.code == 2
    assert "File name too long; use a shorter name" in run.err
    assert len(run.err.splitlines()) == 1
    assert len(run.err) < 250


@pytest.mark.parametrize(
    ("closed", "arguments"),
    [
        ("", ("inspect",)),
        ("", ("verify", "--pattern", "2:4")),
        ("config.json", ("inspect",)),
        ("model.safetensors", ("eval",)),
        ("model.safetensors", ("eval", "--stream")),
        ("tokenizer.json", ("eval",)),
        ("apt_report.json", ("verify", "--pattern", "2:4")),
    ],
    ids=str,
)
def test_unreadable_files_are_errors_with_their_name(apt, model, closed, arguments, request):
    (model / "apt_report.json").write_text("{}")
    (model / closed).chmod(0)
    request.getfixturevalue("no_rights")
    command, *options = arguments
    small = ("--samples", 1, "--seqlen", 16) if command == "eval" else ()
    run = apt(command, "model" if command == "verify" else "./model", *options, *small)
    assert run.code == 2
    assert len(run.err.splitlines()) == 1
    assert closed in run.err
    assert "Permission denied" in run.err or "no permission to read it" in run.err


def test_unreadable_text_is_an_error_with_its_name(apt, tmp_path, request):
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "a.txt").write_text("some words")
    (tmp_path / "a.txt").write_text("some words")
    for name in ("closed", "a.txt"):
        (tmp_path / name).chmod(0)
    request.getfixturevalue("no_rights")
    for name in ("a.txt", "closed/a.txt"):
        run = apt("eval", "zoo:llama", "--data", name)
        assert run.code == 2
        assert f"{name}" in run.err
        assert "Permission denied" in run.err


def test_deleted_working_directory_is_an_error(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    code = "import os, sys; os.rmdir('../gone'); from apt.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "methods"], cwd=gone, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "apt-prune: the working directory no longer exists; change to another\n"


def test_working_directory_is_not_imported_from(tmp_path):
    for name in ("torch", "typer", "pluggy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from here')")
    done = subprocess.run(
        [sys.executable, "-m", "apt", "methods"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
