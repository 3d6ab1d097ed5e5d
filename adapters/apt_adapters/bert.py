"""BERT and encoders built like it, DistilBERT, and MPNet: post-norm blocks."""

from typing import Any, ClassVar

from torch import nn

from apt.adapter import Groups, Input, StackedAdapter, columns, rows

_BEHIND_PADDING = ("camembert", "data2vec-text", "mpnet", "roberta", "xlm-roberta")


class BertAdapter(StackedAdapter):
    """BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA and models with the same modules.

    The second sublayer adds its product to a normalised stream, so only the first is residual.
    """

    stack_paths: ClassVar = {"encoder": "encoder.layer"}
    inputs = (
        Input("attention", ("attention.self.query", "attention.self.key", "attention.self.value")),
        Input("heads", ("attention.output.dense",), residual=True),
        Input("mlp", ("intermediate.dense",)),
        Input("neurons", ("output.dense",), added_to="mlp"),
    )

    def positions(self, config: Any) -> int | None:
        """The positions of tokens: those of RoBERTa's table begin behind that of the padding."""
        positions = super().positions(config)
        if positions is None or config.model_type not in _BEHIND_PADDING:
            return positions
        return positions - 1 - (config.pad_token_id or 0)

    def groups(self, block: nn.Module, config: Any) -> list[Groups]:
        """The channels of the MLP. Heads stay: the width of all heads must be the hidden size."""
        parts = (*rows(block, "intermediate.dense"), columns("output.dense"))
        readers, sizes = ("output.dense",), {"intermediate_size": int}
        return [Groups("channels", config.intermediate_size, readers, parts, sizes)]


class MpnetAdapter(BertAdapter):
    """MPNet: BERT with other names, and with relative positions for all blocks."""

    inputs = (
        Input("attention", ("attention.attn.q", "attention.attn.k", "attention.attn.v")),
        Input("heads", ("attention.attn.o",), residual=True),
        Input("mlp", ("intermediate.dense",)),
        Input("neurons", ("output.dense",), added_to="mlp"),
    )


class DistilBertAdapter(StackedAdapter):
    """DistilBERT."""

    stack_paths: ClassVar = {"encoder": "transformer.layer"}
    inputs = (
        Input("attention", ("attention.q_lin", "attention.k_lin", "attention.v_lin")),
        Input("heads", ("attention.out_lin",), residual=True),
        Input("mlp", ("ffn.lin1",)),
        Input("neurons", ("ffn.lin2",), added_to="mlp"),
    )

    def groups(self, block: nn.Module, config: Any) -> list[Groups]:
        """The channels of the MLP. Heads stay: the width of all heads must be the hidden size."""
        parts = (*rows(block, "ffn.lin1"), columns("ffn.lin2"))
        return [Groups("channels", config.hidden_dim, ("ffn.lin2",), parts, {"hidden_dim": int})]


class ModernBertAdapter(StackedAdapter):
    """ModernBERT: pre-norm blocks with one matrix for q, k and v, and a gated MLP."""

    stack_paths: ClassVar = {"encoder": "layers"}
    inputs = (
        Input("attention", ("attn.Wqkv",)),
        Input("heads", ("attn.Wo",), residual=True),
        Input("mlp", ("mlp.Wi",)),
        Input("neurons", ("mlp.Wo",), residual=True),
    )
