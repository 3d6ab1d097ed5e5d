"""The options of a whole recovery, from a pruned model on disk to a recovered one on disk."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apt.locations.hub import Hub
from apt.output.report import portable
from apt.recovery.options import RecoverOptions


@dataclass(frozen=True)
class RecoverRunOptions:
    """The options of a run of ``apt-prune recover``.

    Args:
        model: the pruned model: a directory or a hub name.
        output: the directory to write.
        kind: the name of the kind of recovery; None for the default of the model.
        recover: the options of the training.
        dense: the dense model, for kinds that need it; None for the one in the model's report.
        calibration: the data source of the training text.
        evaluation: a data source to measure on before and after; None measures nothing.
        metrics: the names of the metrics.
        samples: the number of samples of the training text at most; None for what the steps use.
        seqlen: the number of tokens of a sample.
        seed: the seed for the choice and the order of the samples.
        save_masks: True to write the masks beside the model.
        adapter, tokenizer, device, overwrite, resume, max_shard_size, trust_remote_code, bos, hub:
            as in `apt.engine.options.RunOptions`.
    """

    model: str
    output: Path
    kind: str | None = None
    recover: RecoverOptions = field(default_factory=RecoverOptions)
    dense: str | None = None
    calibration: str = "builtin"
    evaluation: str | None = None
    metrics: tuple[str, ...] = ("perplexity",)
    samples: int | None = None
    seqlen: int = 512
    seed: int = 0
    save_masks: bool = False
    adapter: str | None = None
    tokenizer: str | None = None
    device: str = "auto"
    overwrite: bool = False
    resume: bool = False
    max_shard_size: str | None = None
    trust_remote_code: bool = False
    bos: bool = True
    hub: Hub = field(default_factory=Hub)

    def record(self) -> dict[str, Any]:
        """The options as values for JSON, for the report."""
        omitted = ("recover", "hub", "overwrite", "resume", "output")
        plain = {k: v for k, v in vars(self).items() if k not in omitted}
        paths = ("model", "calibration", "evaluation", "tokenizer", "dense")
        return {
            **plain,
            **{name: portable(plain[name]) if plain[name] else None for name in paths},
            "revision": self.hub.revision,
            **self.recover.record(),
        }
