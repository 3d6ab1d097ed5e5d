"""The checks of a release before it is published: versions, the changelog, and the contents."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
IN_WHEEL = {
    "apt_prune": {"apt": "apt", "adapters/apt_adapters": "apt_adapters",
                  "plugins/apt_lab": "apt_lab", "plugins/apt_plugins": "apt_plugins"},
    "apt_kernels": {"plugins/apt-kernels/src/apt_kernels": "apt_kernels"},
}  # fmt: skip
"""The folders of the packages in the repository, with their names in the wheel."""
OUTSIDE = {"apt_prune": {".ci", ".github"}}
"""Folders of the repository that are in no sdist."""


def tracked() -> set[str]:
    """The files of the repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    return {name for name in listed.stdout.decode().split("\0") if name}


def version(path: str, pattern: str) -> str:
    """The version that a file of the repository states."""
    found = re.search(pattern, (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
    if not found:
        raise SystemExit(f"{path} has no version")
    return found.group(1)


def members(archive: Path) -> set[str]:
    """The files of a wheel, or of an sdist without its top folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name for name in wheel.namelist() if not name.endswith("/")}
    with tarfile.open(archive) as sdist:
        names = [PurePosixPath(member.name) for member in sdist if member.isfile()]
    return {str(PurePosixPath(*name.parts[1:])) for name in names}


def faults() -> list[str]:
    """The reasons why the files of `DIST` must not be published."""
    found, files = [], tracked()
    own = version("apt/__init__.py", r'^__version__ = "(.+)"$')
    kernels = version("plugins/apt-kernels/src/apt_kernels/__init__.py", r'^__version__ = "(.+)"$')
    if (top := version("CHANGELOG.md", r"^## (\S+)")) != own:
        found.append(f"the first section of CHANGELOG.md is {top}, not {own}")
    for package, number in (("apt_prune", own), ("apt_kernels", kernels)):
        archives = sorted(DIST.glob(f"{package}-*"))
        if {archive.name.endswith(".whl") for archive in archives} != {True, False}:
            found.append(f"{package} needs a wheel and an sdist: {[a.name for a in archives]}")
        for archive in archives:
            if not archive.name.startswith(f"{package}-{number}"):
                found.append(f"{archive.name} is not version {number}")
            found += _strays(archive, package, files)
    return found


def _strays(archive: Path, package: str, files: set[str]) -> list[str]:
    """The files that are missing in an archive, or that should not be there."""
    inside = members(archive)
    if archive.suffix == ".whl":
        wanted = {
            name.replace(folder, target, 1)
            for folder, target in IN_WHEEL[package].items()
            for name in files
            if name.startswith(f"{folder}/")
        }
        made = {name for name in inside if ".dist-info/" in name or name.endswith(".so")}
        strays, missing = inside - wanted - made, wanted - inside
        if package == "apt_kernels" and not any(name.endswith(".so") for name in made):
            missing.add("the compiled library")
    else:
        folder = "plugins/apt-kernels/" if package == "apt_kernels" else ""
        known = {name.removeprefix(folder) for name in files if name.startswith(folder)}
        made = {"PKG-INFO", "setup.cfg"} | {name for name in inside if ".egg-info/" in name}
        hidden = OUTSIDE.get(package, set())
        strays = inside - known - made | {n for n in inside if n.split("/")[0] in hidden}
        missing = {name for name in known if name.startswith("src/")} - inside
    return [
        *(f"{archive.name} has {name}, which is not in the repository" for name in sorted(strays)),
        *(f"{archive.name} lacks {name}" for name in sorted(missing)),
    ]


if __name__ == "__main__":
    problems = faults()
    print("\n".join(problems) or "versions, changelog and contents agree")
    sys.exit(1 if problems else 0)
