"""Changes of files between a kill and --resume are detected or harmless."""

import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from apt.checkpoints.safetensors_io import Shards
from apt.files.journal import Journal
from tests.helpers import TEXT
from tests.helpers.interrupted import PLACES, KilledError, cut, weights

TAMPERINGS = int(os.environ.get("APT_TAMPERINGS", "30"))
QUICK = ("--samples", 2, "--seqlen", 16, "--pattern", "2:4", "--calibration", TEXT, "--stream")


@pytest.fixture
def cut_short(checkpoint, apt, monkeypatch):
    """A function that interrupts a run after some lines of the journal, and returns its command."""
    command = ("prune", checkpoint("llama"), *QUICK, "--method", "wanda")

    def leave(lines=5):
        with monkeypatch.context() as patch:
            cut(patch, PLACES["journal"], lines, KilledError())
            with pytest.raises(KilledError):
                apt(*command, "-o", "out")
        return (*command, "-o", "out", "--resume")

    return leave


@pytest.fixture
def check(apt, output_of):
    """A function that resumes: the result of an uninterrupted run, or an error and no output."""

    def go_on(command):
        run = apt(*command)
        if run.code == 0:
            assert weights("out") == weights(output_of(*command[:-3]))
            return "harmless"
        assert run.code == 2, run.err
        assert "delete" in run.err
        assert not Path("out").exists()
        return "seen"

    return go_on


def flip(path, draw):
    """Flip a random bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    path.write_bytes(raw)


@pytest.mark.parametrize("lines", [4, 5, 6], ids=["one block", "two blocks", "all blocks"])
def test_bit_flips_in_any_file_are_seen_or_harmless(cut_short, check, lines):
    command, draw, found = cut_short(lines), random.Random(lines), []
    shutil.copytree(".out.apt", "left")
    files = sorted(p.relative_to("left") for p in Path("left").rglob("*") if p.stat().st_size)
    files = [path for path in files if (Path("left") / path).is_file()]
    for number in range(TAMPERINGS // 3):
        for leftover in (".out.apt", "out"):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.copytree("left", ".out.apt")
        flip(Path(".out.apt") / files[number % len(files)], draw)
        found.append(check(command))
    print(f"{lines}: {len(found)} flips, {found.count('seen')} seen, the others did no harm")
    assert found.count("seen") > len(found) / 3


CHANGES = {
    "a pruned weight": "model.layers.0.mlp.up_proj.weight",
    "a norm of a pruned block": "model.layers.0.input_layernorm.weight",
    "a norm of a block to come": "model.layers.2.input_layernorm.weight",
    "the embedding": "model.embed_tokens.weight",
    "the last norm": "model.norm.weight",
}


@pytest.mark.parametrize("name", CHANGES.values(), ids=CHANGES)
def test_changed_tensor_of_a_kept_block_is_refused(cut_short, apt, name):
    command, out = cut_short(), Path(".out.apt/out")
    Shards(out).write([(name, Shards(out).read(name) + 1)])
    run = apt(*command)
    assert run.code == 2
    assert "the interrupted run of out is damaged" in run.err
    assert "was changed; delete" in run.err
    assert not Path("out").exists()


def test_changed_tensor_of_a_later_block_is_overwritten(cut_short, check):
    command, out, name = cut_short(), Path(".out.apt/out"), "model.layers.2.mlp.up_proj.weight"
    Shards(out).write([(name, torch.ones_like(Shards(out).read(name)))])
    assert check(command) == "harmless"


def test_forged_lines_of_the_journal_are_harmless(cut_short, check):
    command, path = cut_short(), Path(".out.apt/journal.jsonl")
    before = path.read_bytes()
    for line in (b'{"finished": true}\n', b'{"finished": {}, "checksum": ""}\n', b"[]\n", b"\xff"):
        path.write_bytes(before + line)
        assert check(command) == "harmless"
        shutil.rmtree("out")
        cut_short()
    forged = Journal(path, "")
    forged.read()
    forged.add({"finished": {}})
    assert check(command) == "harmless"


def test_missing_or_changed_line_of_the_journal_is_refused(cut_short, apt):
    command, path = cut_short(), Path(".out.apt/journal.jsonl")
    first, second, *rest = path.read_bytes().splitlines(keepends=True)
    for lines in ([first, *rest], [first, second.replace(b"0", b"1", 1), *rest], [second, *rest]):
        path.write_bytes(b"".join(lines))
        run = apt(*command)
        assert run.code == 2
        assert "was changed" in run.err
        assert not Path("out").exists()


def test_files_added_to_the_staging_folder_are_not_published(cut_short, check):
    command = cut_short()
    Path(".out.apt/out/evil.py").write_text("raise SystemExit")
    Path(".out.apt/out/deep").mkdir()
    Path(".out.apt/out/deep/evil.bin").write_bytes(b"x")
    assert check(command) == "harmless"


def test_resuming_a_finished_run_reports_it_as_complete(cut_short, apt):
    command = cut_short()
    assert apt(*command).code == 0
    before = {p.name: p.read_bytes() for p in Path("out").iterdir()}
    again = apt(*command)
    assert again.code == 0, again.err
    assert "out: already complete" in again.out
    other = apt(*command, "--seed", 1)
    assert other.code == 2
    assert "out is the result of another run: seed differ" in other.err
    assert {p.name: p.read_bytes() for p in Path("out").iterdir()} == before
