"""The tables of ``benchmarks/results`` in Markdown, each made from the rows of a file."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from statistics import mean, stdev
from typing import Any

Row = dict[str, Any]
Rows = Sequence[Row]
Cell = Callable[[Row], str]
FORMER = "admm/own_samples=0/norm_epochs=0/tuning_tokens=12288"
PARTS = {
    "/norm_epochs=0": "… without norm tuning",
    "/own_samples=0": "… nor own text",
    "/allocation=uniform/permute=false": "… without allocation and permutation",
    "/random_tokens=0": "… nor random tokens",
    "/row_importance=0": "… nor rows weighted",
    "/tuning_epochs=0": "… nor blocks tuned",
}
"""Parts of the default method, as options that turn them off one after the other."""
OLDER = "admm/allocation=uniform/permute=false"
WITHOUT = dict(zip(map("admm".__add__, accumulate(PARTS)), PARTS.values(), strict=True))
"""The default method without its parts: the first one, the first two, and so on."""
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
    **WITHOUT,
    **{
        OLDER + parts: WITHOUT[f"admm/norm_epochs=0/own_samples=0{OLDER[4:]}{parts}"]
        for parts in (
            "",
            "/random_tokens=0",
            "/random_tokens=0/row_importance=0",
            "/random_tokens=0/row_importance=0/tuning_epochs=0",
        )
    },
    "admm/own_samples=8/random_tokens=0": "`admm`, own text",
    "ss/own_samples=8": "SS (SparseGPT), own text",
    "admm:best/own_samples=0": "`admm`, best, without own text",
    FORMER: "former default",
}
COLUMNS = {"0.5": "50 %", "0.6": "60 %", "0.7": "70 %", "0.8": "80 %"}
ORDER = ("", "0.5", "4:8", "0.6", "2:4", "0.7", "0.8")
"""The patterns from the least loss to the most; the dense model first."""


def ordered(rows: Rows) -> list[Row]:
    """The rows in the order of their patterns."""
    return sorted(rows, key=lambda row: ORDER.index(row["pattern"]))


def written(line: Sequence[str]) -> str:
    return f"| {' | '.join(line)} |"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(map(written, [header, ["---"] * len(header), *lines]))


def pivot(rows: Rows, cell: Cell, row: str = "method", column: str = "pattern") -> str:
    """A table with a line for each value of ``row``, and a column for each of ``column``."""
    kept = ordered([r for r in rows if r[column]])
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


BOTH = perplexities("wiki", "fortunes")


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


def comparison(rows: Rows) -> str:
    """Perplexities and divergences of a comparison."""
    header = ["", "method", "perplexity", "KL from dense", "same first token, %"]
    lines = [
        [
            COLUMNS.get(row["pattern"], row["pattern"]),
            NAMES.get(row["method"], row["method"]),
            *scores(row),
        ]
        for row in ordered(rows)
    ]
    return table(header, lines)


def shortly(rows: Rows) -> str:
    """Perplexities of a comparison, a line for each method."""
    return pivot(rows, lambda row: scores(row)[0])


def patterns(rows: Rows) -> str:
    """Perplexities of the default of a comparison."""
    kept = [row for row in rows if row["method"] in ("dense", "admm")]
    return pivot(kept, lambda row: scores(row)[0])


def timed(rows: Rows) -> str:
    """Perplexities of runs of a given time."""
    dense, *runs = rows
    cells = {(row["minutes"], row["pattern"]): BOTH(row) for row in runs}
    columns = list(dict.fromkeys(row["pattern"] for row in ordered(runs)))
    lines = [
        [
            f"`--minutes {minutes:g}`" if minutes else "no `--minutes`",
            *(cells.get((minutes, pattern), "") for pattern in columns),
        ]
        for minutes in sorted({minutes for minutes, _ in cells})
    ]
    header = [f"dense {BOTH(dense)}", *(COLUMNS.get(pattern, pattern) for pattern in columns)]
    return table(header, lines)


def by_seed(rows: Rows) -> str:
    """Perplexities of several seeds, with their mean and standard deviation."""
    dense, *runs = rows
    seeds = sorted({row["seed"] for row in runs})
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(ordered(runs), key=lambda row: row["seed"]):
        groups.setdefault((row["pattern"], row["method"]), []).append(row)
    lines = []
    for pattern, method in sorted(groups, key=lambda key: (ORDER.index(key[0]), -len(key[1]))):
        found = groups[pattern, method]
        values = [[row[text] for row in found] for text in ("wiki", "fortunes")]
        means = [mean(each) for each in values]
        spread = (stdev(each) / middle for each, middle in zip(values, means, strict=True))
        lines.append(
            [
                COLUMNS.get(pattern, pattern),
                NAMES[method],
                *map(BOTH, found),
                " / ".join(f"{each:.2f}" for each in means),
                " / ".join(f"{100 * each:.1f} %" for each in spread),
            ]
        )
    header = ["", f"dense {BOTH(dense)}", *(f"seed {seed}" for seed in seeds), "mean", "deviation"]
    return table(header, lines)


def costs(rows: Rows) -> str:
    """Predicted and measured seconds, of whole runs and of their solves."""
    lines = []
    for row in rows:
        shape, effort, samples = row["row"].split("/")
        run, solves = row["predicted"] / row["seconds"], row["solving"] / row["solved"]
        times = (f"{row[key]:.0f}" for key in ("predicted", "seconds"))
        own = (f"{row[key]:.0f}" for key in ("solving", "solved"))
        lines.append([shape, effort, samples, *times, f"{run:.2f}", *own, f"{solves:.2f}"])
    header = ["shape", "effort", "samples", "predicted, s", "measured", "ratio"]
    return table([*header, "its solves, s", "measured", "ratio"], lines)


def memories(rows: Rows) -> str:
    """Predicted and measured peak memory."""
    lines = [
        [*row["row"].split("/"), gib(row["predicted"]), gib(row["peak"])]
        for row in sorted(rows, key=lambda row: float(row["predicted"]))
    ]
    return table(["shape", "method", "predicted", "measured"], lines)


def efforts(rows: Rows) -> str:
    """Perplexities by effort, at 2:4."""
    names = {
        "admm/layer-wise": "`--layer-wise`",
        "admm:fast": "`fast`",
        "admm": "`default`",
        "admm:best": "`best`",
    }
    found = {row["method"]: row for row in rows if row["pattern"] in ("", "2:4")}
    lines = [[names[method], BOTH(found[method])] for method in names]
    return table(["effort", f"2:4, dense {BOTH(found['dense'])}"], lines)


def joint(rows: Rows) -> str:
    """SparseGPT's mask with both kinds of compensation."""
    return pivot([r for r in rows if r["method"] in ("dense", "ss", "sm")], perplexities("wiki"))


def accuracy_of(task: Row) -> Row:
    """The normalised accuracy of a task, or its accuracy if it has no other."""
    metrics = task["metrics"]
    found: Row = metrics.get("acc_norm") or metrics["acc"]
    return found


def tasks(rows: Rows) -> str:
    """The accuracies of a comparison, and the share of answers that are not the dense model's."""
    names = list(rows[0]["tasks"])
    header = ["", "method", *(name.removeprefix("local_") for name in names), "mean", "changed, %"]
    lines = []
    for row in ordered(rows):
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


def calibrated_on(row: Row) -> int:
    """The number of calibration tokens of a row."""
    samples, seqlen = map(int, row["tokens"].split("x"))
    return samples * seqlen


def tokens(rows: Rows) -> str:
    """Accuracy against calibration tokens."""
    header = ["calibration", "effort", "layer error", "Wikipedia / fortunes"]
    lines = [
        [
            row["tokens"].replace("x", " × "),
            row["method"].partition(":")[2],
            f"{row['error']:.4f}",
            BOTH(row),
        ]
        for row in sorted(rows, key=lambda r: (calibrated_on(r), r["method"] != "admm:fast"))
    ]
    return table(header, lines)


def solver(rows: Rows) -> str:
    return pivot(rows, lambda row: f"{row['error']:.4f} · {row['ratio']:.1f}")


def mib(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def stream(rows: Rows) -> str:
    """Peak memory of streamed runs."""
    header = ["model", "weights", "peak memory", "seconds"]
    lines = [[r["model"], mib(r["weights"]), mib(r["peak"]), f"{r['seconds']:.0f}"] for r in rows]
    return table(header, lines)


def against_limit(rows: Rows) -> str:
    """Seconds of whole runs beside the time of the work that they cannot avoid."""
    header = ["mode", "effort", "limit, s", "seconds", "of the limit", "of these solves"]
    lines = [
        [r["mode"], r["effort"] + ", with norm tuning" * r.get("norms", False),
         f"{r['limit']:.1f}", f"{r['seconds']:.1f}", f"{r['ratio']:.2f}", f"{r['solve']:.1f}"]
        for r in rows if "mode" in r
    ]  # fmt: skip
    return table(header, lines)


def scaling(rows: Rows) -> str:
    """Seconds by the number of blocks and of tokens."""
    header = ["blocks", "tokens", "seconds", "of these solves", "others, by block and 1,000 tokens"]
    lines = [
        [str(r["blocks"]), f"{r['tokens']:,}", f"{r['seconds']:.1f}", f"{r['solve']:.1f}",
         f"{r['rest_per_block_and_1000_tokens']:.3f}"]
        for r in rows
    ]  # fmt: skip
    return table(header, lines)


def scans(rows: Rows) -> str:
    """Tokens per second with two scans of a state-space model."""
    header = ["scan", "calibration, tokens/s", "tuning, tokens/s", "largest tensor"]
    first = rows[0]

    def speed(row: Row, name: str) -> str:
        return f"{row[name]:,.0f} ({row[name] / first[name]:.1f} ×)"

    lines = [
        [r["scan"], speed(r, "calibrate"), speed(r, "tune"), f"{r['largest'] * 4 / 2**20:.1f} MiB"]
        for r in rows
    ]
    return table(header, lines)


def beside(rows: Rows) -> str:
    """llm-compressor and APT on the same tokens."""
    header = ["", "method", "Wikipedia / fortunes", "seconds"]
    lines = [
        [COLUMNS.get(r["pattern"], r["pattern"]), r["method"], BOTH(r),
         f"{r['seconds']:.0f}" if "seconds" in r else ""]
        for r in rows
    ]  # fmt: skip
    return table(header, lines)


def spelled(row: str) -> str:
    """The name of a row that begins with a pattern."""
    pattern = next((p for p in COLUMNS if row.startswith(p)), "")
    return COLUMNS.get(pattern, "") + row.removeprefix(pattern)


def quantized(rows: Rows) -> str:
    header = ["SmolLM2", "Wikipedia / fortunes", "bytes of the Linears"]
    lines = [[spelled(row["row"]), BOTH(row), f"{row['bytes'] / 1e6:.1f} MB"] for row in rows]
    return table(header, lines)


def packed_models(rows: Rows) -> str:
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


def products(rows: Rows) -> str:
    """Products of single matrices."""
    header = ["", "milliseconds", "least to most", "times as fast as torch's dense bf16"]
    lines = [
        [row["run"], f"{row['ms']:.2f}", f"{row['least']:.2f} to {row['most']:.2f}",
         f"{row['ratio']:.2f}"]
        for row in rows
    ]  # fmt: skip
    return table(header, lines)


TITLES = {
    "causal": "Causal language models",
    "image": "Models that take images and text",
    "other": "Encoders, encoder-decoders, images, sounds, and all others",
}
SERVED = ("own", "auto")


def served(rows: Rows) -> str:
    """How many model types are served, and by what."""
    counts = {s: sum(row["served"] == s for row in rows) for s in (*SERVED, "refused", "not built")}
    own, general = (counts[name] for name in SERVED)
    said = f"Of {len(rows)} types {own + general} are served: {own} by an adapter of their own, "
    said += f"{general} by `auto`; {counts['refused']} are refused"
    return said + (
        f", and {counts['not built']} could not be built." if counts["not built"] else "."
    )


def family(row: Row) -> list[str]:
    """The line of a type that is served."""
    kept = "yes" if row["untouched"] else "**no**"
    exact = row["pattern"] if row["exact"] else f"**not {row['pattern']}**"
    experts = "yes" if row["experts"] else ""
    groups = ", ".join(f"`{kind}`" for kind in row["groups"])
    return [f"`{row['type']}`", row["adapter"], experts, f"{row['share']:.1%}", exact, kept, groups]


def narrower(rows: Rows) -> str:
    """How many model types have groups that can be removed, and of which usual kinds."""
    groups = [row["groups"] for row in rows if row["served"] in SERVED]
    usual = ("channels", "heads", "key-value-heads", "experts", "expert-channels")
    counts = [f"{sum(kind in own for own in groups)} `{kind}`" for kind in usual]
    return (
        f"{sum(map(bool, groups))} can be narrower: {', '.join(counts[:-1])} and {counts[-1]} "
        "can go."
    )


def stacked(row: Row) -> list[str]:
    """The line of a type of one or several stacks that is served."""
    line = family(row)
    return [*line[:2], ", ".join(row.get("stacks", ["decoder"])), *line[3:6]]


def all_types(rows: Rows) -> str:
    """How many model types are served in some table."""
    types = {row["type"] for row in rows}
    count = len({row["type"] for row in rows if row["served"] in SERVED})
    return f"{count} of {len(types)} model types are served."


_ESCAPED = str.maketrans({sign: f"\\{sign}" for sign in "|[]"})  # they would be links


def families(rows: Rows) -> str:
    """The tables of model types: those that are served, and the others with the reason."""
    parts = [all_types(rows)]
    decoders = ["type", "adapter", "experts", "in sites", "exact", "rest untouched", "groups"]
    for name, title in TITLES.items():
        own = [row for row in rows if row["table"] == name]
        line, head = family, decoders
        if name == "other":
            line, head = stacked, [*decoders[:2], "stacks", *decoders[3:6]]
        lines = [line(row) for row in own if row["served"] in SERVED]
        others = [
            [f"`{row['type']}`", row["served"], row["reason"].translate(_ESCAPED)]
            for row in own
            if row["served"] not in SERVED
        ]
        said = f"{served(own)} {narrower(own)}" if name != "other" else served(own)
        parts += [f"## {title}", said, table(head, lines)]
        parts += [table(["type", "", "reason"], others)]
    return "\n\n".join(parts)


def towers(rows: Rows) -> str:
    """The towers of images that are served, and the other types with the reason."""
    served = [row for row in rows if not row["reason"]]
    others = [[f"`{r['type']}`", r["reason"].translate(_ESCAPED)] for r in rows if r["reason"]]
    lines = [
        [f"`{r['type']}`", r["tower"], r["adapter"], ", ".join(f"`{n}`" for n in r["samples"])]
        for r in served
    ]
    return "\n\n".join([
        f"Of {len(rows)} types the towers of {len(served)} are served.",
        table(["type", "tower", "adapter", "a sample"], lines),
        table(["type", "reason"], others),
    ])  # fmt: skip


def widths(rows: Rows) -> str:
    """What narrower models of several types keep of each kind of groups, and what they compute."""
    header = ["type", "adapter", "kept", "largest difference", "warnings"]
    types: dict[str, list[Row]] = {}
    for row in rows:
        types.setdefault(row["type"], []).append(row)
    lines = [
        [
            f"`{name}`",
            own[0]["adapter"],
            ", ".join(f"{r['kept']} of {r['count']} `{r['kind']}`" for r in own),
            f"{max(r['difference'] / r['effect'] for r in own):.0e}".replace("0e+00", "0"),
            "; ".join(line for r in own for line in r["warnings"]) or "none",
        ]
        for name, own in types.items()
    ]
    return table(header, lines)


def llama_cpp(rows: Rows) -> str:
    """What llama.cpp makes of exported files, beside transformers."""
    header = [
        "model", "type", "MiB", "perplexity in llama.cpp", "in transformers", "same text",
        "zeros kept", "entries that differ",
    ]  # fmt: skip
    return table(header, [
        [
            row["model"],
            f"`{row['type']}`",
            f"{row['bytes'] / 2**20:.0f}",
            f"{row['perplexity']:.2f}",
            f"{row['perplexity in transformers']:.2f}",
            f"{row['gaps'].count(None)} of {len(row['gaps'])}",
            f"{row['kept']:,} of {row['zeros']:,}",
            ", ".join(f"`{key.partition('.')[2]}`" for key in row["differing"]),
        ]
        for row in rows
    ])  # fmt: skip


def llama_cpp_families(rows: Rows) -> str:
    """How far llama.cpp's probabilities are from those of transformers."""
    lines = [[row["model"], f"{row['difference']:.0e}"] for row in rows]
    return table(["model", "largest difference"], lines)


def llama_cpp_tokens(rows: Rows) -> str:
    """How many documents have the same tokens in llama.cpp."""
    texts = {"wiki": "Wikipedia", "fortunes": "fortunes", "runs": "runs of spaces"}
    lines = [
        [
            row["tokenizer"], f"{row['tokens']:,}",
            *(f"{row[text]} of {row['documents']}" for text in texts),
        ]
        for row in rows
    ]  # fmt: skip
    return table(["tokenizer", "tokens", *texts.values()], lines)


def deployments(rows: Rows) -> str:
    """What a model buys in transformers and in llama.cpp."""

    def each(row: Row, key: str) -> str:
        return " / ".join(
            f"{found[key]:.{1 if found[key] < 10 else 0}f}" for found in row["threads"].values()
        )

    header = ["model", "runtime", "file, MiB", "memory, MiB", "decoding, tokens/s", "prompts"]
    measured = "wiki" in rows[0]
    return table(header + ["perplexity"] * measured, [
        [
            row["model"],
            row["runtime"],
            f"{row['bytes'] / 2**20:.0f}",
            f"{row['threads']['1']['peak'] / 2**20:.0f}",
            each(row, "decode"),
            each(row, "prefill"),
            *([BOTH(row)] if measured else []),
        ]
        for row in rows
    ])  # fmt: skip


RUNTIMES = {
    "ctranslate2": "CTranslate2",
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
    "vllm": "vLLM",
}


def runtimes(rows: Rows) -> str:
    """What other runtimes make of directories, or why they make nothing of them."""
    versions = {row["runtime"]: row["version"].split("-")[0] for row in rows if "version" in row}
    lines = [
        [
            f"{RUNTIMES[row['runtime']]} {versions.get(row['runtime'], '')}".strip(),
            row["model"],
            row["kind"],
            *(
                [row["error"], "", ""]
                if "error" in row
                else [
                    f"{row['same']} of {row['prompts']}",
                    f"{row['speed']:.0f}",
                    f"{row['bytes'] / 2**20:.0f}",
                ]
            ),
        ]
        for row in rows
    ]
    return table(["runtime", "model", "weights", "same text", "tokens/s", "files, MiB"], lines)


def encoded(rows: Rows) -> str:
    """The similarity and the neighbours on both texts, for each method and pattern."""

    def cell(row: Row) -> str:
        texts = (
            f"{row[f'{text} similarity']:.3f} · {row[f'{text} neighbours']:.2f}"
            for text in ("wiki", "dictionary")
        )
        return " / ".join(texts)

    return pivot(rows, cell)


def encoder_speeds(rows: Rows) -> str:
    """The sentences per second of each model and software, with the ratio to the dense model."""

    def cell(row: Row) -> str:
        return f"{row['speed']:.1f}" + (f" ({row['ratio']:.2f})" if row["model"] != "dense" else "")

    batches = list(dict.fromkeys(row["batch"] for row in rows))
    kinds = list(dict.fromkeys((row["software"], row["model"]) for row in rows))
    found = {(row["software"], row["model"], row["batch"]): cell(row) for row in rows}
    lines = [[*kind, *(found[*kind, batch] for batch in batches)] for kind in kinds]
    return table(["", "model", *(f"batch {batch}" for batch in batches)], lines)


TABLES: Mapping[str, tuple[str, Callable[[Rows], str]]] = {
    "smollm2": ("smollm2", comparison),
    "tasks": ("smollm2", tasks),
    "methods": ("smollm2", shortly),
    "patterns": ("smollm2", patterns),
    "efforts": ("variants own", efforts),
    "variants": ("variants", lambda rows: pivot(rows, BOTH)),
    "own": ("own", lambda rows: pivot(rows, BOTH)),
    "paper": ("paper", lambda rows: pivot(rows, with_error("wiki"))),
    "joint": ("paper", joint),
    "minutes": ("minutes", timed),
    "encoders": ("encoders", encoded),
    "encoder-speed": ("encoder-speed", encoder_speeds),
    "costs": ("costs", costs),
    "memory": ("memory", memories),
    "tokens": ("tokens", tokens),
    "solver": ("solver", solver),
    "endtoend": ("endtoend", against_limit),
    "scaling": ("scaling", scaling),
    "mamba": ("mamba", scans),
    "llm_compressor": ("llm_compressor", beside),
    "stream": ("stream", stream),
    "stream-7b": ("stream-7b", stream),
    "families": ("families", families),
    "towers": ("towers", towers),
    "quantize": ("quantize", quantized),
    "widths": ("widths", widths),
    "llama-cpp": ("llama-cpp", llama_cpp),
    "llama-cpp-families": ("llama-cpp-families", llama_cpp_families),
    "llama-cpp-tokens": ("llama-cpp-tokens", llama_cpp_tokens),
    "runtimes": ("runtimes", runtimes),
    "deployments": ("deployments", deployments),
    "seeds": ("seeds", by_seed),
    "deployments-1.5b": ("deployments-1.5b", deployments),
    "deployments-1.5b-int4": ("deployments-1.5b-int4", deployments),
    "deployments-avx2": ("deployments-avx2", deployments),
    "packed": ("packed", packed_models),
    "packed-threads": ("packed-threads", packed_models),
    "packed-1.5b": ("packed-1.5b", packed_models),
    "products": ("products", products),
    **{
        f"zoo-{name}": (f"zoo-{name}", lambda rows: pivot(rows, with_error("wiki", "dictionary")))
        for name in ("llama", "opt", "bloom", "mamba", "mamba2", "moe")
    },
}
"""The files of each table, and the function that writes it."""
