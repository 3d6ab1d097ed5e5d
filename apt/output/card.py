"""The model card of a pruned model, for readers on the hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from apt.checkpoints.copies import CARD, REPORT
from apt.output.report import Report

_NO_FASTER = "Zeros alone make a model neither smaller nor faster: a runtime must use the pattern."
_TAGS = ("apt-prune", "pruned")


def write_card(directory: Path, report: Report, source: Path | None = None) -> None:
    """Write ``README.md``: a summary of the run, then the card of the original model.

    Args:
        directory: the pruned model.
        report: the record of the run.
        source: the directory of the original model. Its card is kept, with licence and languages.
    """
    original, reference = _original(source), str(report.model["reference"])
    parts = [f"---\n{_front_matter(original, reference)}\n---\n", _about(report, reference)]
    if original is not None and original.text.strip():
        parts.append(f"## Card of the original\n\n{original.text.strip()}\n")
    (directory / CARD).write_text("\n".join(parts), encoding="utf-8")


def _original(source: Path | None) -> ModelCard | None:
    """The card of the original model; None if there is none or it cannot be read."""
    if source is None or not (source / CARD).is_file():
        return None
    try:
        card: ModelCard = ModelCard.load(source / CARD, ignore_metadata_errors=True)
    except Exception:  # whatever its YAML holds, a card must not cost a pruned model
        return None
    return card


def _front_matter(original: ModelCard | None, reference: str) -> str:
    """The metadata of the original with those of this model, or the latter alone."""
    data: dict[str, Any] = vars(original.data) if original else {}
    data = {key: value for key, value in data.items() if value is not None}
    data["tags"] = [tag for tag in _as_list(data.get("tags")) if tag not in _TAGS] + [*_TAGS]
    data.setdefault("library_name", "transformers")
    data.setdefault("pipeline_tag", "text-generation")
    if reference.count("/") == 1:  # a name on the hub
        data["base_model"] = reference
    try:
        return str(ModelCardData(**data))
    except Exception:  # as above: some values are valid YAML, but no metadata
        if original is None:
            raise
        return _front_matter(None, reference)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _about(report: Report, reference: str) -> str:
    """The summary of a pruning, if APT pruned the model, and of a recovery."""
    pruned = [_pruned(report, reference)] if report.options else [f"# {reference}, recovered\n"]
    return "\n".join(pruned + ([_recovered(report)] if report.recovery else []))


def _recovered(report: Report) -> str:
    record, losses = report.recovery, dict(report.recovery["training"]["held_back"])
    training, options = record["training"], record["options"]
    best = training["best"]
    return (
        f"Its kept weights were then trained ({options['kind']}) on {options['calibration']}: "
        f"{best} steps of {training['tokens']:,} tokens lowered the loss on samples held back from "
        f"{losses[0]:.4f} to {losses[best]:.4f}. All {record['zeros']:,} zeros were kept.\n"
    )


def _pruned(report: Report, reference: str) -> str:
    options, text = report.options, report.calibration
    small = bool(report.structure)
    done = _smaller(report) if small else _sparse(report)
    lines = [
        f"# {reference}, {'smaller' if small else 'pruned'}",
        "",
        f"[APT](https://arxiv.org/abs/2410.15567) pruned this model after training: {done}",
        "",
        "| | |",
        "| --- | --- |",
        f"| original | {reference} |",
        *([] if small else [f"| pattern | {options['pattern']} |"]),
        f"| method | {options['method']} |",
        f"| calibration | {text['source']}, {_shape(text['shape'])} tokens |",
        f"| mean relative layer error | {report.relative_layer_error:.4f} |",
        *_scores(report),
        "",
        *([] if small else [_NO_FASTER]),
        f"`{REPORT}` has all options and the record of each matrix.",
    ]
    return "\n".join(lines) + "\n"


def _sparse(report: Report) -> str:
    return f"{report.sparsity:.2%} of the weights in {len(report.sites)} matrices are zero."


def _smaller(report: Report) -> str:
    blocks, groups = report.structure["blocks"], report.structure["groups"]
    kept = [f"{g['kept']} of {g['of']} {kind}" for kind, g in groups.items() if g["kept"] < g["of"]]
    parts = ", ".join([f"{blocks['kept']} of {blocks['of']} blocks", *kept])
    return f"it keeps {report.structure['share']:.2%} of the parameters of its blocks: {parts}."


def _shape(shape: list[int]) -> str:
    return " × ".join(map(str, shape))


def _scores(report: Report) -> list[str]:
    """A row for each metric that was measured before and after."""
    before, after = report.scores.get("before", {}), report.scores.get("after", {})
    where = f"on {report.scores.get('source')}"
    return [
        f"| {name} {where} | {before[name]:.4g}, now {after[name]:.4g} |"
        for name in before
        if name in after
    ]
