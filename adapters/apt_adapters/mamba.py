"""Mamba, FalconMamba and Mamba2.

``dt_proj`` is never called as a module: its weight is multiplied directly, and with fused kernels
other projections are as well. The weight tap, which is every adapter's default capture, sees these
products; nothing here depends on which path the forward takes.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

from torch import nn

from apt.adapter import DecoderAdapter, Effects, Extra, Input
from apt_adapters.effects import effects_of, extras_of
from apt_adapters.processor import on_processor


class StateSpaceAdapter(DecoderAdapter):
    """A family of which some blocks, or all, have a state-space mixer.

    Attributes:
        mixer: the mixer's name in such a block.
    """

    mixer: ClassVar[str] = "mixer"

    def running(self, model: nn.Module) -> AbstractContextManager[None]:
        """On a processor, with functions that are made for it."""
        return on_processor(model)

    def extras(self, block: nn.Module) -> list[Extra]:
        """The mixer's convolution, decays and skip."""
        return extras_of(self.mixer, block)

    def effects(
        self, block: nn.Module, extras: Sequence[Extra], sink: Effects
    ) -> AbstractContextManager[None]:
        """Watch the mixer's functions, where there is one."""
        mixer = getattr(block, self.mixer, None)
        return nullcontext() if mixer is None else effects_of(mixer, extras, sink)


class MambaAdapter(StateSpaceAdapter):
    """``MambaForCausalLM`` and ``FalconMambaForCausalLM``."""

    blocks_path = "backbone.layers"
    inputs: ClassVar[tuple[Input, ...]] = (
        Input("mixer", ("mixer.in_proj",)),
        Input("convolved", ("mixer.x_proj",)),
        Input("time_step", ("mixer.dt_proj",)),
        Input("scanned", ("mixer.out_proj",), residual=True),
    )


class Mamba2Adapter(MambaAdapter):
    """``Mamba2ForCausalLM``; B, C and the time step come out of ``in_proj``."""

    inputs = (
        Input("mixer", ("mixer.in_proj",)),
        Input("scanned", ("mixer.out_proj",), residual=True),
    )
