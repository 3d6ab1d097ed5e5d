"""``apt eval``."""

import typer

from apt.cli import arguments as args
from apt.errors import AptError


def evaluate(
    model: str = typer.Argument(help="Directory, hub name, .gguf file or zoo:NAME."),
    data: str = typer.Option(
        "builtin", "--data", metavar="SRC", help="As --calibration of apt prune."
    ),
    samples: int | None = typer.Option(None, "--samples", help="Windows; by default all."),
    seqlen: int = typer.Option(2048, "--seqlen", help="Tokens a window; at most the positions."),
    adapter: str | None = args.ADAPTER,
    device: str = args.DEVICE,
    dtype: str = args.DTYPE,
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
    trust_remote_code: bool = args.REMOTE,
) -> None:
    """Measure perplexity over consecutive windows of text."""
    import json

    from apt.cli.output import err, notice, out
    from apt.evaluate import perplexity
    from apt.models import find, load, load_tokenizer, skeleton
    from apt.plugins import registry
    from apt.run import capped, choose_device, read_dtype
    from apt.text import digest, documents, evaluation_tokens

    precision = read_dtype(dtype)
    if (samples is not None and samples < 1) or seqlen < 2:
        raise AptError("--samples must be at least 1 and --seqlen at least 2")
    source = find(model, registry(), trust_remote_code=trust_remote_code)
    shell = skeleton(source, registry(), adapter)
    seqlen = capped(seqlen, shell, notice)
    texts = documents(data, "evaluation", registry())
    tokens = evaluation_tokens(load_tokenizer(source), texts, samples, seqlen, data)
    with err.status("loading the model") as status:
        loaded = load(shell, precision, choose_device(device))
        status.update(f"measuring perplexity on {tokens.numel():,} tokens")
        value = perplexity(loaded.module, tokens)
    windows = tokens.shape[0]
    if as_json:
        record = {"model": model, "data": data, "perplexity": value, "windows": windows,
                  "seqlen": seqlen, "tokens_sha256": digest(tokens)}  # fmt: skip
        out.print(json.dumps(record), markup=False)
    else:
        out.print(f"{model}: perplexity {value:.3f} on {data}, {windows} × {seqlen} tokens",
                  markup=False)  # fmt: skip
