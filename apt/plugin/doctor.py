"""What this machine has to prune with, and what it lacks."""

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch

from apt.errors import first_line
from apt.plugin.registry import Registry
from apt.plugin.specs import AdapterSpec

_REQUIRED = ("torch", "transformers", "safetensors", "datasets", "pluggy")
# Packages that open a way of their own: what they are for, what imports, and how they are had.
_OPTIONAL = (
    ("gguf", "reading .gguf files", "gguf", "pip install 'apt-prune[gguf]'"),
    ("accelerate", "reading .gguf files", "accelerate", "pip install 'apt-prune[gguf]'"),
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: its name.
        state: what was found.
        remedy: the command or the step that would better it; empty where nothing needs to be.
        broken: whether it is there, but does not work.
    """

    what: str
    state: str
    remedy: str = ""
    broken: bool = False


def machine() -> list[Finding]:
    """Processor, its bfloat16, and every GPU."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    native = [name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name)]
    found = [
        Finding("python", platform.python_version()),
        Finding(
            "processor",
            f"{torch.get_num_threads()} threads, "
            + (
                f"bfloat16 by {native[0]}" if native else "no bfloat16 of its own: tuning is slower"
            ),
        ),
    ]
    if not torch.cuda.is_available():
        why = "" if torch.version.cuda else f" (torch {torch.__version__} is built without CUDA)"
        return [*found, Finding("GPU", f"none{why}")]
    for index in range(torch.cuda.device_count()):
        name, memory = torch.cuda.get_device_name(index), torch.cuda.mem_get_info(index)[1]
        found.append(Finding(f"GPU {index}", f"{name}, {memory / 2**30:.0f} GiB"))
    return found


def packages() -> Iterator[Finding]:
    """What APT is built on, and what is optional."""
    for name in _REQUIRED:
        yield Finding(name, version(name))
    for name, purpose, module, remedy in _OPTIONAL:
        found = try_import(name, module)
        if found is None:
            yield Finding(name, f"not installed; for {purpose}", remedy)
        else:
            yield found


def try_import(distribution: str, module: str) -> Finding | None:
    """Whether a package imports here; None where it is not installed."""
    try:
        installed = version(distribution)
    except PackageNotFoundError:
        return None
    try:
        import_module(module)
    except Exception as error:
        problem = f"{type(error).__name__}: {first_line(error)}"
        return Finding(distribution, f"{installed}, does not import: {problem}", broken=True)
    return Finding(distribution, installed)


def plugins(registry: Registry) -> Iterator[Finding]:
    """Plugins that did not load."""
    for plugin in registry.plugins.values():
        if plugin.problem:
            yield Finding(
                plugin.distribution, plugin.problem, "upgrade or uninstall it", broken=True
            )


def families(registry: Registry) -> Iterator[Finding]:
    """What the machine will run each family with."""
    for spec in registry.adapters.specs.values():
        yield from _family(spec)


def _family(spec: AdapterSpec) -> Iterator[Finding]:
    try:
        spec.load()
        if spec.doctor is not None:
            yield from spec.examine()
            return
    except Exception as error:
        problem = f"{type(error).__name__}: {first_line(error)}"
        yield Finding(spec.name, problem, "reinstall its package", broken=True)
        return
    yield Finding(
        spec.name, f"torch on {'the GPU' if torch.cuda.is_available() else 'the processor'}"
    )
