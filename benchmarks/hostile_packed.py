"""Further cases of `hostile.py`: packed models whose checksums agree, without a tensor."""

from collections.abc import Iterator
from pathlib import Path

from hostile_cases import Case, sparse
from safetensors.torch import load_file, save_file

_FILE, _NAME = "p/apt_packed.safetensors", "model.layers.0.mlp.up_proj.weight"
_COMMANDS = {
    "unpack": ["unpack", "p", "-o", "out"],
    "eval": ["eval", "p", "--data", "t.txt", "--seqlen", "16"],
    "bench": ["bench", "p", "--prompt", "4", "--generate", "2", "--rounds", "1"],
}


def parts() -> Iterator[Case]:
    """Packed models of another tool, which lack the mask, the values or the scales of a matrix."""
    for command, arguments in _COMMANDS.items():
        for kind in (None, "int8", "int4"):
            for part in ("mask", "values", *(["scales"] if kind else [])):

                def prepare(folder: Path, kind: str | None = kind, part: str = part) -> None:
                    from apt.packing.directory import Rounding, pack
                    from apt.runtime.entries import KEY, read_config
                    from apt.runtime.packed_file import CHECKSUMS, checksums

                    sparse(folder)
                    (folder / "p").mkdir()
                    rounding = Rounding(kind, 64) if kind else None
                    pack(folder / "m", {_NAME: rounding}, folder / "p")
                    tensors = load_file(folder / _FILE)
                    del tensors[f"{_NAME}_{part}"]
                    about = read_config(folder / "p")[KEY]["matrices"]
                    named = {"format": "pt", CHECKSUMS: checksums(tensors, about)}
                    save_file(tensors, folder / _FILE, named)

                name = f"{command}: {kind or 'floats'} without {part}"
                yield Case("parts", name, [*arguments], prepare, refused=True)
