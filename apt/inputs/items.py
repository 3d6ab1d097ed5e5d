"""The images and sounds of a source: the files of a folder, or the rows of a data set."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch

from apt.errors import AptError, first_line, shortened
from apt.locations.paths import expanded, kind_at
from apt.plugin.documents import Label, label_of
from apt.plugin.registry import Registry
from apt.plugin.specs import CalibrationSpec
from apt.text.datasets import Split, hub_rows
from apt.text.sampling import generator

_READ = 4  # rows that are read for each sample, so that seeds give different samples
_LONGEST = 2**20  # bytes of a text beside an image
_TEXTS = (".txt", ".jsonl", ".gz")


@dataclass(frozen=True)
class Kind:
    """A kind of items.

    Attributes:
        name: its plural, for messages.
        endings: the suffixes of its files.
    """

    name: str
    endings: tuple[str, ...]

    @property
    def advice(self) -> str:
        """What to give, for messages."""
        return f"give a folder of {', '.join(self.endings[:-1])} or {self.endings[-1]} files"


@dataclass(frozen=True)
class Item:
    """An image or a sound.

    Attributes:
        name: its file or its row, for messages.
        stored: its file, or the bytes of a file.
        text: its text; None if it has none.
        label: its class; None if it is not known.
    """

    name: str
    stored: Path | bytes
    text: str | None = None
    label: Label | None = None

    def open(self) -> BinaryIO:
        """The bytes of its file."""
        return io.BytesIO(self.stored) if isinstance(self.stored, bytes) else self.stored.open("rb")

    def unreadable(self, kind: str, error: Exception) -> AptError:
        """The error for an item that cannot be decoded; ``kind`` is what it should be."""
        message = f"{self.name} cannot be read as {kind}: {first_line(error)}"
        return AptError(message, "remove it, or write it anew", ("calibration", "evaluation"))


def drawn_items(
    source: str,
    kind: Kind,
    split: Split,
    count: int,
    seed: int,
    registry: Registry,
    *,
    fewer: bool = False,
) -> list[Item]:
    """``count`` items of a source, in an order drawn by ``seed``.

    Args:
        source: a folder, whose files are read with those of its subfolders; a .parquet file or a
            hub data set with a column of files; or the name of a registered source, which may have
            fewer items.
        fewer: True if the source may have fewer items; at least one.

    Raises:
        AptError: the source has no items of this kind, or too few, or cannot be read.
    """
    path = expanded(source)
    if kind_at(path) == "directory":
        items = [_of_file(file, path) for file in _files(path, kind)]
    else:
        items = list(islice(_rows(source, kind, split, registry), _READ * count))
    if not items:
        message = f"{shortened(source)} has no {kind.name}"
        raise AptError(message, kind.advice, ("calibration", "evaluation"))
    if len(items) < count and not (fewer or _registered(source, registry)):
        raise AptError(
            f"{shortened(source)} has {len(items)} {kind.name}, but {count} are needed",
            f"use fewer samples or more {kind.name}",
            ("samples",),
        )
    order = torch.randperm(len(items), generator=generator(seed))[:count]
    return [items[index] for index in order.tolist()]


def _registered(source: str, registry: Registry) -> CalibrationSpec | None:
    """The spec of a registered source, in any case of its letters; None for other sources."""
    specs = registry.calibrations.specs.values()
    return next((spec for spec in specs if spec.name.lower() == source.lower()), None)


def _files(folder: Path, kind: Kind) -> list[Path]:
    """The files of a folder and its subfolders, in the order of their names."""
    return sorted(
        path for path in folder.rglob("*")
        if path.suffix.lower() in kind.endings and path.is_file()
        and not path.name.startswith(".")
    )  # fmt: skip


def _of_file(path: Path, folder: Path) -> Item:
    """The item of a file, with the text of the .txt file of the same name."""
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        return Item(str(path), path)
    try:
        with beside.open(encoding="utf-8-sig") as file:
            text = file.read(_LONGEST).strip()
    except (OSError, ValueError) as error:
        raise AptError(f"{beside} cannot be read: {first_line(error)}") from error
    return Item(str(path), path, text or None)


def _rows(source: str, kind: Kind, split: Split, registry: Registry) -> Iterator[Item]:
    """The items of a data set, or of a registered source.

    Raises:
        AptError: the source is one of texts, or does not exist.
    """
    path = expanded(source)
    spec = _registered(source, registry)
    if spec is not None and (target := getattr(spec, kind.name)):
        return spec.items(target, split)
    if spec is not None or path.suffix in _TEXTS:
        message = f"{shortened(source)} has texts, and the model takes {kind.name}"
        raise AptError(message, kind.advice, ("calibration", "evaluation"))

    def read(row: Any, where: str) -> Item:
        return _of_row(row, f"{where} of {shortened(source)}", kind)

    if kind_at(path) == "file":
        if path.suffix != ".parquet":
            message = f"{shortened(source)} is one file, and {kind.name} are read from a folder"
            raise AptError(message, kind.advice, ("calibration", "evaluation"))
        files = {"train": str(path)}
        parts: dict[Split, str] = {"calibration": "train", "evaluation": "train"}
        return hub_rows("parquet", None, split, read, files, called=source, parts=parts)
    if "/" not in source or source.startswith((".", "/", "~")):
        message = f"no such folder: {shortened(source)}"
        raise AptError(message, kind.advice, ("calibration", "evaluation"))
    name, _, config = source.partition(":")
    return hub_rows(name, config or None, split, read)


def _of_row(row: dict[str, Any], where: str, kind: Kind) -> Item:
    """The item of a row: its first column with the bytes or the path of a file, and its text.

    Raises:
        ValueError: the row has no such column.
    """
    texts = [row[name] for name in ("text", "caption") if isinstance(row.get(name), str)]
    for value in row.values():
        held = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(held, bytes):
            return Item(where, held, next(iter(texts), None), label_of(row))
        place = value.get("path") if isinstance(value, dict) else None
        if isinstance(place, str) and Path(place).is_file():
            return Item(where, Path(place), next(iter(texts), None), label_of(row))
    raise ValueError(f"{where} has no column of {kind.name}")
