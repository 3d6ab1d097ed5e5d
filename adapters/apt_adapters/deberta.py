"""DeBERTa and its later versions: post-norm blocks that multiply a table of positions."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn

from apt.adapter import Call, Groups, Input, Sink, Site, StackedAdapter, columns, rows
from apt.errors import AptError


class DebertaV2Adapter(StackedAdapter):
    """DeBERTa-v2 and -v3, and mDeBERTa.

    The matrices of queries and keys multiply the tokens, and then the table of relative positions,
    unless other matrices multiply the table; these stay dense.
    """

    stack_paths: ClassVar = {"encoder": "encoder.layer"}
    inputs: ClassVar[tuple[Input, ...]] = (
        Input("attention", ("attention.self.query_proj", "attention.self.key_proj")),
        Input("values", ("attention.self.value_proj",)),
        Input("heads", ("attention.output.dense",), residual=True),
        Input("mlp", ("intermediate.dense",)),
        Input("neurons", ("output.dense",), added_to="mlp"),
    )
    left_dense = ("attention.self.pos_key_proj", "attention.self.pos_query_proj")

    def check(self, config: Any) -> None:
        """Refuse a convolution between the first two blocks, as DeBERTa-v2-xlarge has it."""
        if getattr(config, "conv_kernel_size", 0):
            raise AptError(
                "this DeBERTa has a convolution behind its first block, which APT does not run",
                "choose a model without one, such as DeBERTa-v3",
            )

    def positions(self, config: Any) -> int | None:
        """None: the positions are relative, and texts may be longer than the table."""
        return super().positions(config) if config.position_biased_input else None

    def tables(self, block: nn.Module, call: Call) -> Mapping[str, Tensor]:
        """The table of relative positions, if the matrices of the tokens multiply it."""
        table = _table(block, call.kwargs)
        return {} if table is None else {"attention": table}

    @contextmanager
    def capture(self, block: nn.Module, sites: Sequence[Site], sink: Sink) -> Iterator[None]:
        """Watch the products with the tokens alone."""
        tables = list[Tensor | None]()

        def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            tables[:] = [_table(module, kwargs)]

        def take(site: Site, inputs: Tensor) -> None:
            table = tables[0] if tables else None
            if table is None or inputs.shape != (1, *table.shape) or not inputs[0].equal(table):
                sink(site, inputs)

        hook = block.register_forward_pre_hook(note, with_kwargs=True)
        try:
            with super().capture(block, sites, take):
                yield
        finally:
            hook.remove()

    def groups(self, block: nn.Module, config: Any) -> list[Groups]:
        """The channels of the MLP. Heads stay: the width of all heads must be the hidden size."""
        parts = (*rows(block, "intermediate.dense"), columns("output.dense"))
        sizes = {"intermediate_size": int}
        return [Groups("channels", config.intermediate_size, ("output.dense",), parts, sizes)]


class DebertaAdapter(DebertaV2Adapter):
    """DeBERTa: one matrix for queries, keys and values, and others for the table of positions."""

    inputs = (
        Input("attention", ("attention.self.in_proj",)),
        Input("heads", ("attention.output.dense",), residual=True),
        Input("mlp", ("intermediate.dense",)),
        Input("neurons", ("output.dense",), added_to="mlp"),
    )
    left_dense = ("attention.self.pos_proj", "attention.self.pos_q_proj")


def _table(block: nn.Module, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The rows (positions, hidden) of the table that the attention of a block multiplies."""
    attention: Any = block.get_submodule("attention.self")
    table = kwargs.get("rel_embeddings")
    if table is None or not getattr(attention, "share_att_key", False):
        return None
    rows_of_table: Tensor = table[: 2 * attention.pos_ebd_size]
    return rows_of_table
