"""Writes the tables of ``benchmarks/results`` into the documents.

In a page, a table stands between ``<!-- table NAME -->`` and ``<!-- end -->``. A test checks that
each page has the tables that this script writes::

    python benchmarks/pages.py
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from re import DOTALL, Match, search, sub
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs/benchmarks.md", ROOT / "docs/packing.md")
Row = dict[str, Any]
Cell = Callable[[Row], str]
NAMES = {
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "ss": "SS (SparseGPT)",
    "sm": "SM",
    "ms": "MS",
    "mm": "MM",
    "alps": "ALPS",
    "admm": "`admm` (default)",
    "admm:default": "`admm`, default",
    "admm:fast": "`admm`, fast",
    "admm:best": "`admm`, best",
    "admm/layer-wise": "`admm`, layer-wise",
    "admm/random_tokens=0": "… without random tokens",
    "admm/random_tokens=0/row_importance=0": "… nor rows weighted",
    "admm/random_tokens=0/row_importance=0/tuning_epochs=0": "… nor blocks tuned",
    "ss/own_samples=8": "SS (SparseGPT), own text",
    "admm/own_samples=8/random_tokens=0": "`admm`, own text",
    "admm:best/own_samples=0": "`admm`, best, without own text",
}
COLUMNS = {"0.5": "50 %", "0.6": "60 %", "0.7": "70 %"}


def written(line: Sequence[str]) -> str:
    return f"| {' | '.join(line)} |"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(map(written, [header, ["---"] * len(header), *lines]))


def pivot(rows: Sequence[Row], cell: Cell, row: str = "method", column: str = "pattern") -> str:
    """A table with a line for each value of ``row``, and a column for each of ``column``."""
    kept = [r for r in rows if r[column]]
    columns = list(dict.fromkeys(r[column] for r in kept))
    found: dict[str, dict[str, str]] = {}
    for r in kept:
        found.setdefault(r[row], {})[r[column]] = cell(r)
    dense = next((cell(r) for r in rows if r[row] == "dense"), "")
    corner = f"dense {dense}" if dense else ""
    lines = [
        [NAMES.get(name, name), *(cells.get(c, "") for c in columns)]
        for name, cells in found.items()
    ]
    return table([corner, *(COLUMNS.get(c, c) for c in columns)], lines)


def perplexities(*texts: str) -> Cell:
    return lambda row: " / ".join(f"{row[text]:.2f}" for text in texts)


def with_error(*texts: str) -> Cell:
    scores = perplexities(*texts)
    return lambda row: scores(row) + (f" · {row['error']:.4f}" if "error" in row else "")


def scores(row: Row) -> list[str]:
    """Perplexity, divergence and agreement of a row of a comparison, on both texts."""
    wiki, fortunes = row["scores"].values()
    return [
        f"{wiki['perplexity']:.2f} / {fortunes['perplexity']:.1f}",
        f"{wiki['divergence']:.3f} / {fortunes['divergence']:.3f}",
        f"{100 * wiki['agreement']:.1f} / {100 * fortunes['agreement']:.1f}",
    ]


def comparison(rows: Sequence[Row]) -> str:
    """Perplexities and divergences of a comparison."""
    header = ["", "method", "perplexity", "KL from dense", "same first token, %", "seconds"]
    lines = [
        [
            COLUMNS.get(row["pattern"], row["pattern"]),
            NAMES.get(row["method"], row["method"]),
            *scores(row),
            f"{row['seconds']:.0f}" if "seconds" in row else "",
        ]
        for row in rows
    ]
    return table(header, lines)


def accuracy_of(task: Row) -> Row:
    """The normalised accuracy of a task, or its accuracy if it has no other."""
    metrics = task["metrics"]
    found: Row = metrics.get("acc_norm") or metrics["acc"]
    return found


def tasks(rows: Sequence[Row]) -> str:
    """The accuracies of a comparison, and their differences from those of the dense model."""
    names = list(rows[0]["tasks"])
    header = ["", "method", *(name.removeprefix("local_") for name in names), "mean", "changed, %"]
    lines = []
    for row in rows:
        found = [accuracy_of(row["tasks"][name]) for name in names]
        mean = sum(one["value"] for one in found) / len(found)
        changed = [row["tasks"][name].get("changed") for name in names]
        lines.append([
            COLUMNS.get(row["pattern"], row["pattern"]),
            NAMES.get(row["method"], row["method"]),
            *(f"{100 * one['value']:.0f} ± {100 * one['stderr']:.0f}" for one in found),
            f"{100 * mean:.1f}",
            "" if None in changed else f"{100 * sum(changed) / len(changed):.0f}",
        ])  # fmt: skip
    return table(header, lines)


def tokens(rows: Sequence[Row]) -> str:
    """Accuracy against calibration tokens."""
    header = ["samples × tokens", "effort", "layer error", "Wikipedia / fortunes", "seconds"]
    both = perplexities("wiki", "fortunes")
    lines = [
        [
            row["tokens"].replace("x", " × "),
            row["method"].partition(":")[2],
            f"{row['error']:.4f}",
            both(row),
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    return table(header, lines)


def solver(rows: Sequence[Row]) -> str:
    return pivot(rows, lambda row: f"{row['error']:.4f} · {row['ratio']:.1f}")


def stream(rows: Sequence[Row]) -> str:
    header = ["blocks", "weights", "peak", "seconds"]
    lines = [
        [str(r["blocks"]), f"{r['weights']:,.0f} MiB", f"{r['peak']:,.0f} MiB",
         f"{r['seconds']:.0f}"]
        for r in rows
    ]  # fmt: skip
    return table(header, lines)


def spelled(row: str) -> str:
    """The name of a row that begins with a pattern."""
    pattern = next((p for p in COLUMNS if row.startswith(p)), "")
    return COLUMNS.get(pattern, "") + row.removeprefix(pattern)


def quantized(rows: Sequence[Row]) -> str:
    header = ["SmolLM2", "Wikipedia / fortunes", "bytes of the Linears"]
    both = perplexities("wiki", "fortunes")
    lines = [[spelled(row["row"]), both(row), f"{row['bytes'] / 1e6:.1f} MB"] for row in rows]
    return table(header, lines)


def packed_models(rows: Sequence[Row]) -> str:
    """Speeds and sizes of packed models, with the smallest and the largest ratio of all rounds."""
    header = ["zeros, values", "decoding, tokens/s", "of dense", "prompts, of dense", "file"]

    def ratio(found: Row | None) -> str:
        if found is None:
            return "1"
        return f"{found['median']:.2f} ({found['smallest']:.2f} to {found['largest']:.2f})"

    lines = []
    for row in rows:
        pattern, _, kind = row["model"].partition("-")
        pattern = pattern.replace("of", ":")
        lines.append([
            f"{COLUMNS.get(pattern, pattern)}, {kind}" if kind else "dense bf16",
            f"{row['decode']:.1f}", ratio(row["decode ratio"]), ratio(row["prefill ratio"]),
            f"{row['bytes'] / 2**20:,.0f} MiB",
        ])  # fmt: skip
    return table(header, lines)


def products(rows: Sequence[Row]) -> str:
    """Products of single matrices."""
    header = ["", "milliseconds", "least to most", "times as fast as torch's dense bf16"]
    lines = [
        [row["run"], f"{row['ms']:.2f}", f"{row['least']:.2f} to {row['most']:.2f}",
         f"{row['ratio']:.2f}"]
        for row in rows
    ]  # fmt: skip
    return table(header, lines)


BOTH = perplexities("wiki", "fortunes")
TABLES: Mapping[str, tuple[str, Callable[[Sequence[Row]], str]]] = {
    "smollm2": ("smollm2", comparison),
    "tasks": ("smollm2", tasks),
    "accuracy": ("accuracy", lambda rows: pivot(rows, BOTH)),
    "parts": ("parts", lambda rows: pivot(rows, BOTH)),
    "own": ("own", lambda rows: pivot(rows, BOTH)),
    "paper": ("paper", lambda rows: pivot(rows, with_error("wiki"))),
    "tokens": ("tokens", tokens),
    "solver": ("solver", solver),
    "stream": ("stream", stream),
    "stream-7b": ("stream-7b", stream),
    "quantize": ("quantize", quantized),
    "packed": ("packed", packed_models),
    "packed-1.5b": ("packed-1.5b", packed_models),
    "products": ("products", products),
    **{
        f"zoo-{name}": (f"zoo-{name}", lambda rows: pivot(rows, with_error("wiki", "dictionary")))
        for name in ("llama", "opt", "bloom", "mamba", "mamba2")
    },
}
"""The file of each table, and the function that writes it."""


def results(name: str) -> Row:
    """A file of the results."""
    found: Row = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))
    return found


def row_of(name: str, **wanted: str) -> Row:
    """The row of a file with these values."""
    rows: list[Row] = results(name)["rows"]
    return next(row for row in rows if all(row.get(k) == v for k, v in wanted.items()))


def figures() -> dict[str, str]:
    """Sentences of README.md with figures, as patterns, and the text that the results give."""
    plain = row_of("allocation", method="admm", pattern="0.7")["wiki"]
    auto = row_of("allocation", method="admm/allocation=auto", pattern="0.7")["wiki"]
    packed = row_of("packed", model="0.5-bfloat16")["decode ratio"]["median"]
    return {
        r"SmolLM2 decodes [\d.]+ times as fast": f"SmolLM2 decodes {packed:.1f} times as fast",
        r"perplexity of SmolLM2 from [\d.]+ to [\d.]+": (
            f"perplexity of SmolLM2 from {plain:.1f} to {auto:.1f}"
        ),
    }


def wrong_figures() -> Iterator[str]:
    """What README.md says in place of figures of the results."""
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for pattern, expected in figures().items():
        found = search(pattern, text)
        if found is None or found[0] != expected:
            yield f"README.md: {found[0] if found else pattern}, and the results: {expected}"


def rendered(name: str) -> str:
    """A table, and a line with its origin."""
    file, write = TABLES[name]
    record = results(file)
    threads = "one thread" if record["threads"] == 1 else f"{record['threads']} threads"
    origin = f"{record['machine']}, {threads}, commit {record['commit']}, {record['date']}"
    return f"{write(record['rows'])}\n\n({origin})"


def page(text: str) -> str:
    """A page with the tables as they are in the results."""

    def replaced(match: Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n\n{rendered(match[1])}\n\n<!-- end -->"

    return sub(r"<!-- table ([\w.-]+) -->.*?<!-- end -->", replaced, text, flags=DOTALL)


def changed() -> Iterator[tuple[Path, str]]:
    """The pages that have other tables than the results."""
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        if (fresh := page(text)) != text:
            yield path, fresh


def main() -> None:
    for path, text in changed():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
    if wrong := list(wrong_figures()):
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
