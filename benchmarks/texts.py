"""Write the texts of the benchmarks as files, for the command line.

``calibration.jsonl`` and ``wiki.jsonl`` have summaries of Wikipedia articles, ``fortunes.jsonl``
quotations and jokes (see ``benchmarks/common.py``). The beginning of the last two is left out,
because APT's defaults were chosen on it::

    python benchmarks/texts.py out/texts
"""

import argparse
import json
from itertools import accumulate, takewhile
from pathlib import Path

from common import FORTUNES, fortunes, open_model, wiki

from apt.text.datasets import tokenize

CHOSEN_ON = 16 * 512  # tokens of SmolLM2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fortunes", type=Path, default=FORTUNES, help="folder of the second text")
    options = parser.parse_args()
    _, tokenizer = open_model()
    calibration, evaluation = wiki()
    found = {"calibration": calibration}
    for name, documents in (("wiki", evaluation), ("fortunes", fortunes(options.fortunes))):
        lengths = accumulate(len(tokenize(tokenizer, [text])) for text in documents)
        found[name] = documents[sum(1 for _ in takewhile(lambda n: n <= CHOSEN_ON, lengths)) + 1 :]
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, documents in found.items():
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
        (options.folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
