"""Write the embedded pictures: ``python zoo/pictures.py FOLDER``.

``FOLDER`` has the pictures of scikit-image: ``skimage/data`` of its wheel, unpacked (tested with
version 0.26.0). All that are used are in the public domain or under CC0. They are made smaller, and
are written as JPEG beside the texts of ``apt_plugins``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

DATA = Path(__file__).resolve().parent.parent / "plugins" / "apt_plugins" / "data"
SIDE, QUALITY = 384, 85
PICTURES = {
    "calibration": (
        "astronaut.png", "brick.png", "camera.png", "coffee.png", "coins.png",
        "hubble_deep_field.jpg", "gravel.png", "rocket.jpg",
    ),
    "evaluation": ("chelsea.png", "grass.png", "moon.png"),
}  # fmt: skip


def main() -> None:
    """Write the pictures and what belongs to them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for split, names in PICTURES.items():
        place = DATA / f"pictures-{split}"
        place.mkdir(exist_ok=True)
        for name in names:
            with Image.open(folder / name) as picture:
                small = picture.convert("RGB")
                small.thumbnail((2 * SIDE, SIDE), Image.Resampling.LANCZOS)
                small.save(place / f"{Path(name).stem}.jpg", quality=QUALITY, optimize=True)


if __name__ == "__main__":
    main()
