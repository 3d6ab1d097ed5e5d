"""Checks of the path of an output directory.

A run replaces an empty directory, or a directory in which every file was written by APT and is
unchanged. It replaces no other directory.
"""

import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from apt.checkpoints.copies import REPORT
from apt.errors import AptError, first_line
from apt.files.hashes import changed_files
from apt.output.report import listed_files, read_report

_ANOTHER_OUTPUT = "choose another output"
_OUTPUT = ("output",)
_OVERWRITE = ("overwrite", "output")
_FOLDER_NAME = ".{}.apt"


def _unusable(message: str) -> AptError:
    return AptError(message, _ANOTHER_OUTPUT, _OUTPUT)


def staging_folder(output: Path) -> Path:
    """The staging folder of a run: ``.NAME.apt`` beside the output directory ``NAME``."""
    output = Path(os.path.realpath(output))
    return output.parent / _FOLDER_NAME.format(output.name)


def check_output(
    directory: Path, overwrite: bool, inputs: Sequence[Path] = (), option: str = "output"
) -> str:
    """Raise if an output directory cannot be used, before any work is done.

    Args:
        directory: the directory; a link is followed.
        overwrite: True if a directory that APT wrote may be replaced.
        inputs: files and directories that the run reads.
        option: the option that names the directory, for messages.

    Returns:
        A description of the earlier result that will be replaced; empty if there is none.

    Raises:
        AptError: it exists and is not a directory, it has files that APT did not write or that were
            changed since, it is or contains a protected place, it is inside an input, or it cannot
            be written.
    """
    with _naming_option(option):
        try:
            _check_links(directory)
            target = Path(os.path.realpath(directory))
            _check_place(directory, target, inputs)
            _check_name(target)
            replaced = check_replaceable(target, overwrite, str(directory))
            _check_writable(target)
        except OSError as error:
            raise _unusable(f"cannot write {directory}: {error.strerror}") from error
        return replaced


@contextmanager
def _naming_option(option: str) -> Iterator[None]:
    """While entered, errors about the output name this option."""
    try:
        yield
    except AptError as error:
        error.options = tuple(option if name == "output" else name for name in error.options)
        raise


def check_not_input(directory: Path, inputs: Sequence[Path]) -> None:
    """Raise if an output is or contains a protected place, or is inside one of ``inputs``."""
    _check_place(directory, Path(os.path.realpath(directory)), inputs)


def check_replaceable(target: Path, overwrite: bool, name: str) -> str:
    """Raise if ``target`` exists and may not be replaced; see `check_output`."""
    if not os.path.lexists(target):
        return ""
    if not target.is_dir():
        raise _unusable(f"{name} exists and is not a directory")
    entries = set(relative_paths(target))
    if not entries:
        return ""
    listed = _files_in_report(target)
    expected = {REPORT, *listed} if listed else set()
    _refuse_files(f"{name} exists and has files that APT did not write", entries - expected)
    if not overwrite:
        message = f"{name} exists and is not empty"
        raise AptError(message, "overwrite it, or choose another", _OVERWRITE)
    _refuse_files(
        f"{name} exists and was changed since APT wrote it", changed_files(target, listed)
    )
    return f"{name}, the result of an earlier run, with its {len(entries)} files"


def _refuse_files(message: str, files: Collection[str]) -> None:
    """Raise if there are files, with some of their names in the message."""
    if files:
        examples = ", ".join(sorted(files)[:3]) + (", …" if len(files) > 3 else "")
        hint = f"APT never deletes such files; {_ANOTHER_OUTPUT}"
        raise AptError(f"{message}: {examples}", hint, _OUTPUT)


def relative_paths(directory: Path) -> list[str]:
    """The relative paths of all files, links and empty folders in a directory."""
    paths = []
    for folder, folders, names in os.walk(directory):
        here = Path(folder)
        links = [name for name in folders if (here / name).is_symlink()]
        empty = [""] if not folders and not names and here != directory else []
        paths += [(here / n).relative_to(directory).as_posix() for n in (*names, *links, *empty)]
    return sorted(paths)


def _files_in_report(target: Path) -> dict[str, str]:
    """The files that the report of a directory lists, with their hashes; empty without a report."""
    report = None if (target / REPORT).is_symlink() else read_report(target)
    return {} if report is None else listed_files(report)


def _check_links(directory: Path) -> None:
    """Raise if the path contains a link whose target does not exist."""
    for path in (directory, *directory.parents):
        if path.is_symlink() and not path.exists():
            raise _unusable(f"{path} is a link to a missing file")


def _check_name(target: Path) -> None:
    longest = os.pathconf(_existing_parent(target), "PC_NAME_MAX")
    if len(os.fsencode(_FOLDER_NAME.format(target.name))) > longest:
        limit = longest - len(_FOLDER_NAME.format(""))
        raise _unusable(f"the name {target.name[:20]}… of the output is longer than {limit} bytes")


def _check_place(directory: Path, target: Path, inputs: Sequence[Path]) -> None:
    """Raise if the target is or contains a protected place, or is inside an input."""
    for name, place in _protected_places(inputs):
        if target == place:
            raise _unusable(f"{directory} is {name}")
        if target in place.parents:
            raise _unusable(f"{directory} contains {name}, {place}")
        if name == _INPUT and place in target.parents:
            raise _unusable(f"{directory} is inside {name}, {place}")
    if target.is_mount():
        raise AptError(f"{directory} is a mount point", "choose a directory on it", _OUTPUT)


_INPUT = "an input of the run"


def _protected_places(inputs: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """The places that an output must not replace, each with its name for messages."""
    try:
        yield "the working directory", Path.cwd()
    except OSError as error:
        raise AptError("the working directory no longer exists", "change to another") from error
    yield "the home directory", Path(os.path.realpath(Path.home()))
    for path in inputs:
        yield _INPUT, Path(os.path.realpath(path))


def _check_writable(target: Path) -> None:
    parent = _existing_parent(target)
    if not parent.is_dir():
        raise _unusable(f"{parent} is not a directory")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise _unusable(f"cannot write in {parent}: {error.strerror}") from error
    if target.is_dir() and not os.access(target, os.W_OK | os.X_OK):
        raise _unusable(f"cannot write in {target}: Permission denied")


def check_space(needed: Mapping[str, tuple[Path, int]]) -> None:
    """Raise if a disk has too little space for the outputs on it.

    Args:
        needed: each output and the bytes that it needs, by the option that names the output.
    """
    disks: dict[int, dict[str, tuple[Path, int]]] = defaultdict(dict)
    for option, (place, count) in needed.items():
        parent = _existing_parent(Path(os.path.realpath(place)))
        disks[parent.stat().st_dev][option] = parent, count + count // 100 + 2**20
    for outputs in disks.values():
        parent, total = next(iter(outputs.values()))[0], sum(n for _, n in outputs.values())
        if (free := shutil.disk_usage(parent).free) < total:
            names = " and ".join(f"the {option}" for option in outputs)
            verb = "need" if len(outputs) > 1 else "needs"
            available = f"{parent} has {free / 2**20:,.0f} MiB left"
            message = f"{available}, but {names} {verb} {total / 2**20:,.0f} MiB"
            raise AptError(message, _ANOTHER_OUTPUT, outputs)


def _existing_parent(directory: Path) -> Path:
    return next(parent for parent in directory.absolute().parents if parent.exists())


def cannot_write(
    output: Path, error: BaseException, hint: str = "", options: Iterable[str] = ()
) -> AptError:
    """The error for an output that cannot be written to disk."""
    cause = first_line(error)
    # numpy counts the items of a short write, without an error number.
    unnumbered = isinstance(error, OSError) and error.errno is None
    if unnumbered and shutil.disk_usage(_existing_parent(output)).free < 2**20:
        cause, hint = "its disk is full", hint or "free space on that disk"
    return AptError(f"cannot write {output}: {cause}", hint, options)
