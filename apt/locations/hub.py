"""The hub: how it is asked, and whether it answers. Nothing here imports torch."""

import queue
import threading
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

_PATIENCE = 5.0  # seconds


@dataclass(frozen=True)
class Hub:
    """How repositories of the hub are read.

    Attributes:
        revision: a branch, a tag or a commit; None for the main branch.
        token: what proves who asks; None for the one that ``hf auth login`` has stored.
        cache_dir: where downloads are kept; None for the usual place.
        local: whether nothing is asked of the hub, and only what has been downloaded is read.
    """

    revision: str | None = None
    token: str | None = None
    cache_dir: str | None = None
    local: bool = False

    def options(self) -> dict[str, Any]:
        """What ``from_pretrained`` and the functions of huggingface_hub are told."""
        local = {"local_files_only": True} if self.local else {}
        given = {"revision": self.revision, "token": self.token, "cache_dir": self.cache_dir}
        return {**{name: value for name, value in given.items() if value is not None}, **local}

    def for_another(self) -> "Hub":
        """For a repository that the revision does not belong to."""
        return replace(self, revision=None)

    def reached(self) -> "Hub":
        """The same; one that reads what has been downloaded where the hub does not answer."""
        return self if reachable() else replace(self, local=True)


def offline() -> bool:
    """Whether the user has asked for no network (``HF_HUB_OFFLINE``)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def endpoint() -> str:
    """The hub's address."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def unreachable() -> str:
    """What to say of a hub that does not answer."""
    return f"{endpoint()} does not answer"


@cache
def reachable() -> bool:
    """Whether the hub answers within seconds; asked once in a process.

    huggingface_hub itself tries for half a minute and more, file by file.
    """
    if offline():
        return False
    answers: queue.Queue[bool] = queue.Queue()
    # A name that does not resolve blocks beyond every timeout: hence a thread to give up on.
    threading.Thread(target=lambda: answers.put(_answers()), daemon=True).start()
    try:
        return answers.get(timeout=_PATIENCE)
    except queue.Empty:
        return False


def _answers() -> bool:
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint(), timeout=_PATIENCE)
    except Exception:  # of requests before huggingface_hub 1, of httpx after
        return False
    return True
