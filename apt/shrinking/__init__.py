"""Choices of what a smaller model lacks: sizes, groups and blocks, before any weight is solved."""
