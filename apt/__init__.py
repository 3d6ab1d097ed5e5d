"""APT: one-shot post-training pruning of language models."""

__version__ = "0.1.0"
