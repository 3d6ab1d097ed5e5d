"""``python -m apt``."""

import os
import sys
from contextlib import suppress


def _leave_out_working_directory() -> None:
    """Import nothing from the folder that one happens to stand in.

    ``python -m`` puts it first on the path, where any ``torch.py`` of it would be run.
    """
    with suppress(OSError, IndexError):
        if not sys.flags.safe_path and sys.path[0] in ("", os.getcwd()):
            del sys.path[0]


if __name__ == "__main__":
    _leave_out_working_directory()
    from apt.cli import main

    main()
