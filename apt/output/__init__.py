"""The output directory: where it may be, how it appears whole, and the record in it."""
