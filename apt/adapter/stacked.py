"""The base class of adapters for encoders, and for models of several stacks."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from apt.adapter.decoder import DecoderAdapter, Input
from apt.errors import AptError

Stack = tuple[str, list[tuple[str, nn.Module]]]
"""The name of a stack, and its blocks with their full names."""


class StackedAdapter(DecoderAdapter):
    """A model of one or several stacks, declared by the paths of their lists of blocks.

    Attributes:
        stack_paths: the path of the list of blocks of each stack, within the model's body, by the
            name of the stack and in the order of a run. A model may lack some of them.
        inputs: the inputs of the blocks of all stacks, in the order of the forward pass. The blocks
            of a stack may lack some of them.
    """

    blocks_path = ""
    stack_paths: ClassVar[Mapping[str, str]]

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The blocks of all stacks."""
        return [block for _, blocks in self.stacks(model) for block in blocks]

    def stacks(self, model: nn.Module) -> list[Stack]:
        """The stacks that the model has."""
        body: Any = getattr(model, "base_model", model)
        prefix = next((f"{n}." for n, m in model.named_modules() if m is body and n), "")
        paths = {name: prefix + path for name, path in self.stack_paths.items()}
        found = [(name, path) for name, path in paths.items() if has_module(model, path)]
        if not found:
            raise AptError(
                f"adapter {type(self).__name__} does not fit {type(model).__name__}: "
                f"it has no '{next(iter(paths.values()))}'",
                "choose the model's own adapter, see: apt-prune adapters",
            )
        return [(name, self.blocks_at(model, path)) for name, path in found]

    def inputs_of(self, block: nn.Module) -> tuple[Input, ...]:
        """The declared inputs whose Linears the block has."""
        present = {name for name, _ in block.named_modules()}
        found = []
        for entry in self.inputs:
            linears = tuple(name for name in entry.linears if name in present)
            if linears:
                found.append(replace(entry, linears=linears))
        return tuple(found)


def has_module(model: nn.Module, path: str) -> bool:
    """True if a model has a module at ``path``."""
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
