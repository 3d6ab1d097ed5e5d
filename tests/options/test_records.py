"""Reports have the same options from a shell, from a file and from a program."""

import json
import tomllib
from pathlib import Path

import pytest

import apt as library
from apt.output.report import report_of
from tests.helpers import TEXT
from tests.helpers.commands import words

TEXTS = {"samples": 4, "seqlen": 16, "calibration": str(TEXT)}
RUNS = {
    "prune": (library.PruneRun, {
        "sparsity": "0.6", "per": "row", "skip": ("*.k_proj",), "overrides": ("*.q_proj=0.4",),
        "error_aware": False, "damping": 0.02, "method": "ss", "seed": 7,
        "evaluation": str(TEXT), "bos": False, "max_shard_size": "1MB", "save_masks": True,
    }),
    "streamed": (library.PruneRun, {
        "pattern": "2:4", "stream": True, "activations": "disk", "input_correction": 0.3,
        "tuning_epochs": 1, "tuning_rate": 0.02, "random_tokens": 0.5, "quantize": "int4",
        "scale_group": "row", "only": ("*.mlp.*",),
    }),
    "shrink": (library.ShrinkRun, {
        "sizes": {"channels": 32, "heads": 2}, "drop": (1,), "effort": "fast", "compensate": True,
    }),
    "fit": (library.FitRun, {"size": "1MB", "damping": 0.02, "seed": 7, "tuning_epochs": 0}),
    "recover": (library.RecoverRun, {
        "kind": "layers", "blocks": 2, "steps": 8, "batch": 4, "micro_batch": 2, "checks": 2,
        "rate": 1e-2, "validation_share": 0.25, "samples": 32,
    }),
}  # fmt: skip


def recorded(output):
    """The options in a report."""
    report = json.loads(report_of(Path(output)).read_text())
    del report["options"]["output"]
    return report["options"], (report.get("recovery") or {}).get("options")


@pytest.mark.parametrize("name", RUNS)
def test_shell_file_and_program_leave_the_same_record(name, apt, checkpoint, output_of):
    kind, given = RUNS[name]
    command, model = "prune" if name == "streamed" else name, checkpoint("llama")
    if name == "recover":
        model = output_of("prune", model, *words(library.PruneRun, TEXTS), "--method", "wanda")
    given = {"model": str(model), **TEXTS, **given}
    end = ".gguf" if name == "fit" else ""
    shell, file, program = f"shell{end}", f"file{end}", f"program{end}"
    run = apt(command, *words(kind, given), "-o", shell, "--save-config", "run.toml")
    assert run.code == 0, run.err
    assert tomllib.loads(Path("run.toml").read_text())["seqlen"] == 16
    run = apt(command, "--config", "run.toml", "-o", file)
    assert run.code == 0, run.err
    library.run(kind(**given, output=program))
    assert recorded(shell) == recorded(file) == recorded(program)
