"""Reports for readers: one self-contained HTML page about one or several pruned models."""
