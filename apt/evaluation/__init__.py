"""Metrics of a model on text, in memory or block by block."""

from apt.evaluation.metrics import accuracy, agreement, divergence, perplexity

__all__ = ["accuracy", "agreement", "divergence", "perplexity"]
