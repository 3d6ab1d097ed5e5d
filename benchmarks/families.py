"""Which model types of transformers APT prunes: one tiny random model of each is pruned.

All types with a causal language model, all that take images and text, and all others that have a
model, are in the tables. A row says which adapter served the type, which share of the matrices of
the blocks was pruned, if the pattern is exact, if all other values are the same bit for bit, and
what can be narrower; or why the type was refused::

    python benchmarks/families.py --json benchmarks/results/families.json
    python benchmarks/pages.py
    python benchmarks/families.py --only 'qwen3*' deepseek_v3

The whole takes some minutes on one core. Every type has a process of its own. With ``--rows``, rows
are kept in a file, and a run that was ended goes on there. With ``--streamed``, every type that is
served is saved, and pruned by the command line in memory and streamed: both write the same bytes,
or a line says what differs. With ``--default``, the default method prunes in place of ``ss``:
decoders of text then generate text and train their norms.
"""

import argparse
import json
import multiprocessing
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from apt_adapters.example_inputs import example_inputs
from common import save
from tables import SERVED, TITLES, served
from torch import Tensor, nn
from typer.testing import CliRunner

import apt
from apt.adapter import Adapter, Samples, Site
from apt.checkpoints.architecture import check_kind, reads_of
from apt.checkpoints.load import load_tokenizer
from apt.cli import app
from apt.errors import AptError, describe
from apt.locations.model_source import find
from apt.options import PruneOptions
from apt.planning.plan import shared_sites
from apt.plugin.registry import registry

Row = dict[str, Any]
Weights = list[tuple[Site, Tensor]]  # views of the weights as they are stored

COMMAND = (
    *("--pattern", "2:4", "--method", "ss", "--samples", "4", "--seqlen", "16"),
    *("--calibration", str(Path(__file__).parent.parent / "tests/helpers/text.txt")),
)
"""The options of ``apt-prune prune`` with ``--streamed``."""
PATTERNS = ("2:4", "0.5")
"""The first is used wherever it fits."""
SECONDS = 120  # for one type
SAMPLES = 4  # of a model that is no decoder of text


class _TooLong(Exception):
    pass


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise in the middle of what takes longer."""

    def end(*_: Any) -> None:
        raise _TooLong(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def adapter_for(model_type: str) -> tuple[str, Adapter]:
    """The name of the adapter that serves a type, ``auto`` for most, and the adapter."""
    specs = registry().adapters.specs
    own = [spec for spec in specs.values() if model_type in spec.model_types]
    spec = own[0] if own else specs["auto"]
    return spec.name, spec.load()()


def row(model_type: str, table: str, default: bool = False) -> Row:
    """The row of a type. An exception of any kind becomes the reason of a refusal."""
    made: Row = {"type": model_type, "table": table, "adapter": "", "reason": ""}
    try:
        with limited(SECONDS):
            model = made_model(model_type, table)
    except Exception as error:
        return {**made, "served": "not built", "reason": _sentence(error)}
    name, adapter = adapter_for(model_type)
    try:
        check_kind(f"a model of type {model_type}", model.config)
        with limited(SECONDS):
            found = pruned(model, adapter, inputs_for(model), default)
    except Exception as error:
        reason = error.message if isinstance(error, AptError) else f"fails: {_sentence(error)}"
        return {**made, "served": "refused", "reason": reason}
    by = "auto" if name == "auto" else "own"
    return {**made, "served": by, "adapter": name, **found}


def made_model(model_type: str, table: str) -> Any:
    """The tiny model of a row."""
    if table == "other":
        return tiny.other_model(model_type)
    return tiny.model(model_type, image=table == "image")


def inputs_for(model: nn.Module) -> Tensor | Samples:
    """Random inputs: token ids for a decoder of text, and example inputs for any other model."""
    if reads_of(type(model), model.config).windows:
        return tiny.tokens()
    inputs = example_inputs(model, SAMPLES)
    return Samples([{n: t[index] for n, t in inputs.items()} for index in range(SAMPLES)])


def _sentence(error: Exception) -> str:
    """The first sentence of an exception's text, without the folder of the installed packages."""
    packages = Path(transformers.__file__).parent.parent
    return describe(error).partition(". ")[0].replace(f"{packages}/", "")


def pruned(
    model: nn.Module, adapter: Adapter, inputs: Tensor | Samples, default: bool = False
) -> Row:
    """What pruning changes in a model, by the first pattern that fits.

    Args:
        default: True for the default method, which may train vectors.
    """
    before = {name: value.clone() for name, value in tensors(model)}
    given: dict[str, Any] = {} if default else {"method": "ss"}
    if default and isinstance(inputs, Tensor):
        given["other_tokens"] = inputs.flip(0)
    for pattern in PATTERNS:
        model.load_state_dict(before, strict=False)
        try:
            apt.prune(
                model, inputs, pattern=pattern, adapter=adapter, options=PruneOptions(), **given
            )
        except AptError as error:
            if "pattern" not in error.options or pattern == PATTERNS[-1]:
                raise
            continue
        return compared(model, adapter, pattern, before, vectors="other_tokens" in given)
    raise AssertionError("no pattern is left")


def compared(
    model: nn.Module, adapter: Adapter, pattern: str, before: dict[str, Tensor], *, vectors: bool
) -> Row:
    """The share of the weights that are sites, and what became of them and of the others.

    Args:
        vectors: True if vectors may differ as well.
    """
    blocks, shared = adapter.blocks(model), shared_sites(model, adapter)  # these stay dense
    names = {parameter: name for name, parameter in model.named_parameters()}
    weights = [
        (site, site.weight(block).detach(), block.get_parameter(site.parameter))
        for name, block in blocks
        for site in adapter.sites(block)
        if f"{name}.{site.name}" not in shared
    ]
    matrices = {
        parameter: parameter.numel()
        for _, block in blocks
        for parameter in block.parameters()
        if parameter.ndim > 1
    }
    names_of_stacks = [name for name, _ in adapter.stacks(model)]
    exact = all(is_exact(site.oriented(weight), pattern) for site, weight, _ in weights)
    total = sum(weight.numel() for _, weight, _ in weights)
    for site, weight, parameter in weights:  # back to the values of before
        old = before[names[parameter]]
        weight.copy_(old if site.expert is None else old[site.expert])
    return {
        "share": total / sum(matrices.values()),
        **({} if names_of_stacks == ["decoder"] else {"stacks": names_of_stacks}),
        "experts": any(site.routed for site, _, _ in weights),
        "groups": groups(model, adapter),
        "pattern": pattern,
        "exact": exact,
        "untouched": all(
            same(value, before[name]) or (vectors and value.ndim == 1)
            for name, value in tensors(model)
        ),
    }


def groups(model: Any, adapter: Adapter) -> list[str]:
    """The kinds of groups that `apt-prune shrink` can remove from some block."""
    found = (adapter.groups(block, model.config) for _, block in adapter.blocks(model))
    return list(dict.fromkeys(each.kind for kinds in found for each in kinds))


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers of a model, each once."""
    yield from ((name, value.detach()) for name, value in model.named_parameters())
    yield from model.named_buffers()


def same(one: Tensor, other: Tensor) -> bool:
    """True if two tensors are equal bit for bit."""
    return one.shape == other.shape and bool(
        torch.equal(
            one.contiguous().view(-1).view(torch.uint8),
            other.contiguous().view(-1).view(torch.uint8),
        )
    )


def is_exact(weight: Tensor, pattern: str) -> bool:
    """True if a weight (out, in) has the zeros of the pattern, no more and no fewer."""
    zeros = weight == 0
    if pattern == "2:4":
        return bool((zeros.unflatten(1, (-1, 4)).sum(2) == 2).all())
    return int(zeros.sum()) == round(zeros.numel() * float(pattern))


def streamed(row: Row) -> str:
    """What the command line writes for a saved model of a type, in memory and streamed."""
    tokenizer = load_tokenizer(find("zoo:llama", registry()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        for part in (made_model(row["type"], row["table"]), tokenizer):
            part.save_pretrained(path / "model")
        written = []
        for way in ("memory", "streamed"):
            flags = ["--stream"] * (way == "streamed") + ["-o", str(path / way)]
            run = CliRunner().invoke(
                app, ["prune", str(path / "model"), "--adapter", row["adapter"], *COMMAND, *flags]
            )
            if run.exit_code:
                return f"{way}: {getattr(run.exception, 'message', run.exception)}"
            files = (path / way).glob("*.safetensors")
            written.append({file.name: file.read_bytes() for file in files})
    return "streamed: the same bytes" if written[0] == written[1] else "streamed: OTHER BYTES"


def types(table: str) -> Sequence[str]:
    """The model types of a table."""
    names = {"causal": tiny.CAUSAL, "image": tiny.IMAGE, "other": tiny.other_types()}[table]
    return sorted(names)


def guarded(model_type: str, table: str, default: bool = False) -> Row:
    """The row of a type, or why there is none."""
    failed = {"type": model_type, "table": table, "adapter": "", "served": "refused"}
    return in_own_process(partial(row, model_type, table, default), failed, 3 * SECONDS)


def in_own_process(make: Callable[[], Row], failed: Row, seconds: float) -> Row:
    """A row made in a process of its own; ``failed`` with the reason if it crashes or hangs."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=lambda: send.send(make()))
    process.start()
    send.close()
    try:
        if receive.poll(seconds):
            made: Row = receive.recv()
            return made
        reason = f"not done after {seconds} s"
    except EOFError:
        reason = "its process has crashed"
    finally:
        process.kill()
        process.join()
    return {**failed, "reason": reason}


def kept_rows(path: Path | None) -> dict[tuple[str, str], Row]:
    """The rows of a run that was ended, by type and table."""
    lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
    rows = map(json.loads, lines)
    return {(row["type"], row["table"]): row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", nargs="+", metavar="GLOB", default=["*"])
    parser.add_argument("--tables", nargs="+", choices=TITLES, default=[*TITLES])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--streamed", action="store_true")
    parser.add_argument("--default", action="store_true")
    parser.add_argument("--rows", type=Path, help="a file of rows, to go on with a run")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for one type")
    options = parser.parse_args()
    globals()["SECONDS"] = options.seconds
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    rows, kept = [], kept_rows(options.rows)
    for table in options.tables:
        for model_type in types(table):
            if any(fnmatch(model_type, glob) for glob in options.only):
                known = kept.get((model_type, table))
                rows.append(known or guarded(model_type, table, options.default))
                if options.rows and (model_type, table) not in kept:
                    with options.rows.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
                print(told(rows[-1]), flush=True)
                if options.streamed and rows[-1]["served"] in SERVED:
                    print(f"{'':28} {streamed(rows[-1])}", flush=True)
    for table in options.tables:
        print(served([r for r in rows if r["table"] == table]), file=sys.stderr)
    save(options.json, rows)


def told(row: Row) -> str:
    """A row as a line."""
    head = f"{row['type']:28} {row['served']:9}"
    if row["reason"]:
        return f"{head} {row['reason']}"
    marks = [m for m in ("exact", "untouched") if not row[m]]
    wrong = f"  NOT {' and NOT '.join(marks)}" if marks else ""
    stacks = ", ".join(row.get("stacks", ()))
    marks = f"{'experts ' * row['experts']}{stacks}{wrong}"
    return f"{head} {row['share']:6.1%} {row['pattern']} {marks}"


if __name__ == "__main__":
    main()
