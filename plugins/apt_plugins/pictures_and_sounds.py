"""The pictures and sounds that ship with APT."""

import io
import random
from collections.abc import Iterator
from importlib.resources import files
from itertools import cycle
from pathlib import Path

from apt.extending import Item, Split

_SIDE = 256  # pixels of a cut
_SMALLEST = 0.4  # of the shorter side of a picture


def pictures(split: Split) -> Iterator[Item]:
    """Square cuts of embedded photographs, without an end; its two splits have other photographs.

    The cuts have from 40 to 100 % of the shorter side, at places drawn with a fixed seed.
    """
    from PIL import Image

    draw, names = random.Random(0), _files("pictures", split, ".jpg")
    photographs = [(path.stem, Image.open(path).convert("RGB")) for path in names]
    for number, (name, photograph) in enumerate(cycle(photographs)):
        side = round(min(photograph.size) * draw.uniform(_SMALLEST, 1))
        left, top = (draw.randint(0, length - side) for length in photograph.size)
        cut = photograph.crop((left, top, left + side, top + side)).resize((_SIDE, _SIDE))
        stored = io.BytesIO()
        cut.save(stored, "JPEG", quality=90)
        yield Item(f"cut {number} of {name}", stored.getvalue())


def sounds(split: Split) -> Iterator[Item]:
    """Sentences of the embedded text, read by espeak-ng in several voices, with their texts."""
    for path in _files("sounds", split, ".ogg"):
        yield Item(str(path), path, path.with_suffix(".txt").read_text(encoding="utf-8").strip())


def _files(kind: str, split: Split, ending: str) -> list[Path]:
    folder = Path(str(files("apt_plugins"))) / "data" / f"{kind}-{split}"
    return sorted(folder.glob(f"*{ending}"))
