"""Mamba, FalconMamba and Mamba2.

``dt_proj`` is never called as a module: its weight is multiplied directly. With fused kernels, so
are other projections. The weight tap, the default capture of adapters, observes these products, so
this module does not depend on the path of the forward.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

from torch import nn

from apt.adapter import DecoderAdapter, Effects, Extra, Groups, Input, Part, columns, rows
from apt_adapters.effects import effects_of, extras_of
from apt_adapters.processor import on_processor


class StateSpaceAdapter(DecoderAdapter):
    """A family with a state-space mixer in some or all of its blocks.

    Attributes:
        mixer: the name of the mixer in a block.
    """

    mixer: ClassVar[str] = "mixer"

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """On a CPU, replace the kernels by functions for the CPU."""
        with super().running(model), on_processor(model):
            yield

    def extras(self, block: nn.Module) -> list[Extra]:
        """The convolution, the decays and the skip weights of the mixer."""
        return extras_of(self.mixer, block)

    def effects(
        self, block: nn.Module, extras: Sequence[Extra], sink: Effects
    ) -> AbstractContextManager[None]:
        """Report the effects of the mixer's extras; a block without a mixer reports none."""
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

    def groups(self, block: nn.Module, config: Any) -> list[Groups]:
        """The channels of the mixer, and the states of its scan.

        FalconMamba normalises B and C over all states, so that no state can be removed.
        """
        count = config.intermediate_size
        parts = (
            *rows(block, "mixer.in_proj"),
            *rows(block, "mixer.in_proj", start=count),
            *rows(block, "mixer.conv1d"),
            columns("mixer.x_proj"),
            *rows(block, "mixer.dt_proj"),
            Part("mixer.A_log"),
            Part("mixer.D"),
            columns("mixer.out_proj"),
        )
        readers = ("mixer.x_proj", "mixer.out_proj")
        channels = Groups("channels", count, readers, parts, {"intermediate_size": int})
        is_normalised = config.model_type == "falcon_mamba"
        return [channels] if is_normalised else [channels, _states(config)]


def _states(config: Any) -> Groups:
    """The states: rows of x_proj for B and C, and columns of A."""
    count, rank = config.state_size, config.time_step_rank
    c_rows = Part("mixer.x_proj.weight", start=rank + count)
    parts = (Part("mixer.x_proj.weight", start=rank), c_rows, Part("mixer.A_log", dim=1))
    return Groups("states", count, (), parts, {"state_size": int}, outputs=(c_rows,))


class Mamba2Adapter(MambaAdapter):
    """``Mamba2ForCausalLM``; B, C and the time step are outputs of ``in_proj``."""

    inputs = (
        Input("mixer", ("mixer.in_proj",)),
        Input("scanned", ("mixer.out_proj",), residual=True),
    )

    def groups(self, block: nn.Module, config: Any) -> list[Groups]:
        """The states of the scan. ``expand`` is a whole number, which fixes the number of heads.

        ``in_proj`` has rows for the gate, x, B, C and the time step. The convolution has x, B and
        C. Each of the ``n_groups`` groups of heads has a B and a C of all states.
        """
        count, groups = config.state_size, config.n_groups
        width = config.num_heads * config.head_dim
        parts, c_channels = list[Part](), list[Part]()
        for group in range(groups):
            first = width + group * count  # within x, B and C
            second = first + groups * count
            parts += [
                *rows(block, "mixer.in_proj", start=width + first),
                *rows(block, "mixer.in_proj", start=width + second),
                *rows(block, "mixer.conv1d", start=first),
                *rows(block, "mixer.conv1d", start=second),
            ]
            c_channels += [*rows(block, "mixer.conv1d", start=second)]
        fields = {"state_size": int}
        return [Groups("states", count, (), tuple(parts), fields, outputs=tuple(c_channels))]
