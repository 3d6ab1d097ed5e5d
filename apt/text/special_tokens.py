"""Special tokens: the BOS token, and the tokens that are never drawn at random."""

from collections.abc import Iterator
from typing import Any


def bos_of(tokenizer: Any) -> int | None:
    """The token that a tokenizer adds at the beginning of every text; None if it adds none.

    It is determined by a test, since a tokenizer may define a BOS token and not add it.
    """
    ids, bos = tokenizer("x")["input_ids"], tokenizer.bos_token_id
    return bos if bos is not None and ids[:1] == [bos] else None


def special_ids(tokenizer: Any) -> tuple[int, ...]:
    """All special tokens of a tokenizer, in order."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {token for token, content in added.items() if content.special}
    return tuple(sorted(special | set(tokenizer.all_special_ids)))


def named_ids(model: Any) -> tuple[int, ...]:
    """The tokens that a model's configurations name, ``pad_token_id`` for instance, in order."""
    configs = (getattr(model, name, None) for name in ("config", "generation_config"))
    return tuple(sorted({token for config in configs if config for token in _named(config)}))


def _named(config: Any) -> Iterator[int]:
    for name, value in vars(config).items():
        if name.endswith("_token_id"):
            yield from (t for t in (value if isinstance(value, list) else [value]) if t is not None)
