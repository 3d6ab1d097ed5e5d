"""The loop over blocks: capture, solve, write back, tune, propagate."""
