"""A model with its blocks in its checkpoint and everything else in memory."""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from apt.checkpoints.empty_model import weightless
from apt.checkpoints.model import Model
from apt.checkpoints.safetensors_io import Shards
from apt.checkpoints.tensor_map import Layout, pruned_of
from apt.errors import AptError
from apt.planning.plan import PlannedBlock


class StoredBlocks:
    """Blocks as they lie in a checkpoint.

    Args:
        shards: the checkpoint.
        layout: what the model's parameters are made of there.
        blocks: the modules by name, on the meta device.
        device: where a block is loaded to.
        dtype: the precision that it is held in there; None for that of each tensor.
    """

    def __init__(
        self,
        shards: Shards,
        layout: Layout,
        blocks: Mapping[str, nn.Module],
        device: str,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._shards, self._layout, self._blocks = shards, layout, blocks
        self._device, self._dtype = device, dtype

    @contextmanager
    def open(self, name: str, dense: dict[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """A block in memory, from the tensors that have been read of it where they have been; then
        on the meta device again."""
        block = self._blocks[name]
        _put(block, self.read(name) if dense is None else dense, self._device)
        try:
            yield block
        finally:
            _empty(block)

    @contextmanager
    def read_on_call(self) -> Iterator[None]:
        """While entered, the whole model runs: each block is read for every call of it."""
        with ExitStack() as stack:
            for name, block in self._blocks.items():
                read = partial(self._read_for_call, name)
                for handle in (
                    block.register_forward_pre_hook(read),
                    block.register_forward_hook(_drop_after_call, always_call=True),
                ):
                    stack.callback(handle.remove)
            yield

    def _read_for_call(self, name: str, block: nn.Module, args: Any) -> None:
        _put(block, self.read(name), self._device)

    def read(self, name: str) -> dict[str, Tensor]:
        """The parameters of a block.

        Raises:
            AptError: a value is not finite.
        """
        pinned, read = self._device.startswith("cuda"), {}
        for path, parameter in self._blocks[name].named_parameters():
            tensor = self._parameter(f"{name}.{path}", parameter.shape)
            read[path] = tensor.pin_memory() if pinned else tensor
        return read

    def _parameter(self, name: str, shape: torch.Size) -> Tensor:
        """A parameter, put together from its pieces."""
        pieces = self._layout[name]
        if len(pieces) == 1:
            return in_precision(self._shards.read_finite(pieces[0].key), self._dtype)
        whole = torch.empty(shape, dtype=self._shards.entries[pieces[0].key].dtype)
        for piece in pieces:
            whole[piece.part] = self._shards.read_finite(piece.key)
        return in_precision(whole, self._dtype)

    def restore(self, name: str) -> None:
        """Put a block that is in memory back to how it lies here."""
        _put(self._blocks[name], self.read(name), self._device)

    def write(self, name: str, paths: Iterable[str]) -> None:
        """Write these parameters of a block that is in memory over what lies here.

        The block then holds what was written, which is rounded where it is stored in fewer bits.
        """
        parameters = {path: self._blocks[name].get_parameter(path) for path in paths}
        self._shards.write(
            (piece.key, parameter[piece.part])
            for path, parameter in parameters.items()
            for piece in self._layout[f"{name}.{path}"]
        )
        for path, parameter in parameters.items():
            stored = self._shards.entries[self._layout[f"{name}.{path}"][0].key].dtype
            if stored != parameter.dtype:
                parameter.data.copy_(parameter.data.to(stored))

    def digest(self, block: PlannedBlock) -> str:
        """A checksum of what lies here of a block's pruned parameters."""
        return self._shards.digest(pruned_of(block, self._layout))


def in_precision(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in that precision, if it holds floating-point numbers and one is given."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _drop_after_call(block: nn.Module, args: Any, result: Any) -> None:
    _empty(block)


def _empty(block: nn.Module) -> None:
    """Put a block on the meta device."""
    empty = {n: torch.empty_like(p, device="meta") for n, p in block.named_parameters()}
    _put(block, empty, "meta")


def _put(block: nn.Module, tensors: dict[str, Tensor], device: str) -> None:
    """Give a block its parameters, and keep none of them here."""
    for path in list(tensors):
        owner, _, own = path.rpartition(".")
        tensor = tensors.pop(path).to(device, non_blocking=True)
        setattr(block.get_submodule(owner), own, nn.Parameter(tensor, requires_grad=False))


def assemble(
    shell: Model, shards: Shards, layout: Layout, device: str, dtype: torch.dtype | None = None
) -> nn.Module:
    """The model with the parameters of its blocks on the meta device and all else in memory.

    Raises:
        AptError: the checkpoint lacks something that is not in a block.
    """
    source = shell.source
    module: Any = weightless(
        copy.deepcopy(shell.config), trust_remote_code=source.trust_remote_code
    )
    blocks = shell.adapter.blocks(module)
    held = {f"{name}.{path}" for name, block in blocks for path, _ in block.named_parameters()}
    given = {n: layout[n][0].key for n in module.state_dict() if n in layout and n not in held}
    tensors = {n: in_precision(shards.read_finite(key), dtype) for n, key in given.items()}
    module.load_state_dict(tensors, strict=False, assign=True)
    module.tie_weights()
    with _without(module, blocks[0][0].rpartition(".")[0]):
        _check_whole(shell, module, given)
        module.to(device)
    for _, block in blocks:
        _move_buffers(block, device)
    whole: nn.Module = module
    return whole


@contextmanager
def _without(module: nn.Module, path: str) -> Iterator[None]:
    """The model without its blocks, which `nn.Module.to` would refuse to move, while entered."""
    blocks = module.get_submodule(path)
    module.set_submodule(path, nn.ModuleList())
    yield
    module.set_submodule(path, blocks)


def _move_buffers(block: nn.Module, device: str) -> None:
    for owner in block.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, buffer.to(device))


def _check_whole(shell: Model, module: nn.Module, given: Collection[str]) -> None:
    """Raise where a weight outside the blocks came neither from the checkpoint nor from a tie."""
    tied = {p.data_ptr() for n, p in module.state_dict().items() if n in given}
    for name, tensor in module.state_dict().items():
        if name not in given and tensor.data_ptr() not in tied:
            raise AptError(f"{shell.source.reference} lacks {name}", "is the checkpoint complete?")
