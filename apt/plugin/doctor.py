"""The state of this machine: hardware, packages, plugins, and missing parts."""

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch

from apt.compute import compute_dtype, dtype_name
from apt.devices import accelerator, default_device, name_of, operations_per_second, total_memory
from apt.errors import AptError, first_line
from apt.plugin.registry import Registry
from apt.plugin.specs import AdapterSpec

_REQUIRED = ("torch", "transformers", "safetensors", "datasets", "pluggy")
# Optional packages: name, purpose, module to import, and the command that installs it.
_OPTIONAL = (
    ("gguf", "reading and writing .gguf files", "gguf", "pip install 'apt-prune[gguf]'"),
    ("accelerate", "reading .gguf files", "accelerate", "pip install 'apt-prune[gguf]'"),
    ("lm-eval", "answering tasks", "lm_eval", "pip install 'apt-prune[eval]'"),
    ("peft", "recovery", "peft", "pip install 'apt-prune[recover]'"),
)


@dataclass(frozen=True)
class Finding:
    """The state of one component.

    Attributes:
        what: the name of the component.
        state: its state in words.
        remedy: a command or step that improves it; empty if none is needed.
        broken: True if it is installed but does not work.
    """

    what: str
    state: str
    remedy: str = ""
    broken: bool = False


def machine() -> list[Finding]:
    """The processor, every GPU, and the speed of the default device in each dtype."""
    findings = [
        Finding("python", platform.python_version()),
        Finding("processor", f"{torch.get_num_threads()} threads"),
        *_graphics(),
    ]
    return [*findings, *dtypes(default_device())]


def dtypes(device: str) -> Iterator[Finding]:
    """The speed of a device in each dtype, and the compute dtype of a model in that dtype."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = dtype_name(dtype)
        speed = f"{operations_per_second(dtype, device) / 1e9:,.0f} GFLOP/s on {device}"
        compute = dtype_name(compute_dtype(dtype, device))
        yield Finding(name, f"{speed}; a model in {name} computes in {compute}")


def _graphics() -> list[Finding]:
    """Every GPU."""
    findings: list[Finding] = []
    if (kind := accelerator()) is None:
        reason = "" if torch.version.cuda else f" (torch {torch.__version__} is built without CUDA)"
        return [*findings, Finding("GPU", f"none{reason}")]
    for index in range(torch.accelerator.device_count()):
        device = f"{kind}:{index}"
        memory = total_memory(device)
        size = f", {memory / 2**30:.0f} GiB" if memory else ""
        findings.append(Finding(f"GPU {index}", name_of(device) + size))
    return findings


def packages() -> Iterator[Finding]:
    """The required packages and the optional ones."""
    for name in _REQUIRED:
        yield Finding(name, version(name))
    for name, purpose, module, remedy in _OPTIONAL:
        finding = try_import(name, module)
        if finding is None:
            yield Finding(name, f"not installed; for {purpose}", remedy)
        else:
            yield finding


def try_import(distribution: str, module: str) -> Finding | None:
    """The version of a package and any error on import; None if it is not installed."""
    try:
        installed_version = version(distribution)
    except PackageNotFoundError:
        return None
    try:
        import_module(module)
    except Exception as error:
        problem = f"{type(error).__name__}: {first_line(error)}"
        return Finding(
            distribution, f"{installed_version}, does not import: {problem}", broken=True
        )
    return Finding(distribution, installed_version)


def plugins(registry: Registry) -> Iterator[Finding]:
    """Plugins that did not load."""
    for plugin in registry.plugins.values():
        if plugin.problem:
            yield Finding(
                plugin.distribution, plugin.problem, "upgrade or uninstall it", broken=True
            )


def families(registry: Registry) -> Iterator[Finding]:
    """The implementation that this machine uses for each family."""
    for spec in registry.adapters.specs.values():
        yield from _family(spec)


def _family(spec: AdapterSpec) -> Iterator[Finding]:
    try:
        spec.load()
        if spec.doctor is not None:
            yield from spec.examine()
            return
    except AptError as error:  # its target does not load
        yield Finding(spec.name, error.message, error.hint, broken=True)
        return
    except Exception as error:
        problem = f"{type(error).__name__}: {first_line(error)}"
        yield Finding(spec.name, problem, "reinstall its package", broken=True)
        return
    yield Finding(spec.name, f"torch on {'the GPU' if accelerator() else 'the processor'}")
