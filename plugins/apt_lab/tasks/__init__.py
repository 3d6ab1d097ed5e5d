"""Downstream tasks, answered through lm-evaluation-harness."""
