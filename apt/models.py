"""From a reference (directory, hub name, GGUF file, ``zoo:NAME``) to a model and its adapter."""

import hashlib
import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from apt.adapter import Adapter
from apt.errors import AptError, first_line
from apt.formats import Checkpoint, open_checkpoint
from apt.plugins import Registry, registry
from apt.shards import check_files
from apt.specs import AdapterSpec
from apt.stored import find_stored

ZOO = "zoo:"
_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Source:
    """Where a model is read from.

    Attributes:
        reference: what the user wrote.
        location: a directory or a hub name.
        gguf: the file within the directory, for GGUF.
        trust_remote_code: whether code that comes with the checkpoint may run.
    """

    reference: str
    location: str
    gguf: str | None = None
    trust_remote_code: bool = False

    @property
    def name(self) -> str:
        """A short name, for a folder."""
        if self.gguf:
            return Path(self.gguf).stem
        return Path(self.reference.removeprefix(ZOO)).resolve().name

    def files(self) -> list[Path]:
        """The file or directory of this machine that is read; none for a hub name."""
        path = Path(self.location) / (self.gguf or "")
        return [path] if path.exists() else []

    def options(self) -> dict[str, Any]:
        """What every ``from_pretrained`` is told."""
        gguf = {"gguf_file": self.gguf} if self.gguf else {}
        return {"trust_remote_code": self.trust_remote_code, **gguf}


@dataclass(frozen=True)
class Model:
    """A loaded model with what is needed to prune it.

    Attributes:
        source: where it is read from.
        module, config: the model and its configuration, as transformers has them.
        spec, adapter: the adapter of its family.
        checkpoint: what reads and writes it where it is not in transformers' own format.
    """

    source: Source
    module: nn.Module
    config: Any
    spec: AdapterSpec
    adapter: Adapter
    checkpoint: Checkpoint | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the checkpoint's weights, as far as its configuration says."""
        return getattr(self.config, "dtype", None) or torch.float32


def find(reference: str, registry: Registry, *, trust_remote_code: bool = False) -> Source:
    """Say where ``reference`` is to be read from.

    Raises:
        AptError: it names something local that is not there or is no checkpoint.
    """
    if reference.startswith(ZOO):
        spec = registry.adapters.get(reference.removeprefix(ZOO))
        folder = spec.zoo_path()
        if folder is None:
            raise AptError(f"adapter '{spec.name}' has no embedded model")
        return Source(reference, str(folder), None, trust_remote_code)
    path = Path(reference).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise AptError(f"{reference} is a file, but no .gguf", "give the model's directory")
        return Source(reference, str(path.parent), path.name, trust_remote_code)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise AptError(f"{reference} has no config.json", "give a Hugging Face directory")
        return Source(reference, str(path), None, trust_remote_code)
    if path.suffix == ".gguf" or reference.startswith((".", "/", "~")) or reference.count("/") > 1:
        raise AptError(f"no such model: {reference} does not exist", _nearby(path))
    return Source(reference, reference, None, trust_remote_code)


def _nearby(path: Path) -> str:
    siblings = os.listdir(path.parent) if path.parent.is_dir() else []
    close = get_close_matches(path.name, siblings, n=1)
    return f"did you mean '{path.parent / close[0]}'?" if close else "check the path"


def read_config(source: Source) -> Any:
    """The model's configuration."""
    with _loading(source):
        return AutoConfig.from_pretrained(source.location, **source.options())


def skeleton(source: Source, registry: Registry, adapter: str | None = None) -> Model:
    """The model on the meta device: modules and shapes, no weights."""
    checkpoint, config = _configured(source, registry)
    spec = registry.adapters.get(adapter) if adapter else registry.adapter_for(config.model_type)
    instance: Adapter = spec.load()()
    instance.check(config)
    module = _empty(source, config)
    return Model(source, module, config, spec, instance, checkpoint)


def _configured(source: Source, registry: Registry) -> tuple[Checkpoint | None, Any]:
    """The checkpoint where it is of another format, and the configuration."""
    try:
        return None, read_config(source)
    except AptError as error:
        if source.gguf or isinstance(error.__cause__, OSError):  # no such thing, or no network
            raise
        checkpoint = open_checkpoint(source.location, registry)
        if checkpoint is None:
            raise
        return checkpoint, checkpoint.config


def _empty(source: Source, config: Any) -> nn.Module:
    """A model without weights, in eval mode."""
    layers = getattr(config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > _MOST_LAYERS:  # each is a module, also without weights
        raise AptError(
            f"{source.reference} does not load: it would have {layers:,} layers",
            "is its config.json damaged?",
        )
    with _loading(source), torch.device("meta"):
        module: nn.Module = AutoModelForCausalLM.from_config(
            config, trust_remote_code=source.trust_remote_code
        )
    return module.eval()


def load(shell: Model, dtype: torch.dtype | None = None, device: str = "cpu") -> Model:
    """Read the weights of a `skeleton`.

    Args:
        shell: the model on the meta device.
        dtype: the precision to hold it in; None keeps that of the checkpoint's sites (fp32 for
            GGUF), see `apt.stored.Stored.dtype`.
        device: where to put it.

    Raises:
        AptError: the checkpoint is damaged, incomplete, or holds weights that are not finite.
    """
    source = shell.source
    if os.path.isdir(source.location) and not source.gguf:
        check_files(Path(source.location))
    if shell.checkpoint is None:
        module, missing = _from_pretrained(source, dtype or _stored_dtype(shell))
    else:
        module, missing = _from_checkpoint(source, shell.checkpoint, dtype)
    if missing:
        raise AptError(
            f"{source.reference} lacks {len(missing)} weights of {type(module).__name__}, "
            f"such as {missing[0]}",
            "is the checkpoint complete and in the format of transformers?",
        )
    check_finite(module, source.reference)
    return replace(shell, module=module.to(device).eval(), config=module.config)


def _stored_dtype(shell: Model) -> torch.dtype | None:
    """The precision of the checkpoint's sites, where its tensors can be read one by one."""
    stored = find_stored(shell)
    return stored.dtype(shell) if stored else None


def _from_pretrained(source: Source, dtype: torch.dtype | None) -> tuple[Any, list[str]]:
    """The model as transformers reads it, and the names of weights that are not there."""
    wanted = dtype or (torch.float32 if source.gguf else "auto")
    with _loading(source), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, info = AutoModelForCausalLM.from_pretrained(
            source.location, dtype=wanted, output_loading_info=True, **source.options()
        )
    missing = sorted(info["missing_keys"])
    return (_plain(module) if source.gguf and not missing else module), missing


def _from_checkpoint(
    source: Source, checkpoint: Checkpoint, dtype: torch.dtype | None
) -> tuple[Any, list[str]]:
    """The model as a plugin reads it, every weight in its own dtype unless told otherwise."""
    module: Any = _empty(source, checkpoint.config)
    with _loading(source):
        found = module.load_state_dict(checkpoint.read(), strict=False, assign=True)
    module.tie_weights()
    empty = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
    if found.unexpected_keys:
        raise AptError(
            f"{source.reference} has {found.unexpected_keys[0]}, of which "
            f"{type(module).__name__} knows nothing",
            "is its config.json the right one?",
        )
    if empty:
        return module, empty
    module.config.dtype = dtype or module.get_input_embeddings().weight.dtype
    return (module.to(dtype) if dtype else module), []


def _plain(module: Any) -> nn.Module:
    """The same model, no longer flagged as quantized: GGUF weights are plain once they are read.

    The flag makes transformers refuse to cast and to save the model.
    """
    config = type(module.config).from_dict(
        {k: v for k, v in module.config.to_dict().items() if k != "quantization_config"}
    )
    fresh: Any = type(module)(config).to(next(module.parameters()).dtype)
    fresh.load_state_dict(module.state_dict())
    fresh.generation_config = module.generation_config
    plain: nn.Module = fresh
    return plain


def check_finite(module: nn.Module, reference: str) -> None:
    """Raise where a weight is NaN or infinite, naming it."""
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise AptError(
                f"{name} of {reference} holds values that are not finite",
                "the checkpoint is damaged; get it again",
            )


def load_tokenizer(source: Source, other: str | None = None) -> Any:
    """The model's tokenizer, or that of the directory or hub name ``other``."""
    options = source.options() if other is None else {}
    try:
        found = AutoTokenizer.from_pretrained(other or source.location, **options)
        if len(found) <= len(found.all_special_tokens):  # made from no file, for some families
            raise ValueError("there is no file with a vocabulary")
        return found
    except Exception as error:  # `tokenizers` raises bare exceptions
        raise AptError(
            f"{other or source.reference} has no tokenizer that loads: {first_line(error)}",
            "put the tokenizer's files beside the weights, or name one with --tokenizer",
        ) from error


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        raw = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def _hub_hint(reference: str) -> str:
    embedded = [spec.name for spec in registry().adapters.specs.values() if spec.zoo]
    close = get_close_matches(reference.lower(), embedded, n=1)
    if close:
        return f"did you mean '{ZOO}{close[0]}', the embedded model?"
    return f"check the name and the network; embedded: {', '.join(ZOO + e for e in embedded)}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and all that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def _loading(source: Source) -> Iterator[None]:
    """Make one line of whatever is raised: loaders have errors of many kinds for damaged files."""
    try:
        yield
    except AptError:
        raise
    except Exception as error:
        raise _load_error(source, error) from error


def _load_error(source: Source, error: Exception) -> AptError:
    """One line for whatever the loaders raise."""
    text = str(error)
    if "trust_remote_code" in text:
        return AptError(
            f"{source.reference} needs code of its own, which is not run unless asked",
            "read that code, then pass --trust-remote-code",
        )
    if any(isinstance(cause, pickle.UnpicklingError) for cause in _chain(error)):
        return AptError(
            f"{source.reference} is pickled and holds more than tensors; it is not loaded",
            "get a safetensors version of it",
        )
    if not Path(source.location).exists():
        return AptError(
            f"no such model: '{source.reference}' is neither a directory here nor to be had from "
            "the hub",
            _hub_hint(source.reference),
        )
    return AptError(f"{source.reference} does not load: {first_line(error)}", "is it complete?")
