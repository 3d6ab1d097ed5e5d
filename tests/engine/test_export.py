"""Export formats of other packages: the example of docs/plugins.md, and wrong functions."""

import re
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from apt import AptError
from apt.engine.export import export_model
from apt.extending import Exported
from apt.hookspecs import ExportSpec, hookimpl
from apt.options import ExportRun
from apt.plugin.registry import load_registry
from tests.helpers import ROOT

PAGE = (ROOT / "docs/plugins.md").read_text(encoding="utf-8").partition("## An export format")[2]
EXAMPLE = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL).group(1)


@pytest.fixture
def with_plugin(monkeypatch):
    """A function that loads all plugins, and a module of this source."""

    def load(source, **names):
        module = ModuleType("apt_npz")
        vars(module).update(names)
        exec(source, vars(module))
        monkeypatch.setitem(sys.modules, "apt_npz", module)
        return load_registry([*entry_points(group="apt"), EntryPoint("npz", "apt_npz", "apt")])

    return load


def test_documented_example_exports_every_parameter(with_plugin, checkpoint, tmp_path):
    registry = with_plugin(EXAMPLE)
    run = ExportRun(model=str(checkpoint("llama")), output=tmp_path / "x.npz")
    done = export_model(run, registry)
    with np.load(tmp_path / "x.npz") as arrays:
        assert done.tensors == len(arrays.files) == 3 + 3 * 9
        assert arrays["model.norm.weight"].shape == (32,)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
    with pytest.raises(AptError, match=r"gguf \(\.gguf\), npz \(\.npz\)"):
        export_model(ExportRun(model="zoo:llama", output=tmp_path / "x"), registry)
    other = ExportRun(model="zoo:llama", output=tmp_path / "y.npz", type="f16")
    with pytest.raises(AptError, match="npz has no type 'f16'; it writes f32"):
        export_model(other, registry)


def nothing(model, target):
    """Write no file."""
    return Exported("f32", 0, 0, 0, 0)


def something(model, target):
    """Return nothing about the written file."""
    target.write_text("x")


FAULTY = """
@hookimpl
def apt_exports():
    return [ExportSpec("faulty", "does not work", "apt_npz:write", ".bad")]
"""


@pytest.mark.parametrize("write", [nothing, something])
def test_error_names_the_export_function_that_writes_no_file(
    with_plugin, checkpoint, tmp_path, write
):
    registry = with_plugin(FAULTY, hookimpl=hookimpl, ExportSpec=ExportSpec, write=write)
    run = ExportRun(model=str(checkpoint("llama")), output=tmp_path / "x.bad")
    with pytest.raises(AptError, match="export format faulty does not write a file"):
        export_model(run, registry)
    assert list(Path(tmp_path).iterdir()) == []
