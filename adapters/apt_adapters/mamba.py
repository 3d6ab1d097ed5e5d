"""Mamba and FalconMamba.

``dt_proj`` is never called as a module: its weight is multiplied directly, and with fused kernels
other projections are as well. The weight tap, which is every adapter's default capture, sees these
products; nothing here depends on which path the forward takes.
"""

from apt.adapter import DecoderAdapter, Input


class MambaAdapter(DecoderAdapter):
    """``MambaForCausalLM`` and ``FalconMambaForCausalLM``."""

    blocks_path = "backbone.layers"
    inputs = (
        Input("mixer", ("mixer.in_proj",)),
        Input("convolved", ("mixer.x_proj",)),
        Input("time_step", ("mixer.dt_proj",)),
        Input("scanned", ("mixer.out_proj",), residual=True),
    )
