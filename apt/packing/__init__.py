"""Packed copies of checkpoints, and dense copies of packed ones."""
