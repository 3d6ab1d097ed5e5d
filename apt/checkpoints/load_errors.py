"""One line for whatever the loaders of models and tokenizers raise."""

import json
import os
import pickle
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from apt.checkpoints.safetensors_io import INDEX
from apt.errors import AptError, described, shortened
from apt.locations.hub import Hub, offline, unreachable
from apt.locations.model_source import ZOO, Source
from apt.locations.paths import mendable
from apt.plugin.registry import registry


def load_error(source: Source, error: Exception, hint: str) -> AptError:
    """The line for what was raised while a model was loaded.

    Args:
        source: the model.
        error: what was raised.
        hint: what to do where nothing better is known.
    """
    if _wants_code(error):
        return _needs_code(source.reference)
    if any(isinstance(cause, pickle.UnpicklingError) for cause in _chain(error)):
        return AptError(
            f"{source.reference} is pickled and holds more than tensors; it is not loaded",
            "get a safetensors version of it",
        )
    for cause in _chain(error):
        if isinstance(cause, OSError) and (told := mendable(cause)):
            return told
    if (path := _unreadable(Path(source.location))) is not None:
        return AptError(f"cannot use {path}: no right to read it", "ask for it, or use a copy")
    if source.on_hub and (told := _not_on_hub(source, error)):
        return told
    if told := _damaged_index(source, error):
        return told
    return AptError(f"{source.reference} does not load: {described(error)}", hint)


def _not_on_hub(source: Source, error: Exception) -> AptError | None:
    """The line for a model that the hub does not give; None where it does, and that is at fault."""
    name, causes = shortened(source.reference), {type(cause).__name__ for cause in _chain(error)}
    if source.hub.local:
        return AptError(
            f"no such model: '{name}' is no directory here and has not been downloaded, and "
            f"{_silent()}",
            _hub_hint(source.reference) if "/" not in name else "check the network and the name",
        )
    if "GatedRepoError" in causes:
        return AptError(
            f"'{name}' is not given to everybody",
            "ask for access on its page of the hub, then give a token or run `hf auth login`",
            ("token",),
        )
    if "RevisionNotFoundError" in causes:
        return AptError(f"'{name}' has no revision '{source.hub.revision}'", "check its page")
    if isinstance(error, OSError) or "HFValidationError" in causes:
        return AptError(
            f"no such model: '{name}' is neither a directory here nor to be had from the hub",
            _hub_hint(source.reference),
        )
    return None


def _silent() -> str:
    """Why the hub was not asked."""
    return "the network is switched off by HF_HUB_OFFLINE" if offline() else unreachable()


def _unreadable(directory: Path) -> Path | None:
    """A file of weights that may not be read, for which safetensors says that it is not there."""
    if not directory.is_dir():
        return None
    weights = sorted(directory.glob("*.safetensors"))
    return next((p for p in weights if not os.access(p, os.R_OK, effective_ids=True)), None)


def _damaged_index(source: Source, error: Exception) -> AptError | None:
    """The line for an index of several files that lacks an entry."""
    path = Path(source.location) / INDEX
    if not isinstance(error, KeyError) or not path.is_file():
        return None
    index = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(index, dict) or error.args[0] in index:
        return None
    return AptError(f"{path} has no '{error.args[0]}'", "get the checkpoint again")


def tokenizer_error(reference: str, error: Exception, hub: Hub) -> AptError:
    """The line for what was raised while a tokenizer was loaded."""
    if hub.local:
        return AptError(
            f"no such tokenizer: '{reference}' is no directory here and has not been downloaded, "
            f"and {_silent()}",
            "check the network and the name",
        )
    if _wants_code(error):
        return _needs_code(f"the tokenizer of {reference}")
    return AptError(
        f"{reference} has no tokenizer that loads: {described(error)}",
        "put the tokenizer's files beside the weights, or name another tokenizer",
        ("tokenizer",),
    )


def _wants_code(error: Exception) -> bool:
    return "trust_remote_code" in str(error)


def _needs_code(what: str) -> AptError:
    return AptError(
        f"{what} needs code of its own, which is not run unless asked",
        "read that code, then allow it",
        ("trust_remote_code",),
    )


def _hub_hint(reference: str) -> str:
    embedded = [spec.name for spec in registry().adapters.specs.values() if spec.zoo]
    close = get_close_matches(reference.lower(), embedded, n=1)
    if close:
        return f"did you mean '{ZOO}{close[0]}', the embedded model?"
    return f"check the name; embedded: {', '.join(ZOO + e for e in embedded)}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and all that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
