"""Blocks of zeros for APT: the hook. The code is in `apt_block_pattern`, which imports torch."""

from apt.hookspecs import PatternSpec, hookimpl

APT_API = 1


@hookimpl
def apt_patterns() -> list[PatternSpec]:
    """Blocks."""
    return [
        PatternSpec(
            "block",
            "a share of the blocks of outputs by inputs: block:16x16@0.5",
            "apt_block_pattern:Blocks",
            "block:16x16@0.5",
        )
    ]
