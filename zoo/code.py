"""Build the embedded text of the kind *code* from modules of the standard library of Python.

Run ``python zoo/code.py`` with CPython 3.11.7 to write the same bytes as those that ship with the
plugins. The texts of the kinds *chat* and *math* need no file: `apt_plugins.generated_texts` writes
them when they are read.
"""

from __future__ import annotations

import gzip
import json
import platform
import sysconfig
from collections.abc import Sequence
from pathlib import Path

DATA_DIR = Path(__file__).resolve().parents[1] / "plugins" / "apt_plugins" / "data"
# Modules without a copyright notice of their own, which are under the licence of Python alone.
CALIBRATION = (
    "glob.py", "queue.py", "json/decoder.py", "graphlib.py", "html/__init__.py", "timeit.py",
    "asyncio/queues.py", "copy.py", "zipapp.py", "email/policy.py", "filecmp.py", "operator.py",
    "ctypes/util.py", "shelve.py", "tabnanny.py", "importlib/util.py", "cProfile.py", "types.py",
    "multiprocessing/context.py", "netrc.py", "string.py", "asyncio/timeouts.py", "colorsys.py",
    "dbm/dumb.py", "rlcompleter.py", "pyclbr.py", "curses/textpad.py", "zoneinfo/_common.py",
    "symtable.py", "_weakrefset.py", "reprlib.py", "asyncio/runners.py",
)  # fmt: skip
EVALUATION = (
    "fnmatch.py", "lzma.py", "asyncio/transports.py", "sched.py", "codeop.py", "linecache.py",
    "hmac.py", "wsgiref/simple_server.py", "py_compile.py", "_compression.py",
)  # fmt: skip


def main() -> None:
    """Write the texts and the licence of Python."""
    if platform.python_version() != "3.11.7":
        raise SystemExit(f"this is Python {platform.python_version()}, not 3.11.7")
    library = Path(sysconfig.get_path("stdlib"))
    _write(DATA_DIR / "code-calibration.jsonl.gz", library, CALIBRATION)
    _write(DATA_DIR / "code-evaluation.jsonl.gz", library, EVALUATION)
    licence = (library / "LICENSE.txt").read_text(encoding="utf-8")
    (DATA_DIR / "PYTHON-LICENSE.txt").write_text(licence, encoding="utf-8")


def _write(path: Path, library: Path, names: Sequence[str]) -> None:
    """Write one module a line, compressed without a time stamp."""
    rows = [
        {"text": (library / name).read_text(encoding="utf-8"), "module": name} for name in names
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


if __name__ == "__main__":
    main()
