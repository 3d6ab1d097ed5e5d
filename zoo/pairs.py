"""Build the embedded pairs of source and target lines: a sentence without and with its marks.

Run ``python zoo/pairs.py`` to write the calibration and the evaluation pairs that ship with the
plugins. The source is the target in lower case, without the punctuation at the ends of its words.
``zoo/t5.py`` trains a model that restores the target; it takes its sentences from the same split of
documents, so it has seen no evaluation pair.
"""

from __future__ import annotations

import difflib
import gzip
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import corpus

CALIBRATION_PAIRS = 1200
EVALUATION_PAIRS = 400
WORDS = range(5, 31)  # of a sentence
# A sentence ends at a full stop, a question or an exclamation mark that stands before a space and a
# capital, and not after one of these abbreviations or an initial.
END = re.compile(r"(?<=[.?!])\s+(?=[A-Z])")
TITLES = "St|Mr|Mrs|Ms|Dr|Jr|Sr|Prof|Gen|Col|Lt|No|vs|c|ca|b|d|r|fl|lit|approx|etc"
ABBREVIATION = re.compile(rf"(?:\b(?:[A-Z]|{TITLES})|\.[A-Za-z])\.$")
# What a word of the source has neither before nor after it.
MARKS = ".,;:?!\"'()[]"
# Sentences with other characters are left out, so that the task stays one of English.
PLAIN = re.compile(r"[A-Za-z0-9 .,;:?!\"'()\-–%$&/]+")


class Pair(NamedTuple):
    """A sentence of the corpus as the target, and the same without its marks as the source."""

    source: str
    target: str


def sentences(text: str) -> Iterator[str]:
    """Cut a document into its sentences."""
    held = ""
    for line in text.split("\n"):
        for piece in END.split(line):
            held = f"{held} {piece}" if held else piece
            if not ABBREVIATION.search(held):
                yield held
                held = ""
        if held:
            yield held
            held = ""


def strip_marks(sentence: str) -> str:
    """Return a sentence in lower case, without the punctuation at the ends of its words."""
    return " ".join(word.strip(MARKS).lower() for word in sentence.split())


def pairs(documents: Iterable[corpus.Document]) -> Iterator[Pair]:
    """Yield a pair for each plain sentence of a fitting length."""
    for document in documents:
        for sentence in sentences(document.text):
            target = " ".join(sentence.split())
            words = target.split(" ")
            fits = len(words) in WORDS and target[0].isupper() and target[-1] in ".?!"
            # A word of marks alone, a dash for example, would leave no word in the source.
            if fits and PLAIN.fullmatch(target) and all(word.strip(MARKS) for word in words):
                yield Pair(strip_marks(target), target)


def words_restored(written: str, target: str) -> int:
    """Return how many words of the target are in a written sentence, in order and exactly."""
    matcher = difflib.SequenceMatcher(None, written.split(), target.split(), autojunk=False)
    return sum(block.size for block in matcher.get_matching_blocks())


def evaluation_pairs() -> list[Pair]:
    """Return the evaluation pairs exactly as they are embedded."""
    documents = corpus.head(corpus.load_split().evaluation, corpus.EVALUATION_BYTES)
    return spread(list(pairs(documents)), EVALUATION_PAIRS)


def spread(found: Sequence[Pair], count: int) -> list[Pair]:
    """Take ``count`` pairs at equal distances, so that many articles are represented."""
    return [found[i * len(found) // count] for i in range(count)]


def main() -> None:
    """Write the calibration and the evaluation pairs."""
    documents = corpus.head(corpus.load_split().training, corpus.CALIBRATION_BYTES)
    calibration = spread(list(pairs(documents)), CALIBRATION_PAIRS)
    _write(corpus.DATA_DIR / "pairs-calibration.jsonl.gz", calibration)
    _write(corpus.DATA_DIR / "pairs-evaluation.jsonl.gz", evaluation_pairs())


def _write(path: Path, rows: Sequence[Pair]) -> None:
    """Write one pair a line, compressed without a time stamp."""
    text = "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


if __name__ == "__main__":
    main()
