"""Tokenizers of SentencePiece, which llama.cpp has as scores of tokens and transformers as merges.

transformers joins the two pieces that come first among the merges. llama.cpp joins any two pieces
whose text together is a token, those of the highest score first, and of equal scores the leftmost.
Both make the same tokens if the merges have all pairs of each token, one token after the other.
Runs of one character, for example of spaces, often have the same score. Their merges must be sorted
by the lengths of the two pieces, the longest first. Then transformers also joins from the left.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Pair = Sequence[str]
SPACE = "▁"
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_NO_WORDS = {
    "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False
}  # fmt: skip
_PREFIXES = {"always": True, "first": True, "never": False}
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
"""The tokens of single bytes, for characters that are no token."""


@dataclass(frozen=True)
class Pieces:
    """A tokenizer as llama.cpp has it.

    Attributes:
        ranks: the order in which pieces are joined, by the token that they become.
        prefix: True if a space goes before a text.
    """

    ranks: Mapping[str, int]
    prefix: bool

    def score(self, token: str) -> float:
        """The score of a token; tokens that no pieces become come last."""
        return -float(self.ranks.get(token, len(self.ranks)))


def pieces_of(record: dict[str, Any], added: Collection[str]) -> Pieces | None:
    """The pieces of a tokenizer, as its JSON has it; None if llama.cpp would make others.

    Args:
        record: the content of ``tokenizer.json``.
        added: the tokens that are found in a text before it is cut into pieces.
    """
    model, prefix = record.get("model", {}), _prefix(record)
    vocabulary = model.get("vocab", {})
    if prefix is None or model.get("type") != "BPE" or not model.get("byte_fallback"):
        return None
    if any(model.get(key) for key in ("dropout", "ignore_merges", "continuing_subword_prefix")):
        return None
    if not vocabulary.keys() >= BYTES:
        return None
    own = vocabulary.keys() - BYTES - set(added)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    merges = [pair for pair in merges if "".join(pair) in own]
    known = {tuple(pair) for pair in merges}
    if any(pair not in known for token in own for pair in _pairs(token, own)):
        return None
    ranks = {}
    for rank, together in enumerate(_of_one_score(merges)):
        if not _grow_from_the_left(together):
            return None
        ranks.update(dict.fromkeys(map("".join, together), rank))
    return Pieces(ranks, prefix)


def _of_one_score(merges: Sequence[Pair]) -> Iterator[Sequence[Pair]]:
    """The merges in parts, so that all pairs of a token are in the same part."""
    last = {"".join(pair): at for at, pair in enumerate(merges)}
    start = end = 0
    for at, pair in enumerate(merges):
        end = max(end, last["".join(pair)])
        if at == end:
            yield merges[start : at + 1]
            start = at + 1


def _grow_from_the_left(merges: Sequence[Pair]) -> bool:
    """True if pairs of one score are joined in the same order by ranks and from the left."""
    if len({"".join(pair) for pair in merges}) == 1:
        return True
    lengths = [(len(first), len(second)) for first, second in merges]
    one = len(set("".join(map("".join, merges)))) == 1
    return one and all(pair >= then for pair, then in pairwise(lengths))


def _prefix(record: dict[str, Any]) -> bool | None:
    """True if a space goes before a text; None if more is done to it than to mark spaces."""
    normalizer, cut = record.get("normalizer"), record.get("pre_tokenizer")
    if cut is not None and cut.get("type") == "Metaspace" and normalizer is None:
        marks = cut.get("replacement") == SPACE and not cut.get("split", True)
        return _PREFIXES[cut["prepend_scheme"]] if marks else None
    if cut not in (None, _NO_WORDS):  # no spaces are left to cut at
        return None
    if normalizer == _SPACES:
        return False
    before = {"type": "Prepend", "prepend": SPACE}
    return True if normalizer == {"type": "Sequence", "normalizers": [before, _SPACES]} else None


def _pairs(token: str, vocabulary: Collection[str]) -> Iterator[tuple[str, str]]:
    """The pairs of pieces that become a token: tokens, or characters that are none."""
    for at in range(1, len(token)):
        pair = token[:at], token[at:]
        if all(len(piece) == 1 or piece in vocabulary for piece in pair):
            yield pair
