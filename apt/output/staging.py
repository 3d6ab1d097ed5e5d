"""The staging folder of a run: beside the output, with a lock and the partial output.

For the output ``NAME`` its name is ``.NAME.apt``. No other user can write in it, and it contains no
links. It is deleted when the output is complete.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import IO, NoReturn

from safetensors import SafetensorError

from apt.checkpoints.copies import CARD, REPORT
from apt.checkpoints.safetensors_io import synchronise
from apt.errors import AptError
from apt.files.flushing import flush, flush_folder
from apt.files.hashes import file_hashes, sha256
from apt.files.journal import Journal, Line
from apt.files.locking import locked
from apt.files.renaming import exchange, rename_new
from apt.files.writing import check_file
from apt.output.location import cannot_write, check_replaceable, staging_folder
from apt.output.report import listed_files, read_report, report_beside

_JOURNAL, _FINISHED, _OUT = "journal.jsonl", "finished", "out"


class Staging:
    """The staging folder of a run, see `apt.output.location.staging_folder`.

    Args:
        output: the output directory; a link is followed.
        overwrite: True if the result of an earlier run may be replaced.

    Attributes:
        output: the real path of the output directory.
        name: the path of the output directory as the user gave it.
        folder: the path of the staging folder.
        out: the partial output, which becomes the output directory at the end.
        scratch: a folder for files that no later run uses.
        journal: the journal of a run that can be resumed.
    """

    def __init__(self, output: Path, overwrite: bool = False) -> None:
        self.name, self.overwrite = output, overwrite
        self.output, self.folder = Path(os.path.realpath(output)), staging_folder(output)
        self.out, self._old = self.folder / _OUT, self.folder / "old"
        self._former = self.folder / "former"  # ``out`` while another folder replaces it
        self.scratch = self.folder / "scratch"
        self.journal = Journal(
            self.folder / _JOURNAL, f"the interrupted run of {output}",
            f"delete {self.folder} and begin again",
        )  # fmt: skip

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock. At the end the folder is deleted, unless `worth_keeping`.

        Raises:
            AptError: another run holds the lock, or the folder does not belong to this user.
        """
        with _removing_new_parents(self.folder), _locked(self):
            self._check_links()
            _put_back(self._old, self.output)
            _put_back(self._former, self.out)
            self.journal.read()
            self.fresh(self.scratch.name)
            try:
                yield
            finally:
                discarded = self.scratch if self.worth_keeping else self.folder
                shutil.rmtree(discarded, ignore_errors=True)

    @property
    def worth_keeping(self) -> bool:
        """True if there is work to resume from, or a complete result that was not published."""
        return self.journal.has_work or self.complete

    @property
    def complete(self) -> bool:
        """True if there is a result with a report, which is the last file to be written."""
        return (self.out / REPORT).is_file()

    def begin(self, inputs: Line | None = None, *, resume: bool = False) -> bool:
        """Start a new output, or continue an interrupted run.

        Args:
            inputs: all inputs of a run that can be resumed; None for other runs.
            resume: True to continue an interrupted run, if there is one.

        Returns:
            True if an interrupted run is continued.

        Raises:
            AptError: the interrupted run had other inputs, or is not to be resumed; or there is a
                complete result.
        """
        if self.journal.has_work and resume:
            self.journal.check(inputs or {})
            return True
        if self.journal.has_work:
            raise AptError(
                f"there is an interrupted run of {self.name}",
                f"resume it, or delete {self.folder}",
                ("resume",),
            )
        if self.complete:
            raise AptError(
                f"{self.out} is the complete result of an earlier run, not yet in its place",
                f"move it to another place, or delete {self.folder}",
            )
        shutil.rmtree(self.out, ignore_errors=True)
        self.journal.clear()
        self.out.mkdir()
        if inputs is not None:
            self.journal.begin(inputs)
        return False

    def fresh(self, name: str) -> Path:
        """An empty folder of this name."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def replace_out(self, folder: Path) -> None:
        """Put a complete folder, made by `fresh`, in the place of ``out``.

        At every moment one of the two folders is at ``out``, or the next run puts it back there.
        """
        self.record_finished(folder)
        exchange(folder, self.out, self._former)
        shutil.rmtree(folder, ignore_errors=True)

    def finish(self) -> None:
        """Publish the output of a run that can be resumed, unless it is already published."""
        finished = self.finished_output
        if finished == self.output:
            self._remove()
            return
        if finished is None:
            self.record_finished(self.out)
        self.publish()

    def record_finished(self, directory: Path) -> None:
        """Record a complete output by the hash of its report, which has the hashes of its files."""
        self.journal.add({_FINISHED: sha256(directory / REPORT)}, directory)

    @property
    def finished_output(self) -> Path | None:
        """The complete output of the interrupted run, published or not; None if there is none."""
        return next(filter(self._is_finished, (self.output, self.out)), None)

    def _is_recorded(self, report: Path) -> bool:
        """True if the journal says that the output with this report is complete."""
        hashes = self.journal.values(_FINISHED)
        return bool(hashes) and report.is_file() and sha256(report) == hashes[-1]

    def _is_finished(self, directory: Path) -> bool:
        if not self._is_recorded(directory / REPORT):
            return False
        listed, unlisted = listed_files(read_report(directory) or {}), [REPORT, CARD]
        return file_hashes(directory, unlisted) == {k: v for k, v in listed.items() if k != CARD}

    def publish(self) -> None:
        """Move the output to its place, and delete the staging folder.

        Raises:
            AptError: a file that may not be replaced was created there. The output is then moved
                to a free name beside its place; the message has this name.
        """
        with write_errors(self.name):
            flush(self.out)
        set_permissions(self.out)
        try:
            check_replaceable(self.output, self.overwrite, str(self.name))
        except AptError as error:
            self._move_beside(error.message)
        with write_errors(self.name, f"the result is complete, in {self.out}"):
            try:
                self._move_to_output()
            except FileExistsError:
                self._move_beside(f"{self.name} was created during the run")
        self._remove()

    def _move_to_output(self) -> None:
        if not self.output.exists():
            rename_new(self.out, self.output)
        else:
            exchange(self.out, self.output, self._old)
            self.out.rename(self._old)
        flush_folder(self.output.parent)

    def _move_beside(self, reason: str) -> NoReturn:
        """Move the output to the first free name beside its place, and raise."""
        place = self._move_out(f"{self.output.name}-{number}" for number in count(1))
        raise AptError(f"{reason}, and was not replaced", f"the result is complete, in {place}")

    def _move_out(self, names: Iterable[str]) -> Path:
        """Move the output to the first free name beside its place, and return its new path."""
        places = map(self.output.with_name, names)
        place = next(place for place in places if not os.path.lexists(place))
        rename_new(self.out, place)
        self.journal.clear()
        self._remove()
        return place if self.name.is_symlink() else self.name.with_name(place.name)

    def _remove(self) -> None:
        """Delete the folder.

        Files that cannot be deleted do no harm to a published output. A network file system keeps
        the lock in the folder until it is closed, see `_locked`.
        """
        shutil.rmtree(self.folder, ignore_errors=True)

    def _check_links(self) -> None:
        """Raise if the folder contains a link."""
        for parent, folders, names in os.walk(self.folder):
            for path in (Path(parent) / name for name in (*folders, *names)):
                if path.is_symlink() or (path.is_file() and path.stat().st_nlink > 1):
                    raise self.journal.damaged(f"{path} is a link")


class FileStaging(Staging):
    """The staging folder of a run whose output is a file, with its report beside it.

    ``out`` has the file and the report. Before an export, it is the directory to export.
    """

    @property
    def has_directory(self) -> bool:
        """True if ``out`` is a complete directory to export."""
        return self.complete and not (self.out / self.output.name).is_file()

    def _is_finished(self, directory: Path) -> bool:
        if directory != self.output:
            return super()._is_finished(directory)
        if not (directory.is_file() and self._is_recorded(report_beside(directory))):
            return False
        return listed_files(read_report(directory) or {}) == {directory.name: sha256(directory)}

    def move_directory_out(self) -> Path:
        """Move a complete directory, from which no file was made, to a free name beside the file.

        Returns:
            The path: the name of the file without its suffix, if that is free.
        """
        set_permissions(self.out)
        stem = self.output.stem
        return self._move_out(chain([stem], (f"{stem}-{number}" for number in count(1))))

    def publish(self) -> None:
        """Move the file to its place, and then its report; delete the staging folder.

        Raises:
            AptError: a file that may not be replaced was created there. The result then stays in
                the staging folder, which is in the message.
        """
        hint = f"the result is complete, in {self.out}"
        places = {self.output.name: self.output, REPORT: report_beside(self.output)}
        set_permissions(self.out)
        for path in places.values():
            try:
                check_file(path, overwrite=self.overwrite)
            except AptError as error:
                raise AptError(f"{error.message}, and was not replaced", hint) from error
        with write_errors(self.name, hint):
            flush(self.out)
            for name, path in places.items():
                if self.overwrite:
                    (self.out / name).replace(path)
                else:
                    rename_new(self.out / name, path)
            flush_folder(self.output.parent)
        self._remove()


def _put_back(aside: Path, place: Path) -> None:
    """Put back a folder that a killed run had moved aside, or delete it if its place is taken."""
    if aside.is_dir() and not os.path.lexists(place):
        aside.rename(place)
    shutil.rmtree(aside, ignore_errors=True)


def resumable(output: Path) -> bool:
    """True if there is an interrupted run of an output."""
    return (staging_folder(output) / _JOURNAL).exists()


def unpublished(output: Path) -> Path | None:
    """The complete result of a run that was interrupted before its publication, or None."""
    out = staging_folder(output) / _OUT
    return out if (out / REPORT).is_file() else None


@contextmanager
def _locked(work: Staging) -> Iterator[None]:
    """Hold the lock of a staging folder, which is created if it does not exist."""
    while True:
        with write_errors(work.name):
            _make_folder(work.folder)
        with locked(place := work.folder / "lock") as lock:
            if lock is None:
                raise AptError(f"another run is writing {work.name}", "wait for it")
            if not _is_at(lock, place):
                continue  # the previous run has deleted it in the meantime
            try:
                yield
                return
            finally:
                lock.close()  # NFS keeps a deleted open file as .nfsXXXX until it is closed
                with suppress(OSError):  # it is not empty: it is kept, or another run uses it
                    work.folder.rmdir()


@contextmanager
def _removing_new_parents(folder: Path) -> Iterator[None]:
    """While entered, parent folders may be created. At the end the empty ones are deleted."""
    missing = [parent for parent in folder.parents if not parent.exists()]
    try:
        yield
    finally:
        with suppress(OSError):
            for parent in missing:
                parent.rmdir()


def _make_folder(folder: Path) -> None:
    """Create a private folder, or use the existing one if it belongs to this user."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.geteuid():
        hint = "delete it, or choose another output"
        raise AptError(f"{folder} is not a folder of this user", hint, ("output",))


def _is_at(lock: IO[str], path: Path) -> bool:
    """True if the open file is still at ``path``."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.lstat())
    except OSError:
        return False


@contextmanager
def staged_directory(output: Path, overwrite: bool = False) -> Iterator[Staging]:
    """A staging folder. Its ``out`` is published at the end, or deleted after an error.

    Raises:
        AptError: see `Staging`.
    """
    work = Staging(output, overwrite)
    with work.locked():
        work.begin()
        yield work
        work.publish()


@contextmanager
def staged_file(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """The path of a file to create. At the end the file becomes the output in one step.

    Args:
        output: the file; `apt.files.writing.check_file` has checked its place.
        overwrite: True if a regular file there may be replaced.

    Raises:
        AptError: another run writes it, it was created in the meantime, or the disk is full.
    """
    work = Staging(output)
    with work.locked(), write_errors(output):
        work.begin()
        yield (partial := work.out / output.name)
        synchronise(partial)
        check_file(output, overwrite=overwrite, options=("output",))
        set_permissions(work.out)
        if overwrite:
            partial.replace(output)
        else:
            rename_new(partial, output)
        flush_folder(output.parent)


@contextmanager
def write_errors(output: Path, hint: str = "", options: Iterable[str] = ()) -> Iterator[None]:
    """Turn errors of a full or failing disk into an `AptError` with a hint."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise cannot_write(output, error, hint, options) from error


def set_permissions(partial: Path) -> None:
    """Set the default permissions: private folders and safetensors files have other ones."""
    mask = os.umask(0)
    os.umask(mask)
    partial.chmod(0o777 & ~mask)
    for path in partial.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
