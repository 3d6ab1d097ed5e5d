"""Packages that are made of the template."""

import shutil
import tomllib

import pytest

from tests.helpers import ROOT


def copied(folder, **answers):
    """The package that copier makes of the template in the working tree."""
    copier = pytest.importorskip("copier")
    there = folder / "repository"
    shutil.copytree(ROOT / "template", there / "template", dirs_exist_ok=True)
    shutil.copy(ROOT / "copier.yml", there)
    made = folder / "made"
    copier.run_copy(str(there), made, data=answers, defaults=True, quiet=True)
    project = tomllib.loads((made / "pyproject.toml").read_text())["project"]
    return made.rename(folder / project["name"])
