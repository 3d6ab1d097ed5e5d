"""Write the embedded sounds: ``python zoo/sounds.py``.

espeak-ng (Debian's package of this name) reads sentences of the embedded text in several voices.
Each sound is a file in Ogg Vorbis with 16,000 values per second, with its transcript in a .txt file
beside it.
"""

from __future__ import annotations

import gzip
import re
import subprocess
import tempfile
from itertools import cycle
from pathlib import Path

import numpy as np
import soundfile

DATA = Path(__file__).resolve().parent.parent / "plugins" / "apt_plugins" / "data"
RATE = 16_000  # values per second
COUNTS = {"calibration": 20, "evaluation": 6}
VOICES = ("en-us", "en-gb+f2", "en-us+m3", "en-gb-scotland", "en-us+f4", "en-gb+m5")
SPEEDS = (140, 165, 190)  # words per minute


def sentences(split: str) -> list[str]:
    """Sentences of the embedded text of 60 to 110 characters that are plain words."""
    text = gzip.decompress((DATA / f"{split}.txt.gz").read_bytes()).decode("utf-8")
    parts = re.split(r"(?<=[a-z][.])\s+", text)
    return [part for part in parts if re.fullmatch(r"[A-Z][A-Za-z ,'-]{59,109}[.]", part)]


def spoken(sentence: str, voice: str, speed: int) -> np.ndarray:
    """The values of a sound (values,)."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        command = ["espeak-ng", "-v", voice, "-s", str(speed), "-w", file.name, sentence]
        subprocess.run(command, check=True)
        values, rate = soundfile.read(file.name, dtype="float32")
    places = np.arange(0, len(values) - 1, rate / RATE)
    return np.interp(places, np.arange(len(values)), values).astype("float32")


def main() -> None:
    """Write the sounds and what belongs to them."""
    for split, count in COUNTS.items():
        place, found = DATA / f"sounds-{split}", sentences(split)
        place.mkdir(exist_ok=True)
        voices, speeds = cycle(VOICES), cycle(SPEEDS)
        for number, sentence in enumerate(found[:: len(found) // count][:count]):
            wave = spoken(sentence, next(voices), next(speeds))
            soundfile.write(place / f"{number:02}.ogg", wave, RATE, format="OGG", subtype="VORBIS")
            (place / f"{number:02}.txt").write_text(f"{sentence}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
