"""``python -m apt``."""

import os
import sys
from contextlib import suppress


def _leave_out_working_directory() -> None:
    """Remove the working directory from the import path.

    ``python -m`` puts it first there, so that a file ``torch.py`` in it would be run.
    """
    with suppress(OSError, IndexError):
        if not sys.flags.safe_path and sys.path[0] in ("", os.getcwd()):
            del sys.path[0]


if __name__ == "__main__":
    _leave_out_working_directory()
    from apt.cli import main

    main()
