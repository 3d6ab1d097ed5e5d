"""Checks of adapters, for the test kit `apt.testing` and the adapter `auto`."""
