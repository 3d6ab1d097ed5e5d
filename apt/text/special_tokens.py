"""Special tokens: the BOS token, and the tokens that are never drawn at random."""

from typing import Any

from apt.errors import AptError


def check_tokenizer(tokenizer: Any) -> None:
    """Raise `AptError` if an object is no tokenizer of transformers."""
    if not callable(tokenizer) or not hasattr(tokenizer, "bos_token_id"):
        message = f"tokenizer is of the class {type(tokenizer).__name__}"
        raise AptError(message, "give one of transformers", ("tokenizer",))


def bos_of(tokenizer: Any) -> int | None:
    """The token that a tokenizer adds at the beginning of every text; None if it adds none.

    Raises:
        AptError: ``tokenizer`` is no tokenizer of transformers.
    """
    check_tokenizer(tokenizer)
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
    entries = ((c, name) for c in configs if c for name in vars(c) if name.endswith("_token_id"))
    return tuple(sorted({token for entry in entries for token in tokens_of(*entry)}))


def tokens_of(config: Any, name: str) -> list[int]:
    """The tokens of an entry of a configuration; raises `AptError` for other values."""
    value = getattr(config, name, None)
    tokens = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) for token in tokens):
        message = f"{name} of the model's configuration is {value!r}, which is no token"
        raise AptError(message, "correct its config.json or generation_config.json")
    return tokens
