"""The sites of a block, found by observing every operator while the block runs."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from apt.adapter import Site
from apt.conformance.oracle import PRODUCTS, Stream, is_stack, slices_of, storage_of, used_rows
from apt.errors import AptError

HINT = "it needs an adapter of its own, see docs/adapters.md"
_MOST_LEFT = 0.1  # the share of a block's weights in matrices that are not read as sites
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_Key = tuple[str, int | None]  # the path of a parameter, and the index of an expert in a stack


@dataclass
class _Use:
    """The products with one matrix.

    Attributes:
        inputs: the storages of the inputs.
        rows: the number of rows of each input.
        transposed: True if the matrix is stored (in, out).
    """

    inputs: list[tuple[Any, ...]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    transposed: bool = False


class Trace(Stream[_Key]):  # type: ignore[no-untyped-call]
    """Records the inputs of a block's matrices, and the products added to the residual stream."""

    def __init__(self, block: nn.Module, stream: Tensor) -> None:
        self._tensors = matrices = dict(matrices_of(block))
        super().__init__(matrices, stream)
        self._matrices = {storage_of(p): (key, p) for key, p in matrices.items()}
        self._lists = {n for n, m in block.named_modules() if isinstance(m, nn.ModuleList)}
        self._families = _families(matrices, self._lists)
        self._uses: dict[_Key, _Use] = {}
        self._read: set[int] = set()  # the storages of all operands

    def unread(self, block: nn.Module) -> set[str]:
        """The parameters that no operator read, such as an unused cross attention.

        Members of a ``ModuleList`` are left out: they may be experts without a token in this run.
        """
        return {
            name
            for name, parameter in block.named_parameters()
            if parameter.untyped_storage().data_ptr() not in self._read
            and role_of(name, self._lists) == name
        }

    def sites(
        self, tokens: int, selecting: Collection[_Key], earlier: Sequence[int] = ()
    ) -> list[Site]:
        """The sites: the matrices that multiply all ``tokens``, once or several times.

        The matrices of experts are sites if together they multiply every token equally often.

        Args:
            tokens: the number of tokens in the run.
            selecting: the matrices whose products decide a selection. In a block with experts they
                are routers, and not sites.
            earlier: the numbers of tokens of the earlier stacks. A matrix that multiplies all of
                one of them reads the output of the last such stack.
        """
        stacks = {rows: index for index, rows in enumerate(earlier) if rows != tokens}
        all_rows = {key: set(use.rows) for key, use in self._uses.items()}
        crossing = {
            key: stacks[min(rows)]
            for key, rows in all_rows.items()
            if len(rows) == 1 and rows <= stacks.keys()
        }
        complete = {key for key, rows in all_rows.items() if rows == {tokens}} | crossing.keys()
        routed = {
            key
            for key in self._uses
            if not complete.issuperset(self._families[key])
            and self._share_out(self._families[key], tokens)
        }
        names: dict[tuple[Any, ...], str] = {}  # of the inputs
        orders: dict[str, int] = {}
        site_of: dict[_Key, Site] = {}
        for key, use in self._uses.items():
            if key in site_of or key not in complete | routed:
                continue  # it multiplies other values, a table of positions for instance
            if (routed and key in selecting) or self._gates(key, routed, bool(selecting)):
                continue
            name = names.setdefault(use.inputs[0], _short(key))
            order = orders.setdefault(name, len(orders))
            if key in routed:
                site_of |= _expert_sites(self._families[key], order, use)
            else:
                site_of[key] = Site(
                    _short(key), key[0], name, order, key in self.added, use.transposed, key[1],
                    calls=len(use.rows), crossing=key in crossing, stack=crossing.get(key, -1),
                )  # fmt: skip
        return list(site_of.values())

    def _share_out(self, members: Sequence[_Key], tokens: int) -> bool:
        """True if several matrices together multiply every token equally often."""
        rows = sum(sum(self._uses[key].rows) for key in members if key in self._uses)
        return len(members) > 1 and rows > 0 and rows % tokens == 0

    def _gates(self, key: _Key, routed: Collection[_Key], router: bool) -> bool:
        """True for the weight of a gate beside experts, which has one output.

        If no selection showed the router, a matrix with one output for each expert is the router.
        """
        shape = self._tensors[key].shape
        outputs = shape[1] if self._uses[key].transposed else shape[0]
        return key not in routed and any(
            (outputs == 1 or (outputs == len(self._families[other]) and not router))
            and key[0].startswith(self._around(other))
            for other in routed
        )

    def _around(self, key: _Key) -> str:
        """The prefix of the paths of modules beside the experts that own a matrix."""
        experts = role_of(key[0], self._lists).partition(".*")[0]
        if key[1] is not None:
            experts = experts.rpartition(".")[0]
        return f"{experts.rpartition('.')[0]}.".lstrip(".")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the operator; if it is a product, record its factors."""
        result = super().__torch_dispatch__(func, types, args, kwargs)
        operands = (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        self._read.update(operand.untyped_storage().data_ptr() for operand in operands)
        if func in PRODUCTS:
            left, right = (args[place] for place in PRODUCTS[func])
            self._use(right, left, turned=False)
            self._use(left, right, turned=True)
        return result

    def _use(self, factor: Tensor, other: Tensor, *, turned: bool) -> None:
        if storage_of(factor) not in self._matrices:
            return
        if turned:
            factor, other = factor.transpose(-1, -2), other.transpose(-1, -2)  # as in X Wᵀ
        for weight, inputs in slices_of(factor, other):
            key, matrix = self._matrices.get(storage_of(weight), (None, None))
            if key is None or matrix is None or weight.numel() != matrix.numel():
                continue
            use = self._uses.setdefault(key, _Use())
            use.inputs.append((*storage_of(inputs), inputs.numel()))
            use.rows.append(len(used_rows(inputs, is_stack(factor))))
            use.transposed = weight.stride(-1) == 1 and weight.shape[-1] > 1


def matrices_of(block: nn.Module) -> Iterator[tuple[_Key, Tensor]]:
    """The matrices of a block; the slices of stacked experts are separate matrices."""
    for name, parameter in block.named_parameters():
        if parameter.ndim == 2:
            yield (name, None), parameter
        elif parameter.ndim == 3 and not _is_convolution(block, name):
            for expert, weight in enumerate(parameter):
                yield (name, expert), weight


def _families(matrices: Collection[_Key], lists: Collection[str]) -> dict[_Key, list[_Key]]:
    """For each matrix, all matrices in the same role.

    The slices of a stack have one role, and so have the weights of one path in the members of a
    ``ModuleList``. Any other matrix is alone in its role.
    """
    families: dict[str, list[_Key]] = {}
    for key in matrices:
        families.setdefault(role_of(key[0], lists), []).append(key)
    return {key: members for members in families.values() for key in members}


def role_of(parameter: str, lists: Collection[str]) -> str:
    """The path of a parameter, without the index in the innermost ``ModuleList``."""
    names = parameter.split(".")
    for place in range(len(names) - 1, 0, -1):
        if ".".join(names[:place]) in lists:
            return ".".join([*names[:place], "*", *names[place + 1 :]])
    return parameter


def _expert_sites(members: Sequence[_Key], order: int, use: _Use) -> dict[_Key, Site]:
    """The routed sites of matrices in the same role; ``use`` is the use of one of them."""
    return {
        (parameter, expert): Site(
            _short((parameter, expert)), parameter, f"input {order} of {index}", order,
            transposed=use.transposed, expert=expert, routed=True,
        )
        for index, (parameter, expert) in enumerate(members)
    }  # fmt: skip


def _short(key: _Key) -> str:
    """The name of a site."""
    name = key[0].removesuffix(".weight")
    return name if key[1] is None else f"{name}.{key[1]}"


def assert_most(
    name: str,
    block: nn.Module,
    sites: list[Site],
    unread: Collection[str],
    *,
    convolutions: bool = False,
) -> None:
    """Raise if many weights of a block are not sites; weights that no operator reads may be.

    Args:
        convolutions: True if convolutions and tables may be any part of the block.
    """
    site_parameters = {site.parameter for site in sites}
    sizes = {n: p.numel() for n, p in block.named_parameters() if p.ndim > 1 and n not in unread}
    unread_sizes = {n: size for n, size in sizes.items() if n not in site_parameters}
    matrices = sum(size for n, size in unread_sizes.items() if _is_matrix(block, n))
    total = sum(sizes.values())
    if (
        not site_parameters
        or matrices > _MOST_LEFT * total
        or (sum(unread_sizes.values()) > total / 2 and not convolutions)
    ):
        largest = max(unread_sizes, key=lambda n: unread_sizes[n], default="a matrix")
        raise AptError(
            f"adapter auto found no input of {name}.{largest}, a large part of the block", HINT
        )


def _is_matrix(block: nn.Module, name: str) -> bool:
    """True for the weight of a Linear and for stacked matrices; False for a convolution."""
    owner = block.get_submodule(name.rpartition(".")[0])
    stacked = block.get_parameter(name).ndim > 2 and not _is_convolution(block, name)
    return stacked or isinstance(owner, nn.Linear)


def _is_convolution(block: nn.Module, name: str) -> bool:
    return isinstance(block.get_submodule(name.rpartition(".")[0]), _CONVOLUTIONS)
