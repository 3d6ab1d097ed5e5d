"""The source of a model: the reference that the user gives, resolved without reading a weight.

This module imports no torch, so that a wrong path is reported at once.
"""

import os
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from apt.errors import AptError, shortened
from apt.locations.hub import Hub
from apt.locations.paths import expanded, kind_at
from apt.plugin.registry import Registry

ZOO = "zoo:"


@dataclass(frozen=True)
class Source:
    """The source of a model.

    Attributes:
        reference: the reference as the user gives it.
        location: a directory or a hub name.
        gguf: the name of a GGUF file within the directory; None for other formats.
        trust_remote_code: True if code from the checkpoint may run.
        hub: the settings for the hub, used if ``location`` is a hub name.
        tower: the name of the tower of a multimodal model that is opened alone, such as ``vision``;
            "" to open the model.
    """

    reference: str
    location: str
    gguf: str | None = None
    trust_remote_code: bool = False
    hub: Hub = field(default_factory=Hub)
    tower: str = ""

    @property
    def name(self) -> str:
        """A short name of the model, for the name of an output directory."""
        if self.gguf:
            return Path(self.gguf).stem
        return Path(self.reference.removeprefix(ZOO)).resolve().name

    @property
    def on_hub(self) -> bool:
        """True if it is not a local directory."""
        return kind_at(Path(self.location)) != "directory"

    def files(self) -> list[Path]:
        """The local file or directory that is read; empty for a hub name."""
        path = Path(self.location) / (self.gguf or "")
        return [path] if path.exists() else []

    def has_kind_of(self, path: Path) -> bool:
        """True if it is a file, and a path has the suffix of such files."""
        return self.gguf is not None and path.suffix == Path(self.gguf).suffix

    def options(self) -> dict[str, Any]:
        """The arguments for every ``from_pretrained``."""
        gguf = {"gguf_file": self.gguf} if self.gguf else {}
        hub = self.hub.options() if self.on_hub else {}
        return {"trust_remote_code": self.trust_remote_code, **gguf, **hub}


def find(
    reference: str, registry: Registry, *, trust_remote_code: bool = False, hub: Hub | None = None
) -> Source:
    """Resolve a reference to a model.

    Args:
        reference: a directory, a ``.gguf`` file, ``zoo:NAME``, or a name on the hub.
        hub: the settings for the hub. If it does not answer, only earlier downloads are read.

    Raises:
        AptError: the local path does not exist or is not a checkpoint, or a revision is given for
            a model that is not on the hub.
    """
    hub = hub or Hub()
    source = _find(reference, registry, trust_remote_code)
    if source.on_hub:
        return replace(source, hub=hub.or_local())
    if hub.revision is not None:
        message = f"a revision is for models of the hub, and {reference} is on this machine"
        raise AptError(message, "leave it out", ("revision",))
    return source


def _find(reference: str, registry: Registry, trust_remote_code: bool) -> Source:
    if reference.startswith(ZOO):
        spec = registry.adapters.get(reference.removeprefix(ZOO))
        folder = spec.zoo_path()
        if folder is None:
            raise AptError(f"adapter '{spec.name}' has no embedded model")
        return Source(reference, str(folder), None, trust_remote_code)
    path = expanded(reference)
    kind = kind_at(path) if reference else None
    if kind == "file":
        if path.suffix != ".gguf":
            raise AptError(f"{reference} is a file, but not .gguf", "give the model's directory")
        return Source(reference, str(path.parent), path.name, trust_remote_code)
    if kind == "directory":
        if kind_at(path / "config.json") != "file":
            if kind_at(path / "adapter_config.json") == "file":
                raise AptError(
                    f"{reference} has the weights of a peft adapter, and no model",
                    "merge it with its model (merge_and_unload), and give the result",
                )
            raise AptError(f"{reference} has no config.json", "give a Hugging Face directory")
        return Source(reference, str(path), None, trust_remote_code)
    if not _hub_name(reference):
        raise AptError(
            f"no such model: {shortened(reference)!r} does not exist", _similar_path(path)
        )
    return Source(reference, reference, None, trust_remote_code)


def _hub_name(reference: str) -> bool:
    """True for a possible name of a repository of the hub: ``OWNER/NAME``, formerly ``NAME``."""
    local = reference.startswith((".", "/", "~")) or reference.endswith(".gguf")
    return bool(reference.strip()) and not local and reference.count("/") <= 1


def _similar_path(path: Path) -> str:
    """A hint with an existing path of a similar name, or the hint to check the path."""
    try:
        siblings = os.listdir(path.parent)
    except OSError:
        siblings = []
    close = get_close_matches(path.name, siblings, n=1)
    return f"did you mean '{path.parent / close[0]}'?" if close else "check the path"
