"""Settings for the Hugging Face Hub, and a check that it answers. This module imports no torch."""

import queue
import threading
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

_TIMEOUT = 5.0  # seconds


@dataclass(frozen=True)
class Hub:
    """Settings for reading repositories of the hub.

    Attributes:
        revision: a branch, a tag or a commit; None for the main branch.
        local: True if only earlier downloads are read, without contacting the hub.
    """

    revision: str | None = None
    local: bool = False

    def options(self) -> dict[str, Any]:
        """The arguments for ``from_pretrained`` and the functions of huggingface_hub."""
        offline_option = {"local_files_only": True} if self.local else {}
        return {
            **({"revision": self.revision} if self.revision is not None else {}),
            **offline_option,
        }

    def or_local(self) -> "Hub":
        """The settings, restricted to earlier downloads if the hub does not answer."""
        return self if reachable() else replace(self, local=True)


def offline() -> bool:
    """True if the user has switched the network off (``HF_HUB_OFFLINE``)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def endpoint() -> str:
    """The hub's address."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def no_answer() -> str:
    """The part of a message about a hub that does not answer."""
    return f"{endpoint()} does not answer"


@cache
def reachable() -> bool:
    """True if the hub answers within seconds; tested once in a process.

    huggingface_hub itself would try for more than half a minute for each file.
    """
    if offline():
        return False
    answers: queue.Queue[bool] = queue.Queue()
    # Resolving a host name ignores every timeout. So it runs in a thread that can be abandoned.
    threading.Thread(target=lambda: answers.put(_answers()), daemon=True).start()
    try:
        return answers.get(timeout=_TIMEOUT)
    except queue.Empty:
        return False


def _answers() -> bool:
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint(), timeout=_TIMEOUT)
    except Exception:  # from requests before huggingface_hub 1, from httpx since then
        return False
    return True
