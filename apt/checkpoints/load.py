"""Loading of a model and its adapter from a source (directory, hub name, GGUF file)."""

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast

from apt.adapter import Adapter
from apt.checkpoints.architecture import check_kind, opening_class, quantised_with, without_weights
from apt.checkpoints.expanded import open_quantised
from apt.checkpoints.formats import Checkpoint, open_checkpoint
from apt.checkpoints.load_errors import load_error, tokenizer_error
from apt.checkpoints.opened import Opened
from apt.checkpoints.quantised import QuantisedCheckpoint
from apt.checkpoints.safetensors_io import check_files
from apt.checkpoints.stored import find_stored, open_stored, read_parameter
from apt.checkpoints.towers import examples_of, tower_of
from apt.compute import ComputeDtype, compute_dtype
from apt.errors import SLOW_PRODUCTS, AptError, shortened
from apt.locations.hub import Hub
from apt.locations.model_source import Source
from apt.locations.paths import expanded, kind_at
from apt.plugin.registry import Registry
from apt.runtime.entries import METHOD
from apt.runtime.weights import with_weights, without_own_code

_MOST_LAYERS = 10_000
_DAMAGED = "is its config.json damaged?"


def read_config(source: Source) -> Any:
    """The model's configuration."""
    with _loading(source, _DAMAGED):
        config = AutoConfig.from_pretrained(source.location, **source.options())
        if source.gguf is None and config.model_type in source.location:
            values, _ = PretrainedConfig.get_config_dict(source.location, **source.options())
            if not values.keys() & {"model_type", "auto_map"}:  # transformers 4 guesses by name
                raise ValueError("config.json has no model_type")
        return without_own_code(config)


def open_skeleton(
    source: Source,
    registry: Registry,
    adapter: str | None = None,
    *,
    packed: bool = False,
    expanded: bool = False,
) -> Opened:
    """Open a model, or a tower of it, without its weights: modules and shapes, on the meta device.

    Args:
        adapter: the name of an adapter; by default the adapter for the model's type.
        packed: True to accept a packed or quantised model, which can be measured, but not pruned.
        expanded: True to read a quantised checkpoint by expanding its tensors, if a plugin reads
            its format.
    """
    quantised, checkpoint, plain = None, None, None
    if (expanded or source.gguf) and (found := open_quantised(source, registry)) is not None:
        source, reader = found
        quantised, plain = (reader, None) if expanded else (None, reader)
        config = reader.config
    else:
        checkpoint, config = _read_configuration(source, registry)
    if source.gguf is None:  # quantised GGUF weights are converted to plain ones
        check_kind(source.reference, config, packed=packed)
    module, whole = _skeleton_module(source, config), None
    if source.tower:
        whole, module = module, tower_of(module, source.tower, examples_of(source, config))
        config = module.config
    spec = registry.adapters.get(adapter) if adapter else registry.adapter_for(config.model_type)
    instance: Adapter = spec.make()
    instance.check(config)
    return Opened(
        source, module, config, spec, instance, checkpoint, quantised=quantised, plain=plain,
        whole=whole,
    )  # fmt: skip


def _read_configuration(source: Source, registry: Registry) -> tuple[Checkpoint | None, Any]:
    """The checkpoint, None in the format of transformers, and the configuration."""
    try:
        return None, read_config(source)
    except AptError as error:
        if source.gguf or isinstance(error.__cause__, OSError):  # no such model, or no network
            raise
        checkpoint = open_checkpoint(source, registry)
        if checkpoint is None:
            raise
        return checkpoint, checkpoint.config


def _skeleton_module(source: Source, config: Any) -> nn.Module:
    """A model without weights, in eval mode."""
    count = getattr(config, "num_hidden_layers", 0)
    if isinstance(count, int) and count > _MOST_LAYERS:  # each is a module, even without weights
        message = f"{source.reference} does not load: it would have {count:,} layers"
        raise AptError(message, _DAMAGED)
    with _loading(source, _DAMAGED), torch.device("meta"):
        module = without_weights(config, trust_remote_code=source.trust_remote_code)
    return module.eval()


def load(
    skeleton: Opened,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    compute: str | None = None,
) -> Opened:
    """Read the weights of a model from `open_skeleton`.

    Args:
        dtype: the dtype of the weights; None for the stored dtype of the sites (fp32 for GGUF).
        compute: the name of the compute dtype, or ``auto``; None for the dtype of the weights. A
            packed or quantised model ignores it.

    Raises:
        AptError: the checkpoint is damaged or incomplete, or has weights that are not finite.
    """
    source = skeleton.source
    if not source.on_hub and not source.gguf and skeleton.quantised is None:
        check_files(Path(source.location))
    arguments = {}
    if quantised_with(skeleton.config) == METHOD:
        import apt.runtime.quantizer  # noqa: F401  # registers the format with transformers

        arguments = {"config": with_weights(skeleton.config)}
    elif source.gguf:
        arguments = {"config": copy.deepcopy(skeleton.config)}  # to read it again takes seconds
    if skeleton.whole is not None:
        dtype = dtype or open_stored(skeleton).dtype(skeleton)
    if skeleton.whole is not None or skeleton.quantised is not None:
        module, missing = _from_weights(skeleton, _expanded(skeleton), dtype)
    elif skeleton.plain is not None:
        module, missing = _from_weights(skeleton, _plain(skeleton.plain), dtype)
    elif skeleton.checkpoint is None:
        stored = None if dtype else find_stored(skeleton)  # None: tensors cannot be read one by one
        stored_dtype = stored.dtype(skeleton) if stored else None
        module, missing = _from_pretrained(skeleton, dtype or stored_dtype, **arguments)
    else:
        weights = skeleton.checkpoint.read
        module, missing = _from_weights(skeleton, lambda: weights().items(), dtype)
    if missing:
        raise AptError(
            f"{source.reference} lacks {len(missing)} weights of {type(module).__name__}, "
            f"such as {missing[0]}",
            "is the checkpoint complete and in the format of transformers?",
        )
    check_finite(module, source.reference, dtype)
    loaded = replace(skeleton, module=module.to(device).eval(), config=module.config)
    if compute is not None and quantised_with(loaded.config) is None:
        ComputeDtype(loaded.module, compute_dtype(loaded.dtype, device, compute))
    return loaded


def _from_pretrained(
    skeleton: Opened, dtype: torch.dtype | None, **arguments: Any
) -> tuple[Any, list[str]]:
    """The model, read by transformers, and the names of missing weights."""
    source = skeleton.source
    requested = dtype or (torch.float32 if source.gguf else "auto")
    names = _one_name_table() if source.gguf else nullcontext()
    with _loading(source), names, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", message=SLOW_PRODUCTS)
        module, info = opening_class(skeleton.config).from_pretrained(
            source.location, dtype=requested, output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below
            **source.options(), **arguments,
        )  # fmt: skip
    for mismatch in info.get("mismatched_keys", ()):
        raise _mismatched(source, module, mismatch)
    missing = sorted(info["missing_keys"])
    return (_unquantised(module) if source.gguf and not missing else module), missing


@contextmanager
def _one_name_table() -> Iterator[None]:
    """While entered, the table of the names of GGUF tensors is built once.

    transformers builds the table for each module of a model, which takes longer than the reading
    of the weights.
    """
    try:
        import gguf
    except ImportError:
        yield
        return
    build = gguf.get_tensor_name_map
    gguf.get_tensor_name_map = cache(build)
    try:
        yield
    finally:
        gguf.get_tensor_name_map = build


def _mismatched(source: Source, module: Any, mismatch: Any) -> AptError:
    """The error for a tensor of a wrong shape; transformers 4 gives only its name."""
    name, *shapes = (mismatch,) if isinstance(mismatch, str) else mismatch
    difference = f"is {tuple(shapes[0])}" if shapes else "has another shape"
    expected = module.state_dict().get(name)
    required = "another" if expected is None else tuple(expected.shape)
    message = f"{name} of {source.reference} {difference}, but {required} by its configuration"
    return AptError(message, "is its config.json the right one?")


Weights = Iterable[tuple[str, Tensor]]
"""Tensors with the names of parameters, one by one."""


def _expanded(skeleton: Opened) -> Callable[[], Weights]:
    """A function that reads the weights of a quantised checkpoint, or of a tower."""
    stored, state = open_stored(skeleton), skeleton.module.state_dict()
    return lambda: (
        (name, read_parameter(pieces, state[name].shape, stored.shards))
        for name, pieces in stored.layout.items()
    )


def _plain(reader: QuantisedCheckpoint) -> Callable[[], Weights]:
    """A function that reads the weights of a GGUF file."""
    return lambda: ((name, reader.read(name)) for name in reader.tensors)


def _from_weights(
    skeleton: Opened, read: Callable[[], Weights], dtype: torch.dtype | None
) -> tuple[Any, list[str]]:
    """The model, read by a plugin; each weight keeps its stored dtype if ``dtype`` is None."""
    source = skeleton.source
    with _loading(source):
        module: Any = skeleton.skeleton(dtype or torch.float32)
        dtypes = {name: tensor.dtype for name, tensor in module.state_dict().items()}
        weights = {
            name: tensor if dtype is None else tensor.to(dtypes.get(name, dtype))
            for name, tensor in read()
        }
        loaded = module.load_state_dict(weights, strict=False, assign=True)
    module.tie_weights()
    empty = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
    if loaded.unexpected_keys:
        raise AptError(
            f"{source.reference} has {loaded.unexpected_keys[0]}, which "
            f"{type(module).__name__} does not have",
            "is its config.json the right one?",
        )
    if empty:
        return module, empty
    module.config.dtype = dtype or module.get_input_embeddings().weight.dtype
    return module, []


def _unquantised(module: Any) -> nn.Module:
    """The same model without its flag for quantisation.

    GGUF weights are no longer quantised after loading. With the flag, transformers refuses to cast
    and to save the model.
    """
    config = type(module.config).from_dict(
        {k: v for k, v in module.config.to_dict().items() if k != "quantization_config"}
    )
    copied: Any = type(module)(config).to(next(module.parameters()).dtype)
    copied.load_state_dict(module.state_dict())
    copied.generation_config = module.generation_config
    return cast(nn.Module, copied)


def check_finite(module: nn.Module, reference: str, cast: torch.dtype | None = None) -> None:
    """Raise if a weight is NaN or infinite.

    Args:
        cast: the dtype to which the weights were cast; None without a cast.
    """
    for name, parameter in module.named_parameters():
        if torch.isfinite(parameter).all():
            continue
        if cast is torch.float16 and not parameter.isnan().any():
            message = f"{name} of {reference} has values beyond 65,504, the largest of float16"
            raise AptError(message, "use dtype bfloat16 or float32", ("dtype",))
        message = f"{name} of {reference} holds values that are not finite"
        raise AptError(message, "the checkpoint is damaged; get it again")


def load_tokenizer(source: Source, other: str | None = None) -> Any:
    """The tokenizer of the model, or of ``other``, a directory or hub name."""
    location, hub, options = source.location, source.hub, source.options()
    if other is not None:
        location, hub = str(expanded(other)), _hub_for_tokenizer(source, other)
        options = {"trust_remote_code": source.trust_remote_code, **hub.options()}
    try:
        tokenizer = _read_tokenizer(location, options)
        # Some families make a tokenizer without any file.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError("there is no file with a vocabulary")
        return tokenizer
    except Exception as error:  # `tokenizers` raises plain exceptions
        raise tokenizer_error(other or source.reference, location, error, hub) from error


def _read_tokenizer(location: str, options: dict[str, Any]) -> Any:
    try:
        return AutoTokenizer.from_pretrained(location, **options)
    except Exception:
        if "gguf_file" not in options:
            raise
        # The automatic class reads the configuration too, though not of all architectures.
        return PreTrainedTokenizerFast.from_pretrained(location, **options)


def _hub_for_tokenizer(source: Source, name: str) -> Hub:
    """The settings of the hub for another tokenizer than the model's."""
    if kind_at(expanded(name)) == "directory":
        return Hub()
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise AptError(
            f"no such tokenizer: {shortened(name)} is not a directory", "check it", ("tokenizer",)
        )
    return Hub().or_local()


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        raw = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()


@contextmanager
def _loading(source: Source, hint: str = "is it complete?") -> Iterator[None]:
    """Turn every exception into an `AptError`: loaders raise many types of errors."""
    try:
        yield
    except AptError:
        raise
    except Exception as error:
        raise load_error(source, error, hint) from error
