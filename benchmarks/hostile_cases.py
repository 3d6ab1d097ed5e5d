"""The cases of `hostile.py`: damaged checkpoints, texts, options, paths and environments."""

import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

QUICK = ["--samples", "2", "--seqlen", "32", "--method", "wanda", "-o", "out"]


@dataclass
class Case:
    """A command in a separate folder.

    Attributes:
        group, name: the group of the case, and a description.
        arguments: the arguments of the command line.
        prepare: a function that prepares the folder, which has the model ``m`` and the text
            ``t.txt``.
        environment: additional environment variables. With them the case runs in a new process.
        shell: text after the command in a shell, such as ``"> /dev/full"``.
        before: text before the command in a shell, such as ``"ulimit -f 2;"``.
        signal: a signal that is sent after ``seconds``.
        may: the allowed exit statuses beside 0 and 2.
        refused: True if the exit status must be 2.
        keeps: what may exist after exit status 2, since it is complete or can be continued.
        check: a function that returns a fault of the folder after an exit status of 0 or that of a
            signal; empty if there is none.
    """

    group: str
    name: str
    arguments: list[str]
    prepare: Callable[[Path], None] = lambda folder: None
    environment: dict[str, str] = field(default_factory=dict)
    shell: str = ""
    before: str = ""
    signal: int = 0
    seconds: float = 0.0
    may: tuple[int, ...] = ()
    refused: bool = False
    keeps: tuple[str, ...] = ()
    check: Callable[[Path], str] = lambda folder: ""


def options() -> Iterator[Case]:
    """Values that options must refuse."""
    numbers = ["-1", "0", "1000000000000", "x", "1.5", "nan", ""]
    values = {
        "--samples": numbers,
        "--seqlen": [*numbers, "1", "2"],
        "--seed": ["-1", "x", str(10**23), str(-(10**23))],
        "--own-samples": ["-1", "999999999", "x"],
        "--damping": ["-1", "nan", "inf", "1e308", "0", "x"],
        "--block-size": ["0", "-1", "1000000000", "x"],
        "--sparsity": ["-1", "0", "1", "1.5", "nan", "1e-12", "abc", "2:4", "", "0.5x", "1e400"],
        "--pattern": [
            "0:4",
            "4:4",
            "5:4",
            "a:b",
            "2:0",
            "2:7",
            "2:4:8",
            "-2:4",
            "",
            "2",
            "999:1000",
            "auto:8",
            "auto:0",
            "auto:-1",
            "auto:",
            "auto:8@",
            "auto:8@2",
            "auto:8@0.5",
            "auto:7@0.5",
            "auto:8@auto:8@0.5",
        ],
        "--per": ["x", "row", "layer", "block", "model", ""],
        "--method": ["nonsense", "", "WANDA"],
        "--effort": ["x", "best"],
        "--device": ["x", "meta", "cuda", "cuda:99", "", "cpu:0"],
        "--dtype": ["x", "int8", "float16", ""],
        "--metric": ["x", ""],
        "--allocation": ["x", "owl", "auto", "atp", ""],
        "--adapter": ["x", "mamba", "opt", "auto", ""],
        "--also": ["x", "conv1d"],
        "--only": ["nothing*", "*.q_proj", "[", ""],
        "--skip": ["*", "*.k_proj", "[", ""],
        "--override": ["x", "*.q_proj", "*.q_proj=", "=2:4", "*.q_proj=9", "nothing*=0.5"],
        "--max-shard-size": ["x", "0", "-1", "1KB"],
        "--tokenizer": ["nowhere", "t.txt", ""],
        "--calibration": ["nowhere", "", "nowhere.txt", "/", "."],
        "--eval": ["nowhere", "", "nowhere.txt", "/"],
        "--activations": ["x", "disk"],
    }
    for option, given in values.items():
        for value in given:
            for mode in ([], ["--stream"]) if option in ("--only", "--skip") else ([],):
                command = ["prune", "m", *QUICK, option, value, *mode]
                yield Case("options", f"{option} {value!r} {' '.join(mode)}", command)
    for command in (["prune"], ["eval"], ["inspect"], ["verify"], ["convert"], ["check"],
                    ["nonsense"], ["eval", "m", "--samples", "0"],
                    ["inspect", "m", "--samples", "0"], ["inspect", "m", "--seqlen", "-3"],
                    ["verify", "m"], ["verify", "nowhere"], ["convert", "m", "-o", "m"],
                    ["check", "nonsense"], ["eval", "m", "--adapter", "mamba"],
                    ["prune", "m", "--sparsity", "0.5", "--pattern", "2:4"],
                    *(["prune", "m", *QUICK, *more.split()] for more in (
                        "--pattern auto:8 --sparsity 0.999", "--pattern auto:8 --sparsity x",
                        "--sparsity 0.999 --allocation auto", "--sparsity 0.001 --allocation auto",
                        "--sparsity 0.5 --per block --allocation owl",
                        "--sparsity 0.99 --allocation atp", "--sparsity 0.95 --allocation owl",
                        "--sparsity 0.995 --allocation alphapruning",
                        "--sparsity 0.6 --allocation atp --stream", "--sparsity 0.6 --pack x",
                        "--sparsity 0.6 --allocation auto --stream", "--pattern 2:4 --per model",
                    ))):  # fmt: skip
        yield Case("options", " ".join(command), command, may=(1,))


def smaller() -> Iterator[Case]:
    """Wishes of smaller models that cannot be met, and damaged checkpoints."""
    quick = ["shrink", "m", "--samples", "2", "--seqlen", "32", "-o", "out"]
    values = {
        "--keep": ["-1", "0", "1", "1.5", "nan", "inf", "x", "", "1e-9", "0.999999", "0.5"],
        "--size": ["channels", "channels=", "channels=0", "channels=-1", "channels=x", "=1",
                   "channels=999999", "rooms=3", "heads=1", "channels=1=2", "", "heads=1.5"],
        "--blocks": ["0", "-1", "999", "x", "1"],
        "--drop": ["-1", "99", "x", "0", "1"],
        "--multiple-of": ["0", "-1", "100000", "x", "7"],
        "--budget": ["money", "latency", ""],
        "--method": ["angular", "loss", "llm-pruner", "flap", "admm", "nonsense", ""],
        "--evaluations": ["0", "-1", "x"],
        "--minutes": ["-1", "nan", "0", "inf", "x"],
        "--plot": ["x.png", "x.gif", "none/x.png", ""],
        "--calibration": ["nowhere", "t.txt", ""],
        "--pattern": ["2:4"],
    }  # fmt: skip
    for option, given in values.items():
        for value in given:
            yield Case("smaller", f"{option} {value!r}", [*quick, option, value])
    for words in (
        "--width-only --depth-only", "--search --stream", "--search --evaluations 1 --minutes 0.01",
        "--drop 0 --drop 1 --drop 2 --drop 3", "--drop 0 --blocks 1", "--keep 0.5 --blocks 1",
        "--depth-only --size channels=8", "--method angular --width-only", "--resume",
        "--method joint --depth-only", "--search --method loss", "--stream --method llm-pruner",
    ):  # fmt: skip
        yield Case("smaller", words, [*quick, *words.split()])
    for key in ("intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"):
        for value in (None, 0, -1, 1, 2**70, "x", 1.5):
            change = damaged_config(lambda c, k=key, v=value: c.update({k: v}))
            yield Case("smaller", f"{key} = {value!r}", [*quick], change, may=(1,))


def recoveries() -> Iterator[Case]:
    """Recoveries, laws and masks with wrong options, models, reports and files."""
    quick = ["recover", "m", "--calibration", "t.txt", "--seqlen", "16", "--batch", "2",
             "--checks", "2", "-o", "out"]  # fmt: skip
    short = [*quick, "--steps", "2", "--kind", "layers"]
    values = {
        "--steps": ["0", "-1", "x", "1.5", ""],
        "--tokens": ["0", "-1", "x", "auto", "AUTO", "1e6", "", "64"],
        "--minutes": ["0", "-1", "nan", "inf", "x", "0.001"],
        "--kind": ["spp", "lora", "distill", "nonsense", "", "LAYERS"],
    }
    for option, given in values.items():
        for value in given:
            kind = [] if option == "--kind" else ["--kind", "layers"]
            yield Case("recoveries", f"{option} {value!r}", [*quick, *kind, option, value], sparse)
    values = {
        "--rate": ["0", "-1", "nan", "inf", "1e30", "1e-30", "x"],
        "--batch": ["0", "-1", "x", "100000"],
        "--micro-batch": ["0", "-1", "1", "x"],
        "--validation-share": ["0", "1", "-1", "nan", "0.99", "1e-9", "x"],
        "--checks": ["0", "-1", "1000", "x"],
        "--patience": ["0", "-1", "x"],
        "--optimizer": ["nonsense", "", "adafactor", "adamw_bnb_8bit", "sgd"],
        "--rank": ["0", "-1", "x"],
        "--blocks": ["0", "-1", "999", "x"],
        "--hidden": ["-1", "nan", "inf", "x"],
        "--top": ["0", "-1", "x"],
        "--samples": ["0", "-1", "1", "2", "x"],
        "--seqlen": ["0", "1", "2", "-1", "1000000", "x"],
        "--seed": ["-1", "x", str(10**23)],
        "--calibration": ["nowhere", "", "nowhere.txt", "/"],
        "--dense": ["nowhere", "", "m", "t.txt"],
        "--plot": ["x.gif", "none/x.png", ""],
        "--max-shard-size": ["x", "1KB"],
    }  # fmt: skip
    for option, given in values.items():
        for value in given:
            yield Case("recoveries", f"{option} {value!r}", [*short, option, value], sparse)
    for words in ("--gradient-checkpointing", "--move-masks", "--resume", "--save-masks"):
        yield Case("recoveries", words, [*short, words], sparse)
    yield Case("recoveries", "masks of adapters that move",
               [*quick, "--steps", "2", "--kind", "spp", "--move-masks"], sparse)  # fmt: skip
    yield Case("recoveries", "a dense model", short)
    yield Case("recoveries", "a dense model, spp", [*short[:-1], "spp"])
    for name, text in (("empty", ""), ("list", "[]"), ("half", '{"options": {'), ("no sites",
                       '{"options": {}, "skipped": []}'), ("structure",
                       '{"options": {}, "skipped": [], "structure": {"share": "x"}}')):  # fmt: skip
        for command in (short, ["law", "m"], ["reapply", "m", "m", "-o", "out"]):
            yield Case("recoveries", f"{command[0]} with a report: {name}", command,
                       lambda folder, t=text: sparse(folder, t), may=(1,))  # fmt: skip
    for masks in ("m", "t.txt", "nowhere", "m/model.safetensors", "masks.safetensors", ""):
        yield Case("recoveries", f"reapply {masks!r}", ["reapply", masks, "m", "-o", "out"], sparse)
    for more in (["--threshold", "0"], ["--tokens", "nan"], ["--resamples", "-1"], ["nowhere"]):
        yield Case("recoveries", f"law {more}", ["law", "m", *more], sparse)


def sparse(folder: Path, report: str | None = None) -> None:
    """Set half of the weights of the model ``m`` to zero, and write a report beside it."""
    rewrite(lambda found: found.update(
        {n: t * (torch.arange(t.numel()).view(t.shape) % 2) for n, t in found.items()
         if "proj" in n}))(folder)  # fmt: skip
    if report is not None:
        (folder / "m/apt_report.json").write_text(report)
    save_file({"m": torch.zeros(3)}, folder / "masks.safetensors", {"shapes": "{}"})


def damaged_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A function that changes the model's ``config.json``, or replaces it by a text."""

    def prepare(folder: Path) -> None:
        path = folder / "m/config.json"
        config = json.loads(path.read_text())
        changed = change(config)
        path.write_text(changed if isinstance(changed, str) else json.dumps(config))

    return prepare


def configurations() -> Iterator[Case]:
    """Invalid configurations, and those of models that are not decoders."""
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "vocab_size", "max_position_embeddings", "model_type", "architectures", "dtype",
            "rms_norm_eps", "rope_parameters", "num_key_value_heads", "hidden_act")  # fmt: skip
    values = (None, 0, -1, 1, 2**70, "x", [], {}, 1.5)
    draw = random.Random(0)
    pairs = [(key, value) for key in keys for value in values]
    cases: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
        (f"{key} = {value!r}", lambda c, k=key, v=value: c.update({k: v}))
        for key, value in draw.sample(pairs, 40)
    ]
    texts = {"empty": "", "half": '{"model_type": "llama", ', "list": "[]", "null": "null",
             "deep": "[" * 100_000, "binary": "\x00\x01", "nested": '{"a":' * 50_000}  # fmt: skip
    cases += [(name, lambda c, t=text: t) for name, text in texts.items()]
    kinds = ("t5", "bert", "vit", "clip", "whisper", "bart", "nonsense", "gpt2", "rwkv")
    cases += [(f"type {kind}", lambda c, k=kind: json.dumps({"model_type": k})) for kind in kinds]
    for scheme in ("gptq", "awq", "bitsandbytes", "fp8"):
        quantised = {"quantization_config": {"quant_method": scheme, "bits": 4}}
        cases.append((f"quantised by {scheme}", lambda c, q=quantised: c.update(q)))
    for name, change in cases:
        for command in (["prune", "m", *QUICK], ["eval", "m", "--data", "t.txt", "--seqlen", "32"]):
            yield Case(
                "configurations", f"{command[0]} {name}", command, damaged_config(change), may=(1,)
            )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "m/model.safetensors")


def rewrite(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        found = tensors(folder)
        change(found)
        save_file(found, folder / "m/model.safetensors", metadata={"format": "pt"})

    return prepare


def raw(
    change: Callable[[bytes], bytes], name: str = "model.safetensors"
) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        path = folder / "m" / name
        path.write_bytes(change(path.read_bytes()))

    return prepare


def flipped(seed: int, name: str) -> Callable[[Path], None]:
    """A function that changes one bit of a file."""

    def change(data: bytes) -> bytes:
        draw, changed = random.Random(seed), bytearray(data)
        changed[draw.randrange(min(len(data), 4000))] ^= 1 << draw.randrange(8)
        return bytes(changed)

    return raw(change, name)


def pickled(folder: Path) -> None:
    """Replace the weights by a pickle file that would run a command."""

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {folder}/pwned",)

    torch.save({"evil": Evil()}, folder / "m/pytorch_model.bin")
    (folder / "m/model.safetensors").unlink()


def link_out(folder: Path) -> None:
    (folder / "secret").write_text("secret")
    (folder / "m/notes.txt").symlink_to(folder / "secret")


def checkpoints() -> Iterator[Case]:
    """Weights and tokenizers that are damaged, mixed, incomplete or hostile."""
    first = "model.layers.0.mlp.up_proj.weight"
    norm, table = "model.norm.weight", "model.embed_tokens.weight"
    nan = torch.tensor(float("nan"))
    cases: dict[str, Callable[[Path], None]] = {
        "empty": raw(lambda b: b""),
        "half": raw(lambda b: b[: len(b) // 2]),
        "one byte short": raw(lambda b: b[:-1]),
        "one byte more": raw(lambda b: b + b"x"),
        "LFS pointer": raw(lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:1"),
        "no weights": lambda f: (f / "m/model.safetensors").unlink(),
        "missing tensor": rewrite(lambda t: t.pop(first)),
        "more tensors": rewrite(lambda t: t.update(more=torch.ones(2))),
        "other shape": rewrite(lambda t: t.update({first: t[first][:-1].clone()})),
        "NaN site": rewrite(lambda t: t.update({first: t[first] * nan})),
        "NaN norm": rewrite(lambda t: t.update({norm: t[norm] * nan})),
        "NaN embedding": rewrite(lambda t: t.update({table: t[table] * nan})),
        "zero site": rewrite(lambda t: t.update({first: t[first] * 0})),
        "all zero": rewrite(lambda t: t.update({n: x * 0 for n, x in t.items()})),
        "huge": rewrite(lambda t: t.update({first: t[first] * 1e30})),
        "bf16 with fp32 norms": rewrite(
            lambda t: t.update({n: x.bfloat16() for n, x in t.items() if x.ndim > 1})),
        "fp16": rewrite(lambda t: t.update({n: x.half() for n, x in t.items()})),
        "fp64": rewrite(lambda t: t.update({n: x.double() for n, x in t.items()})),
        "int8 site": rewrite(lambda t: t.update({first: t[first].to(torch.int8)})),
        "fp8 site": rewrite(lambda t: t.update({first: t[first].to(torch.float8_e4m3fn)})),
        "index outside": lambda f: (f / "m/model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "../secret.safetensors"}})) and None,
        "index lacks a file": lambda f: (f / "m/model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "b.safetensors"}})) and None,
        "index of nonsense": lambda f: (
            f / "m/model.safetensors.index.json").write_text("{") and None,
        "pickled command": pickled,
        "link out": link_out,
        "no tokenizer": lambda f: [p.unlink() for p in (f / "m").glob("tokenizer*")] and None,
        "half a tokenizer": raw(lambda b: b[: len(b) // 2], "tokenizer.json"),
        "empty tokenizer": raw(lambda b: b"", "tokenizer.json"),
        "list for a tokenizer": raw(lambda b: b"[]", "tokenizer.json"),
        "tokenizer of another class": raw(
            lambda b: b'{"tokenizer_class": "Nonsense"}', "tokenizer_config.json"),
        "tokenizer_config list": raw(lambda b: b"[]", "tokenizer_config.json"),
        "small vocabulary": rewrite(lambda t: t.update({table: t[table][:100].clone()})),
    }  # fmt: skip
    cases |= {f"bit {seed} of the header": flipped(seed, "model.safetensors") for seed in range(12)}
    cases |= {f"bit {seed} of the config": flipped(seed, "config.json") for seed in range(6)}
    for name, prepare in cases.items():
        for mode in ([], ["--stream"]):
            command = ["prune", "m", *QUICK, *mode]
            yield Case("checkpoints", f"{name} {' '.join(mode)}", command, prepare)


def texts() -> Iterator[Case]:
    """Files that are not usable texts."""
    import gzip

    line = json.dumps({"text": "some words of text " * 200}).encode() + b"\n"
    files = {
        "empty.txt": b"",
        "blank.txt": b" \n\n \n" * 100,
        "binary.txt": bytes(range(256)) * 50,
        "utf16.txt": ("words " * 500).encode("utf-16"),
        "short.txt": b"word",
        "long.txt": b"x" * 3_000_000,
        "nul.txt": b"\0" * 5000,
        "surrogate.jsonl": b'{"text": "\\ud800 ' + b"words " * 500 + b'"}\n',
        "deep.jsonl": b"[" * 100_000 + b"\n",
        "null.jsonl": line * 50 + b'{"text": null}\n' + line,
        "number.jsonl": b'{"text": 5}\n' * 10,
        "no-text.jsonl": b'{"a": "x", "b": "y"}\n',
        "half.jsonl": line + b'{"text": "wor',
        "blank.jsonl": b"\n\n",
        "list.jsonl": b"[1, 2]\n",
        "half.txt.gz": gzip.compress(b"words " * 5000)[:200],
        "none.txt.gz": b"words " * 500,
        "garbage.parquet": b"PAR1" + b"x" * 100 + b"PAR1",
        "text.csv": b"a,b\n",
        "noname": b"words " * 500,
    }
    for name, content in files.items():

        def prepare(folder: Path, name: str = name, content: bytes = content) -> None:
            (folder / name).write_bytes(content)

        yield Case("texts", f"prune {name}", ["prune", "m", *QUICK, "--calibration", name], prepare)
        yield Case(
            "texts",
            f"eval {name}",
            ["eval", "m", "--data", name, "--seqlen", "32", "--json"],
            prepare,
            may=(1,),
        )


def paths() -> Iterator[Case]:
    """Places that must not be an output."""

    def things(folder: Path) -> None:
        os.mkfifo(folder / "fifo")
        (folder / "file").write_text("x")
        (folder / "loop").symlink_to(folder / "loop")
        (folder / "dangling").symlink_to(folder / "nowhere")
        (folder / "foreign").mkdir()
        (folder / "foreign/thesis").write_text("years")
        (folder / "to-foreign").symlink_to("foreign")
        (folder / "empty").mkdir()

    places = ("", ".", "..", "/", "m", "m/sub", "m/../m", "fifo", "file", "file/x", "loop",
              "dangling", "dangling/x", "foreign", "to-foreign", "empty", "x" * 255, "x" * 5000,
              "/dev/null", "/proc/x", "deep/er/and/deep/er", "t.txt", "out/../out", " ", "-",
              "ü\n", "a\tb")  # fmt: skip
    for place in places:
        for more in ([], ["--overwrite"], ["--stream", "--overwrite"]):
            command = ["prune", "m", *QUICK[:-1], place, *more]
            yield Case("paths", f"-o {place[:20]!r} {' '.join(more)}", command, things)
        yield Case(
            "paths",
            f"convert -o {place[:20]!r}",
            ["convert", "m", "--overwrite", "-o", place],
            things,
        )


def environments() -> Iterator[Case]:
    """Unusual or wrong shells, locales and environment variables."""
    run = ["prune", "m", *QUICK]
    settings = {
        "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
        "WORLD_SIZE=x": {"WORLD_SIZE": "x"},
        "RANK=x": {"RANK": "x", "WORLD_SIZE": "2"},
        "narrow": {"COLUMNS": "1"},
        "no home": {"HOME": "/nowhere"},
        "bad plugins": {"APT_DISABLE_PLUGINS": "*"},
    }
    for name, environment in settings.items():
        for command in (run, ["inspect", "m"], ["methods"]):
            yield Case("environments", f"{command[0]} {name}", command, environment=environment)
    for name, shell in (("full", "> /dev/full"), ("head", "| head -1"), ("closed", ">&-")):
        for command in (run, ["inspect", "m"], ["methods"], ["--help"]):
            yield Case("environments", f"{command[0]} {name}", command, shell=shell,
                       may=(1, 120, 141))  # fmt: skip


def signals() -> Iterator[Case]:
    """Runs that receive a signal at a random time."""
    draw = random.Random(0)
    for number in (signal.SIGINT, signal.SIGTERM):
        for mode in ([], ["--stream"]):
            for _ in range(4):
                seconds = draw.uniform(1, 9)
                yield Case("signals", f"{number.name} {seconds:.1f} s {' '.join(mode)}",
                           ["prune", "m", *QUICK, "--samples", "32", *mode], signal=number,
                           seconds=seconds, may=(130, 143, -2, -15))  # fmt: skip


GROUPS = {f.__name__: f for f in (options, smaller, recoveries, configurations, checkpoints, texts,
                                  paths, environments, signals)}  # fmt: skip
