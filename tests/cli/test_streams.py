"""Standard output and error that are full, closed or unread, or whose encoding lacks characters."""

import io
import os
import subprocess
import sys

import pytest

from apt.cli import output
from apt.cli.output import notice, out
from apt.cli.streams import guarded
from tests.helpers.processes import start

APT = [sys.executable, "-m", "apt"]
ALONE = {**os.environ, "APT_DISABLE_PLUGINS": "*"}  # some packages import torch


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["methods"]], ids=str)
def test_full_standard_output_is_a_one_line_error(words):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*APT, *words], stdout=full, stderr=subprocess.PIPE, text=True, env=ALONE
        )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "apt-prune: cannot write to standard output: No space left on device; "
        "write it to another place"
    ]


def test_closed_pipe_ends_the_command_without_a_message():
    for words in (["prune", "--help"], ["methods"]):
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(
            [*APT, *words], stdout=writing, stderr=subprocess.PIPE, text=True, env=ALONE
        )
        os.close(writing)
        assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(("closed", "code"), [("1>&-", 1), ("2>&-", 0), ("1>&- 2>&-", 1)])
def test_closed_standard_output_is_an_error_and_closed_standard_error_is_not(closed, code):
    command = f"exec {sys.executable} -m apt --help {closed}"
    assert subprocess.run(["bash", "-c", command], stdout=subprocess.DEVNULL).returncode == code


def full_error():
    """Replace the standard error of this process by a full device."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)


def test_full_standard_error_does_not_stop_the_run(tmp_path):
    words = ("inspect", "zoo:llama", "--samples", 1)
    process = start(tmp_path, *words, before=full_error)
    process.join()
    assert process.exitcode == 0
    assert "LlamaForCausalLM" in (tmp_path / "said").read_text()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_missing_characters_of_an_encoding_are_replaced(monkeypatch, encoding):
    monkeypatch.setattr(output, "_events", False)  # whatever the last run of the process had
    monkeypatch.setattr(output, "_level", output.Level.NORMAL)
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    with guarded():
        out.print("error 0.5 → 0.1, 4 × 64 … 日本 \udcff", markup=False)
        notice("20.2 → 41.1")
    printed_lines = raw.getvalue().decode(encoding).splitlines()
    plain = {
        "ascii": "error 0.5 -> 0.1, 4 x 64 ... \\u65e5\\u672c \\udcff",
        "latin-1": "error 0.5 -> 0.1, 4 × 64 ... \\u65e5\\u672c \\udcff",
        "utf-8": "error 0.5 → 0.1, 4 × 64 … 日本 \\udcff",
    }
    assert printed_lines == [
        plain[encoding],
        "20.2 → 41.1" if encoding == "utf-8" else "20.2 -> 41.1",
    ]
    assert sys.stdout is stream


def test_output_works_in_an_ascii_locale(tmp_path):
    ascii_only = {"LC_ALL": "C", "LANG": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [*APT, "methods"],
        env={**ALONE, **ascii_only}, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "w_j" in done.stdout
    assert "\\xb2" in done.stdout  # a square
