"""Metrics of a model on text, in memory or block by block."""

from apt.evaluation.metrics import accuracy, perplexity

__all__ = ["accuracy", "perplexity"]
