"""The files of a checkpoint that its output has as well: copied, and held against the original."""

import hashlib
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file

from apt.checkpoints.safetensors_io import INDEX, Shards, write_index
from apt.errors import AptError

CARD = "README.md"
"""The model card, which is written anew when a run ends."""

REPORT = "apt_report.json"
"""The record of the run that wrote a checkpoint."""

# Weights in other formats would be dense ones beside the pruned.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_INDICES = (".bin.index.json", ".h5.index.json", ".msgpack.index.json")
_PIECE = 2**24


def side_files(source: Path) -> Iterator[Path]:
    """All of a checkpoint's files but its weights, their index and a report.

    Hidden folders are left out: they hold what tools keep for themselves. A link counts where it
    leads to a file of the checkpoint, or of the hub's cache of it: any other file is not meant to
    travel with the output.
    """
    return (path for path in _files(source) if not _leads_out(path, source))


def links_outside(source: Path) -> list[Path]:
    """The links among a checkpoint's files that lead to files outside it."""
    return [path for path in _files(source) if _leads_out(path, source)]


def _files(source: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(folder) / name for name in sorted(names)):
            if not _is_weights(path) and path.name not in (REPORT, INDEX) and path.is_file():
                yield path


def _is_weights(path: Path) -> bool:
    return path.suffix in (*OTHER_WEIGHTS, ".safetensors") or path.name.endswith(_INDICES)


def _leads_out(path: Path, source: Path) -> bool:
    """Whether a path is a link to a file that is not the checkpoint's."""
    if not path.is_symlink():
        return False
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(source))
    blobs = root.parent.parent / "blobs"  # of the hub's cache: blobs/…, snapshots/REVISION/…
    cached = root.parent.name == "snapshots" and blobs in real.parents
    return root not in real.parents and not cached


def weight_files(shards: Shards) -> list[Path]:
    """The files that hold the tensors, with their index where there is one."""
    index = shards.files[0].with_name(INDEX)
    return [*shards.files, *([index] if index.is_file() else [])]


def copied_size(source: Path, shards: Shards) -> int:
    """Bytes of all that is copied."""
    return sum(path.stat().st_size for path in (*side_files(source), *weight_files(shards)))


def copy_files(files: Iterable[Path], source: Path, target: Path) -> None:
    """Copy files to the same places of ``target``, and wait until the disk has them."""
    for path in files:
        into = target / path.relative_to(source)
        into.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, into)
        synchronise(into)


def synchronise(path: Path) -> None:
    """Wait until the disk has a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def copy_weights(shards: Shards, source: Path, target: Path, largest: str | None) -> None:
    """Copy the files of the weights, or write them anew in files of at most ``largest``, as 5GB."""
    if largest is None:
        copy_files(weight_files(shards), source, target)
        return
    tensors = {name: x for path in shards.files for name, x in load_file(path).items()}
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=largest)
    for name, keys in split.filename_to_tensors.items():
        part = {key: tensors[key] for key in keys}
        save_file(part, target / name, metadata={"format": "pt"})
        synchronise(target / name)
    if split.is_sharded:
        write_index(target, split.metadata, split.tensor_to_filename)


def checksums(directory: Path, *, headers: bool = False) -> dict[str, str]:
    """A checksum of every file of a directory by its relative path, the model card left out.

    Args:
        directory: the directory.
        headers: whether only the header counts of a safetensors file.
    """
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name != CARD:
            found[name] = _checksum(path, header=headers and path.suffix == ".safetensors")
    return found


def _checksum(path: Path, *, header: bool) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        if header:
            start = file.read(8)
            digest.update(start + file.read(min(int.from_bytes(start, "little"), _PIECE * 8)))
            digest.update(str(path.stat().st_size).encode())
        else:
            while piece := file.read(_PIECE):
                digest.update(piece)
    return digest.hexdigest()


def check_copy(
    shards: Shards, target: Path, known: Mapping[str, str], pruned: Collection[str]
) -> None:
    """Raise where a copy is not what was copied; remove files that were not.

    Args:
        shards: the tensors that were copied.
        target: the copy.
        known: the `checksums` of the copy, of safetensors files those of their headers.
        pruned: the tensors that may differ.

    Raises:
        AptError: a byte differs, or a file is missing.
    """
    found = checksums(target, headers=True)
    for name in found.keys() - known.keys():
        (target / name).unlink()
    for folder, _, _ in os.walk(target, topdown=False):
        if not os.listdir(folder):
            os.rmdir(folder)
    for name, checksum in known.items():
        if found.get(name) != checksum:
            raise AptError(f"{target / name} was changed")
    copied = Shards(target)
    for name in shards.entries.keys() - set(pruned):
        if shards.digest([name]) != copied.digest([name]):
            raise AptError(f"{name} in {copied.entries[name].file} was changed")
