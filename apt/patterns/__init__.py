"""Patterns: the zeros that a weight must have, and the selection of masks that have them.

A pattern answers all questions that the rest of APT has about it (`SitePattern`, `Pattern`). So a
kind of pattern is one class, and comes from any package through the hook ``apt_patterns``.
"""

from apt.patterns.column_groups import ColumnGroups
from apt.patterns.kinds import NM, MixedNM, Unstructured
from apt.patterns.protocol import Granularity, Pattern, SitePattern
from apt.patterns.reading import keeps_all, lowest, meets, parse_pattern, read
from apt.patterns.selection import lowest_k
from apt.patterns.target_form import COLUMNS, IntegerGrid, ScaleGroup, TargetForm

__all__ = [
    "COLUMNS", "NM", "ColumnGroups", "Granularity", "IntegerGrid", "MixedNM", "Pattern",
    "ScaleGroup", "SitePattern", "TargetForm", "Unstructured", "keeps_all", "lowest", "lowest_k",
    "meets", "parse_pattern", "read",
]  # fmt: skip
