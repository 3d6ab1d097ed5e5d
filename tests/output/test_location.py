"""The place of an output: no path and no mode loses existing files."""

import os
import shutil
import socket
import stat
from pathlib import Path

import pytest

from apt.engine.run_output import RunOutput
from apt.errors import AptError
from apt.files import renaming
from apt.files.renaming import exchange, rename_new
from apt.output import staging
from apt.output.location import check_output, staging_folder
from apt.output.report import Report
from apt.output.staging import Staging, staged_directory
from tests.helpers import TEXT
from tests.helpers.mounting import mounted

QUICK = ("--samples", 2, "--seqlen", 16, "--pattern", "2:4", "--method", "wanda")

MODES = {"memory": (), "stream": ("--stream",), "overwrite": ("--overwrite",),
         "stream-overwrite": ("--stream", "--overwrite")}  # fmt: skip


def snapshot(folder):
    """The contents of a folder: kinds, modes, links, and the bytes of files."""
    found = {}
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(parent) / name
            status = path.lstat()
            content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
            target = os.readlink(path) if path.is_symlink() else ""
            key = path.relative_to(folder).as_posix()
            found[key] = (status.st_mode, status.st_rdev, target, content)
    return found


@pytest.fixture
def house(checkpoint, tmp_path, monkeypatch):
    """A home with a model, a folder of other files, and paths that are no folders."""
    home = tmp_path / "home"
    models = home / "models"
    shutil.copytree(checkpoint("llama"), models / "in")
    (home / "work").mkdir()
    (home / "foreign").mkdir()
    (home / "foreign" / "thesis.txt").write_text("years of work")
    (home / "file").write_text("x")
    (home / "dangling").symlink_to(home / "nowhere")
    (home / "loop").symlink_to(home / "loop")
    (home / "to-foreign").symlink_to(home / "foreign")
    (home / "to-file").symlink_to(home / "file")
    os.mkfifo(home / "fifo")
    with socket.socket(socket.AF_UNIX) as bound:
        monkeypatch.chdir(home)
        bound.bind("socket")
    if not os.geteuid():
        os.mknod(home / "device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    monkeypatch.setenv("HOME", str(home))
    return home


REFUSED = {
    "": "is the working directory",
    ".": "is the working directory",
    "..": "contains the working directory",
    "/": "contains the working directory",
    "~HOME": "contains the working directory",
    "../models/in": "is an input of the run",
    "../models": "contains an input of the run",
    "../models/in/sub": "is inside an input of the run",
    "../models/in/deep/er": "is inside an input of the run",
    "../foreign": "has files that APT did not write: thesis.txt",
    "../to-foreign": "has files that APT did not write: thesis.txt",
    "../file": "exists and is not a directory",
    "../to-file": "exists and is not a directory",
    "../file/out": "",
    "../fifo": "exists and is not a directory",
    "../socket": "exists and is not a directory",
    "../device": "exists and is not a directory",
    "../dangling": "is a link to a missing file",
    "../dangling/out": "is a link to a missing file",
    "../loop": "",
    "x" * 251: "of the output is longer than 250 bytes",
    "x" * 300: "",
    "/".join(["x" * 200] * 30): "",
}


@pytest.mark.parametrize("mode", ["memory", "stream-overwrite"])
def test_refused_places_stay_unchanged(house, apt, monkeypatch, mode):
    for place, message in REFUSED.items():
        if place == "../device" and os.geteuid():
            continue
        monkeypatch.chdir(house)  # what the fixture `apt` has changed
        before = snapshot(house)
        monkeypatch.chdir(house / "work")
        output = str(house) if place == "~HOME" else place
        run = apt(
            "prune", "../models/in", *QUICK, "--calibration", TEXT, "-o", output, *MODES[mode]
        )
        assert run.code == 2, (place, run.err)
        assert message in run.err, (place, run.err)
        line = run.err.splitlines()[-1]
        assert line.startswith("apt"), line
        assert snapshot(house) == before, place


@pytest.mark.parametrize(
    ("mode", "place"),
    [("memory", "new"), ("stream-overwrite", "new"), ("memory", "deep/er/new"),
     ("stream", "../to-empty"), ("overwrite", "../to-empty"), ("stream-overwrite", "deep/er/new")],
)  # fmt: skip
def test_accepted_places_are_written_and_protected_afterwards(house, apt, monkeypatch, mode, place):
    monkeypatch.chdir(house / "work")
    (house / "empty").mkdir()
    (house / "to-empty").symlink_to(house / "empty")
    outside = snapshot(house / "foreign"), snapshot(house / "models")
    command = ("prune", "../models/in", *QUICK, "--calibration", TEXT, "-o", place)
    run = apt(*command, *MODES[mode])
    assert run.code == 0, run.err
    assert (Path(place) / "apt_report.json").is_file()
    again = apt(*command, *MODES[mode])
    assert (again.code == 0) == ("overwrite" in mode), again.err
    assert ("replaces" in again.err) == ("overwrite" in mode)
    (Path(place) / "notes.txt").write_text("mine")
    kept = snapshot(place)
    last = apt(*command, *MODES[mode])
    assert last.code == 2
    assert "files that APT did not write: notes.txt" in last.err
    assert snapshot(place) == kept
    assert (house / "to-empty").is_symlink()
    assert (snapshot(house / "foreign"), snapshot(house / "models")) == outside
    assert not [p for p in house.rglob("*") if p.name.endswith(".apt")]


def test_mount_point_is_refused(house, tmp_path):
    with mounted(tmp_path / "mount") as folder:
        with pytest.raises(AptError, match="is a mount point"):
            check_output(folder, overwrite=True)
        check_output(folder / "out", overwrite=True)


@pytest.mark.parametrize("options", [(), ("--stream",), ("--overwrite",)], ids=str)
def test_files_that_appear_during_the_run_are_kept(checkpoint, apt, monkeypatch, options):
    original = staging.set_permissions

    def appear(partial):
        original(partial)
        Path("out").mkdir()
        Path("out/thesis.txt").write_text("years of work")

    monkeypatch.setattr("apt.output.staging.set_permissions", appear)
    run = apt("prune", checkpoint("llama"), *QUICK, "--calibration", TEXT, "-o", "out", *options)
    assert run.code == 2
    assert "was not replaced; the result is complete, in out-1" in run.err
    assert [p.name for p in Path("out").iterdir()] == ["thesis.txt"]
    monkeypatch.setattr("apt.output.staging.set_permissions", original)
    assert apt("verify", "out-1").code == 0
    assert sorted(p.name for p in Path().iterdir()) == ["out", "out-1"]


def write(place, overwrite=False):
    with staged_directory(place, overwrite) as work:
        (work.out / "weights").write_text("new")
        Report({}, {"reference": "m"}, {}).write(work.out)


WRITERS = {
    "convert": ("convert", "plain"),
    "convert-with-a-report": ("convert", "pruned", "--tokenizer", "plain"),
    "reapply": ("reapply", "pruned", "plain"),
    "pack": ("pack", "pruned"),
}


@pytest.mark.parametrize("command", WRITERS)
def test_command_replaces_its_own_result(command, checkpoint, apt):
    shutil.copytree(checkpoint("llama"), "plain")
    given = ("prune", "plain", *QUICK, "--calibration", TEXT, "-o", "pruned")
    assert apt(*given).code == 0
    (Path("pruned") / "vocabulary.extra").write_text("a file that the report does not list")
    words = (*WRITERS[command], "-o", "out")
    assert apt(*words).code == 0
    before = snapshot("out")
    assert "exists and is not empty" in apt(*words).err
    run = apt(*words, "--overwrite")
    assert run.code == 0, run.err
    assert snapshot("out").keys() == before.keys()
    (Path("out") / "thesis.txt").write_text("years of work")
    assert "has files that APT did not write: thesis.txt" in apt(*words, "--overwrite").err


@pytest.mark.parametrize("exchanges", [True, False])
def test_old_result_stays_until_the_new_one_is_complete(tmp_path, monkeypatch, exchanges):
    if not exchanges:  # as on a system without the call
        monkeypatch.setattr(renaming, "_system_rename", lambda *arguments: False)
    write(tmp_path / "out")
    with pytest.raises(AptError, match="overwrite it"):
        check_output(tmp_path / "out", overwrite=False)
    write(tmp_path / "out", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_run_killed_between_two_renames_keeps_the_old_result(tmp_path, monkeypatch):
    write(tmp_path / "out")
    before = snapshot(tmp_path / "out")
    monkeypatch.setattr(renaming, "_system_rename", lambda *arguments: False)
    work = Staging(tmp_path / "out", overwrite=True)
    work.out.mkdir(parents=True)
    work.output.rename(work.folder / "old")
    with Staging(tmp_path / "out").locked():
        assert snapshot(tmp_path / "out") == before


def test_rename_and_exchange_keep_both_folders(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "is").write_text(name)
    with pytest.raises(FileExistsError):
        rename_new(tmp_path / "a", tmp_path / "b")
    exchange(tmp_path / "a", tmp_path / "b", tmp_path / "spare")
    assert (tmp_path / "a" / "is").read_text() == "b"
    assert (tmp_path / "b" / "is").read_text() == "a"


@pytest.mark.parametrize("kind", ["link", "file", "foreign"])
def test_staging_folder_of_another_user_is_refused(tmp_path, kind):
    folder, outside = staging_folder(tmp_path / "out"), tmp_path / "outside"
    (outside / "out").mkdir(parents=True)
    (outside / "out" / "kept").write_text("kept")
    if kind == "link":
        folder.symlink_to(outside)
    elif kind == "file":
        folder.write_text("x")
    elif os.geteuid():
        pytest.skip("only root can give folders to others")
    else:
        folder.mkdir()
        os.chown(folder, 12345, 12345)
    before = snapshot(tmp_path)
    with pytest.raises(AptError, match="is not a folder of this user"):
        write(tmp_path / "out")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["journal.jsonl", "lock", "out", "out/model.safetensors"])
@pytest.mark.parametrize("hard", [False, True], ids=["symbolic", "hard"])
def test_links_in_a_staging_folder_are_refused(tmp_path, name, hard):
    if hard and name == "out":
        pytest.skip("folders have no hard links")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    link = staging_folder(tmp_path / "out") / name
    link.parent.mkdir(parents=True)
    if hard:
        os.link(outside / "kept", link)
    else:
        link.symlink_to(outside if name == "out" else outside / "kept")
    with pytest.raises(AptError, match="is a link|cannot be opened"):
        write(tmp_path / "out")
    assert snapshot(outside) == {"kept": (outside.joinpath("kept").lstat().st_mode, 0, "", b"kept")}


def test_new_parent_folders_are_deleted_after_an_error(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(KeyError), staged_directory(tmp_path / "there/deep/er/out"):
        raise KeyError
    assert snapshot(tmp_path).keys() == {"there"}
    write(tmp_path / "there/deep/er/out")
    assert (tmp_path / "there/deep/er/out/weights").is_file()


def test_result_of_another_run_is_kept_after_publication(apt, checkpoint, monkeypatch):
    """Metrics are written after the publication. Another run may replace the output before."""
    measure = RunOutput.measure

    def while_another_run_ends(self, when):
        if when == "after":
            Path("out/apt_report.json").write_text('{"options": {}, "skipped": []}')
        return measure(self, when)

    monkeypatch.setattr(RunOutput, "measure", while_another_run_ends)
    result = apt("prune", checkpoint("llama"), *QUICK, "--eval", TEXT, "-o", "out")
    assert result.code == 2
    assert "out was replaced by another run before its metrics were written" in result.err
    assert Path("out/apt_report.json").read_text() == '{"options": {}, "skipped": []}'
