"""Failures during a run: the message is clear, and nothing is lost."""

import os
import resource
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

import apt as library
from apt.errors import AptError
from apt.files.journal import Journal
from apt.plugin.registry import registry
from tests.helpers.families import random_model, random_tokens
from tests.helpers.interrupted import SMALL, signalled, weights
from tests.helpers.mounting import mounted

TOKENS = random_tokens(samples=8)


@contextmanager
def limited(size):
    """While entered, files of this process have a size limit, as on a full disk or over a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("stream", [False, True], ids=["memory", "stream"])
def test_file_size_limit_is_an_error_and_the_input_is_unchanged(apt, checkpoint, stream):
    model = checkpoint("llama")
    before = {p: p.read_bytes() for p in model.iterdir()}
    command = ("prune", model, *SMALL, "-o", "out", *(["--stream"] if stream else []))
    with limited(100_000):
        run = apt(*command)
    assert run.code == 2, run.err
    (line,) = (text for text in run.err.splitlines() if text.startswith("apt: "))
    assert "cannot write" in line
    assert "File too large" in line
    assert ("--resume" in line) == stream
    assert "Traceback" not in run.err
    assert not Path("out").exists()
    assert {p: p.read_bytes() for p in model.iterdir()} == before
    if stream:
        again = apt(*command, "--resume")
        assert again.code == 0, again.err
    assert [p.name for p in Path().iterdir()] == (["out"] if stream else [])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    with mounted(tmp_path / "disk", "-o", "size=256k") as folder:
        yield folder


def test_small_disk_is_an_error_before_the_work(checkpoint, apt, small_disk):
    for options in ([], ["--stream"]):
        run = apt("prune", checkpoint("llama"), *SMALL, "-o", small_disk / "out", *options)
        assert run.code == 2
        assert "disk has 0 MiB left, but the output needs" in run.err
        assert not list(small_disk.iterdir())


def test_disk_that_fills_during_the_run_is_an_error(checkpoint, apt, small_disk, monkeypatch):
    monkeypatch.setattr("apt.engine.run_output.check_space", lambda needed: None)
    run = apt("prune", checkpoint("llama"), *SMALL, "-o", small_disk / "out")
    assert run.code == 2
    assert "cannot write" in run.err
    assert "No space left on device" in run.err
    assert not list(small_disk.iterdir())


@pytest.mark.parametrize("error_aware", [True, False], ids=["error-aware", "layer-wise"])
@pytest.mark.parametrize("where", ["self_attn", "mlp"])
def test_error_names_the_block_of_an_activation_that_is_not_finite(where, error_aware):
    model = random_model("llama")

    def spoil(module, arguments, output):
        (output[0] if isinstance(output, tuple) else output)[0, 3, 5] = float("nan")

    model.model.layers[1].get_submodule(where).register_forward_hook(spoil)
    options = library.PruneOptions(error_aware=error_aware, own_samples=0)
    with pytest.raises(AptError, match=r"in model\.layers\.1: .*not finite") as caught:
        library.prune(model, TOKENS, pattern="2:4", options=options)
    assert "\n" not in str(caught.value)


def test_overflow_in_half_precision_is_an_error_that_names_compute(tmp_path, tokenizer, apt):
    model = random_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data *= 2e4
    model.half().save_pretrained("half")
    tokenizer.save_pretrained("half")
    run = apt("prune", "half", *SMALL, "-o", "out", "--layer-wise", "--compute", "float16")
    assert run.code == 2
    assert "in model.layers.1:" in run.err
    assert "not finite" in run.err
    assert not Path("out").exists()
    assert "(--compute)" in run.err
    assert apt("prune", "half", *SMALL, "-o", "out", "--compute", "float32").code == 0


def test_indefinite_gram_matrix_raises_the_damping(apt, checkpoint):
    few = ("--samples", 1, "--seqlen", 24, "--damping", 0, "--layer-wise")
    run = apt("prune", checkpoint("llama"), *few, "-o", "out")
    assert run.code == 0, run.err
    assert "needed damping" in run.out


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("stream", [False, True], ids=["memory", "stream"])
def test_exception_of_a_method_keeps_its_traceback_and_loses_no_work(
    apt, output_of, checkpoint, monkeypatch, stream
):
    spec = registry().methods.get("wanda")
    whole, calls = spec.load(), []

    def broken(*arguments):
        calls.append(arguments)
        if len(calls) == 9:
            raise BrokenError("no idea")
        return whole(*arguments)

    options = ["--method", "wanda", "-o", "out", *(["--stream"] if stream else [])]
    with monkeypatch.context() as patch:
        patch.setattr(type(spec), "load", lambda self: broken if self is spec else whole)
        with pytest.raises(BrokenError) as caught:
            apt("prune", checkpoint("llama"), *SMALL, *options)
    message = "\n".join(caught.value.__notes__)
    assert "while model.layers.1.self_attn.k_proj was pruned" in message
    assert "method wanda comes from apt-prune 0.1.0, adapter llama from apt-prune 0.1.0" in message
    assert ("continue with --resume" in message) == stream
    assert not Path("out").exists()
    if stream:
        assert apt("prune", checkpoint("llama"), *SMALL, *options, "--resume").code == 0
        whole = output_of("prune", checkpoint("llama"), *SMALL, "--method", "wanda", "--stream")
        assert weights("out") == weights(whole)


def test_output_that_links_to_another_folder_does_not_change_it(apt, checkpoint, tmp_path):
    outside = Path(tempfile.mkdtemp(dir=tmp_path))
    (outside / "kept").write_text("kept")
    Path("out").symlink_to(outside)
    run = apt("prune", checkpoint("llama"), *SMALL, "--stream", "-o", "out", "--overwrite")
    assert run.code == 2
    assert "has files that APT did not write: kept" in run.err
    assert Path("out").readlink() == outside
    assert {p.name: p.read_text() for p in outside.iterdir()} == {"kept": "kept"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_terminated_run_prints_its_state_and_can_be_resumed(apt, checkpoint, monkeypatch, number):
    command = ("prune", checkpoint("llama"), *SMALL, "--method", "wanda", "-o", "out")
    with monkeypatch.context() as patch:
        patch.setattr(
            "apt.engine.run_output.write_card", lambda *arguments: os.kill(os.getpid(), number)
        )
        run = apt(*command)
    assert run.code == (143 if number == signal.SIGTERM else 130)
    assert "interrupted; nothing was written" in run.err
    assert not list(Path().iterdir())
    monkeypatch.setattr(Journal, "add", signalled(4, number))
    run = apt(*command, "--stream")
    assert run.code == (143 if number == signal.SIGTERM else 130)
    assert "give the same command with --resume" in run.err
    assert [p.name for p in Path().iterdir()] == [".out.apt"]
    assert apt(*command, "--stream", "--resume").code == 0
    assert [p.name for p in Path().iterdir()] == ["out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ignored_signal_does_not_end_the_run(apt, output_of, checkpoint, monkeypatch, number):
    """A background job of a script ignores Ctrl-C, and a job under nohup ignores SIGHUP."""
    command = ("prune", checkpoint("llama"), *SMALL, "--method", "wanda", "--stream")
    whole = output_of(*command)
    monkeypatch.setattr(Journal, "add", signalled(4, number))
    before = signal.signal(number, signal.SIG_IGN)
    try:
        run = apt(*command, "-o", "out")
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
    assert run.code == 0, run.err
    assert weights("out") == weights(whole)


def test_failed_start_of_a_streamed_run_leaves_no_files(apt, checkpoint, monkeypatch):
    error = AptError("no", "such")
    monkeypatch.setattr(
        "apt.engine.streamed.assemble", lambda *arguments: (_ for _ in ()).throw(error)
    )
    run = apt("prune", checkpoint("llama"), *SMALL, "-o", "out", "--stream")
    assert run.code == 2
    assert not list(Path().iterdir())
