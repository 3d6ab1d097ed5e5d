"""``apt doctor``: the present and missing components, as text and as JSON."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from apt_adapters import kernels

from apt.plugin import doctor
from apt.plugin.registry import Plugin, registry


def test_each_family_and_package_has_a_line(apt):
    result = apt("doctor")
    assert result.code == 0, result.out
    for word in ("torch", "transformers", "processor", "llama", "mamba2", "falcon-h1"):
        assert word in result.out


def test_findings_are_printed_as_json(apt):
    record = json.loads(apt("doctor", "--json").out)
    named = {finding["what"]: finding for finding in record["families"]}
    assert named.keys() == set(registry().adapters.specs)
    assert named["mamba"]["state"] == "APT's own scan on the processor"
    assert record["plugins that failed"] == []


@pytest.mark.parametrize(("fast", "taken"), [(True, "bfloat16"), (False, "float32")])
def test_machine_section_has_speeds_of_dtypes_and_the_default_dtype(apt, monkeypatch, fast, taken):
    monkeypatch.setattr("apt.compute.multiplies_fast", lambda dtype, device: fast)
    machine = json.loads(apt("doctor", "--json").out)["machine"]
    found = {entry["what"]: entry["state"] for entry in machine}
    for name in ("float32", "bfloat16", "float16"):
        assert "GFLOP/s on cpu" in found[name]
    assert found["bfloat16"].endswith(f"a model in bfloat16 computes in {taken}")


def test_missing_package_comes_with_the_install_command(monkeypatch):
    monkeypatch.setattr(doctor, "_OPTIONAL", (("nosuch", "nothing", "nosuch", "pip install x"),))
    last = list(doctor.packages())[-1]
    assert last == doctor.Finding("nosuch", "not installed; for nothing", "pip install x")


def test_installed_package_that_does_not_import_is_broken(monkeypatch, apt):
    monkeypatch.setitem(sys.modules, "gguf", None)
    result = apt("doctor")
    assert result.code == 1
    assert "does not import" in result.out


def test_failing_plugins_and_adapters_are_listed():
    broken = Plugin("bad-package 1.0", "bad", "bad", problem="ImportError: no")
    spec = replace(registry().adapters.get("llama"), target="apt_adapters.nowhere:Nothing")
    installed = SimpleNamespace(
        plugins={"bad": broken}, adapters=SimpleNamespace(specs={"llama": spec})
    )
    (plugin,) = doctor.plugins(installed)
    assert (plugin.what, plugin.state, plugin.broken) == ("bad-package 1.0", broken.problem, True)
    (family,) = doctor.families(installed)
    assert family.broken
    assert "apt_adapters.nowhere" in family.state


@pytest.mark.parametrize(
    ("found", "runs", "state", "broken"),
    [
        (None, None, "not installed", False),
        (doctor.Finding("x", "1.0, does not import: OSError", broken=True), None, "OSError", True),
        (doctor.Finding("x", "1.0"), RuntimeError("no kernel image"), "no kernel image", True),
        (doctor.Finding("x", "1.0"), 0.5, "off by 0.5", True),
    ],
    ids=["absent", "unimportable", "crashing", "wrong"],
)
def test_unusable_kernels_are_listed_with_the_command(monkeypatch, found, runs, state, broken):
    def run():
        if isinstance(runs, Exception):
            raise runs
        return runs

    monkeypatch.setattr(kernels, "try_import", lambda *_: found)
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "scan_differs", run)
    monkeypatch.setattr(kernels, "convolution_differs", run)
    kernels._on_gpu.cache_clear()
    (finding,) = kernels.mamba()
    kernels._on_gpu.cache_clear()
    assert state in finding.state
    assert kernels.INSTALL in finding.remedy
    assert finding.broken == broken


def test_usable_kernels_are_listed(monkeypatch):
    monkeypatch.setattr(kernels, "try_import", lambda *_: doctor.Finding("x", "1.0"))
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "scan_differs", lambda: 1e-6)
    monkeypatch.setattr(kernels, "convolution_differs", lambda: 1e-6)
    kernels._on_gpu.cache_clear()
    (finding,) = kernels.mamba()
    kernels._on_gpu.cache_clear()
    assert finding.state.startswith("kernels on the GPU")
    assert not finding.remedy
