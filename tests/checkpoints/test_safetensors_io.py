"""Safetensors files read and written in place, and the errors for damaged or hostile files."""

import json
import struct
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from apt.checkpoints.copies import copy_weights
from apt.checkpoints.safetensors_io import Shards, read_header, read_metadata, write_header
from apt.errors import AptError

TENSORS = {
    "a.weight": torch.randn(4, 8).bfloat16(),
    "b.weight": torch.randn(3, 5),
    "b.bias": torch.randn(3).half(),
    "count": torch.tensor(7),
    "none": torch.empty(0, 4),
}


@pytest.fixture
def directory(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt", "note": "kept"})
    return tmp_path


def test_shards_read_the_stored_tensors(directory):
    shards = Shards(directory)
    assert shards.entries.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(shards.read(name), tensor)


def test_write_changes_only_the_given_tensor(directory):
    size = (directory / "model.safetensors").stat().st_size
    changed = torch.zeros_like(TENSORS["b.weight"])
    Shards(directory).write([("b.weight", changed)])
    loaded = load_file(directory / "model.safetensors")
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded[name], changed if name == "b.weight" else tensor)
    assert (directory / "model.safetensors").stat().st_size == size
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert file.metadata()["note"] == "kept"
    with pytest.raises(ValueError, match=r"b\.bias is"):
        Shards(directory).write([("b.bias", changed)])


def test_fp8_is_read_on_request_alone(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {"w": torch.randn(4, 8).to(torch.float8_e4m3fn), "s": torch.ones(2, 1)}
    save_file(tensors, path)
    with pytest.raises(AptError, match="w in .* is stored as F8_E4M3: the checkpoint is quantised"):
        Shards(tmp_path)
    shards = Shards(tmp_path, fp8=True)
    assert torch.equal(shards.read("w").view(torch.uint8), tensors["w"].view(torch.uint8))
    assert torch.equal(shards.read_slice("w", 2).float(), tensors["w"][2].float())


def test_a_written_header_is_that_of_safetensors(directory):
    path = directory / "model.safetensors"
    data = path.read_bytes()
    entries = sorted(read_header(path).items(), key=lambda item: item[1].start)
    start = min(entry.start for _, entry in entries)
    tensors = [(name, entry.dtype, entry.shape) for name, entry in entries]
    path.write_bytes(write_header(tensors, read_metadata(path)) + data[start:])
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "kept"}


def index(directory, weights):
    if (directory / "model.safetensors").exists():  # else it is read before the index
        (directory / "model.safetensors").rename(directory / "first.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def test_shards_read_several_files_by_their_index(directory):
    save_file({"c": torch.ones(2)}, directory / "second.safetensors")
    index(directory, dict.fromkeys(TENSORS, "first.safetensors") | {"c": "second.safetensors"})
    shards = Shards(directory)
    assert torch.equal(shards.read("c"), torch.ones(2))
    assert torch.equal(shards.read("b.bias"), TENSORS["b.bias"])


def test_single_file_is_read_before_an_index(directory, tmp_path_factory):
    """The index may be left from before the files were merged."""
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"old": "gone.safetensors"}}))
    shards, copy = Shards(directory), tmp_path_factory.mktemp("copy")
    assert shards.entries.keys() == TENSORS.keys()
    copy_weights(shards, directory, copy, None)
    assert [path.name for path in copy.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "x/y", "..", "", "a\\b"])
def test_index_with_a_file_outside_the_directory_is_refused(directory, name):
    index(directory, {"a": name})
    with pytest.raises(AptError, match="outside its directory"):
        Shards(directory)


def test_missing_files_duplicate_tensors_and_damaged_indices_are_errors(directory, tmp_path):
    index(directory, {"a": "third.safetensors"})
    with pytest.raises(AptError, match=r"lacks third\.safetensors"):
        Shards(directory)
    save_file(TENSORS, directory / "second.safetensors")
    index(directory, {"a": "second.safetensors", "b": "first.safetensors"})
    with pytest.raises(AptError, match=r"is in first\.safetensors and in second"):
        Shards(directory)
    (directory / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(AptError, match="is damaged"):
        Shards(directory)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AptError, match="only safetensors can be streamed"):
        Shards(tmp_path / "empty")


def test_truncated_file_is_an_error(directory):
    shards = Shards(directory)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(AptError, match="ends within"):
        [shards.read(name) for name in TENSORS]
    with pytest.raises(AptError, match="is damaged"):
        Shards(directory)


headers = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F8", 3]),
        "shape": st.lists(st.integers(-2, 2**40), max_size=3),
        "data_offsets": st.lists(st.integers(-4, 2**66), max_size=3),
    }
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    raw=st.binary(max_size=64)
    | headers.map(lambda h: json.dumps(h).encode())
    | st.dictionaries(st.text(max_size=3), entries, max_size=3).map(
        lambda h: json.dumps(h).encode()
    ),
    size=st.none() | st.integers(0, 2**64 - 1),
    rest=st.binary(max_size=32),
)
def test_any_header_is_read_within_the_file_or_refused(tmp_path, raw, size, rest):
    path = tmp_path / "any.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw) if size is None else size) + raw + rest)
    with suppress(AptError):
        for entry in read_header(path).values():
            assert entry.start + entry.size <= path.stat().st_size


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(raw=st.binary(max_size=64) | headers.map(lambda h: json.dumps({"weight_map": h}).encode()))
def test_any_index_without_files_is_refused(tmp_path, raw):
    (tmp_path / "model.safetensors.index.json").write_bytes(raw)
    with pytest.raises(AptError):
        Shards(tmp_path)
