"""The phases of a run and its memory over time, for the report."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from apt.events import BlockStarted, Phase, TrainingStep

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Timeline:
    """The beginning of each phase of a run, and the memory at the beginning of phases and blocks.

    Args:
        show: called with a text for each step outside the loops over blocks and training steps.
        observe: called with each event.
    """

    def __init__(self, show: Callable[[str], None], observe: Callable[[Any], None]) -> None:
        self._show, self._observe = show, observe
        self._started = time.perf_counter()
        self._phases: list[tuple[Phase, float]] = []
        self._memory: list[tuple[float, int]] = []

    def status(self, phase: Phase, text: str = "") -> None:
        """Show a step, and record its phase if the phase begins."""
        self._begin_phase(phase)
        self._show(text or phase)

    def observe(self, event: Any) -> None:
        """Record the memory at the beginning of a block."""
        if isinstance(event, BlockStarted) and not self._begin_phase("pruning"):
            self._sample_memory()
        elif isinstance(event, TrainingStep):
            self._begin_phase("training")
        self._observe(event)

    def _begin_phase(self, phase: Phase) -> bool:
        """Record the beginning of a phase; False if it has begun already."""
        if self._phases and self._phases[-1][0] == phase:
            return False
        self._phases.append((phase, self._now()))
        self._sample_memory()
        return True

    def _sample_memory(self) -> None:
        self._memory.append((self._now(), resident_bytes()))

    def _now(self) -> float:
        return round(time.perf_counter() - self._started, 3)

    def record(self) -> dict[str, Any]:
        """The phases with their first second, and the samples of memory in bytes, until now."""
        self._sample_memory()
        return {
            "phases": [list(phase) for phase in self._phases],
            "memory": [list(sample) for sample in self._memory],
            "end": self._now(),
        }


def resident_bytes() -> int:
    """The resident memory of this process in bytes; 0 if the system does not report it."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE_BYTES
    return 0
