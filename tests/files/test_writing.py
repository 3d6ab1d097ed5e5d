"""Files that commands write: in one step, not through links, and never inside an input."""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from apt.cli.output import open_log
from apt.errors import AptError
from apt.files.hashes import changed_files, file_hashes
from apt.files.writing import check_file, write_file
from tests.helpers import TEXT

QUICK = ("--samples", 2, "--seqlen", 32, "--calibration", TEXT, "--method", "magnitude")


def links(place):
    """Functions that create a link or a special file at a path, by kind."""
    return {
        "link": lambda: (Path("other").write_text("mine"), place.symlink_to("other")),
        "dangling": lambda: place.symlink_to("nowhere"),
        "loop": lambda: place.symlink_to(place.name),
        "fifo": lambda: os.mkfifo(place),
        "folder": lambda: place.mkdir(),
        "device": lambda: place.symlink_to("/dev/full"),
    }


KINDS = list(links(Path()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overwrite", [True, False])
def test_only_regular_files_are_replaced(tmp_path, monkeypatch, kind, overwrite):
    monkeypatch.chdir(tmp_path)
    place = Path("file")
    links(place)[kind]()
    with pytest.raises(AptError, match=r"is a link|not a regular file"):
        write_file(place, "text", overwrite=overwrite)
    assert not Path("nowhere").exists()
    if kind == "link":
        assert Path("other").read_text() == "mine"


def test_file_is_replaced_in_one_step_only_with_overwrite(tmp_path, monkeypatch):
    place = tmp_path / "file"
    write_file(place, "one")
    with pytest.raises(AptError, match=r"file exists; overwrite it, or choose another file"):
        write_file(place, "two")
    assert place.read_text() == "one"
    write_file(place, "two", overwrite=True)
    assert place.read_text() == "two"
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(AptError, match="cannot write .*file: No space left on device"):
        write_file(place, "three", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert place.read_text() == "two"


def full_disk(descriptor):
    raise OSError(28, os.strerror(28))


def test_hard_link_of_a_replaced_file_keeps_its_content(tmp_path):
    (tmp_path / "other").write_text("mine")
    (tmp_path / "file").hardlink_to(tmp_path / "other")
    write_file(tmp_path / "file", "new", overwrite=True)
    assert (tmp_path / "other").read_text() == "mine"


def test_missing_folders_and_inputs_are_refused(tmp_path):
    with pytest.raises(AptError, match="its folder does not exist; create it first"):
        check_file(tmp_path / "none" / "file")
    (tmp_path / "model").mkdir()
    (tmp_path / "alias").symlink_to("model")
    with pytest.raises(AptError, match="is inside an input of the run"):
        check_file(tmp_path / "alias" / "file", inputs=[tmp_path / "model"])
    with pytest.raises(AptError, match="cannot write"):
        check_file(tmp_path / ("x" * 300))


@pytest.fixture(scope="module")
def model(tmp_path_factory, checkpoint):
    return Path(shutil.copytree(checkpoint("llama"), tmp_path_factory.mktemp("m") / "m"))


@pytest.fixture(scope="module")
def pruned(output_of, model):
    return output_of("prune", model, *QUICK)


SEARCH = ("--search", "--keep", 0.75, "--evaluations", 1, *QUICK[:-2])
WRITERS = {
    "report": ("page.html", ("report", "out", "-o", "page.html")),
    "plot": ("p.png", ("shrink", "m", *SEARCH, "-o", "new", "--plot", "p.png")),
    "save-config": ("s.toml", ("prune", "m", *QUICK, "-o", "new", "--save-config", "s.toml")),
    "log": ("l.log", ("--log-file", "l.log", "methods")),
    "image": (
        "i/out-sparsity-by-block-and-kind.png",
        ("report", "out", "-o", "page.html", "--png", "i"),
    ),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in WRITERS
        for kind in (KINDS if name == "log" else ("link", "dangling", "fifo"))
    ],
)
def test_commands_refuse_links_as_output_files(apt, model, pruned, name, kind):
    shutil.copytree(model, "m")
    shutil.copytree(pruned, "out")
    place = Path(WRITERS[name][0])
    place.parent.mkdir(exist_ok=True)
    links(place)[kind]()
    before = snapshot()
    run = apt(*WRITERS[name][1])
    assert run.code == 2, run.out
    assert len(run.err.strip().splitlines()) < 3
    assert snapshot() == before


def snapshot():
    """The content of all files, and the targets of all links."""
    return {
        str(path): os.readlink(path) if path.is_symlink()
        else path.read_bytes() if path.is_file() else None
        for path in sorted(Path().rglob("*"))
    }  # fmt: skip


@pytest.mark.parametrize("name", ["report", "plot", "image"])
def test_commands_replace_a_file_only_with_overwrite(apt, model, pruned, name):
    shutil.copytree(model, "m")
    shutil.copytree(pruned, "out")
    place, words = Path(WRITERS[name][0]), WRITERS[name][1]
    place.parent.mkdir(exist_ok=True)
    place.write_text("mine")
    run = apt(*words)
    assert (run.code, place.read_text()) == (2, "mine")
    assert "exists; overwrite it" in run.err
    assert apt(*words, "--overwrite").code == 0
    assert place.read_bytes() != b"mine"


INSIDE = {
    "compare": ("compare", "m", "--methods", "wanda", "--patterns", "0.5", "-o", "m/c"),
    "save-config": ("prune", "m", *QUICK, "-o", "new", "--save-config", "m/s.toml"),
    "plot": ("shrink", "m", *SEARCH, "-o", "new", "--plot", "m/p.png"),
    "log": ("--log-file", "m/config.json", "methods"),
    "report": ("report", "out", "-o", "out/page.html"),
    "image": ("report", "out", "-o", "page.html", "--png", "out/images"),
}


@pytest.mark.parametrize("name", INSIDE)
def test_outputs_inside_an_input_are_refused(apt, model, pruned, name):
    shutil.copytree(model, "m")
    shutil.copytree(pruned, "out")
    before = snapshot()
    run = apt(*INSIDE[name])
    assert run.code == 2
    assert snapshot() == before


def test_log_is_appended_and_a_full_disk_is_an_error_of_one_line(tmp_path, monkeypatch, capsys):
    import logging

    path, log = tmp_path / "l.log", logging.getLogger("test.log")
    for text in ("one", "two"):
        handler = open_log(path)
        log.addHandler(handler)
        log.warning(text)
        log.removeHandler(handler)
        handler.close()
    assert [line.split()[-1] for line in path.read_text().splitlines()] == ["one", "two"]
    handler = open_log(path)
    monkeypatch.setattr(handler.stream, "flush", lambda: full_disk(0), raising=False)
    handler.handle(log.makeRecord("a", 30, "b", 1, "three", (), None))
    assert capsys.readouterr().err.count("\n") == 1


def test_journal_of_a_search_keeps_other_files(apt, model):
    search = ("shrink", model, "--search", "--keep", 0.75, "--evaluations", 1, "--samples", 2,
              "--seqlen", 32, "--calibration", TEXT, "-o", "small")  # fmt: skip
    place = Path(".small.search.jsonl")
    place.write_text("my notes\n")
    run = apt(*search)
    assert (run.code, place.read_text()) == (2, "my notes\n")
    assert "is not the journal of a search" in run.err
    plain = tuple(word for word in search if word not in ("--search", "--evaluations", 1))
    assert apt(*plain).code == 0  # no search: the file is not its own
    assert place.read_text() == "my notes\n"
    place.unlink()
    Path("target").write_text("mine")
    place.symlink_to("target")
    assert apt(*search, "--overwrite").code == 2
    assert Path("target").read_text() == "mine"
    place.unlink()
    assert apt(*search, "--overwrite").code == 0
    assert not place.exists()


def test_overwrite_replaces_only_an_unmodified_result(apt, model, pruned):
    shutil.copytree(pruned, "out")
    again = ("prune", model, *QUICK, "-o", "out", "--overwrite")
    assert apt(*again).code == 0
    for name, change in {
        "model.safetensors": fine_tune,
        "config.json": lambda p: p.write_text(p.read_text().replace("0.02", "0.03")),
        "README.md": lambda p: p.write_text("my text"),
    }.items():
        shutil.rmtree("out")
        shutil.copytree(pruned, "out")
        change(Path("out") / name)
        before = snapshot()
        run = apt(*again)
        assert run.code == 2
        assert f"out exists and was changed since APT wrote it: {name}" in run.err
        assert snapshot() == before


def fine_tune(path):
    tensors = load_file(path)
    tensors["model.norm.weight"] += 1
    save_file(tensors, path, {"format": "pt"})


def test_result_that_changes_during_the_run_is_kept(apt, model, pruned, monkeypatch):
    shutil.copytree(pruned, "out")
    from apt.output.staging import Staging

    publish = Staging.publish

    def changed(work):
        Path("out/config.json").write_text("{}")
        publish(work)

    monkeypatch.setattr(Staging, "publish", changed)
    run = apt("prune", model, *QUICK, "-o", "out", "--overwrite")
    assert run.code == 2
    assert "was changed since APT wrote it: config.json, and was not replaced" in run.err
    assert Path("out/config.json").read_text() == "{}"
    assert Path("out-1/model.safetensors").exists()


def test_report_has_the_hash_of_each_file(pruned):
    record = json.loads((pruned / "apt_report.json").read_text())
    assert record["files"] == file_hashes(pruned, ["apt_report.json"])
    assert changed_files(pruned, record["files"]) == []


def test_verify_reports_changed_files(apt, pruned):
    shutil.copytree(pruned, "out")
    Path("out/README.md").write_text("my text")
    run = apt("verify", "out")
    assert (run.code, "README.md was changed" in run.err) == (0, True)
    data = bytearray(Path("out/model.safetensors").read_bytes())
    data[-1] ^= 1
    Path("out/model.safetensors").write_bytes(data)
    Path("out/tokenizer.json").unlink()
    run = apt("verify", "out", "--json")
    assert run.code == 1
    assert json.loads(run.out)["problems"] == [
        "model.safetensors was changed or removed since it was written",
        "tokenizer.json was changed or removed since it was written",
    ]


@pytest.mark.parametrize("command", ["reapply", "convert", "pack"])
def test_every_output_has_a_report_with_its_files(apt, pruned, command):
    shutil.copytree(pruned, "out")
    given = ("out", "out") if command == "reapply" else ("out",)
    assert apt(command, *given, "-o", "other").code == 0
    record = json.loads(Path("other/apt_report.json").read_text())
    assert record["files"] == file_hashes(Path("other"), ["apt_report.json"])
    assert Path("other/README.md").exists()
    assert apt("verify", "other").code == 0


def test_reapply_refuses_a_fifo(apt, pruned):
    os.mkfifo("fifo")
    run = apt("reapply", "fifo", pruned, "-o", "other")
    assert (run.code, "fifo is neither a file nor a directory" in run.err) == (2, True)


def test_hidden_files_of_a_checkpoint_are_not_copied(apt, model):
    shutil.copytree(model, "m")
    for name in (".env", ".cache/token"):
        Path("m", name).parent.mkdir(exist_ok=True)
        Path("m", name).write_text("SECRET=1")
    assert apt("prune", "m", *QUICK, "-o", "out").code == 0
    assert not [path for path in Path("out").rglob("*") if path.name.startswith(".")]
