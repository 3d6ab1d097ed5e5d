"""T5, mT5 and UMT5: an encoder and a decoder of pre-norm blocks, with relative positions."""

from typing import Any, ClassVar

from apt.adapter import Input, StackedAdapter

_MLPS = ("layer.1.DenseReluDense", "layer.2.DenseReluDense")  # of the encoder, and of the decoder


class T5Adapter(StackedAdapter):
    """T5, Flan-T5, mT5, UMT5 and LongT5, with a plain or a gated MLP; also their encoders alone."""

    stack_paths: ClassVar = {"encoder": "encoder.block", "decoder": "decoder.block"}
    inputs = (
        Input("attention", tuple(f"layer.0.SelfAttention.{name}" for name in "qkv")),
        Input("heads", ("layer.0.SelfAttention.o",), residual=True),
        Input("cross attention", ("layer.1.EncDecAttention.q",)),
        Input("encoder", ("layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"), crossing=True),
        Input("cross heads", ("layer.1.EncDecAttention.o",), residual=True),
        Input("mlp", tuple(f"{mlp}.{name}" for mlp in _MLPS for name in ("wi", "wi_0", "wi_1"))),
        Input("neurons", tuple(f"{mlp}.wo" for mlp in _MLPS), residual=True),
    )

    def positions(self, config: Any) -> int | None:
        """None: positions are relative."""
        return None
