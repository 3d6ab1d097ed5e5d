"""A model family as the core sees it: how it is traversed, and what flows into its weights.

An adapter answers the questions of `Adapter`; `DecoderAdapter` answers most of them for a decoder
of Linears that is declared by its paths. Adapter packages import everything from here.
"""

from apt.adapter.decoder import DecoderAdapter, Input
from apt.adapter.experts import expert_sites, one_by_one
from apt.adapter.protocol import Adapter
from apt.adapter.recording import passed_on, record_calls, stubbed
from apt.adapter.sites import Call, Effects, Extra, Sink, Site, State
from apt.adapter.weight_tap import WeightTap

__all__ = [
    "Adapter",
    "Call",
    "DecoderAdapter",
    "Effects",
    "Extra",
    "Input",
    "Sink",
    "Site",
    "State",
    "WeightTap",
    "expert_sites",
    "one_by_one",
    "passed_on",
    "record_calls",
    "stubbed",
]
