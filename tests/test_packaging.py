"""The files that a source distribution and a wheel of APT are made of."""

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

sdist = pytest.importorskip("hatchling.builders.sdist", reason="needs hatchling")
wheel = pytest.importorskip("hatchling.builders.wheel", reason="needs hatchling")
ROOT = Path(__file__).parent.parent
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
    """A working folder with a few files of each kind, own and stray ones."""
    for name in [*OWN, *STRAY]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for name in (".gitignore", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def included(builder):
    return {Path(file.distribution_path).as_posix() for file in builder.recurse_included_files()}


def test_a_source_distribution_has_nothing_stray(folder):
    assert included(sdist.SdistBuilder(str(folder))) == set(OWN)


def test_a_wheel_has_the_packages_only(folder):
    assert included(wheel.WheelBuilder(str(folder))) == {
        "apt/__init__.py", "apt/py.typed", "apt_adapters/zoo/llama/model.safetensors",
        "apt_lab/reporting/page.html.j2", "apt_plugins/data/LICENSE.md",
    }  # fmt: skip


def test_the_source_distribution_has_all_of_the_repository_but_its_ci():
    listed = subprocess.run(
        ["git", "ls-tree", "--name-only", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not in a repository")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = project["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"]
    assert sorted([*named, ".ci", ".gitignore"]) == sorted(listed.stdout.splitlines())
