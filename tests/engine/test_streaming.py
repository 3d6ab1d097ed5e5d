"""Streamed runs write the same bytes as runs in memory, also after an interruption."""

import errno
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

from apt.checkpoints.load import open_skeleton
from apt.checkpoints.safetensors_io import Shards
from apt.distributed.ranks import Ranks
from apt.engine.streamed import Streamed
from apt.engine.task import Task
from apt.engine.text import Text
from apt.files.journal import Journal
from apt.locations.model_source import find
from apt.options import PruneRun
from apt.output.staging import Staging
from apt.planning.plan import make_plan
from apt.plugin.registry import registry
from apt.solver import NM
from tests.helpers.families import CONFIGS, FAMILIES, random_model
from tests.helpers.interrupted import (
    PLACES,
    SMALL,
    KilledError,
    check_full_disk,
    cut,
    signalled,
    weights,
)
from tests.helpers.processes import start


@pytest.fixture
def sharded(tmp_path, tokenizer):
    """A LLaMA in several shards, beside other files."""
    folder = tmp_path / "sharded"
    random_model("llama", torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"dense")
    (folder / "notes").mkdir()
    (folder / "notes" / "card.md").write_text("kept")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.mark.parametrize(
    ("variant", "effort"),
    [*((variant, "fast") for variant in FAMILIES.values()), ("llama", "default"),
     ("mamba2", "default"), ("opt-350m", "fast"),
     *((name, "default") for name in CONFIGS if name == "jamba")],
)  # fmt: skip
def test_streamed_run_writes_the_weights_of_a_run_in_memory(variant, effort, checkpoint, apt):
    """The defaults of a streamed run are no own text and no norm tuning."""
    model, of_streamed = checkpoint(variant), ["--own-samples", 0, "--norm-epochs", 0]
    for name, options in (("memory", of_streamed), ("disk", ["--stream"])):
        result = apt("prune", model, *SMALL, "--effort", effort, "-o", name, *options)
        assert result.code == 0, result.err
    memory, disk = (Shards(Path(name)) for name in ("memory", "disk"))
    assert memory.entries.keys() == disk.entries.keys()
    for name in memory.entries:
        torch.testing.assert_close(memory.read(name), disk.read(name), rtol=1e-3, atol=1e-5)
    assert apt("verify", "disk").code == 0
    assert not list(Path().glob(".disk*"))


def test_streamed_run_keeps_the_layout_and_all_other_files(sharded, apt):
    result = apt("prune", sharded, *SMALL, "--stream", "-o", "out")
    assert result.code == 0, result.err
    before, after = Shards(sharded), Shards(Path("out"))
    assert {n: e.file.name for n, e in before.entries.items()} == {
        n: e.file.name for n, e in after.entries.items()
    }
    for name, entry in before.entries.items():
        assert (entry.dtype, entry.start) == (after.entries[name].dtype, after.entries[name].start)
        same = torch.equal(before.read(name), after.read(name))
        assert same == (not name.endswith("_proj.weight"))
    assert Path("out/notes/card.md").read_text() == "kept"
    assert Path("out/config.json").read_bytes() == (sharded / "config.json").read_bytes()
    assert not Path("out/pytorch_model.bin").exists()


@pytest.mark.parametrize(
    ("place", "count", "effort"),
    [("write", 1, "default"), ("write", 9, "fast"), ("journal", 1, "fast"), ("journal", 6, "fast"),
     ("appear", 1, "fast")],
)  # fmt: skip
def test_resumed_run_writes_the_same_bytes(
    place, count, effort, checkpoint, apt, output_of, monkeypatch
):
    command = ("prune", checkpoint("llama"), *SMALL, "--stream", "--effort", effort)
    whole = output_of(*command)
    with monkeypatch.context() as patch:
        cut(patch, PLACES[place], count, KilledError())
        with pytest.raises(KilledError):
            apt(*command, "-o", "out")
    assert not Path("out").exists()
    if count > 1 or place == "appear":
        refused = apt(*command, "-o", "out")
        assert refused.code == 2
        assert "(--resume)" in refused.err
    result = apt(*command, "-o", "out", "--resume")
    assert result.code == 0, result.err
    assert weights("out") == weights(whole)
    assert not list(Path().glob(".out*"))


def test_run_interrupted_after_publication_is_complete(checkpoint, apt, output_of, monkeypatch):
    command = ("prune", checkpoint("llama"), *SMALL, "--stream", "--effort", "fast")
    whole = output_of(*command)
    original = shutil.rmtree

    def failing(path, *args, **kwargs):
        if Path(path).name == ".out.apt":
            raise KilledError
        original(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", failing)
        with pytest.raises(KilledError):
            apt(*command, "-o", "out")
    assert Path("out").exists()
    assert "exists and is not empty" in apt(*command, "-o", "out").err
    result = apt(*command, "-o", "out", "--resume")
    assert result.code == 0, result.err
    assert weights("out") == weights(whole)
    assert not list(Path().glob(".out*"))


def test_full_disk_loses_no_finished_blocks(checkpoint, apt, output_of, monkeypatch):
    command = ("prune", checkpoint("llama"), *SMALL, "--stream")
    whole = output_of(*command)
    with monkeypatch.context() as patch:
        cut(patch, PLACES["write"], 9, OSError(errno.ENOSPC, "No space left on device"))
        result = apt(*command, "-o", "out")
    check_full_disk(result, command, apt, whole)


def test_resuming_with_other_options_is_refused(checkpoint, apt, monkeypatch):
    command = ("prune", checkpoint("llama"), *SMALL, "--stream", "-o", "out")
    with monkeypatch.context() as patch:
        cut(patch, PLACES["journal"], 4, KilledError())
        with pytest.raises(KilledError):
            apt(*command)
    other = apt(*command, "--seed", 1, "--resume")
    assert other.code == 2
    assert "is another run: calibration.sha256, options.seed differ" in other.err
    assert apt(*command, "--resume").code == 0


def test_truncated_journal_is_read_up_to_its_last_whole_line(
    checkpoint, apt, output_of, monkeypatch
):
    command = ("prune", checkpoint("llama"), *SMALL, "--stream")
    whole = output_of(*command)
    with monkeypatch.context() as patch:
        cut(patch, PLACES["journal"], 5, KilledError())
        with pytest.raises(KilledError):
            apt(*command, "-o", "out")
    journal = Path(".out.apt/journal.jsonl")
    journal.write_bytes(journal.read_bytes()[:-30])
    assert apt(*command, "-o", "out", "--resume").code == 0
    assert weights("out") == weights(whole)


def test_second_run_of_an_output_is_refused(checkpoint, apt):
    for options in (["--stream"], ["--stream", "--resume"], []):
        with Staging(Path("out")).locked():
            result = apt("prune", checkpoint("llama"), *SMALL, *options, "-o", "out")
        assert result.code == 2
        assert "another run is writing" in result.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--allocation", "atp", "--sparsity", "0.5"], "allocation atp needs the whole model"),
        (["--dtype", "float32"], "another dtype than the default needs"),
    ],
)
def test_requests_that_cannot_be_streamed_are_refused_before_the_work(
    options, message, checkpoint, apt
):
    small = SMALL[:4] + SMALL[6:] if "--sparsity" in options else SMALL
    result = apt("prune", checkpoint("llama"), *small, "--stream", "-o", "out", *options)
    assert result.code == 2
    assert message in result.err
    assert not list(Path().iterdir())


def test_too_small_disk_is_refused_before_the_work(checkpoint, apt, monkeypatch):
    from collections import namedtuple

    monkeypatch.setattr(
        "apt.output.location.shutil.disk_usage", lambda _: namedtuple("U", "free")(1000)
    )
    result = apt("prune", checkpoint("llama"), *SMALL, "--stream", "-o", "out")
    assert result.code == 2
    assert "MiB left" in result.err


def kill_after_two_blocks():
    """Make this process kill itself once two blocks are on disk."""
    Journal.add = signalled(4, signal.SIGKILL)


def test_killed_process_is_resumed(checkpoint, tmp_path, apt, output_of):
    command = ("prune", checkpoint("llama"), *SMALL, "--stream")
    whole = output_of(*command)
    process = start(tmp_path, *command, "-o", "out", before=kill_after_two_blocks)
    process.join()
    assert process.exitcode == -signal.SIGKILL, Path("said").read_text()
    assert not Path("out").exists()
    assert Path(".out.apt/journal.jsonl").read_bytes().count(b"\n") == 4
    assert apt(*command, "-o", "out", "--resume").code == 0
    assert weights("out") == weights(whole)


def test_next_block_is_read_while_a_block_is_pruned(checkpoint, apt, output_of, monkeypatch):
    command = ("prune", checkpoint("llama"), *SMALL, "--stream")
    whole = output_of(*command)
    readers, original = [], Shards.read

    def read(self, name):
        readers.append((name, threading.current_thread() is threading.main_thread()))
        return original(self, name)

    with monkeypatch.context() as patch:
        patch.setattr("apt.engine.streamed.reads_ahead", lambda device: True)
        patch.setattr(Shards, "read", read)
        cut(patch, PLACES["journal"], 5, KilledError())
        with pytest.raises(KilledError):
            apt(*command, "-o", "out")
        assert apt(*command, "-o", "out", "--resume").code == 0
    in_main = {name for name, main in readers if main}
    ahead = {name for name, main in readers if not main}
    assert any(".layers.0." in name for name in in_main - ahead)
    assert any(".layers.1." in name for name in ahead)
    assert weights("out") == weights(whole)


def streamed(model, ranks=None, **options):
    """The store of a streamed run of a model to 2:4."""
    options |= {"model": str(model), "output": Path("out"), "pattern": "2:4", "stream": True}
    skeleton = open_skeleton(find(str(model), registry()), registry())
    return Streamed(
        Task(
            options=PruneRun(**options),
            registry=registry(), skeleton=skeleton, device="cpu",
            plan=make_plan(skeleton.module, skeleton.adapter, NM(2, 4)),
        ),
        ranks,
    )  # fmt: skip


def test_read_ahead_block_that_is_never_opened_is_released(checkpoint, monkeypatch):
    """A layer-wise run does not open dropped blocks."""
    monkeypatch.setattr("apt.engine.streamed.reads_ahead", lambda device: True)
    store = streamed(checkpoint("llama"))
    store.begin(Text(None))
    for number, ahead in ((0, ["model.layers.1"]), (2, [])):
        with store.open(f"model.layers.{number}", store.model.model.layers[number]):
            assert list(store._reads) == ahead


@pytest.mark.parametrize("first", [True, False])
def test_each_rank_continues_with_the_stored_values_of_a_block(first, tmp_path, tokenizer):
    """A checkpoint in bf16 that computes in fp32: one rank writes rounded values."""
    random_model("llama", torch.bfloat16).save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    shutil.copytree(tmp_path / "half", tmp_path / "copy")
    rank = type("OneOfTwo", (Ranks,), {"first": first})()
    store = streamed(tmp_path / "half", ranks=rank, compute="float32")
    store.begin(Text(None), tmp_path / "copy")
    name, path = "model.layers.1", "mlp.up_proj.weight"
    block = store.model.get_submodule(name)
    with store.open(name, block):
        weight = block.get_parameter(path)
        dense, exact = weight.data.clone(), weight.data / 3
        weight.data.copy_(exact)
        store.keep(name, block, [])
        assert torch.equal(weight.data, exact.bfloat16().float())
    with store.written(name):
        kept = block.get_parameter(path).data
        assert torch.equal(kept, exact.bfloat16().float() if first else dense)
    assert store.journal.has_work == first


def test_damaged_read_ahead_block_is_an_error_when_it_is_opened(checkpoint, apt, monkeypatch):
    model = Path(shutil.copytree(checkpoint("llama"), "damaged"))
    name = "model.layers.1.mlp.up_proj.weight"
    shards = Shards(model)
    shards.write([(name, torch.full(shards.entries[name].shape, float("nan")))])
    message = f"{name} in {model}/model.safetensors holds values that are not finite"
    result = apt("prune", model, *SMALL, "--stream", "-o", "out")
    assert result.code == 2
    assert message in result.err
    assert not Path(".out.apt").exists()
    monkeypatch.setattr("apt.engine.streamed.reads_ahead", lambda device: True)
    monkeypatch.setattr(
        "apt.checkpoints.stored.Stored.check_finite", lambda self: None
    )  # damaged since
    result = apt("prune", model, *SMALL, "--stream", "-o", "out")
    assert result.code == 2
    assert message in result.err
    assert "finished blocks are in .out.apt: resume the run (--resume)" in result.err


def test_resumed_run_may_place_its_activations_elsewhere(checkpoint, apt, output_of, monkeypatch):
    """This is needed after a run that ended for lack of memory."""
    command = ("prune", checkpoint("llama"), *SMALL, "--stream", "--effort", "fast")
    whole = output_of(*command)
    with monkeypatch.context() as patch:
        cut(patch, PLACES["journal"], 5, KilledError())
        with pytest.raises(KilledError):
            apt(*command, "-o", "out")
    result = apt(*command, "-o", "out", "--resume", "--activations", "disk")
    assert result.code == 0, result.err
    whole, out = Shards(whole), Shards(Path("out"))
    for name in whole.entries:
        torch.testing.assert_close(whole.read(name), out.read(name), rtol=1e-3, atol=1e-5)
    assert apt(*command, "-o", "out", "--resume").code == 0  # it is the same run, and complete


def test_error_that_needs_another_selection_does_not_suggest_to_resume(tmp_path, tokenizer, apt):
    model = random_model("llama")
    torch.nn.init.zeros_(model.model.layers[1].mlp.up_proj.weight)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "dead")
    result = apt("prune", tmp_path / "dead", *SMALL, "--stream", "--effort", "fast", "-o", "out")
    assert result.code == 2
    assert "input was zero on all calibration tokens" in result.err
    assert result.err.endswith("skip 'model.layers.1.mlp.down_proj' (--skip)\n")


def test_resumed_run_uses_the_generated_text_again(checkpoint, apt, output_of, monkeypatch):
    command = ("prune", checkpoint("llama"), *SMALL, "--stream", "--own-samples", 2)
    command = (*command, "--effort", "fast", "--eval", "builtin")
    whole = output_of(*command)
    with monkeypatch.context() as patch:
        cut(patch, PLACES["journal"], 6, KilledError())
        with pytest.raises(KilledError):
            apt(*command, "-o", "out")
    with monkeypatch.context() as patch:
        patch.setattr("apt.text.augmentation.own_text", lambda *args, **kwargs: 1 / 0)
        result = apt(*command, "-o", "out", "--resume")
    assert result.code == 0, result.err
    assert weights("out") == weights(whole)


def test_changed_generated_text_is_refused(checkpoint, apt, monkeypatch):
    command = ("prune", checkpoint("llama"), *SMALL, "--stream", "--own-samples", 2)
    command = (*command, "--effort", "fast", "-o", "out")
    with monkeypatch.context() as patch:
        cut(patch, PLACES["journal"], 5, KilledError())
        with pytest.raises(KilledError):
            apt(*command)
    kept = Path(".out.apt/tokens.safetensors")
    raw = bytearray(kept.read_bytes())
    raw[-8] ^= 1
    kept.write_bytes(raw)
    result = apt(*command, "--resume")
    assert result.code == 2
    assert "damaged: tokens.safetensors was changed" in result.err
