"""The commands: each reads its options, calls a room of this package, and prints."""
