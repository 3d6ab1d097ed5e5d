"""``apt eval``."""

import typer

from apt.cli import arguments as args
from apt.errors import AptError


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
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
    trust_remote_code: bool = args.REMOTE,
) -> None:
    """Measure a model over consecutive windows of text."""
    import json

    from apt.cli.output import err, notice, out
    from apt.models import find, load, load_tokenizer, skeleton
    from apt.plugins import registry
    from apt.run import capped, choose_device, read_dtype
    from apt.text import digest, documents, evaluation_tokens

    precision = read_dtype(dtype)
    measures = [registry().evaluators.get(name) for name in metric]
    if (samples is not None and samples < 1) or seqlen < 2:
        raise AptError("--samples must be at least 1 and --seqlen at least 2")
    source = find(model, registry(), trust_remote_code=trust_remote_code)
    shell = skeleton(source, registry(), adapter)
    seqlen = capped(seqlen, shell, notice)
    texts = documents(data, "evaluation", registry())
    tokens = evaluation_tokens(load_tokenizer(source, tokenizer), texts, samples, seqlen, data)
    with err.status("loading the model") as status:
        loaded = load(shell, precision, choose_device(device))
        values = {}
        for spec in measures:
            status.update(f"measuring {spec.name} on {tokens.numel():,} tokens")
            with loaded.adapter.running(loaded.module):
                values[spec.name] = float(spec.load()(loaded.module, tokens))
    windows = tokens.shape[0]
    if as_json:
        record = {"model": model, "data": data, **values, "windows": windows,
                  "seqlen": seqlen, "tokens_sha256": digest(tokens)}  # fmt: skip
        out.print(json.dumps(record), markup=False)
    else:
        told = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
        out.print(f"{model}: {told} on {data}, {windows} × {seqlen} tokens", markup=False)
