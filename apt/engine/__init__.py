"""A whole run: options, checks before the work, orchestration in memory or streamed."""
