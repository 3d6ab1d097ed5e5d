"""The run of a model on given windows of text with only one block in memory at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, State, stub_output, stubbed
from apt.adapter.recording import eval_mode
from apt.calibration.batches import Batch, enter
from apt.calibration.storage import Store
from apt.checkpoints.offload import StoredBlocks, assemble
from apt.checkpoints.opened import Opened
from apt.checkpoints.stored import open_stored
from apt.compute import compute_dtype
from apt.errors import AptError


@contextmanager
def streamed(
    skeleton: Opened, tokens: Tensor, device: str, compute: torch.dtype | str = "auto"
) -> Iterator[nn.Module]:
    """A model for the windows of ``tokens`` (windows, seqlen); its blocks are read one by one.

    Args:
        compute: the compute dtype, or its name; see `apt.compute.compute_dtype`.
    """
    stored = open_stored(skeleton)
    if isinstance(compute, str):
        compute = compute_dtype(stored.dtype(skeleton), device, compute)
    parts = (stored.shards, stored.layout)
    module = assemble(skeleton, *parts, device, compute)
    on_disk = StoredBlocks(*parts, dict(skeleton.adapter.blocks(module)), device, cast=True)
    with carried(module, skeleton.adapter, tokens, on_disk):
        yield module


@contextmanager
def carried(
    model: nn.Module,
    adapter: Adapter,
    tokens: Tensor,
    on_disk: StoredBlocks,
    store: Store | None = None,
) -> Iterator[None]:
    """Inside the context, ``model`` can be run on any of the windows, in batches of any size.

    On entry, the states of all windows are computed up to the last block, one block after the
    other. In later runs of the model, all blocks but the last are stubs. The last block is in
    memory, and receives the states computed on entry.

    Args:
        model: the model, its blocks on the meta device.
        adapter: the adapter of its family.
        tokens: token ids (windows, seqlen).
        store: the store of the windows' states; None keeps them in memory.

    Raises:
        AptError: the model is run on tokens that are not among the windows.
    """
    *names, last = (name for name, _ in adapter.blocks(model))
    earlier_blocks = [model.get_submodule(name) for name in names]
    with eval_mode(model), adapter.running(model), ExitStack() as stack:
        windows = _Windows(_carry(model, adapter, tokens, on_disk, names, store), tokens)
        block = stack.enter_context(on_disk.open(last))
        for module in earlier_blocks:
            stack.enter_context(stubbed([module], _pass_through(module)))
        for module, hook in ((model, windows.look_up), (block, windows.replace_state)):
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _pass_through(block: nn.Module) -> Callable[..., Any]:
    """A stub of ``block`` that returns its input."""
    return lambda *args, **kwargs: stub_output(args, kwargs, block)


@torch.no_grad()
def _carry(
    model: nn.Module,
    adapter: Adapter,
    tokens: Tensor,
    on_disk: StoredBlocks,
    names: Sequence[str],
    store: Store | None,
) -> list[Batch]:
    """The windows' states after the blocks of these ``names``."""
    batches = enter(adapter, model, tokens, store=store)
    for index, name in enumerate(names):
        with on_disk.open(name) as block:
            for batch in batches:
                batch.state = adapter.step(block, batch.state, batch.calls[index])
    return batches


class _Windows:
    """Hooks that pass the states of the requested windows to the last block."""

    def __init__(self, batches: Sequence[Batch], tokens: Tensor) -> None:
        counts = [batch.tokens // tokens.shape[1] for batch in batches]
        self._dim = _samples_dim(batches[0], counts[0], tokens.shape[1])
        positions = [(b, row) for b, n in zip(batches, counts, strict=True) for row in range(n)]
        keys = (tuple(window) for window in tokens.tolist())
        self._positions = dict(zip(keys, positions, strict=True))
        self._requested: list[tuple[Batch, int]] = []

    def look_up(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before the model: look up the windows in its tokens."""
        try:
            ids: Tensor = args[0] if args else kwargs["input_ids"]
            self._requested = [self._positions[tuple(window)] for window in ids.tolist()]
        except (AttributeError, KeyError, TypeError):
            raise AptError(
                "the metric runs the model on tokens that are none of the given windows",
                "do not stream, or choose another metric",
                ("stream", "metrics"),
            ) from None

    def _state(self) -> tuple[Any, ...]:
        """The state of the requested windows before the last block."""
        states = [_values(batch.state) for batch, _ in self._requested]
        rows = [row for _, row in self._requested]
        streams, others = [state[0] for state in states], [state[1:] for state in states]
        return (_stacked_rows(streams, rows, self._dim), *_stacked_rows(others, rows))

    def replace_state(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A hook before the last block: replace its state by that of the windows."""
        call, state = self._requested[0][0].calls[-1], self._state()
        positional, named = list(args), dict(kwargs)
        for name in call.shared if len(state) > 1 else ():
            named[name].update(
                state[-1][name]
            )  # the model's dictionary, which its stubs did not fill
        positions = call.carried if len(state) > 1 else {}
        for key, position in [(call.keyword or -1, 0), *positions.items()]:
            value = state[position]
            if isinstance(key, int):
                positional[key + 1] = value  # the state is before the other arguments
            else:
                named[key] = value
        return tuple(positional), named


def _samples_dim(batch: Batch, samples: int, seqlen: int) -> int:
    """The dimension of the samples in a stream; in Gemma 3n it follows a dimension of streams."""
    shape = tuple(_values(batch.state)[0].shape)
    dims = (dim for dim in range(len(shape)) if shape[dim : dim + 2] == (samples, seqlen))
    return next(dims, 0)


def _values(state: State) -> tuple[Any, ...]:
    """The stream in a state, and the other values that a block returns."""
    return state if isinstance(state, tuple) else (state,)


def _stacked_rows(parts: Sequence[Any], rows: Sequence[int], dim: int = 0) -> Any:
    """One row of each part, stacked along a dimension; parts are tensors or containers of them."""
    first = parts[0]
    if isinstance(first, Tensor):
        pairs = zip(parts, rows, strict=True)
        return torch.stack([part.select(dim, row) for part, row in pairs], dim)
    if isinstance(first, dict):
        return {key: _stacked_rows([part[key] for part in parts], rows) for key in first}
    if isinstance(first, tuple):
        return tuple(_stacked_rows(items, rows) for items in zip(*parts, strict=True))
    return first
