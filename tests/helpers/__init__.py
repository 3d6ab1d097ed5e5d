"""Helpers that tests of several packages share."""

from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the repository
TEXT = Path(__file__).with_name("text.txt")  # for runs where any text will do
