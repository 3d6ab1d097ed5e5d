"""Writes the tables of ``benchmarks/results`` into the documents.

In a page, a table stands between ``<!-- table NAME -->`` and ``<!-- end -->``. A test checks that
each page has the tables that this script writes::

    python benchmarks/pages.py
"""

import json
from collections.abc import Iterator
from pathlib import Path
from re import DOTALL, Match, search, sub

from tables import TABLES, Row

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def results(name: str) -> Row:
    """A file of the results."""
    found: Row = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))
    return found


def row_of(name: str, **wanted: str | float) -> Row:
    """The row of a file with these values."""
    rows: list[Row] = results(name)["rows"]
    return next(row for row in rows if all(row.get(k) == v for k, v in wanted.items()))


def figures() -> dict[str, str]:
    """Sentences of README.md with figures, as patterns, and the text that the results give."""
    plain = row_of("allocation", method="admm/allocation=uniform", pattern="0.7")["wiki"]
    auto = row_of("allocation", method="admm", pattern="0.7")["wiki"]
    packed, half, most = (
        row_of(name, model=f"{share}-bfloat16")["decode ratio"]["median"]
        for name, share in (("packed", 0.5), ("packed-1.5b", 0.5), ("packed-1.5b", 0.7))
    )
    dense, *timed = (
        row_of("minutes", pattern=pattern, minutes=minutes)["wiki"]
        for pattern, minutes in (
            ("dense", 0),
            ("2:4", 10.0),
            ("0.7", 10.0),
            ("2:4", 30.0),
            ("0.7", 30.0),
        )
    )
    fine, coarse, whole = (
        row_of("deployments", model=f"dense, {form}")["wiki"]
        for form in ("int4 as `q4_0`", "`q4_0`", "`bf16`")
    )
    return {
        r"then has a perplexity of [\d.]+, and of [\d.]+ with the rounding of .*? it has \d+\.\d": (
            f"then has a perplexity of {fine:.1f}, and of {coarse:.1f} with the rounding of "
            f"llama.cpp; in bf16 it has {whole:.1f}"
        ),
        r"perplexity of [\d.]+ at 2:4, and of [\d.]+ with 70 % .*?dense it has [\d.]+\d": (
            f"perplexity of {timed[0]:.1f} at 2:4, and of {timed[1]:.1f} with 70 % zeros; in 30 "
            f"minutes it has {timed[2]:.1f} and {timed[3]:.1f}; dense it has {dense:.1f}"
        ),
        r"SmolLM2 decodes [\d.]+ times as fast": f"SmolLM2 decodes {packed:.1f} times as fast",
        r"billion parameters [\d.]+ times, with 70 % [\d.]+ times": (
            f"billion parameters {half:.1f} times, with 70 % {most:.1f} times"
        ),
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
    files, write = TABLES[name]
    records = [results(file) for file in files.split()]
    rows = [row for record in records for row in record["rows"]]
    return f"{write(rows)}\n\n({'; '.join(dict.fromkeys(map(origin, records)))})"


def origin(record: Row) -> str:
    """Where and when a file was made."""
    threads = "one thread" if record["threads"] == 1 else f"{record['threads']} threads"
    return f"{record['machine']}, {threads}, commit {record['commit']}, {record['date']}"


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
