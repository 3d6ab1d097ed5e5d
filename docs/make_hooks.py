"""Prints the reference of the plugin surface, docs/hooks.md, from the code's own docstrings."""

import inspect
from collections.abc import Iterator
from typing import Any

from apt import adapter
from apt.checkpoints import formats
from apt.plugin import hookspecs, specs
from apt.pruning import layer

SPECS = (
    specs.AdapterSpec, specs.FormatSpec, specs.MethodSpec, specs.AllocationSpec,
    specs.CalibrationSpec, specs.EvaluatorSpec,
)  # fmt: skip
TARGETS = (adapter.Adapter, adapter.Site, adapter.Input, adapter.DecoderAdapter)


def hooks() -> Iterator[Any]:
    """The hooks, in the order in which they are written."""
    for name, value in vars(hookspecs).items():
        if name.startswith("apt_"):
            yield value


def entry(thing: Any, level: str = "###") -> str:
    """A heading, the signature, and the docstring as it is written."""
    signature = (
        str(inspect.signature(thing)).replace("apt.plugin.specs.", "").replace("typing.", "")
    )
    text = inspect.getdoc(thing) or ""
    return f"{level} `{thing.__name__}`\n\n```text\n{thing.__name__}{signature}\n\n{text}\n```\n"


def members(thing: type) -> Iterator[str]:
    """The public methods of a class that say something."""
    for name, value in vars(thing).items():
        if inspect.isfunction(value) and not name.startswith("_"):
            yield entry(value, "####")


def main() -> None:
    """Print it."""
    print("# Hooks\n")
    print("Made from the code by `python docs/make_hooks.py > docs/hooks.md`; do not edit.\n")
    print(f"Version {hookspecs.API} of the surface; versions from {hookspecs.OLDEST_API} on are")
    print("served. A plugin is a module named by an entry point of group `apt`.\n")
    print("## What a plugin may implement\n")
    print("\n".join(entry(hook) for hook in hooks()))
    print("## What the hooks return\n")
    print("\n".join(entry(spec) for spec in SPECS))
    print("## What the targets are\n")
    print(entry(adapter.Adapter))
    print("\n".join(members(adapter.Adapter)))
    print("\n".join(entry(thing) for thing in TARGETS[1:]))
    print(entry(formats.Checkpoint))
    print("\n".join(members(formats.Checkpoint)))
    print(entry(layer.Method.__call__).replace("`__call__`", "A method"), end="")


if __name__ == "__main__":
    main()
