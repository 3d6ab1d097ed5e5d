"""``apt-prune eval``."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import typer

from apt.cli import arguments as args
from apt.errors import AptError
from apt.runs.limits import check_dtype, check_windows

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor, nn

    from apt.checkpoints.model import Model


def evaluate(
    model: str = typer.Argument(help="Directory, hub name, .gguf file or zoo:NAME."),
    data: str = typer.Option(
        "builtin",
        "--data",
        metavar="SRC",
        help="Text; the same values as --calibration of apt-prune prune.",
    ),
    metric: list[str] = args.METRIC,
    dense: str | None = typer.Option(
        None,
        "--dense",
        metavar="MODEL",
        help="The dense model, for the metrics divergence and agreement.",
    ),
    samples: int | None = typer.Option(
        None, "--samples", help="Number of windows; by default all."
    ),
    seqlen: int = typer.Option(
        2048, "--seqlen", help="Tokens of a window; at most the model's positions."
    ),
    adapter: str | None = args.ADAPTER,
    device: str = args.DEVICE,
    dtype: str = args.DTYPE,
    tokenizer: str | None = args.TOKENIZER,
    no_bos: bool = args.NO_BOS,
    stream: bool = typer.Option(
        False, "--stream", help="Read block by block, with one block in memory at a time."
    ),
    as_json: bool = args.JSON,
    trust_remote_code: bool = args.REMOTE,
    revision: str | None = args.REVISION,
    token: str | None = args.TOKEN,
    cache_dir: str | None = args.CACHE_DIR,
) -> None:
    """Measure a model over consecutive windows of text.

    The exit status is 1 if a measure is not a finite number.
    """
    check_windows(samples, seqlen)
    check_dtype(dtype)
    if stream and dtype != "auto":
        raise AptError("--dtype needs the whole model in memory", "leave out --dtype or --stream")
    from apt.cli.output import notice, out, show_json, status_line
    from apt.plugin.registry import registry

    measures = [registry().evaluators.get(name) for name in metric]
    _check_dense([spec.name for spec in measures if spec.dense], dense, stream=stream)
    hub = args.read_hub(revision, token, cache_dir)
    source = args.find_model(model, registry(), hub, trust_remote_code=trust_remote_code)

    from apt.checkpoints.load import load_tokenizer, skeleton
    from apt.checkpoints.stored import open_stored
    from apt.runs.machine import choose_device, read_dtype
    from apt.runs.prepare import capped
    from apt.runs.text import check_vocabulary
    from apt.text.datasets import digest, documents, evaluation_tokens
    from apt.text.special_tokens import bos_of

    device = choose_device(device)
    beside = None
    if dense is not None:
        beside = skeleton(
            args.find_model(dense, registry(), hub, trust_remote_code=trust_remote_code), registry()
        )
    shell = skeleton(source, registry(), adapter)
    if adapter is not None:
        for _, block in shell.adapter.blocks(shell.module):
            shell.adapter.sites(block)  # raises if the adapter is for another family
    if stream:
        open_stored(shell)
    notices: list[str] = []
    seqlen = capped(seqlen, shell, notices.append)
    texts = documents(data, "evaluation", registry(), token)
    reader = load_tokenizer(source, tokenizer)
    bos = None if no_bos else bos_of(reader)
    tokens = evaluation_tokens(reader, texts, samples, seqlen, data, bos)
    check_vocabulary(tokens, shell.module, model)
    _check_vocabularies(shell, beside)
    for line in notices:
        notice(line)
    with status_line("loading the model") as status:
        values = {}
        with ExitStack() as stack:
            given = tokens, read_dtype(dtype), device
            module = stack.enter_context(_runnable(shell, *given, stream))
            others = []
            if beside is not None:
                others = [stack.enter_context(_runnable(beside, *given, stream=False))]
            for spec in measures:
                status.update(f"measuring {spec.name} on {tokens.numel():,} tokens")
                pair = others if spec.dense else []
                values[spec.name] = float(spec.load()(module, tokens, *pair))
    windows = tokens.shape[0]
    if as_json:
        show_json({"model": model, "data": data, **values, "windows": windows,
                   "seqlen": seqlen, "bos": bos, "tokens_sha256": digest(tokens)})  # fmt: skip
    else:
        figures = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
        begin = "" if bos is None else f", each with {reader.bos_token} first"
        out.print(f"{model}: {figures} on {data}, {windows} × {seqlen} tokens{begin}", markup=False)
    _check_finite(values, model, data)


def _check_dense(metrics: Sequence[str], dense: str | None, *, stream: bool) -> None:
    """Raise if a metric needs a dense model that is not given, or that cannot be streamed."""
    if metrics and dense is None:
        raise AptError(
            f"the metric {metrics[0]} compares with the dense model", "add --dense MODEL"
        )
    if dense is not None and not metrics:
        raise AptError("no metric uses --dense", "add --metric divergence or --metric agreement")
    if metrics and stream:
        raise AptError(f"the metric {metrics[0]} needs both models in memory", "leave out --stream")


def _check_vocabularies(model: "Model", dense: "Model | None") -> None:
    """Raise if the models have different numbers of tokens."""
    if dense is None:
        return
    sizes = [m.module.get_input_embeddings().weight.shape[0] for m in (model, dense)]  # type: ignore[operator]
    if sizes[0] != sizes[1]:
        raise AptError(
            f"the dense model has {sizes[1]} tokens, and the model {sizes[0]}",
            "name the model from which it was pruned (--dense)",
        )


def _check_finite(values: Mapping[str, float], model: str, data: str) -> None:
    """Exit with status 1 if a measure is not a finite number."""
    from apt.cli.output import show_error

    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        show_error(f"{model} has no {wrong[0]} on {data}: its outputs there are not finite")
        raise typer.Exit(1)


@contextmanager
def _runnable(
    shell: "Model", tokens: "Tensor", dtype: "torch.dtype | None", device: str, stream: bool
) -> "Iterator[nn.Module]":
    """The model, ready to run on ``tokens``."""
    from apt.checkpoints.load import load
    from apt.evaluation.blockwise import streamed

    if stream:
        with streamed(shell, tokens, device) as module:
            yield module
    else:
        loaded = load(shell, dtype, device)
        with loaded.adapter.running(loaded.module):
            yield loaded.module
