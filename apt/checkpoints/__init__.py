"""Models on disk: how they are found, read, copied, written and verified."""
