"""The parts of pruning that use gradients: row importance and block tuning."""
