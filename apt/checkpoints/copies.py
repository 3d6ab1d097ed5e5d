"""Copies of the files of a checkpoint, and a comparison of a copy with the original."""

import hashlib
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file

from apt.checkpoints.formats import Checkpoint
from apt.checkpoints.former_names import add_rope_names, save_tokenizer
from apt.checkpoints.safetensors_io import INDEX, SINGLE, Shards, synchronise, write_files
from apt.errors import AptError
from apt.files.hashes import sha256

CARD = "README.md"
"""The model card. A run writes a new one at its end."""

REPORT = "apt_report.json"
"""The record of the run that wrote a checkpoint."""

# Files of weights in other formats are not copied: they have the dense weights.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_WEIGHTS = (*OTHER_WEIGHTS, ".safetensors")
_INDICES = tuple(f"{kind}.index.json" for kind in (".bin", ".h5", ".msgpack", ".safetensors"))
_LARGEST_HEADER = 2**27


def side_files(source: Path) -> Iterator[Path]:
    """All files of a checkpoint except its weights, their index, and a report of APT.

    Hidden files and folders are left out: they contain data of tools, and secrets. A link is
    included only if it leads to a file of the checkpoint, or of the hub's cache of this checkpoint.
    No other file is copied to the output.
    """
    return (path for path in _files(source) if not _is_outside_link(path, source))


def links_outside(source: Path) -> list[Path]:
    """The links in a checkpoint that lead to files or folders outside it."""
    folders = (folder / name for folder, names, _ in _visible(source) for name in names)
    return [path for path in (*_files(source), *folders) if _is_outside_link(path, source)]


def _visible(source: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Each folder that is not hidden, with the names of its folders and files."""
    for folder, folders, names in os.walk(source):
        folders[:], names = (
            sorted(name for name in entries if not name.startswith("."))
            for entries in (folders, names)
        )
        yield Path(folder), folders, names


def _files(source: Path) -> Iterator[Path]:
    for folder, _, names in _visible(source):
        for path in (folder / name for name in names if name != REPORT):
            weights = path.suffix in _WEIGHTS or path.name.endswith(_INDICES)
            if not weights and path.is_file():
                yield path


def _is_outside_link(path: Path, source: Path) -> bool:
    """True for a link to a file outside the checkpoint."""
    if not path.is_symlink():
        return False
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(source))
    blobs = root.parent.parent / "blobs"  # of the hub's cache: blobs/…, snapshots/REVISION/…
    in_cache = root.parent.name == "snapshots" and blobs in real.parents
    return root not in real.parents and not in_cache


def weight_files(shards: Shards) -> list[Path]:
    """The files with the tensors, and their index; a single file has no index."""
    single = [path.name for path in shards.files] == [SINGLE]  # an index beside it is not read
    return [*shards.files, *([] if single else [shards.files[0].with_name(INDEX)])]


def copied_size(source: Path, shards: Shards) -> int:
    """The size in bytes of all files to copy."""
    return sum(path.stat().st_size for path in (*side_files(source), *weight_files(shards)))


def copy_files(files: Iterable[Path], source: Path, target: Path) -> None:
    """Copy files to the same relative paths in ``target``, and flush them to disk."""
    for path in files:
        into = target / path.relative_to(source)
        into.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, into)
        synchronise(into)


def copy_weights(shards: Shards, source: Path, target: Path, largest: str | None) -> None:
    """Copy the files of weights, or split the weights into files of ``largest``, such as 5GB."""
    if largest is None:
        copy_files(weight_files(shards), source, target)
        return
    tensors = {name: x for path in shards.files for name, x in load_file(path).items()}
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=largest)
    groups = split.filename_to_tensors.values()
    parts = (({key: tensors[key] for key in keys}, {"format": "pt"}) for keys in groups)
    write_files(target, parts, len(groups))


def checksums(directory: Path) -> dict[str, str]:
    """Checksums by relative path, without the card.

    The checksum of a safetensors file covers its header and its size.
    """
    sums = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name != CARD:
            sums[name] = _of_header(path) if path.suffix == ".safetensors" else sha256(path)
    return sums


def _of_header(path: Path) -> str:
    with path.open("rb") as file:
        length = file.read(8)
        header = length + file.read(min(int.from_bytes(length, "little"), _LARGEST_HEADER))
    return hashlib.sha256(header + str(path.stat().st_size).encode()).hexdigest()


def check_copy(
    shards: Shards, target: Path, expected: Mapping[str, str], pruned: Collection[str]
) -> None:
    """Raise if a copy differs from the original; delete files that were not copied.

    Args:
        expected: the `checksums` of the copy.
        pruned: the tensors that may differ.

    Raises:
        AptError: a byte differs, or a file is missing.
    """
    actual = checksums(target)
    for name in actual.keys() - expected.keys():
        (target / name).unlink()
    for folder, _, _ in os.walk(target, topdown=False):
        if not os.listdir(folder):
            os.rmdir(folder)
    for name, checksum in expected.items():
        if actual.get(name) != checksum:
            raise AptError(f"{target / name} was changed")
    copied = Shards(target)
    for name in shards.entries.keys() - set(pruned):
        if shards.digest([name]) != copied.digest([name]):
            raise AptError(f"{name} in {copied.entries[name].file} was changed")


# transformers would write this file without the fields that it does not know.
_ALWAYS_COPIED = "generation_config.json"


def save_model(
    model: Any,
    tokenizer: Any,
    directory: Path,
    checkpoint: Checkpoint | None = None,
    max_shard_size: str | None = None,
) -> None:
    """Write weights, configuration and tokenizer.

    Args:
        tokenizer: the tokenizer; None writes no tokenizer.
        checkpoint: the writer of another format; None for safetensors, written by transformers.
        max_shard_size: the largest size of a file of weights, such as ``"5GB"``; None for the
            default of transformers.
    """
    if checkpoint is None:
        largest = {"max_shard_size": max_shard_size} if max_shard_size else {}
        _declare_tied(model)
        model.save_pretrained(directory, **largest)
        add_rope_names(model.config, directory)
    else:
        checkpoint.write(model.state_dict(), directory)
    if tokenizer is not None:
        save_tokenizer(tokenizer, directory)


def _declare_tied(model: Any) -> None:
    """Declare the tied head of a Mamba 2, which transformers 4 otherwise refuses to save."""
    if getattr(model, "_tied_weights_keys", None) == [] and model.config.tie_word_embeddings:
        head = model.get_output_embeddings()
        name = next(name for name, module in model.named_modules() if module is head)
        model._dynamic_tied_weights_keys = [f"{name}.weight"]


def keep_side_files(source: Path, directory: Path) -> None:
    """Copy the side files that `save_model` has not written, such as LICENSE."""
    copy_files(
        (
            path
            for path in side_files(source)
            if path.name == _ALWAYS_COPIED or not (directory / path.relative_to(source)).exists()
        ),
        source,
        directory,
    )
