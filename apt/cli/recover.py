"""``apt-prune recover``."""

import re
from pathlib import Path

import typer

from apt.cli import arguments as args
from apt.cli import run_arguments as run
from apt.engine.limits import check_seed, check_shard_size, check_windows
from apt.errors import AptError

_TRAINING = "Training"


def recover(
    model: str = typer.Argument(
        help="A pruned or smaller model: a directory, or a name on the hub."
    ),
    kind: str | None = typer.Option(
        None, "--kind", metavar="NAME", rich_help_panel=_TRAINING,
        help="spp, lora, layers or distill, or another kind listed by apt-prune methods. By "
        "default distill.",
    ),
    steps: int | None = typer.Option(
        None, "--steps", metavar="N", rich_help_panel=_TRAINING,
        help="Number of training steps; by default 1000.",
    ),
    tokens: str | None = typer.Option(
        None, "--tokens", metavar="N|auto", rich_help_panel=_TRAINING,
        help="Number of training tokens, in place of --steps. auto trains on the text once at "
        "most, and ends when more tokens would hardly lower the loss.",
    ),
    minutes: float | None = typer.Option(
        None, "--minutes", metavar="M", rich_help_panel=_TRAINING,
        help="Time for the training, in place of --steps.",
    ),
    rate: float | None = typer.Option(
        None, "--rate", metavar="R", rich_help_panel=_TRAINING,
        help="Highest learning rate; the default depends on the kind.",
    ),
    batch: int = typer.Option(
        8, "--batch", metavar="N", rich_help_panel=_TRAINING, help="Samples of a step."
    ),
    samples_at_once: int = typer.Option(
        8, "--samples-at-once", metavar="N", rich_help_panel=_TRAINING,
        help="Samples that run together. Fewer need less memory; the result is the same.",
    ),
    held_back: float = typer.Option(
        0.05, "--held-back", metavar="S", rich_help_panel=_TRAINING,
        help="Share of the samples that is held back to measure the loss; at most 64.",
    ),
    checks: int = typer.Option(
        10, "--checks", metavar="N", rich_help_panel=_TRAINING,
        help="Number of times that the loss is measured, and the state is saved.",
    ),
    patience: int = typer.Option(
        3, "--patience", metavar="N", rich_help_panel=_TRAINING,
        help="Measurements without a lower loss after which the training ends.",
    ),
    optimizer: str = typer.Option(
        "adamw_torch", "--optimizer", metavar="NAME", rich_help_panel=_TRAINING,
        help="Optimizer of transformers, for example adafactor or adamw_bnb_8bit, whose states "
        "are smaller.",
    ),
    checkpointing: bool = typer.Option(
        False, "--gradient-checkpointing", rich_help_panel=_TRAINING,
        help="Compute activations again in the backward pass, which needs less memory.",
    ),
    rank: int | None = typer.Option(
        None, "--rank", metavar="N", rich_help_panel=_TRAINING,
        help="Rank of the adapters of spp and lora; by default 16.",
    ),
    dropout: float = typer.Option(
        0.0, "--dropout", metavar="P", rich_help_panel=_TRAINING,
        help="Dropout of the inputs of the adapters of spp; 0.05 in the authors' code.",
    ),
    blocks: int = typer.Option(
        3, "--blocks", metavar="N", rich_help_panel=_TRAINING,
        help="Number of last blocks that layers trains.",
    ),
    move_masks: bool = typer.Option(
        False, "--move-masks", rich_help_panel=_TRAINING,
        help="Exchange pruned weights during the training, with exact counts (kinds distill and "
        "layers).",
    ),
    dense: str | None = typer.Option(
        None, "--dense", metavar="MODEL", rich_help_panel=_TRAINING,
        help="The dense model, for distill; by default the one that the report names.",
    ),
    hidden: float = typer.Option(
        1.0, "--hidden", metavar="W", rich_help_panel=_TRAINING,
        help="Weight of the error of the last hidden states in the loss of distill.",
    ),
    top: int = typer.Option(
        64, "--top", metavar="N", rich_help_panel=_TRAINING,
        help="Logits of the dense model that distill keeps for each token.",
    ),
    window: int | None = typer.Option(
        None, "--window", metavar="N", rich_help_panel=_TRAINING,
        help="Train N neighbouring blocks at a time, from the first to the last, which needs less "
        "memory; by default all together.",
    ),
    calibration: str | None = run.CALIBRATION,
    samples: int | None = typer.Option(
        None, "--samples", metavar="N", rich_help_panel=run.CALIBRATION_GROUP,
        help="Samples of the text at most; by default as many as the steps use, up to 10,000.",
    ),
    seqlen: int = typer.Option(
        512, "--seqlen", rich_help_panel=run.CALIBRATION_GROUP,
        help="Tokens of a sample; at most the model's positions.",
    ),
    no_bos: bool = args.NO_BOS,
    seed: int = typer.Option(
        0, "--seed", rich_help_panel=run.CALIBRATION_GROUP,
        help="Seed for the order of the samples and for new adapters.",
    ),
    evaluation: str | None = run.EVALUATION,
    metric: list[str] = args.METRIC,
    adapter: str | None = args.ADAPTER,
    tokenizer: str | None = args.TOKENIZER,
    trust_remote_code: bool = args.REMOTE,
    revision: str | None = args.REVISION,
    token: str | None = args.TOKEN,
    cache_dir: str | None = args.CACHE_DIR,
    device: str = args.DEVICE,
    resume: bool = typer.Option(
        False, "--resume", rich_help_panel=args.RUNNING,
        help="Continue an interrupted training of the same command.",
    ),
    output: Path | None = run.OUTPUT,
    overwrite: bool = run.OVERWRITE,
    max_shard_size: str | None = run.MAX_SHARD_SIZE,
    save_masks: bool = run.SAVE_MASKS,
    plot: Path | None = typer.Option(
        None, "--plot", metavar="FILE", rich_help_panel=run.OUTPUT_GROUP,
        help="Draw the loss into a .png, .svg or .pdf file (needs matplotlib).",
    ),
    as_json: bool = args.JSON,
) -> None:  # fmt: skip
    """Train the kept weights of a pruned model; every zero stays zero.

    For example: apt-prune recover ./pruned --minutes 30 --output ./recovered
    """
    from apt.recovery.options import RecoverOptions

    wish = RecoverOptions(
        steps, _amount(tokens), minutes, rate, batch, samples_at_once, held_back, checks, patience,
        optimizer, checkpointing, rank, dropout, blocks, move_masks, hidden, top, window,
    )  # fmt: skip
    wish.check()
    check_windows(samples, seqlen)
    check_seed(seed)
    check_shard_size(max_shard_size)
    run.check_plot(plot, model, calibration, evaluation, dense, overwrite=overwrite)
    _check_packages()
    from apt.plugin.registry import registry

    defaults = run.Defaults()
    metrics = run.metric_names(metric)
    if kind is not None:
        kind = registry().recoveries.get(kind).name
    hub = args.read_hub(revision, token, cache_dir)
    args.find_model(model, registry(), hub, trust_remote_code=trust_remote_code)

    from apt.cli.recovering import start
    from apt.engine.recover_options import RecoverRunOptions

    options = RecoverRunOptions(
        model,
        output or defaults.choose("output", run.directory(model, "recovered")),
        kind,
        wish,
        dense,
        calibration or defaults.choose("calibration", "builtin"),
        evaluation,
        metrics,
        samples,
        seqlen,
        seed,
        save_masks,
        adapter,
        tokenizer,
        device,
        overwrite,
        resume,
        max_shard_size,
        trust_remote_code,
        not no_bos,
        hub,
    )
    start(options, registry(), defaults.lines, plot, as_json=as_json)


def _amount(text: str | None) -> int | str | None:
    """The value of ``--tokens``."""
    if text is None or text == "auto":
        return text
    if not re.fullmatch(r"[0-9]+(_[0-9]+)*", text):
        raise AptError(f"--tokens {text} is not a number of tokens", "write 1000000, or auto")
    return int(text)


def _check_packages() -> None:
    """Raise if a package that trains is missing."""
    from importlib.util import find_spec

    missing = [name for name in ("accelerate", "peft", "scipy") if find_spec(name) is None]
    if missing:
        raise AptError(f"recover needs {' and '.join(missing)}", "pip install 'apt-prune[recover]'")
