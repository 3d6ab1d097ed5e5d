"""Functions for commands of plugins: to print, to find models and to check files.

They follow ``--quiet``, ``--verbose``, ``--log-file`` and ``--json`` as APT's own commands do. A
command gets its options from `apt.options`, and models from `apt.extending`.
"""

from apt.cli.interruptions import interrupted
from apt.cli.opening import check_new_file, check_plot, find_model
from apt.cli.output import (
    duration,
    has_live_display,
    notice,
    say,
    show,
    show_detail,
    show_error,
    show_json,
    show_rows,
    size,
    table,
)
from apt.cli.plots import pyplot, write_figure
from apt.cli.progress import Progress

__all__ = [
    "Progress", "check_new_file", "check_plot", "duration", "find_model", "has_live_display",
    "interrupted", "notice", "pyplot", "say", "show", "show_detail", "show_error", "show_json",
    "show_rows", "size", "table", "write_figure",
]  # fmt: skip
