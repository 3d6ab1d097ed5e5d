"""The pictures of the documents, from the figures in ``benchmarks/results``::

python benchmarks/plots.py        # writes docs/images
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

ROOT = Path(__file__).parent.parent
# Colours of Okabe and Ito, which remain apart with colour blindness; markers differ as well.
LINES = (
    ("wanda", "Wanda", "#999999", "s"),
    ("ss", "SparseGPT", "#E69F00", "^"),
    ("admm", "APT", "#0072B2", "o"),
    ("admm/allocation=auto", "APT, --allocation auto", "#009E73", "D"),
)
SPARSITIES = ("0.6", "0.7", "0.8")


def sparsity(record: dict[str, Any], path: Path) -> None:
    """Perplexity against sparsity, method by method, on both texts."""
    found = {(row["method"], row["pattern"]): row for row in record["rows"]}
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    texts = (("wiki", "Wikipedia"), ("fortunes", "quotations and jokes"))
    for axes, (text, title) in zip(panels, texts, strict=True):
        for method, name, colour, marker in LINES:
            values = [found[method, pattern][text] for pattern in SPARSITIES]
            places = [100 * float(pattern) for pattern in SPARSITIES]
            axes.plot(places, values, color=colour, marker=marker, label=name)
        axes.axhline(record["dense"][text], color="black", linewidth=1, linestyle=":")
        axes.annotate("dense", (60, record["dense"][text]), va="bottom", fontsize="small")
        axes.set_yscale("log")
        axes.set_xticks([60, 70, 80], ["60 %", "70 %", "80 %"])
        axes.set_xlabel("zeros")
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("perplexity of SmolLM2-135M")
    panels[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    images = ROOT / "docs/images"
    images.mkdir(exist_ok=True)
    record = json.loads((ROOT / "benchmarks/results/allocation.json").read_text(encoding="utf-8"))
    sparsity(record, images / "sparsity.png")


if __name__ == "__main__":
    main()
