"""The options of a whole run, from a model on disk to a pruned model on disk."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apt.locations.hub import Hub
from apt.output.report import portable
from apt.planning.plan import Selection
from apt.runs.prune_options import PruneOptions
from apt.solver import Pattern


@dataclass(frozen=True)
class RunOptions:
    """The options of a run.

    Args:
        model: a directory, a hub name, a ``.gguf`` file or ``zoo:NAME``.
        pattern: the pattern of every selected site.
        output: the directory to write.
        prune: the options that the weights depend on beside the calibration text.
        adapter, method: by name; by default by model type, and the most accurate method.
        calibration: the data source of the calibration samples.
        evaluation: a data source to measure on before and after; None measures nothing.
        metrics: the measures, by name.
        allocation: how an unstructured sparsity is shared out among sites, by name.
        samples: calibration samples that are drawn from the data source.
        seqlen: tokens of a sample.
        seed: draws the samples, and the text that the model writes.
        device: ``"auto"`` takes a GPU if there is one.
        dtype: the precision of the weights; ``"auto"`` keeps that of the checkpoint.
        overwrite: whether the output of an earlier run may be replaced.
        max_shard_size: the largest file of weights, as ``"5GB"``; None keeps the files.
        also: kinds of parameters beyond the Linears that are pruned too.
        stream: read and write block by block, with one block in memory at a time.
        resume: continue an interrupted streamed run.
        activations: where calibration activations are kept between two blocks: ``"memory"`` (with
            the model), ``"cpu"``, or, streamed, ``"disk"``.
        tokenizer: a directory or hub name; None takes the model's own.
        trust_remote_code: whether code that comes with the checkpoint may run.
        bos: whether each sample and window begins with the token that the tokenizer begins with.
        hub: how the hub is asked.
        selection: which sites are pruned, and their own patterns.
    """

    model: str
    pattern: Pattern
    output: Path
    prune: PruneOptions = field(default_factory=PruneOptions)
    adapter: str | None = None
    method: str | None = None
    calibration: str = "builtin"
    evaluation: str | None = None
    metrics: tuple[str, ...] = ("perplexity",)
    allocation: str = "uniform"
    samples: int = 128
    seqlen: int = 2048
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    overwrite: bool = False
    max_shard_size: str | None = None
    also: tuple[str, ...] = ()
    stream: bool = False
    resume: bool = False
    activations: str = "memory"
    tokenizer: str | None = None
    trust_remote_code: bool = False
    bos: bool = True
    hub: Hub = field(default_factory=Hub)
    selection: Selection = field(default_factory=Selection)

    def record(self) -> dict[str, Any]:
        """The options as plain values, for the report; those of ``prune`` apart."""
        apart = ("prune", "selection", "hub")  # the hub's token is nobody's business
        plain = {k: v for k, v in vars(self).items() if k not in apart}
        paths = ("model", "calibration", "evaluation", "tokenizer")
        return {
            **plain,
            **{name: portable(plain[name]) if plain[name] else None for name in paths},
            "revision": self.hub.revision,
            "pattern": str(self.pattern),
            "per": getattr(self.pattern, "per", None),
            "output": self.output.name,
            **self.selection.record(),
        }
