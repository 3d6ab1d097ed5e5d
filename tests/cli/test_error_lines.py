"""The errors of the command line: one line, or JSON, and the exit status."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from apt.cli.interruptions import TerminatedError, signals_as_exceptions
from apt.errors import resource_error
from tests.helpers import TEXT
from tests.helpers.processes import start

QUICK = ("--samples", 2, "--seqlen", 32, "--calibration", TEXT, "--method", "magnitude")
WRONG = [
    (("prune", "--nothing"), "No such option: --nothing"),
    (("prune", "zoo:llama", "--samples", "x"), "Invalid value for '--samples'"),
    (("nothing",), "no command 'nothing'"),
    (("verify",), "Missing argument"),
    (("prune", "zoo:llama", "zoo:opt"), "unexpected extra argument"),
    (("prune", "zoo:llama", "--sparsity", "2"), "sparsity 2 is outside"),
]


@pytest.mark.parametrize(("words", "text"), WRONG, ids=lambda value: str(value)[:40])
def test_usage_error_is_one_line_or_one_json_object(apt, words, text):
    run = apt(*words)
    assert (run.code, len(run.err.strip().splitlines())) == (2, 1)
    assert run.err.startswith("apt: ")
    assert text in run.err
    run = apt(*words, "--json")
    assert run.code == 2
    events = [json.loads(line) for line in run.err.splitlines()]
    assert text in events[-1]["text"]
    assert events[-1]["event"] == "error"
    assert run.out == ""


@pytest.mark.parametrize("text", ['samples = "x"', "seqlen = 2.5"])
def test_wrong_type_in_a_config_file_names_the_file(apt, text):
    Path("c.toml").write_text(text)
    run = apt("prune", "zoo:llama", "--config", "c.toml")
    assert (run.code, len(run.err.splitlines())) == (2, 1)
    assert " in c.toml is " in run.err
    assert text.split()[0] in run.err


def test_config_file_with_bom_and_crlf_is_read(apt):
    Path("c.toml").write_bytes(b"\xef\xbb\xbf" + b'sparsity = "0.25"\r\nper = "layer"\r\n')
    run = apt("prune", "zoo:llama", "--config", "c.toml", "--dry-run")
    assert run.code == 0, run.err
    assert "0.25" in run.out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pack", ("pack", "zoo:llama", "-o", "out")),
        ("unpack", ("unpack", "packed", "-o", "out")),
        ("apply_masks", ("reapply", "masks", "MODEL", "-o", "out")),
        ("save_model", ("convert", "zoo:llama", "-o", "out")),
        ("write_file", ("export", "zoo:llama", "-o", "out.gguf")),
        ("load", ("eval", "zoo:llama")),
        ("render", ("report", "pruned", "-o", "page.html")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_interrupted_command_prints_it_and_leaves_no_files(
    apt, checkpoint, output_of, monkeypatch, tmp_path, name, words
):
    if words[0] in ("unpack", "reapply", "report"):
        pruned = output_of("prune", checkpoint("llama"), *QUICK, "--save-masks")
        shutil.copytree(pruned, "pruned")
        shutil.copytree(output_of("pack", pruned), "packed")
        os.rename("pruned/apt_masks.safetensors", "masks")
    before = sorted(tmp_path.iterdir())

    modules = {
        "pack": "apt.engine.packing", "unpack": "apt.engine.packing",
        "apply_masks": "apt.engine.reapply_task",
        "write_file": "apt_plugins.gguf_files.export",
        "save_model": "apt.checkpoints.copies", "render": "apt_lab.reporting.page",
        "load": "apt.checkpoints.load",
    }  # fmt: skip
    every = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    for number in every if words[0] == "convert" else every[:1]:

        def interrupt(*arguments, number=number, **options):
            raise KeyboardInterrupt if number is signal.SIGINT else TerminatedError(number)

        monkeypatch.setattr(f"{modules[name]}.{name}", interrupt)
        run = apt(*(checkpoint("llama") if word == "MODEL" else word for word in words))
        assert run.code == 128 + number
        assert run.err.splitlines()[-1].startswith("apt: interrupted")
        assert sorted(tmp_path.iterdir()) == before


def test_signal_raises_an_exception_unless_it_is_ignored():
    with signals_as_exceptions():
        for number in (signal.SIGTERM, signal.SIGHUP):
            with pytest.raises(TerminatedError) as found:
                os.kill(os.getpid(), number)
            assert found.value.number == number
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with signals_as_exceptions():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_undecodable_argument_is_an_error(apt):
    run = apt("eval", os.fsdecode(b"\xfc"))
    assert run.code == 2
    assert r"'\udcfc' is not text in the encoding of this environment" in run.err


def test_lack_of_memory_is_a_one_line_error():
    for error in (
        MemoryError("of 3 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ):
        assert resource_error(error) is not None
    assert resource_error(RuntimeError("a bug")) is None
    assert resource_error(ImportError("no such name")) is None


def test_output_of_a_plugin_is_not_in_the_json(apt, monkeypatch):
    from apt.cli import installed

    shown = installed.show_rows

    def loud(rows, *, as_json):
        print("hello from a plugin")
        shown(rows, as_json=as_json)

    monkeypatch.setattr(installed, "show_rows", loud)
    run = apt("plugins", "--json")
    assert json.loads(run.out)
    assert "hello from a plugin" in run.err
    assert "hello from a plugin" in apt("plugins").out


def test_plots_ignore_the_backend_of_the_environment(apt, checkpoint, tmp_path):
    assert apt("prune", checkpoint("llama"), *QUICK, "-o", "out").code == 0
    words = ("report", "out", "-o", "page.html", "--png", "i")
    process = start(tmp_path, *words, MPLBACKEND="nonsense")
    process.join()
    assert process.exitcode == 0, Path("said").read_text()
    assert Path("i/out-sparsity-by-block-and-kind.png").stat().st_size > 1000
