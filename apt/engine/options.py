"""The options of a whole run, from a model on disk to a pruned model on disk."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apt.engine.prune_options import PruneOptions
from apt.locations.hub import Hub
from apt.output.report import portable
from apt.planning.plan import Selection
from apt.shrinking.options import ShrinkOptions
from apt.solver import Pattern


@dataclass(frozen=True)
class RunOptions:
    """The options of a run.

    Args:
        model: a directory, a hub name, a ``.gguf`` file or ``zoo:NAME``.
        pattern: the pattern of every selected site; None for a smaller model.
        output: the directory to write.
        prune: the options that the weights depend on, beside the calibration text.
        adapter, method: names; by default the adapter for the model type, and the most accurate
            method.
        calibration: the data source of the calibration samples.
        evaluation: a data source to measure on before and after; None measures nothing.
        metrics: the names of the metrics.
        allocation: the name of the distribution of an unstructured sparsity over the sites.
        samples: the number of calibration samples from the data source.
        seqlen: the number of tokens of a sample.
        seed: the seed for the choice of samples and for the text that the model generates.
        device: the device; ``"auto"`` uses a GPU if there is one.
        dtype: the dtype of the weights; ``"auto"`` keeps that of the checkpoint.
        overwrite: True if the output of an earlier run may be replaced.
        max_shard_size: the largest size of a file of weights, such as ``"5GB"``; None keeps the
            files of the checkpoint.
        also: kinds of parameters to prune beside the Linears.
        save_masks: True to write the masks beside the model.
        stream: True to read and write block by block, with one block in memory at a time.
        resume: True to continue an interrupted streamed run.
        activations: the place of the calibration activations between two blocks: ``"memory"``
            (with the model), ``"cpu"``, or, if streamed, ``"disk"``.
        tokenizer: a directory or hub name; None uses the model's tokenizer.
        trust_remote_code: True if code from the checkpoint may run.
        bos: True if each sample and window begins with the token that the tokenizer adds.
        hub: the settings for the hub.
        selection: the sites to prune, and the sites with other patterns.
        shrink: the options of a smaller model; None for a sparse one.
    """

    model: str
    pattern: Pattern | None
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
    save_masks: bool = False
    stream: bool = False
    resume: bool = False
    activations: str = "memory"
    tokenizer: str | None = None
    trust_remote_code: bool = False
    bos: bool = True
    hub: Hub = field(default_factory=Hub)
    selection: Selection = field(default_factory=Selection)
    shrink: ShrinkOptions | None = None

    def record(self) -> dict[str, Any]:
        """The options without those of ``prune``, as values for JSON, for the report."""
        omitted = ("prune", "selection", "hub", "shrink")  # the token for the hub is secret
        plain = {k: v for k, v in vars(self).items() if k not in omitted}
        paths = ("model", "calibration", "evaluation", "tokenizer")
        return {
            **plain,
            **{name: portable(plain[name]) if plain[name] else None for name in paths},
            "revision": self.hub.revision,
            "pattern": str(self.pattern) if self.pattern else None,
            "output": self.output.name,
            **self.selection.record(),
            **({"shrink": self.shrink.record()} if self.shrink else {}),
        }
