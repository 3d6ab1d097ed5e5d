"""The tests also run on sources that are not installed, by a folder with the entry point."""

import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from apt.plugin.registry import registry

try:
    distribution("apt-blocks")
except PackageNotFoundError:
    place = Path(tempfile.mkdtemp(prefix="apt-blocks-"))
    info = place / "apt_blocks-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: apt-blocks\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[apt]\nblocks = apt_blocks\n")
    sys.path += [str(place), str(Path(__file__).parents[1] / "src")]
    registry.cache_clear()
