"""Calibration tokens to activations and sums: batches, capture, error-aware targets."""
