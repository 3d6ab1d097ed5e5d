"""The files of a source distribution and a wheel of APT, and the declared minimum versions."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
STRAY = [
    "notes.txt", "model.safetensors", "trl-1.16.0-py3-none-any.whl", ".ci/run", ".venv/bin/pip",
    ".mypy_cache/a.json", "dist/a.tar.gz", "out/llama/model.safetensors", "apt/a.whl", "apt/a.so",
    "apt/__pycache__/a.pyc", "plugins/apt_lab/__pycache__/a.pyc",
]  # fmt: skip
OWN = [
    "apt/__init__.py", "apt/py.typed", "adapters/apt_adapters/zoo/llama/model.safetensors",
    "plugins/apt_lab/reporting/page.html.j2", "tests/test_packaging.py", "README.md", "LICENSE",
    "plugins/apt_plugins/data/LICENSE.md", "pyproject.toml",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A working folder with some files of each kind, tracked and stray ones."""
    for name in [*OWN, *STRAY]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for name in (".gitignore", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def included(kind, folder):
    """The paths in a distribution of this kind, which is not built."""
    module = pytest.importorskip(f"hatchling.builders.{kind}", reason="needs hatchling")
    builder = getattr(module, f"{kind.capitalize()}Builder")(str(folder))
    return {Path(file.distribution_path).as_posix() for file in builder.recurse_included_files()}


def test_source_distribution_has_no_stray_files(folder):
    assert included("sdist", folder) == set(OWN)


def test_wheel_has_the_packages_only(folder):
    assert included("wheel", folder) == {
        "apt/__init__.py", "apt/py.typed", "apt_adapters/zoo/llama/model.safetensors",
        "apt_lab/reporting/page.html.j2", "apt_plugins/data/LICENSE.md",
    }  # fmt: skip


def test_source_distribution_has_the_repository_without_its_ci():
    listed = subprocess.run(
        ["git", "ls-tree", "--name-only", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not in a repository")
    named = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"]
    hidden = [".ci", ".github", ".gitignore", ".pre-commit-config.yaml"]
    assert sorted([*named, *hidden]) == sorted(listed.stdout.splitlines())


def test_oldest_matrix_versions_equal_the_declared_minimums():
    (pins,) = re.findall(r"^OLDEST = (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    least = {}
    for line in PROJECT["project"]["dependencies"]:
        name, version = re.match(r"([\w-]+)>=([\d.]+)", line).groups()
        least[name] = version
    pinned = dict(pin.split("==") for pin in pins.split())
    assert set(pinned) == {"torch", "transformers", "datasets"}  # what the code depends on most
    for name, version in pinned.items():
        assert re.fullmatch(rf"{re.escape(least[name])}(\.0)*", version), name
