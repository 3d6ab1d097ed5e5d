"""Activations in memory or on disk: equal results, and no remaining files."""

import errno
import gc
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from apt.adapter import Site
from apt.calibration.batches import Batch, DenseActivations, enter
from apt.calibration.storage import DiskStore, MemoryStore
from apt.checkpoints.safetensors_io import Shards
from tests.helpers.families import adapter_of, random_model
from tests.helpers.interrupted import PLACES, SMALL, KilledError, check_full_disk, cut, weights

Pair = namedtuple("Pair", "left right")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_disk_store_returns_equal_tensors_and_containers(tmp_path, dtype):
    store, tensor = DiskStore(tmp_path), torch.arange(24).reshape(2, 3, 4).to(dtype)
    given = {"a": [tensor, (tensor.transpose(0, 2), None)], "b": Pair(tensor[:, 1], torch.empty(0))}
    held = store.put(given)
    assert len(list(tmp_path.iterdir())) == 3
    result = store.get(held)
    assert torch.equal(result["a"][0], tensor)
    assert torch.equal(result["a"][1][0], tensor.transpose(0, 2))
    assert result["a"][1][1] is None
    assert isinstance(result["b"], Pair)
    assert torch.equal(result["b"].left, tensor[:, 1])
    assert result["b"].right.shape == (0,)


def test_write_to_a_read_tensor_does_not_change_the_file(tmp_path):
    store = DiskStore(tmp_path)
    held = store.put(torch.ones(5))
    store.get(held).zero_()
    assert torch.equal(store.get(held), torch.ones(5))


def test_file_is_deleted_with_its_last_reference(tmp_path):
    batch = Batch(torch.ones(5), [], 5, DenseActivations(torch.zeros(5), DiskStore(tmp_path)))
    batch.dense.inputs.record(Site("s", "s", "x"), torch.ones(1, 3))
    assert len(list(tmp_path.iterdir())) == 2
    result = batch.dense.inputs["x"][0]
    batch.dense.state = torch.full((5,), 2.0)
    batch.dense.inputs.clear()
    gc.collect()
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(result, torch.ones(1, 3)), "what is still read"
    del batch
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_missing_files_are_ignored_on_deletion(tmp_path, monkeypatch):
    """After an error, the folder is removed before the last reference to an activation."""
    folder, messages = tmp_path / "activations", []
    folder.mkdir()
    held = DiskStore(folder).put(torch.ones(3))
    shutil.rmtree(folder)
    monkeypatch.setattr("sys.unraisablehook", messages.append)
    monkeypatch.setattr("sys.excepthook", lambda *error: messages.append(error))
    del held
    gc.collect()
    assert not messages


def test_disk_store_has_one_file_per_stream_and_batch(tmp_path):
    model, tokens = random_model("llama"), torch.arange(48).reshape(4, 12)
    batches = enter(
        adapter_of(model), model, tokens, 24, with_dense=True, store=DiskStore(tmp_path)
    )
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert sizes == [24 * model.config.hidden_size * 4] * 4
    in_memory = enter(adapter_of(model), model, tokens, 24, store=MemoryStore())
    for one, other in zip(batches, in_memory, strict=True):
        assert torch.equal(one.state, other.state)


@pytest.mark.usefixtures("half_is_slow")
@pytest.mark.parametrize(
    ("variant", "options"),
    [("qwen2-moe", ["--effort", "fast"]), ("llama", []),
     ("mamba2", []), ("llama", ["--layer-wise"]), ("llama", ["--at-once"])],
)  # fmt: skip
def test_activations_on_disk_give_the_same_weights(variant, options, checkpoint, apt):
    command = ("prune", checkpoint(variant), *SMALL, "--stream", *options)
    for where in ("memory", "disk"):
        result = apt(*command, "-o", where, "--activations", where)
        assert result.code == 0, result.err
    memory, disk = Shards(Path("memory")), Shards(Path("disk"))
    for name in memory.entries:
        torch.testing.assert_close(memory.read(name), disk.read(name), rtol=1e-3, atol=1e-5)
    assert not list(Path().glob(".*.apt"))


@pytest.fixture
def command(checkpoint):
    """A run with activations on disk."""
    return ("prune", checkpoint("llama"), *SMALL, "--stream", "--activations", "disk")


def test_killed_run_leaves_no_activations_after_resume(command, apt, output_of, monkeypatch):
    whole = output_of(*command)
    with monkeypatch.context() as patch:
        patch.setattr("apt.calibration.storage.weakref.finalize", lambda *args, **kwargs: None)
        cut(patch, PLACES["journal"], 4, KilledError())
        with pytest.raises(KilledError):
            apt(*command, "-o", "out")
    activations = Path(".out.apt/scratch")
    assert not activations.exists()
    activations.mkdir()  # SIGKILL leaves them
    (activations / "0").write_bytes(b"activations")
    assert apt(*command, "-o", "out", "--resume").code == 0
    assert weights("out") == weights(whole)
    assert not list(Path().glob(".out*"))


def test_full_disk_ends_the_run_with_one_line(command, apt, output_of, monkeypatch):
    original, calls = DiskStore._write, []

    def full(self, tensor):
        calls.append(1)
        if len(calls) == 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, tensor)

    whole = output_of(*command)
    with monkeypatch.context() as patch:
        patch.setattr(DiskStore, "_write", full)
        result = apt(*command, "-o", "out")
    check_full_disk(result, command, apt, whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--activations", "disk"], "stream the run as well (--activations, --stream)"),
     (["--activations", "tape", "--stream"], "is not one of memory, cpu, disk (--activations)")],
)  # fmt: skip
def test_invalid_places_of_activations_are_refused(options, message, checkpoint, apt):
    for command in (("prune", "-o", "out"), ("inspect",)):
        result = apt(*command, checkpoint("llama"), *options)
        assert result.code == 2
        assert message in result.err
        assert not list(Path().iterdir())


def test_inspect_names_the_disk_space_of_activations(checkpoint, apt):
    command = ("inspect", checkpoint("llama"), "--stream", "--samples", 512, "--seqlen", 64)
    memory, disk = (apt(*command, "--activations", where).out for where in ("memory", "disk"))
    assert "of disk" in disk
    assert "of disk" not in memory
