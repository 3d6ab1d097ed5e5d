"""Files that are written with care: in one step, not through links, and with checksums."""
