"""The phases of a run and its memory over time, for the report."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from apt.events import BlockStarted, Event, Observer

_PAGE = os.sysconf("SC_PAGE_SIZE")
_PRUNING = "pruning"


class Timeline:
    """Records when each phase of a run began, and the memory at the beginning of each block."""

    def __init__(self, status: Callable[[str], None], observe: Observer) -> None:
        self._status, self._observe = status, observe
        self._started = time.perf_counter()
        self._phases: list[tuple[str, float]] = []
        self._memory: list[tuple[float, int]] = []

    def status(self, text: str) -> None:
        """Record the beginning of a phase."""
        self._begin(text)
        self._status(text)

    def observe(self, event: Event) -> None:
        """Record the memory at the beginning of a block."""
        if isinstance(event, BlockStarted):
            if all(phase != _PRUNING for phase, _ in self._phases):  # block 0 may be dropped
                self._begin(_PRUNING)
            self._sample()
        self._observe(event)

    def _begin(self, phase: str) -> None:
        self._phases.append((phase, self._now()))
        self._sample()

    def _sample(self) -> None:
        self._memory.append((self._now(), resident_bytes()))

    def _now(self) -> float:
        return round(time.perf_counter() - self._started, 3)

    def record(self) -> dict[str, Any]:
        """The phases with their first second, and the samples of memory in bytes, until now."""
        self._sample()
        return {
            "phases": [list(phase) for phase in self._phases],
            "memory": [list(sample) for sample in self._memory],
            "end": self._now(),
        }


def resident_bytes() -> int:
    """The resident memory of this process; 0 where the system does not say it."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    return 0
