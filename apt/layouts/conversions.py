"""The conversion of stored tensors to parameters by transformers.

transformers 5 stores each family under the names of its first checkpoint, and converts on loading:
it renames, joins, cuts and transposes tensors, and stacks the tensors of single experts. It has a
mapping for each family. This file follows these mappings with shapes alone, without any data.
transformers 4 converts nothing.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import prod
from typing import Any

from torch import nn

from apt.layouts.pieces import Piece

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key
except ImportError:  # transformers 4
    get_model_conversion_mapping = None


@dataclass(frozen=True)
class Converted:
    """A parameter after the conversion by transformers.

    Attributes:
        problem: the reason why the conversion cannot be followed; then there are no pieces.
    """

    shape: tuple[int, ...] = ()
    pieces: tuple[Piece, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class _Axis:
    """Positions in a dimension of a tensor, and the source positions in the stored tensor.

    Attributes:
        place: the positions in the tensor.
        dim: the dimension of the stored tensor; None if the stored tensor has no such dimension.
        source: the positions in this dimension.
    """

    place: range
    dim: int | None
    source: range

    def at(self, selection: slice) -> "_Axis":
        """The axis with a selection of its positions."""
        return replace(self, place=self.place[selection], source=self.source[selection])

    def moved(self, step: int) -> "_Axis":
        """The axis with its positions in the tensor moved by ``step``."""
        place = range(self.place.start + step, self.place.stop + step, self.place.step)
        return replace(self, place=place)


@dataclass(frozen=True)
class _Box:
    """A part of a tensor that comes from one stored tensor of the shape ``stored``."""

    key: str
    stored: tuple[int, ...]
    axes: tuple[_Axis, ...]

    def having(self, dim: int, axis: _Axis) -> "_Box":
        """The box with another axis."""
        return replace(self, axes=(*self.axes[:dim], axis, *self.axes[dim + 1 :]))


@dataclass(frozen=True)
class _Value:
    """A tensor, described by the parts of stored tensors of which it consists."""

    shape: tuple[int, ...]
    boxes: tuple[_Box, ...]


class _NotFollowedError(Exception):
    """This file cannot follow a conversion by transformers."""


_Values = dict[str, list[_Value]]
"""The tensors during a conversion, by the patterns that matched their names."""


Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of tensors by name."""


def converted(module: nn.Module, stored: Shapes) -> dict[str, Converted]:
    """The conversions of all parameters and buffers of a model that are stored."""
    state = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if get_model_conversion_mapping is None:
        return _by_name(state, f"{getattr(module, 'base_model_prefix', '')}.", stored)
    conversions = dict[str, Converted]()
    for name, (converter, values) in _collected(module, state, stored).items():
        try:
            results = _applied(converter, name, values, state)
        except _NotFollowedError as error:
            names = {name, *_targets(converter, name)}
            results = dict.fromkeys(names, Converted(problem=str(error)))
        for target, result in results.items():
            duplicate = Converted(problem="it comes from several tensors")
            conversions[target] = duplicate if target in conversions else result
    return conversions


def _by_name(state: Shapes, prefix: str, stored: Shapes) -> dict[str, Converted]:
    """The parameters whose names are stored, with or without the model's prefix."""
    return {
        name: Converted(stored[key], (Piece(key),))
        for name in state
        for key in [f"{prefix}{name}", name.removeprefix(prefix), name]  # the last one wins
        if key in stored
    }


def _collected(module: Any, state: Shapes, stored: Shapes) -> dict[str, tuple[Any, _Values]]:
    """The converter and the stored tensors of each parameter; no converter for a mere renaming."""
    mapping = get_model_conversion_mapping(module)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
    owners = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix = getattr(module, "base_model_prefix", "")
    present = dict.fromkeys(state, True)  # transformers asks whether a name gives None
    collected = dict[str, tuple[Any, _Values]]()
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, present)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, present)
        if name in state:
            _, values = collected.setdefault(name, (owners.get(pattern), {}))
            values.setdefault(pattern or key, []).append(_stored(key, stored[key]))
    return collected


def _stored(key: str, shape: tuple[int, ...]) -> _Value:
    axes = tuple(_Axis(range(size), dim, range(size)) for dim, size in enumerate(shape))
    return _Value(shape, (_Box(key, shape, axes),))


def _applied(
    converter: Any, name: str, values: _Values, state: Mapping[str, tuple[int, ...]]
) -> dict[str, Converted]:
    """The parameters that a converter makes from stored tensors."""
    if converter is None:
        return {name: _result(_single(values))}
    names = _targets(converter, name)
    for operation in converter.operations:
        kind = type(operation).__name__
        if kind not in _OPERATIONS:
            raise _NotFollowedError(f"transformers converts it by {kind}")
        values = _OPERATIONS[kind](operation, values, converter, [state.get(n, ()) for n in names])
    if set(values) != set(converter.target_patterns):
        raise _NotFollowedError("transformers would not make it of the tensors that are there")
    return {
        target: _result(_single({pattern: values[pattern]}))
        for target, pattern in zip(names, converter.target_patterns, strict=True)
        if target in state
    }


def _targets(converter: Any, name: str) -> list[str]:
    """The names of the parameters that a converter makes, of which ``name`` is the first."""
    if converter is None or len(converter.target_patterns) == 1:
        return [name]
    first, *others = converter.target_patterns
    before, _, after = name.partition(first)
    return [name, *(f"{before}{other}{after}" for other in others)]


def _single(values: _Values) -> _Value:
    """The only tensor; raises if there are several."""
    tensors = [value for matched in values.values() for value in matched]
    if len(tensors) != 1:
        raise _NotFollowedError("it comes from several tensors")
    return tensors[0]


def _stacked(operation: Any, values: _Values, converter: Any, shapes: Any) -> _Values:
    """Each list of tensors as one tensor with a new dimension."""
    results: _Values = {}
    for pattern, tensors in values.items():
        name = converter.target_patterns[0] if len(values) == 1 else pattern
        boxes = tuple(
            replace(box, axes=(*box.axes[: operation.dim], axis, *box.axes[operation.dim :]))
            for index, value in enumerate(tensors)
            for axis in [_Axis(range(index, index + 1), None, range(1))]
            for box in value.boxes
        )
        shape = list(_common([value.shape for value in tensors]))
        shape.insert(operation.dim, len(tensors))
        results[name] = [_Value(tuple(shape), boxes)]
    return results


def _joined(operation: Any, values: _Values, converter: Any, shapes: Any) -> _Values:
    """All tensors one after another along a dimension, in the order of the patterns."""
    dim = operation.dim
    tensors = [v for pattern in converter.source_patterns for v in values.get(pattern, ())]
    other_dims = _common([(*v.shape[:dim], *v.shape[dim + 1 :]) for v in tensors])
    starts = list(accumulate((value.shape[dim] for value in tensors), initial=0))
    boxes = tuple(
        box.having(dim, box.axes[dim].moved(start))
        for start, value in zip(starts, tensors, strict=False)
        for box in value.boxes
    )
    joined = _Value((*other_dims[:dim], starts[-1], *other_dims[dim:]), boxes)
    return {converter.target_patterns[0]: [joined]}


def _chunked(operation: Any, values: _Values, converter: Any, shapes: Any) -> _Values:
    """One tensor as equal parts along a dimension."""
    count, size = len(converter.target_patterns), _single(values).shape[operation.dim]
    if size % count or getattr(operation, "num_shards_attribute", None):
        raise _NotFollowedError(f"transformers cuts it into {count} parts of unequal sizes")
    return _cut(_single(values), operation.dim, [size // count] * count, converter)


def _split(operation: Any, values: _Values, converter: Any, shapes: Any) -> _Values:
    """One tensor as parts along a dimension that have the sizes of the parameters."""
    if not all(shapes):
        raise _NotFollowedError("the model lacks a part of what is stored")
    return _cut(_single(values), operation.dim, [s[operation.dim] for s in shapes], converter)


def _cut(value: _Value, dim: int, sizes: Sequence[int], converter: Any) -> _Values:
    bounds = list(accumulate(sizes, initial=0))
    if bounds[-1] != value.shape[dim]:
        raise _NotFollowedError("its parts have other sizes in the model")
    return {
        pattern: [_Value((*value.shape[:dim], stop - start, *value.shape[dim + 1 :]), boxes)]
        for pattern, (start, stop) in zip(converter.target_patterns, pairwise(bounds), strict=True)
        for boxes in [tuple(_inside(value.boxes, dim, start, stop))]
    }


def _inside(boxes: Sequence[_Box], dim: int, start: int, stop: int) -> Iterator[_Box]:
    """The parts between two positions of a dimension, with positions relative to ``start``."""
    for box in boxes:
        place = box.axes[dim].place
        axis = box.axes[dim].at(slice(bisect_left(place, start), bisect_left(place, stop)))
        if axis.place:
            yield box.having(dim, axis.moved(-start))


def _transposed(operation: Any, values: _Values, converter: Any, shapes: Any) -> _Values:
    """One tensor with two dimensions exchanged; unchanged if it already has the right shape."""
    value, (a, b) = _single(values), (operation.dim0, operation.dim1)
    name = (converter.source_patterns if len(shapes) > 1 else converter.target_patterns)[0]
    if getattr(operation, "check_dims", False) and value.shape == shapes[0]:
        return {name: [value]}
    order = list(range(len(value.shape)))
    order[a], order[b] = order[b], order[a]
    boxes = tuple(replace(box, axes=tuple(box.axes[dim] for dim in order)) for box in value.boxes)
    return {name: [_Value(tuple(value.shape[dim] for dim in order), boxes)]}


def _uninterleaved(operation: Any, values: _Values, converter: Any, shapes: Any) -> _Values:
    """One tensor with its even positions along a dimension before the odd ones."""
    value, dim = _single(values), operation.dim
    half = value.shape[dim] // 2
    if operation.inverse or value.shape[dim] % 2:
        raise _NotFollowedError("transformers interleaves it")
    boxes = []
    for box in value.boxes:
        place = box.axes[dim].place
        for odd in (0, 1):
            axis = box.axes[dim].at(slice((odd - place.start) % 2, None, 2))
            if axis.place and axis.place.step == 2:
                first = odd * half + axis.place.start // 2
                target = range(first, first + len(axis.place))
                boxes.append(box.having(dim, replace(axis, place=target)))
    return {converter.target_patterns[0]: [_Value(value.shape, tuple(boxes))]}


def _common(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The common shape; raises if the shapes differ."""
    if len(set(shapes)) != 1:
        raise _NotFollowedError("its tensors have different shapes")
    return shapes[0]


_OPERATIONS: dict[str, Callable[[Any, _Values, Any, Any], _Values]] = {
    "MergeModulelist": _stacked,
    "Concatenate": _joined,
    "Chunk": _chunked,
    "Split": _split,
    "Transpose": _transposed,
    "Interleave": _uninterleaved,
}
"""The functions that follow the operations of transformers, by the names of their classes."""


def _result(value: _Value) -> Converted:
    """The pieces of a tensor; raises if a part of it is not stored."""
    if sum(prod(len(axis.place) for axis in box.axes) for box in value.boxes) != prod(value.shape):
        raise _NotFollowedError("a part of it is not stored")
    return Converted(value.shape, tuple(_piece(box, value.shape) for box in value.boxes))


def _piece(box: _Box, shape: tuple[int, ...]) -> Piece:
    """The piece of a parameter of the given shape."""
    stored_axes = [(axis.dim, axis.source) for axis in box.axes if axis.dim is not None]
    order = tuple(dim for dim, _ in stored_axes)
    sources = [source for _, source in sorted(stored_axes, key=lambda entry: entry[0])]
    of = tuple(map(_slice, sources))
    part = tuple(_slice(axis.place) if axis.dim is not None else axis.place[0] for axis in box.axes)
    return Piece(
        box.key,
        () if part == tuple(map(_all, shape)) else part,
        () if of == tuple(map(_all, box.stored)) else of,
        () if order == tuple(sorted(order)) else order,
    )


def _all(size: int) -> slice:
    return slice(0, size, 1)


def _slice(places: range) -> slice:
    stop = places[-1] + 1 if places else places.start  # a tensor may be empty
    return slice(places.start, stop, places.step)
