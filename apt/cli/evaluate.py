"""``apt eval``."""

from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from apt.cli import arguments as args
from apt.errors import AptError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor, nn

    from apt.models import Model


def evaluate(
    model: str = typer.Argument(help="Directory, hub name, .gguf file or zoo:NAME."),
    data: str = typer.Option(
        "builtin", "--data", metavar="SRC", help="As --calibration of apt prune."
    ),
    metric: list[str] = args.METRIC,
    samples: int | None = typer.Option(None, "--samples", help="Windows; by default all."),
    seqlen: int = typer.Option(2048, "--seqlen", help="Tokens a window; at most the positions."),
    adapter: str | None = args.ADAPTER,
    device: str = args.DEVICE,
    dtype: str = args.DTYPE,
    tokenizer: str | None = args.TOKENIZER,
    no_bos: bool = args.NO_BOS,
    stream: bool = typer.Option(
        False, "--stream", help="Read block by block; never more than one in memory."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
    trust_remote_code: bool = args.REMOTE,
) -> None:
    """Measure a model over consecutive windows of text."""
    import json

    from apt.cli.output import err, notice, out
    from apt.models import find, load_tokenizer, skeleton
    from apt.plugins import registry
    from apt.run import capped, choose_device, read_dtype
    from apt.specials import bos_of
    from apt.stored import open_stored
    from apt.text import digest, documents, evaluation_tokens

    precision = read_dtype(dtype)
    measures = [registry().evaluators.get(name) for name in metric]
    if (samples is not None and samples < 1) or seqlen < 2:
        raise AptError("--samples must be at least 1 and --seqlen at least 2")
    if stream and precision is not None:
        raise AptError("--dtype needs the whole model in memory", "leave out --stream or it")
    source = find(model, registry(), trust_remote_code=trust_remote_code)
    shell = skeleton(source, registry(), adapter)
    if stream:
        open_stored(shell)
    seqlen = capped(seqlen, shell, notice)
    texts = documents(data, "evaluation", registry())
    reader = load_tokenizer(source, tokenizer)
    bos = None if no_bos else bos_of(reader)
    tokens = evaluation_tokens(reader, texts, samples, seqlen, data, bos)
    with err.status("loading the model") as status:
        values = {}
        with _runnable(shell, tokens, precision, choose_device(device), stream) as module:
            for spec in measures:
                status.update(f"measuring {spec.name} on {tokens.numel():,} tokens")
                values[spec.name] = float(spec.load()(module, tokens))
    windows = tokens.shape[0]
    if as_json:
        record = {"model": model, "data": data, **values, "windows": windows,
                  "seqlen": seqlen, "bos": bos, "tokens_sha256": digest(tokens)}  # fmt: skip
        out.print(json.dumps(record), markup=False)
    else:
        told = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
        begin = "" if bos is None else f", each with {reader.bos_token} first"
        out.print(f"{model}: {told} on {data}, {windows} × {seqlen} tokens{begin}", markup=False)


@contextmanager
def _runnable(
    shell: "Model", tokens: "Tensor", dtype: "torch.dtype | None", device: str, stream: bool
) -> "Iterator[nn.Module]":
    """The model, to be run on ``tokens``."""
    from apt.carried import streamed
    from apt.models import load

    if stream:
        with streamed(shell, tokens, device) as module:
            yield module
    else:
        loaded = load(shell, dtype, device)
        with loaded.adapter.running(loaded.module):
            yield loaded.module
