"""The interface between the core and a model family: its blocks, its sites and their inputs.

An adapter implements the protocol `Adapter`. `DecoderAdapter` implements most of it for a decoder
of Linears whose paths are declared. Adapter packages import everything from this package.
"""

from apt.adapter.decoder import DecoderAdapter, Input
from apt.adapter.experts import Experts, one_by_one
from apt.adapter.groups import Groups, Part, attention_heads, columns, mlp_channels, rows
from apt.adapter.permutations import Permutable, attention_values, permutable_channels
from apt.adapter.protocol import Adapter
from apt.adapter.recording import passed_state, record_calls, stub_output, stubbed
from apt.adapter.routing import Routing, Unrouted, routings
from apt.adapter.samples import ModelInputs, Sample, Samples
from apt.adapter.sites import Call, Effects, Extra, Sink, Site, State
from apt.adapter.stacked import Stack, StackedAdapter
from apt.adapter.weight_tap import WeightTap

__all__ = [
    "Adapter", "Call", "DecoderAdapter", "Effects", "Experts", "Extra", "Groups", "Input",
    "ModelInputs", "Part", "Permutable", "Routing", "Sample", "Samples", "Sink", "Site", "Stack",
    "StackedAdapter", "State", "Unrouted", "WeightTap", "attention_heads", "attention_values",
    "columns", "mlp_channels", "one_by_one", "passed_state", "permutable_channels",
    "record_calls", "routings", "rows", "stub_output", "stubbed",
]  # fmt: skip
