"""What the other kind of text loses when experts are chosen by one kind, by both, or protected.

Experts of ``zoo:moe`` (or another mixture) are removed by calibrations with the same number of
samples, and the perplexity is measured on held-out text of each kind::

    OMP_NUM_THREADS=1 python benchmarks/mixes.py --json benchmarks/results/mixes.json
    OMP_NUM_THREADS=1 python benchmarks/mixes.py --few --json benchmarks/results/expert-tokens.json

The second command has few calibration tokens, with several values of ``--expert-tokens``.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import apt
from apt.evaluation import perplexity
from apt.options import ShrinkRun
from apt.plugin.registry import registry


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="zoo:moe")
    parser.add_argument("--kinds", nargs=2, default=["builtin:wiki", "builtin:code"])
    parser.add_argument("--experts", nargs="+", type=int, default=[8, 4])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--eval-samples", type=int, default=112)
    parser.add_argument("--method", default="expert-effect")
    parser.add_argument("--few", action="store_true", help="few tokens, with --expert-tokens")
    parser.add_argument("--seeds", type=int, default=5, help="with --few")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def place_of(model: str) -> str:
    """The directory of a model of the zoo, or the name as it is."""
    name = model.removeprefix("zoo:")
    return model if name == model else str(registry().adapters.get(name).zoo_path())


def scores(place: str | Path, windows: dict[str, torch.Tensor]) -> dict[str, float]:
    """The perplexity on the windows of each kind."""
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    with torch.no_grad():
        return {kind: perplexity(model, tokens) for kind, tokens in windows.items()}


def smaller(run: ShrinkRun, windows: dict[str, torch.Tensor]) -> dict[str, object]:
    """The perplexities of a smaller model, and the numbers of experts that got few tokens."""
    with tempfile.TemporaryDirectory() as folder:
        report = apt.run(replace(run, output=Path(folder) / "small"))
        blocks = report.structure["experts"].values()
        few = sum(len(entry.get("underserved", ())) for entry in blocks)
        left = sum(len(entry.get("unprotected", ())) for entry in blocks)
        perplexities = scores(Path(folder) / "small", windows)
    return {"perplexity": perplexities, "underserved": few, "unprotected": left}


def main() -> None:
    options = arguments()
    one, other = options.kinds
    tokenizer = AutoTokenizer.from_pretrained(place_of(options.model))
    windows = {
        kind: apt.evaluation_tokens(
            tokenizer, kind, samples=options.eval_samples, seqlen=options.seqlen
        )
        for kind in options.kinds
    }
    plain = ShrinkRun(
        model=options.model, method=options.method, samples=options.samples, seqlen=options.seqlen,
        calibration=one,
    )  # fmt: skip
    rows = []
    tell(rows, {"row": "dense", "perplexity": scores(place_of(options.model), windows)})
    if options.few:
        for seed in range(options.seeds):
            for samples in (1, 2):
                for least in (0, 8, 16, 32, 64):
                    run = replace(
                        plain, calibration=f"{one},{other}" if samples > 1 else one,
                        samples=samples, seqlen=64, seed=seed, compensate=False,
                        sizes={"experts": 8}, expert_tokens=least,
                    )  # fmt: skip
                    row = {"row": f"{samples * 64} tokens, least {least}", "seed": seed}
                    tell(rows, row | smaller(run, windows))
    else:
        mixes = {
            one: (one, ()), other: (other, ()), "both": (f"{one},{other}", ()),
            "9:1": (f"{one}=0.9,{other}=0.1", ()),
            f"9:1, {other} protected": (f"{one}=0.9,{other}=0.1", (other,)),
            f"both, {other} protected": (f"{one},{other}", (other,)),
        }  # fmt: skip
        for experts in options.experts:
            for exact in (False, True):
                for name, (text, protect) in mixes.items():
                    run = replace(
                        plain, calibration=text, protect=protect, compensate=exact,
                        sizes={"experts": experts},
                    )  # fmt: skip
                    row = {"row": name, "experts": experts, "exact": exact}
                    tell(rows, row | smaller(run, windows))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def tell(rows: list[dict[str, object]], row: dict[str, object]) -> None:
    rows.append(row)
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
