"""A model with its blocks in its checkpoint and everything else in memory."""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from apt.errors import AptError
from apt.layout import Layout, pruned_of
from apt.models import Model
from apt.plan import PlannedBlock
from apt.shards import Shards


class Shelf:
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
            empty = {n: torch.empty_like(p, device="meta") for n, p in block.named_parameters()}
            _put(block, empty, "meta")

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


def _put(block: nn.Module, tensors: dict[str, Tensor], device: str) -> None:
    """Give a block its parameters, and keep none of them here."""
    for path in list(tensors):
        owner, _, own = path.rpartition(".")
        tensor = tensors.pop(path).to(device, non_blocking=True)
        setattr(block.get_submodule(owner), own, nn.Parameter(tensor, requires_grad=False))


def assemble(
    shell: Model, shards: Shards, layout: Layout, device: str, dtype: torch.dtype | None = None
) -> nn.Module:
    """The model with its blocks on the meta device and everything else in memory.

    What a model makes for itself, tables of positions for instance, comes from one of a single
    block, whose list of blocks is then replaced.
    """
    blocks = shell.adapter.blocks(shell.module)
    parent = blocks[0][0].rpartition(".")[0]
    single: Any = AutoModelForCausalLM.from_config(
        _of_one_block(shell.config), trust_remote_code=shell.source.trust_remote_code
    ).eval()
    made = {n: b.to(device) for n, b in shell.adapter.blocks(single)[0][1].named_buffers()}
    outer = {
        name: layout[name][0].key
        for name in single.state_dict()
        if name in layout and not name.startswith(f"{parent}.")
    }
    single.set_submodule(parent, nn.ModuleList())
    vars(single.config).update(vars(shell.config))
    single.load_state_dict(
        {n: in_precision(shards.read_finite(key), dtype) for n, key in outer.items()},
        strict=False,
        assign=True,
    )
    single.tie_weights()
    _check_whole(shell, single, outer)
    single.to(device)
    single.set_submodule(parent, shell.module.get_submodule(parent))
    for name, block in blocks:
        _give_buffers(shell, name, block, made)
    module: nn.Module = single
    return module


def _of_one_block(config: Any) -> Any:
    short = copy.deepcopy(config)
    short.num_hidden_layers = 1
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(short, name, value[:1])
    return short


def _give_buffers(shell: Model, name: str, block: nn.Module, made: dict[str, Tensor]) -> None:
    """Buffers that a checkpoint does not hold are what a block makes for itself."""
    for path, buffer in list(block.named_buffers()):
        if not buffer.is_meta:
            continue
        if path not in made or made[path].shape != buffer.shape:
            raise AptError(
                f"{shell.source.reference} cannot be streamed: nothing says what {name}.{path} is",
                "leave out --stream",
            )
        owner, _, own = path.rpartition(".")
        block.get_submodule(owner).register_buffer(own, made[path].clone(), persistent=False)


def _check_whole(shell: Model, module: nn.Module, given: Collection[str]) -> None:
    """Raise where a weight outside the blocks came neither from the checkpoint nor from a tie."""
    tied = {p.data_ptr() for n, p in module.state_dict().items() if n in given}
    for name, tensor in module.state_dict().items():
        if name not in given and tensor.data_ptr() not in tied:
            raise AptError(f"{shell.source.reference} lacks {name}", "is the checkpoint complete?")
