"""The parts of pruning that take gradients: row importance and block reconstruction."""
