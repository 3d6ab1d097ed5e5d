"""The report at the beginning of a run."""

from pathlib import Path
from typing import Any

from torch import Tensor

from apt.engine.prepare import Prepared
from apt.engine.text import Text
from apt.output.report import Report, portable, read_report
from apt.text.datasets import digest


def new_report(prepared: Prepared, text: Text) -> Report:
    """A report with the options, the model and the text, but without the hash of the weights."""
    options, shell = prepared.options, prepared.shell
    return Report(
        options=prepared.record(),
        model={
            "reference": portable(options.model),
            "type": shell.config.model_type,
            "adapter": shell.spec.name,
        },
        calibration={
            "source": portable(options.calibration),
            "own_samples": prepared.augmentation.own_samples,
            "bos": text.bos,
            **calibration_of(text.tokens),
        },
        earlier=_earlier(prepared),
    )


def _earlier(prepared: Prepared) -> dict[str, Any]:
    """The report beside the given model; empty if there is none."""
    source = prepared.shell.source
    if source.on_hub or source.gguf:
        return {}
    return read_report(Path(source.location)) or {}


def calibration_of(tokens: Tensor) -> dict[str, Any]:
    """The shape and hash of calibration tokens (samples, seqlen), for the report."""
    return {"shape": list(tokens.shape), "sha256": digest(tokens.cpu())}
