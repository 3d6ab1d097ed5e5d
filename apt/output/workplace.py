"""The folder beside an output directory where a run does its work: a lock, and the output so far.

``.NAME.apt`` lies beside ``NAME``. It is the run's own: no other user can write in it, nothing in
it is a link, and it is gone once the output is whole.
"""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NoReturn

from safetensors import SafetensorError

from apt.checkpoints.copies import REPORT, checksums
from apt.errors import AptError
from apt.output.journal import Journal, Line
from apt.output.location import cannot_write, check_replaceable, workplace
from apt.output.renaming import exchange, rename_new
from apt.output.report import differences

_JOURNAL = "journal.jsonl"


class Workplace:
    """What lies in the `workplace` of an output directory.

    Args:
        output: the output directory; a link is followed.
        overwrite: whether it may replace the result of an earlier run.

    Attributes:
        output: its real path.
        name: it as the user named it.
        folder: the workplace.
        out: what will be the output directory.
        activations: a folder for what no other run goes on with.
        tokens: the text that a model has written to calibrate on.
        journal: what a streamed run has done so far.
    """

    def __init__(self, output: Path, overwrite: bool = False) -> None:
        self.name, self.overwrite = output, overwrite
        self.output, self.folder = Path(os.path.realpath(output)), workplace(output)
        self.out, self._old = self.folder / "out", self.folder / "old"
        self.activations = self.folder / "activations"
        self.tokens = self.folder / "tokens.safetensors"
        self.journal = Journal(self.folder / _JOURNAL)
        self._found = False  # whether an earlier run left something that is not cleared yet

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock; leave nothing but what a run can go on with, or what is whole.

        Raises:
            AptError: another run holds it, or the folder is not this user's own.
        """
        with _made_parents(self.folder), _locked(self):
            self._check_own()
            self._restore_old()
            self._found = self.journal.path.exists() or self.whole
            shutil.rmtree(self.activations, ignore_errors=True)
            self.activations.mkdir()
            try:
                yield
            finally:
                shutil.rmtree(self.activations if self.kept else self.folder, ignore_errors=True)

    @property
    def kept(self) -> bool:
        """Whether there is something to go on with, or a result that found no place."""
        return self._found or (self.out.is_dir() and (self.journal.has("block") or self.whole))

    @property
    def whole(self) -> bool:
        """Whether there is a result with its report: the last file that is written."""
        return (self.out / REPORT).is_file()

    def begin(self) -> None:
        """Make room for a new output.

        Raises:
            AptError: an earlier run left something that can be gone on with, or a whole result.
        """
        if (self.folder / _JOURNAL).exists():
            self.journal.read()
        if self.journal.has("block"):
            raise AptError(
                f"an interrupted run of {self.name} is there to be resumed",
                f"resume it, or delete {self.folder}",
                ("resume",),
            )
        if self.whole:
            raise AptError(
                f"{self.out} is the whole result of an earlier run that found no place",
                f"move it to where you want it, or delete {self.folder}",
            )
        shutil.rmtree(self.out, ignore_errors=True)
        self.journal.path.unlink(missing_ok=True)
        self.journal = Journal(self.journal.path)
        self._found = False
        self.out.mkdir()

    def go_on(self, fingerprint: Line) -> None:
        """Read the journal of an interrupted run, which must have the same ``fingerprint``."""
        known = self.journal.lines[0].get("fingerprint")
        if not isinstance(known, dict):
            raise self.damaged("its journal has no fingerprint")
        if other := sorted(differences(known, fingerprint)):
            raise AptError(
                f"the interrupted run of {self.name} was another one: {', '.join(other)} differ",
                f"give the same command, or delete {self.folder}",
            )

    def damaged(self, how: str) -> AptError:
        """The error for a workplace that was changed since it was left."""
        return AptError(
            f"the interrupted run of {self.name} is damaged: {how}",
            f"delete {self.folder} and begin again",
        )

    def finish(self) -> None:
        """Let the output of a streamed run appear, unless it has."""
        if self.appeared():
            shutil.rmtree(self.folder)
        else:
            self.journal.add({"finished": checksums(self.out)})
            self.appear()

    def appeared(self) -> bool:
        """Whether an earlier run was cut short when its output was in its place already."""
        known = [line["finished"] for line in self.journal.lines if "finished" in line]
        return bool(known) and self.output.is_dir() and checksums(self.output) == known[-1]

    def appear(self) -> None:
        """Let the output appear in its place, and leave nothing else.

        Raises:
            AptError: something that may not be replaced has come to lie there; the output is moved
                to a name beside it, which the message says.
        """
        open_up(self.out)
        try:
            check_replaceable(self.output, self.overwrite, str(self.name))
        except AptError as error:
            self._step_aside(error.message)
        with writing(self.name, f"the result is whole, in {self.out}"):
            try:
                self._take_place()
            except FileExistsError:
                self._step_aside(f"{self.name} appeared during the run")
            shutil.rmtree(self.folder)

    def _take_place(self) -> None:
        if not self.output.exists():
            rename_new(self.out, self.output)
            return
        exchange(self.out, self.output, self._old)
        self.out.rename(self._old)
        shutil.rmtree(self._old, ignore_errors=True)

    def _step_aside(self, why: str) -> NoReturn:
        """Move the output to the first free name, and say so."""
        number = 1
        while os.path.lexists(place := self.output.with_name(f"{self.output.name}-{number}")):
            number += 1
        rename_new(self.out, place)
        shutil.rmtree(self.folder)
        beside = place if self.name.is_symlink() else self.name.with_name(place.name)
        raise AptError(f"{why}, and was left alone", f"the result is whole, in {beside}")

    def _restore_old(self) -> None:
        """Put back what an earlier run took away from the output's place before it was killed."""
        if self._old.is_dir() and not os.path.lexists(self.output):
            self._old.rename(self.output)
        shutil.rmtree(self._old, ignore_errors=True)

    def _check_own(self) -> None:
        """Raise where something in the folder is a link, by whoever put it there."""
        for parent, folders, names in os.walk(self.folder):
            for path in (Path(parent) / name for name in (*folders, *names)):
                if path.is_symlink() or (path.is_file() and path.stat().st_nlink > 1):
                    raise self.damaged(f"{path} is a link")


def resumable(output: Path) -> bool:
    """Whether an interrupted run of an output is there to go on with."""
    return (workplace(output) / _JOURNAL).exists()


@contextmanager
def _locked(work: Workplace) -> Iterator[None]:
    """Hold the lock of a workplace, which is made if it is not there."""
    while True:
        with writing(work.name):
            _make_folder(work.folder)
        with _open_lock(work.folder / "lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise AptError(f"another run is writing {work.name}", "wait for it") from error
            if not _current(lock, work.folder / "lock"):
                continue  # its last holder removed it in between
            yield
            return


@contextmanager
def _made_parents(folder: Path) -> Iterator[None]:
    """Remove, at the end, the folders above one that were made meanwhile and are empty."""
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        yield
    finally:
        with suppress(OSError):
            for parent in made:
                parent.rmdir()


def _make_folder(folder: Path) -> None:
    """Make a folder of our own, or take the one that is there if it is."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.geteuid():
        hint = "delete it, or choose another output"
        raise AptError(f"{folder} is not a folder of yours", hint, ("output",))


def _open_lock(path: Path) -> IO[str]:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    try:
        return open(os.open(path, flags, 0o600), "r+")
    except OSError as error:
        raise AptError(f"{path} cannot be opened: {error.strerror}", "delete it") from error


def _current(lock: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), os.lstat(path))
    except OSError:
        return False


@contextmanager
def whole_directory(output: Path, overwrite: bool = False) -> Iterator[Workplace]:
    """A workplace whose ``out`` takes the place of ``output`` at the end, or vanishes.

    Raises:
        AptError: see `Workplace`.
    """
    work = Workplace(output, overwrite)
    with work.locked():
        work.begin()
        yield work
        work.appear()


@contextmanager
def writing(output: Path, hint: str = "", options: Iterable[str] = ()) -> Iterator[None]:
    """Say what to do where the disk is full or fails."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise cannot_write(output, error, hint, options) from error


def open_up(partial: Path) -> None:
    """Give the usual permissions: folders of our own and safetensors files are private."""
    mask = os.umask(0)
    os.umask(mask)
    partial.chmod(0o777 & ~mask)
    for path in partial.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
