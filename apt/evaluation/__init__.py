"""Metrics of a model on text, in memory or block by block."""

from apt.evaluation.logits import kept_states
from apt.evaluation.metrics import accuracy, agreement, divergence, perplexity

__all__ = ["accuracy", "agreement", "divergence", "kept_states", "perplexity"]
