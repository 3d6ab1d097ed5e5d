"""A format of quantised directories, as a third party would write it: int8 rows with a scale each.

It has each matrix as ``NAME.bytes`` (int8) and ``NAME.scale`` (fp32, one for each row), and all
other tensors as they are. Its test is that of the hook ``apt_quantised_formats``.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from apt import AptError
from apt.extending import ExpandedTensor, Slices
from apt.hookspecs import QuantisedFormatSpec, hookimpl

METHOD, FILE = "row-bytes", "model.safetensors"


@hookimpl
def apt_quantised_formats():
    """The format."""
    return [QuantisedFormatSpec(METHOD, "int8 rows", f"{__name__}:open_rows")]


def open_rows(source):
    """The checkpoint; None for one of another format."""
    path = Path(source.location) / "config.json"
    if source.gguf or not path.is_file():
        return None
    config = json.loads(path.read_text())
    method = (config.get("quantization_config") or {}).get("quant_method")
    return RowBytes(path.parent) if method == METHOD else None


def quantise(tensor):
    """The bytes and the scales of rows."""
    scale = tensor.float().abs().amax(-1).clamp_min(1e-9) / 127
    return (tensor.float() / scale.unsqueeze(-1)).round().to(torch.int8), scale


def expand(rows, scale):
    """The values of rows."""
    return rows.float() * scale.unsqueeze(-1)


def write(directory, stored, config):
    """Write the stored tensors and the configuration."""
    save_file(stored, directory / FILE, {"format": "pt"})
    plain = {**config.to_dict(), "quantization_config": {"quant_method": METHOD}}
    (directory / "config.json").write_text(json.dumps(plain))


def write_model(model, directory):
    """Quantise a model of transformers."""
    model.save_pretrained(directory)
    stored = dict[str, torch.Tensor]()
    for name, tensor in load_file(directory / FILE).items():
        if tensor.ndim > 1:
            stored[f"{name}.bytes"], stored[f"{name}.scale"] = quantise(tensor)
        else:
            stored[name] = tensor
    write(directory, stored, model.config)
    return directory


@dataclass
class RowBytes:
    """A checkpoint of this format."""

    directory: Path
    config: object = None
    tensors: dict = field(default_factory=dict)

    def __post_init__(self):
        self.files = [self.directory / FILE]
        config = AutoConfig.from_pretrained(self.directory).to_dict()
        config.pop("quantization_config")
        self.config = AutoConfig.for_model(**config)
        with safe_open(self.files[0], "pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping
                if name.endswith(".scale"):
                    continue
                whole, kind = name.removesuffix(".bytes"), "int8" if ".bytes" in name else "f32"
                shape = tuple(file.get_slice(name).get_shape())
                self.tensors[whole] = ExpandedTensor(shape, torch.float32, kind)

    def _stored(self, name):
        with safe_open(self.files[0], "pt") as file:
            parts = [f"{name}.bytes", f"{name}.scale"]
            names = [name] if self.tensors[name].stored == "f32" else parts
            return {part: file.get_tensor(part) for part in names}

    def read(self, name):
        """A tensor, expanded."""
        parts = list(self._stored(name).values())
        return parts[0] if len(parts) == 1 else expand(*parts)

    def check_slices(self, slices: Slices):
        """All rows are stored alone."""
        for name in map(slices.sources.get, slices.rows):
            if self.tensors[name].shape[0] == 1:
                raise AptError(f"{name} has one row", "choose another")

    def write_sliced(self, slices: Slices, target):
        """Write a smaller model."""
        target.mkdir()
        stored = {}
        for name, source in slices.sources.items():
            parts = self._stored(source)
            if rows := slices.rows.get(name):
                parts = {key: part[list(rows)] for key, part in parts.items()}
            if name in slices.values:
                value = slices.values[name]
                made = quantise(value) if len(parts) > 1 else [value]
                parts = dict(zip(parts, made, strict=True))
            stored |= {name + key.removeprefix(source): part for key, part in parts.items()}
        write(target, {key: part.contiguous() for key, part in stored.items()}, slices.config)
