"""The model card of a pruned model, for readers on the hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from apt.checkpoints.copies import CARD, REPORT
from apt.files.writing import write_file
from apt.output.report import Report, levels_by_kind

_NOT_FASTER = "Zeros alone make a model neither smaller nor faster: a runtime must use the pattern."
_TAGS = ("apt-prune", "pruned")


def write_card(directory: Path, report: Report, source: Path | None = None) -> None:
    """Write ``README.md``: a summary of the run, then the card of the original in ``source``."""
    original, reference = _original_card(source), str(report.model["reference"])
    parts = [f"---\n{_front_matter(original, reference)}\n---\n", _summary(report, reference)]
    if original is not None and original.text.strip():
        parts.append(f"## Card of the original\n\n{original.text.strip()}\n")
    write_file(directory / CARD, "\n".join(parts), overwrite=True)


def _original_card(source: Path | None) -> ModelCard | None:
    """The card of the original model; None if there is none or it cannot be read."""
    if source is None or not (source / CARD).is_file():
        return None
    try:
        card: ModelCard = ModelCard.load(source / CARD, ignore_metadata_errors=True)
    except Exception:  # a card with any wrong YAML must not lose the pruned model
        return None
    return card


def _front_matter(original: ModelCard | None, reference: str) -> str:
    """The metadata of this model, with the metadata of the original if they are valid."""
    data: dict[str, Any] = vars(original.data) if original else {}
    data = {key: value for key, value in data.items() if value is not None}
    tags = data.get("tags") or []
    tags = tags if isinstance(tags, list) else [tags]
    data["tags"] = [tag for tag in tags if tag not in _TAGS] + [*_TAGS]
    data.setdefault("library_name", "transformers")
    data.setdefault("pipeline_tag", "text-generation")
    if reference.count("/") == 1:  # a name on the hub
        data["base_model"] = reference
    try:
        return str(ModelCardData(**data))
    except Exception:  # values of the original that are valid YAML, but no metadata
        if original is None:
            raise
        return _front_matter(None, reference)


def _summary(report: Report, reference: str) -> str:
    """The summary of the pruning, and of a later training and reapplication."""
    change = "with zeros again" if report.reapplied else "recovered"
    parts = [_pruning(report, reference)] if report.options else [f"# {reference}, {change}\n"]
    parts += [_training(report)] if report.recovery else []
    parts += [_reapplication(report.reapplied)] if report.reapplied else []
    return "\n".join(parts)


def _reapplication(record: dict[str, Any]) -> str:
    return (
        f"It was fine-tuned ({record['model']}), and its zeros were then set again by the masks "
        f"of {record['masks']}: {record['sparsity']:.2%} of {record['parameters']} matrices.\n"
    )


def _training(report: Report) -> str:
    record, losses = report.recovery, dict(report.recovery["training"]["held_back"])
    training, options = record["training"], record["options"]
    best = training["best"]
    return (
        f"Its kept weights were then trained ({options['kind']}) on {options['calibration']}: "
        f"{best} steps of {training['tokens']:,} tokens lowered the loss on samples held back from "
        f"{losses[0]:.4f} to {losses[best]:.4f}. All {record['zeros']:,} zeros were kept.\n"
    )


def _pruning(report: Report, reference: str) -> str:
    options, text = report.options, report.calibration
    smaller, integers = bool(report.structure), options.get("quantize")
    fitted = bool(report.fit)
    rounds = bool(report.sites) and all(site.pattern == "0" for site in report.sites)
    result = f"{report.sparsity:.2%} of the weights in {len(report.sites)} matrices are zero."
    result = _structure(report) if smaller else result
    verb = "rounded" if rounds else "pruned"
    title = "smaller" if smaller and not rounds else verb
    shape = " × ".join(map(str, text.get("shape", ())))
    error = report.relative_layer_error
    lines = [
        f"# {reference}, {title}",
        "",
        f"[APT](https://arxiv.org/abs/2410.15567) {verb} this model after training: {result}",
        "",
        "| | |",
        "| --- | --- |",
        f"| original | {reference} |",
        *(_level_rows(report) if fitted else []),
        *([] if smaller or rounds or fitted else [f"| pattern | {options.get('pattern')} |"]),
        *([f"| weights | {integers}, scale group {options.get('group')} |"] if integers else []),
        *([] if rounds or fitted else [f"| method | {options.get('method')} |"]),
        *([f"| calibration | {text.get('source')}, {shape} tokens |"] if shape else []),
        *([f"| mean relative layer error | {error:.4f} |"] if report.sites else []),
        *_score_rows(report),
        "",
        *([] if smaller or rounds or fitted else [_NOT_FASTER]),
        f"`{REPORT}` has all options and the record of each matrix.",
    ]
    return "\n".join(lines) + "\n"


def _level_rows(report: Report) -> list[str]:
    """The size of the weights, and the levels of the matrices of each kind."""
    levels = levels_by_kind(report.fit["levels"]).items()
    rows = [f"| size of the weights | {report.fit['size']:,} bytes |"]
    if (speed := report.fit.get("speed")) is not None:
        words = f"{speed['measured']:.1f} tokens/s on {speed['threads']} threads"
        rows.append(f"| decoding, measured where the model was made | {words} |")
    return rows + [f"| {kind} | {found} |" for kind, found in levels]


def _structure(report: Report) -> str:
    blocks, groups = report.structure["blocks"], report.structure["groups"]
    kept = [f"{g['kept']} of {g['of']} {kind}" for kind, g in groups.items() if g["kept"] < g["of"]]
    parts = ", ".join([f"{blocks['kept']} of {blocks['of']} blocks", *kept])
    return f"it keeps {report.structure['share']:.2%} of the parameters of its blocks: {parts}."


def _score_rows(report: Report) -> list[str]:
    """A row for each metric that was measured before and after the run."""
    before, after = report.scores.get("before", {}), report.scores.get("after", {})
    where = f"on {report.scores.get('source')}"
    return [
        f"| {name} {where} | {before[name]:.4g}, now {after[name]:.4g} |"
        for name in before
        if name in after
    ]


_PACKED_MARKERS = "<!-- apt-prune pack -->\n", "<!-- end of apt-prune pack -->\n\n"
_PACKED_TEXT = """## A packed model

The file of the weights has no zeros. [APT](https://arxiv.org/abs/2410.15567) opens it:

```console
pip install apt-prune
```

```python
import apt.runtime

model = apt.runtime.load("DIRECTORY")
```

The weights stay packed in memory. {without} `apt-prune unpack` writes the plain model.
"""
_WITHOUT_APT = (
    "Without APT, the code in this directory opens it, with dense weights in memory: "
    '`AutoModelForCausalLM.from_pretrained("DIRECTORY", trust_remote_code=True)`.'
)
_ONLY_WITH_APT = "Without APT it cannot be opened."


def mark_as_packed(directory: Path, *, has_code: bool) -> None:
    """Add a section to the card: how to open the packed model, with APT and without."""
    path, (start, end) = directory / CARD, _PACKED_MARKERS
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    head, rest = _split_front_matter(text)
    section = _PACKED_TEXT.format(without=_WITHOUT_APT if has_code else _ONLY_WITH_APT)
    write_file(path, f"{head}{start}{section}{end}{rest}", overwrite=True)


def mark_as_unpacked(directory: Path) -> None:
    """Remove the section of `mark_as_packed`, and the card if nothing else is left."""
    path, (start, end) = directory / CARD, _PACKED_MARKERS
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    head, marker, tail = text.partition(start)
    _, closed, rest = tail.partition(end)
    if not marker or not closed:
        return
    if head or rest:
        write_file(path, head + rest, overwrite=True)
    else:
        path.unlink()


def _split_front_matter(text: str) -> tuple[str, str]:
    """The metadata of a card, and the text behind it."""
    marker = "---\n"
    if not text.startswith(marker) or (end := text.find(f"\n{marker}", len(marker) - 1)) < 0:
        return "", text
    place = end + 1 + len(marker)
    return text[:place], text[place:]
