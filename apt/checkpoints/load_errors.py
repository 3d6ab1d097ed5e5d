"""One-line messages for the exceptions of the loaders of models and tokenizers."""

import os
import pickle
from collections.abc import Iterator
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from apt.checkpoints.safetensors_io import INDEX
from apt.errors import AptError, describe, resource_error, shortened
from apt.locations.hub import Hub, no_answer, offline
from apt.locations.model_source import ZOO, Source
from apt.locations.paths import user_error
from apt.plugin.registry import registry


def load_error(source: Source, error: Exception, hint: str) -> AptError:
    """The error for a model that does not load, with ``hint`` if the cause has no other remedy."""
    if _requires_code(error):
        return _code_error(source.reference)
    if any(isinstance(cause, pickle.UnpicklingError) for cause in _chain(error)):
        return AptError(
            f"{source.reference} is pickled and has objects other than tensors; it is not loaded",
            "get a safetensors version of it",
        )
    for cause in _chain(error):
        if isinstance(cause, OSError) and (answer := user_error(cause)):
            return answer
        if answer := resource_error(cause):
            return answer
    if answer := _unreadable(Path(source.location), "*.safetensors"):
        return answer
    if source.on_hub and (answer := _hub_error(source, error)):
        return answer
    if answer := _damaged_index(source, error):
        return answer
    if source.gguf is not None:
        if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
            message = f"to read {source.reference} needs the package {' and '.join(missing)}"
            return AptError(message, "pip install 'apt-prune[gguf]'")
        hint = "get the file again: it is damaged, or of a kind that transformers does not read"
    return AptError(f"{source.reference} does not load: {describe(error)}", hint)


def _hub_error(source: Source, error: Exception) -> AptError | None:
    """The error for a model that the hub does not provide; None for other causes."""
    name, causes = shortened(source.reference), {type(cause).__name__ for cause in _chain(error)}
    if source.hub.local and not _is_absent(error):
        return None
    if source.hub.local:
        return AptError(
            f"no such model: '{name}' is not a local directory and has not been downloaded, and "
            f"{_no_network()}",
            _hub_hint(source.reference) if "/" not in name else "check the network and the name",
        )
    if "GatedRepoError" in causes:
        return AptError(
            f"access to '{name}' is restricted",
            "ask for access on its page on the hub, then run `hf auth login` or set HF_TOKEN",
        )
    if "RevisionNotFoundError" in causes:
        return AptError(
            f"'{name}' has no revision '{source.hub.revision}'", "check its page", ("revision",)
        )
    if causes & {"RepositoryNotFoundError", "HFValidationError"}:
        message = f"no such model: '{name}' is neither a local directory nor available on the hub"
        return AptError(message, _hub_hint(source.reference))
    return None


def _is_absent(error: Exception) -> bool:
    """True if a file was not downloaded earlier, or the name is not valid on the hub."""
    names = {type(cause).__name__ for cause in _chain(error)}
    return bool(names & {"LocalEntryNotFoundError", "HFValidationError"})


def _no_network() -> str:
    """The reason for which the hub was not contacted."""
    return "the network is switched off by HF_HUB_OFFLINE" if offline() else no_answer()


def _unreadable(directory: Path, pattern: str) -> AptError | None:
    """The error for a file without read permission, which loaders may report as missing."""
    if not directory.is_dir():
        return None
    for path in sorted(directory.glob(pattern)):
        if not os.access(path, os.R_OK, effective_ids=True):
            message = f"cannot use {path}: no permission to read it"
            return AptError(message, "ask for it, or use a copy")
    return None


def _damaged_index(source: Source, error: Exception) -> AptError | None:
    """The error for an index without the metadata that transformers requires."""
    path, missing = Path(source.location) / INDEX, "metadata"
    if not isinstance(error, KeyError) or error.args != (missing,) or not path.is_file():
        return None
    return AptError(f"{path} has no '{missing}'", "get the checkpoint again")


def tokenizer_error(reference: str, location: str, error: Exception, hub: Hub) -> AptError:
    """The error for a tokenizer that does not load from ``location``."""
    if _requires_code(error):
        return _code_error(f"the tokenizer of {reference}")
    if answer := _unreadable(Path(location), "tokenizer*"):
        return answer
    if hub.local and _is_absent(error):
        return AptError(
            f"no such tokenizer: '{reference}' is not a local directory and has not been "
            f"downloaded, and {_no_network()}",
            "check the network and the name",
            ("tokenizer",),
        )
    return AptError(
        f"{reference} has no tokenizer that loads: {describe(error)}",
        "put the files of the tokenizer beside the weights, or name another tokenizer",
        ("tokenizer",),
    )


def _requires_code(error: Exception) -> bool:
    return "trust_remote_code" in str(error)


def _code_error(name: str) -> AptError:
    message = f"{name} needs code from its repository, which is not run by default"
    return AptError(message, "read that code, then allow it", ("trust_remote_code",))


def _hub_hint(reference: str) -> str:
    embedded = [spec.name for spec in registry().adapters.specs.values() if spec.zoo]
    close = get_close_matches(reference.lower(), embedded, n=1)
    if close:
        return f"did you mean '{ZOO}{close[0]}', the embedded model?"
    return f"check the name; embedded: {', '.join(ZOO + e for e in embedded)}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and all its causes, from the last to the first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
