"""From calibration tokens to activations and their sums: batches, capture, error-aware targets."""
