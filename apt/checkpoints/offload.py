"""A model in memory without its blocks, which are read from the checkpoint one at a time."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from apt.checkpoints.opened import Opened
from apt.checkpoints.safetensors_io import Shards
from apt.checkpoints.stored import pruned_of, read_parameter, write_parameters
from apt.compute import is_lossy, unrounded
from apt.devices import is_accelerator
from apt.errors import AptError
from apt.layouts.pieces import Layout
from apt.planning.plan import PlannedBlock


class StoredBlocks:
    """The blocks of a model in a checkpoint.

    Args:
        layout: the tensors of the checkpoint for each parameter of the model.
        blocks: the modules by name, on the meta device.
        cast: True to cast a tensor to the dtype of its parameter on the meta device.
    """

    def __init__(
        self,
        shards: Shards,
        layout: Layout,
        blocks: Mapping[str, nn.Module],
        device: str,
        *,
        cast: bool = False,
    ) -> None:
        self._shards, self._layout, self._blocks = shards, layout, blocks
        self._device, self._cast = device, cast

    @contextmanager
    def open(self, name: str, dense: dict[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """While entered, the block is in memory; ``dense`` has its parameters if already read."""
        block = self._blocks[name]
        _set_parameters(block, self.read(name) if dense is None else dense, self._device)
        try:
            yield block
        finally:
            _unload(block)

    @contextmanager
    def read_on_call(self) -> Iterator[None]:
        """While entered, the model can run: each call of a block reads its parameters anew."""
        names = {block: name for name, block in self._blocks.items()}

        def read(block: nn.Module, args: Any) -> None:
            _set_parameters(block, self.read(names[block]), self._device)

        def unload(block: nn.Module, args: Any, result: Any) -> None:
            _unload(block)

        with ExitStack() as stack:
            for block in names:
                stack.callback(block.register_forward_pre_hook(read).remove)
                stack.callback(block.register_forward_hook(unload, always_call=True).remove)
            yield

    def read(self, name: str) -> dict[str, Tensor]:
        """The parameters of a block; raises `AptError` if a value is not finite."""
        pinned, read = is_accelerator(self._device), {}
        for path, parameter in self._blocks[name].named_parameters():
            pieces = self._layout[f"{name}.{path}"]
            tensor = read_parameter(pieces, parameter.shape, self._shards)
            tensor = cast(tensor, parameter.dtype if self._cast else None)
            read[path] = tensor.pin_memory() if pinned else tensor
        return read

    def restore(self, name: str) -> None:
        """Replace the parameters of an open block by the stored ones."""
        _set_parameters(self._blocks[name], self.read(name), self._device)

    def write(self, name: str, paths: Iterable[str], source: "StoredBlocks") -> None:
        """Write parameters of an open block to the checkpoint.

        If the block computes in a dtype of less precision, values that have not changed since they
        were read are written as they are in ``source``, the blocks before pruning.
        """
        parameters = (
            (self._layout[f"{name}.{path}"], source.unrounded(f"{name}.{path}", parameter.detach()))
            for path in paths
            for parameter in [self._blocks[name].get_parameter(path)]
        )
        write_parameters(parameters, self._shards)

    def unrounded(self, name: str, values: Tensor) -> Tensor:
        """The values of a parameter, the unchanged ones as stored; see `apt.compute.unrounded`."""
        if not is_lossy(self.stored_dtype(name), values.dtype):
            return values
        return unrounded(values, read_parameter(self._layout[name], values.shape, self._shards))

    def stored_dtype(self, name: str) -> torch.dtype:
        """The stored dtype of a parameter, by its full name."""
        return self._shards.entries[self._layout[name][0].key].dtype

    def digest(self, block: PlannedBlock) -> str:
        """A checksum of the stored tensors of a block's pruned parameters."""
        return self._shards.digest(pruned_of(block, self._layout))


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A floating-point tensor in another dtype; integers, and ``dtype`` None, are not cast."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _unload(block: nn.Module) -> None:
    """Move a block to the meta device."""
    empty = {n: torch.empty_like(p, device="meta") for n, p in block.named_parameters()}
    _set_parameters(block, empty, "meta")


def _set_parameters(block: nn.Module, tensors: dict[str, Tensor], device: str) -> None:
    """Set the parameters of a block, and empty the dictionary to free memory early."""
    for path in list(tensors):
        owner, _, name = path.rpartition(".")
        tensor = tensors.pop(path).to(device, non_blocking=True)
        setattr(block.get_submodule(owner), name, nn.Parameter(tensor, requires_grad=False))


def assemble(
    skeleton: Opened, shards: Shards, layout: Layout, device: str, dtype: torch.dtype | None = None
) -> nn.Module:
    """The model in memory without its blocks; raises `AptError` if a tensor is missing."""
    module: Any = skeleton.skeleton(dtype)
    blocks = skeleton.adapter.blocks(module)
    in_blocks = {f"{name}.{path}" for name, block in blocks for path, _ in block.named_parameters()}
    state = module.state_dict()
    stored = {name: layout[name] for name in state if name in layout and name not in in_blocks}
    tensors = {
        name: cast(read_parameter(pieces, state[name].shape, shards), dtype and state[name].dtype)
        for name, pieces in stored.items()
    }
    computed = _compute_unsaved(module, {*state} - {*stored} - in_blocks)
    module.load_state_dict(tensors, strict=False, assign=True)
    module.tie_weights()
    with _without_blocks(module, {name.rpartition(".")[0] for name, _ in blocks}):
        _check_complete(skeleton, module, {*stored, *computed})
        module.to(device)
    for owner in (part for _, block in blocks for part in block.modules()):
        for name, buffer in owner.named_buffers(recurse=False):
            # Some buffers have the type `nn.Parameter`: `setattr` would register a parameter.
            owner._buffers[name] = buffer.to(device)
    model: nn.Module = module
    return model


@torch.no_grad()
def _compute_unsaved(module: Any, names: set[str]) -> set[str]:
    """Give values to the parameters that a class of transformers never saves; returns their names.

    Such as Marian's sines of positions, which its configuration determines.
    """
    patterns = list(getattr(module, "_keys_to_ignore_on_save", None) or ())
    tied = set(getattr(module, "_tied_weights_keys", None) or ())
    names = {name for name, _ in module.named_parameters()} & names - tied
    found = {name for name in names if any(re.search(pattern, name) for pattern in patterns)}
    for name in found:
        path, _, parameter = name.rpartition(".")
        owner = module.get_submodule(path)
        values = torch.empty_like(getattr(owner, parameter), device="cpu")
        setattr(owner, parameter, nn.Parameter(values, requires_grad=False))
        module._init_weights(owner)
    return found


@contextmanager
def _without_blocks(module: nn.Module, paths: Collection[str]) -> Iterator[None]:
    """While entered, the model has no blocks: `nn.Module.to` would refuse to move them."""
    lists = {path: module.get_submodule(path) for path in paths}
    for path in lists:
        module.set_submodule(path, nn.ModuleList())
    yield
    for path, blocks in lists.items():
        module.set_submodule(path, blocks)


def _check_complete(skeleton: Opened, module: nn.Module, stored: Collection[str]) -> None:
    """Raise if a weight outside the blocks is neither known nor tied to another."""
    tied = {p.data_ptr() for n, p in module.state_dict().items() if n in stored}
    for name, tensor in module.state_dict().items():
        if name not in stored and tensor.data_ptr() not in tied:
            message = f"{skeleton.source.reference} lacks {name}, or stores it in an unknown way"
            raise AptError(message, "is the checkpoint complete? if so, do not stream it")
