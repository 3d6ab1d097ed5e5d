"""Packed models in memory: `load` opens a directory that ``apt-prune pack`` wrote.

Importing this package registers the packed format with transformers, so that ``from_pretrained``,
pipelines and other tools open such directories as well.
"""

from apt.runtime.linear import PackedLinear
from apt.runtime.load import load
from apt.runtime.quantizer import PackedConfig, PackedQuantizer

__all__ = ["PackedConfig", "PackedLinear", "PackedQuantizer", "load"]
