"""Safe files: written in one step, never through links, and with checksums."""
