"""The tokenizer of a checkpoint as entries of GGUF.

llama.cpp has its own code to cut text into words, and the entry ``tokenizer.ggml.pre`` names the
variant. llama.cpp's converter recognises a tokenizer by the tokens of a sample text. This module
compares the steps of the tokenizer with those of llama.cpp's variants. Tokenizers of SentencePiece
do not cut text into words.
"""

import json
from collections.abc import Container, Mapping
from typing import Any

import gguf
from gguf import TokenType

from apt.errors import AptError
from apt.extending import Exportable
from apt_plugins.gguf_files.layouts import CONVERTER
from apt_plugins.gguf_files.sentencepiece import BYTES, SPACE, Pieces, pieces_of

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}|"
    r" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES, _WORDS_AND_BYTES = ("ByteLevel", False, False), ("ByteLevel", False, True)
_NAMES_OF_STEPS = {
    (_WORDS_AND_BYTES,): "gpt-2",
    (("Digits", True), _WORDS_AND_BYTES): "smollm",
    (("Split", _WORDS.format(digits="{1,3}")), _BYTES): "llama-bpe",
    (("Split", _WORDS.format(digits="")), _BYTES): "qwen2",
}
"""The names that llama.cpp has for sequences of steps."""

_LOOKS_UP_WORDS = ("llama-bpe",)  # each word is looked up before its bytes are merged
_IGNORED_NORMALIZERS = ("NFC",)  # llama.cpp's converter ignores it too


def add_vocabulary(writer: gguf.GGUFWriter, model: Exportable) -> None:
    """Add tokens, merges or scores, special tokens and the chat template.

    Raises:
        AptError: llama.cpp may make other tokens.
    """
    tokenizer = model.tokenizer()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    record = json.loads(backend.to_str()) if backend is not None else {}
    if (name := name_of_steps(record)) is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        _add_tokens(writer, tokenizer, model.config.vocab_size)
        pairs = record["model"]["merges"]
        writer.add_token_merges([p if isinstance(p, str) else " ".join(p) for p in pairs])
    elif (pieces := pieces_of(record, tokenizer.get_added_vocab())) is not None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        _add_tokens(writer, tokenizer, model.config.vocab_size, pieces)
        writer.add_add_space_prefix(pieces.prefix)
    else:
        message = f"the tokenizer of {model.name} is none that is known here"
        raise AptError(message, f"{CONVERTER} {model.directory}")
    _add_special(writer, tokenizer, model)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def name_of_steps(record: dict[str, Any]) -> str | None:
    """The name of a tokenizer's steps in llama.cpp; None for steps without a name."""
    model, normalizer = record.get("model", {}), record.get("normalizer")
    pre_tokenizer = record.get("pre_tokenizer") or {}
    steps = (
        pre_tokenizer.get("pretokenizers", [])
        if pre_tokenizer.get("type") == "Sequence"
        else [pre_tokenizer]
    )
    name = _NAMES_OF_STEPS.get(tuple(map(_step_key, steps)))
    supported = (
        model.get("type") == "BPE"
        and not any(model.get(key) for key in ("byte_fallback", "dropout", "unk_token"))
        and bool(model.get("ignore_merges")) == (name in _LOOKS_UP_WORDS)
        and (normalizer is None or normalizer.get("type") in _IGNORED_NORMALIZERS)
    )
    return name if supported else None


def _step_key(step: dict[str, Any]) -> tuple[Any, ...]:
    """The fields of a step on which the positions of its cuts depend."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return kind, step.get("add_prefix_space", True), step.get("use_regex", True)
    if kind == "Digits":
        return kind, step.get("individual_digits")
    isolated = step.get("behavior") == "Isolated" and not step.get("invert")
    return (kind, step.get("pattern", {}).get("Regex")) if isolated else (kind,)


def _add_tokens(
    writer: gguf.GGUFWriter, tokenizer: Any, count: int, pieces: Pieces | None = None
) -> None:
    """Add the list of tokens, with their kinds and the scores of ``pieces``.

    An id without a token gets a token of the type UNUSED.
    """
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens = [
        (texts.get(number, f"[PAD{number}]"), _token_type(number, texts, added))
        for number in range(count)
    ]
    if pieces is not None:
        tokens = [_sentencepiece_token(*token, tokenizer.unk_token) for token in tokens]
        writer.add_token_scores([pieces.score(text) for text, _ in tokens])
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])


def _token_type(number: int, numbers: Container[int], added: Mapping[int, Any]) -> TokenType:
    """The type of a token; ``numbers`` has the ids of the tokens that have a text."""
    if number not in numbers:
        return TokenType.UNUSED
    if number not in added:
        return TokenType.NORMAL
    return TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED


def _sentencepiece_token(text: str, kind: TokenType, unknown: str | None) -> tuple[str, TokenType]:
    """The text and the type of a token of SentencePiece, which has two more types."""
    if text == unknown:
        return text, TokenType.UNKNOWN
    if text in BYTES:
        return text, TokenType.BYTE
    added = kind == TokenType.USER_DEFINED  # found in a text before its spaces are marked
    return text.replace(SPACE, " ") if added else text, kind


def _add_special(writer: gguf.GGUFWriter, tokenizer: Any, model: Exportable) -> None:
    """Add the special tokens, and the entries for the tokens added at the ends of a text."""
    ids = {
        kind: _configured_id(model.config, kind)
        if tokenizer_id is None
        else tokenizer_id  # the first token is number 0
        for kind in ("bos", "eos", "unk", "pad")
        for tokenizer_id in [getattr(tokenizer, f"{kind}_token_id", None)]
    }
    for kind, number in ids.items():
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    begins, ends = ([ids[kind]] if ids[kind] is not None else [] for kind in ("bos", "eos"))
    encoded = tokenizer("a")["input_ids"]
    for bos, eos in ((False, False), (True, False), (False, True), (True, True)):
        if encoded == begins * bos + plain + ends * eos:
            writer.add_add_bos_token(bos)
            writer.add_add_eos_token(eos)
            return
    message = f"the tokenizer of {model.name} adds other tokens than the first and the last"
    raise AptError(message, f"{CONVERTER} {model.directory}")


def _configured_id(config: Any, kind: str) -> int | None:
    """The id of a special token by the configuration; None for several tokens of that kind."""
    number = getattr(config, f"{kind}_token_id", None)
    return number if isinstance(number, int) else None
