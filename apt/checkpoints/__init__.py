"""Models on disk: reading, copying, writing and verification."""
