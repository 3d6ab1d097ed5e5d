"""Patterns: the required zeros of a weight, and the selection of masks.

A pattern answers all questions of other packages about it (`SitePattern`, `Pattern`). So a kind of
pattern is one class. Any package can add a kind through the hook ``apt_patterns``.
"""

from apt.patterns.column_groups import ColumnGroups
from apt.patterns.grids import COLUMNS, Grid, IntegerGrid, Points, ScaleGroup, scales_of
from apt.patterns.kinds import NM, MixedNM, Unstructured, parse_pattern, read
from apt.patterns.protocol import Granularity, Pattern, SitePattern, keeps_all, lowest, meets
from apt.patterns.selection import lowest_k
from apt.patterns.target_form import TargetForm

__all__ = [
    "COLUMNS", "NM", "ColumnGroups", "Granularity", "Grid", "IntegerGrid", "MixedNM", "Pattern",
    "Points", "ScaleGroup", "SitePattern", "TargetForm", "Unstructured", "keeps_all", "lowest",
    "lowest_k", "meets", "parse_pattern", "read", "scales_of",
]  # fmt: skip
