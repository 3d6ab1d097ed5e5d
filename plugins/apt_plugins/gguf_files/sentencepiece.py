"""Tokenizers of SentencePiece: llama.cpp stores scores of tokens, transformers stores merges.

transformers joins the pair of pieces that comes first in the list of merges. llama.cpp joins any
two pieces whose joined text is a token: the token with the highest score first, and the leftmost
pair among equal scores. Both make the same tokens if the list of merges has all pairs of each
token, one token after the other. Runs of one character, for example of spaces, often have the same
score. Their merges must be sorted by the lengths of the two pieces, the longest first. Then
transformers also joins from the left.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Pair = Sequence[str]
SPACE = "▁"
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_CUT_AT_SPACES = {
    "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False
}  # fmt: skip
_PREFIXES = {"always": True, "first": True, "never": False}
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
"""The tokens of single bytes, for characters without a token."""


@dataclass(frozen=True)
class Pieces:
    """A tokenizer in the form of llama.cpp.

    Attributes:
        ranks: the rank of each token in the order in which tokens are joined from pieces.
        prefix: True if a space is put before a text.
    """

    ranks: Mapping[str, int]
    prefix: bool

    def score(self, token: str) -> float:
        """The score of a token; tokens that are not joined from pieces have the lowest score."""
        return -float(self.ranks.get(token, len(self.ranks)))


def pieces_of(record: dict[str, Any], added: Collection[str]) -> Pieces | None:
    """The pieces of a tokenizer; None if llama.cpp would make other tokens.

    Args:
        record: the content of ``tokenizer.json``.
        added: the tokens that are split off before a text is cut into pieces.
    """
    model, prefix = record.get("model", {}), _prefix(record)
    vocabulary = model.get("vocab", {})
    if prefix is None or model.get("type") != "BPE" or not model.get("byte_fallback"):
        return None
    if any(model.get(key) for key in ("dropout", "ignore_merges", "continuing_subword_prefix")):
        return None
    if not vocabulary.keys() >= BYTES:
        return None
    learned = vocabulary.keys() - BYTES - set(added)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    merges = [pair for pair in merges if "".join(pair) in learned]
    joined = {tuple(pair) for pair in merges}
    if any(pair not in joined for token in learned for pair in _pairs_of(token, learned)):
        return None
    ranks = {}
    for rank, group in enumerate(_score_groups(merges)):
        if not _grow_from_the_left(group):
            return None
        ranks.update(dict.fromkeys(map("".join, group), rank))
    return Pieces(ranks, prefix)


def _score_groups(merges: Sequence[Pair]) -> Iterator[Sequence[Pair]]:
    """The merges in consecutive groups, so that all pairs of a token are in one group."""
    last_index = {"".join(pair): index for index, pair in enumerate(merges)}
    start = end = 0
    for index, pair in enumerate(merges):
        end = max(end, last_index["".join(pair)])
        if index == end:
            yield merges[start : index + 1]
            start = index + 1


def _grow_from_the_left(merges: Sequence[Pair]) -> bool:
    """True if merges with the same score also join the leftmost pair first in transformers."""
    if len({"".join(pair) for pair in merges}) == 1:
        return True
    lengths = [(len(first), len(second)) for first, second in merges]
    single_character = len(set("".join(map("".join, merges)))) == 1
    return single_character and all(pair >= following for pair, following in pairwise(lengths))


def _prefix(record: dict[str, Any]) -> bool | None:
    """True if a space is put before a text; None if the text is changed in other ways too."""
    normalizer, pre_tokenizer = record.get("normalizer"), record.get("pre_tokenizer")
    if (
        pre_tokenizer is not None
        and pre_tokenizer.get("type") == "Metaspace"
        and normalizer is None
    ):
        splits = pre_tokenizer.get("split", True)
        only_marks = pre_tokenizer.get("replacement") == SPACE and not splits
        return _PREFIXES[pre_tokenizer["prepend_scheme"]] if only_marks else None
    if pre_tokenizer not in (None, _CUT_AT_SPACES):  # no spaces are left to cut at
        return None
    if normalizer == _SPACES:
        return False
    prepend = {"type": "Prepend", "prepend": SPACE}
    return True if normalizer == {"type": "Sequence", "normalizers": [prepend, _SPACES]} else None


def _pairs_of(token: str, vocabulary: Collection[str]) -> Iterator[tuple[str, str]]:
    """The pairs of pieces that form a token; a piece is a token or a single character."""
    for cut in range(1, len(token)):
        pair = token[:cut], token[cut:]
        if all(len(piece) == 1 or piece in vocabulary for piece in pair):
            yield pair
