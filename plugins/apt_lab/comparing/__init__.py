"""Comparisons: one model with several methods and patterns, measured in the same way."""
