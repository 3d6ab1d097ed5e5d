"""A check that the weights of a model are plain parameters of plain modules.

Libraries that tune, compress or distribute a model replace its modules or their weights. Zeros in a
wrapper are not zeros of the weight that the model multiplies. Wrappers are recognised by the names
of classes and packages and by their attributes, so that no library is imported.
"""

from collections.abc import Iterator
from itertools import islice

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from apt.errors import AptError

_QUANTISED = "take the model without quantisation, prune it, and quantise the result"
_COMPILED = "take the module from before torch.compile (its _orig_mod)"
_PARAMETRIZED = "call torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') first"
_CLASSES = {
    "ScriptModule": "take the model from before it was scripted or traced",
    "DataParallel": "take the model inside (its module)",
    "DistributedDataParallel": "take the model inside (its module)",
    "FullyShardedDataParallel": "take the model from before it was sharded",
    "PackedLinear": "unpack the model first (apt-prune unpack)",
}
_PACKAGES = {
    "peft": "merge it first (merge_and_unload of the peft model), and take the result",
    **dict.fromkeys(
        ("aqlm", "auto_gptq", "awq", "bitsandbytes", "compressed_tensors", "eetq", "gptqmodel",
         "hqq", "optimum", "torch.ao", "torchao", "vptq"),
        _QUANTISED,
    ),
}  # fmt: skip
_HOOKS = {
    "WeightNorm": "call torch.nn.utils.remove_weight_norm(module) first",
    "SpectralNorm": "call torch.nn.utils.remove_spectral_norm(module) first",
    "BasePruningMethod": "call torch.nn.utils.prune.remove(module, 'weight') first",
}
_SCALE_NAMES = {"weight_scale", "weight_packed", "weight_fake_quant", "qweight", "W_q"}


def refuse_wrapped(model: nn.Module) -> None:
    """Raise `AptError` if a module of ``model`` is a wrapper, or if its weight is wrapped.

    A model that was compiled as a whole is accepted: its blocks are plain modules.
    """
    for name, module in model.named_modules():
        wrapper_and_advice = (
            _class_wrapper(module)
            or _weight_wrapper(module)
            or (_compiled(module) if name else None)
        )
        if wrapper_and_advice is not None:
            wrapper, advice = wrapper_and_advice
            raise AptError(f"{name or 'the model'} is wrapped by {wrapper}", advice)


def check_in_memory(model: nn.Module, *, streamed: bool = False) -> None:
    """Raise `AptError` if a parameter of ``model`` has no values.

    Args:
        streamed: True if the blocks may be read later. Then only the first parameter is checked.
    """
    for name, parameter in islice(model.named_parameters(), 1 if streamed else None):
        if parameter.is_meta:
            message = f"{name} has no values in memory"
            raise AptError(message, "load the whole model into memory", ("model",))


def _class_wrapper(module: nn.Module) -> tuple[str, str] | None:
    """The class of a module that is a wrapper, and the remedy."""
    for base in type(module).__mro__:
        first, *rest = base.__module__.split(".")
        packages = (first, ".".join((first, *rest[:1])))
        advice = _CLASSES.get(base.__name__) or next(filter(None, map(_PACKAGES.get, packages)), "")
        if advice:
            return _path(type(module)), advice
    return None


def _compiled(module: nn.Module) -> tuple[str, str] | None:
    if type(module).__name__ == "OptimizedModule":
        return _path(type(module)), _COMPILED
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "its method compile", "prune the model before its modules are compiled"
    return None


def _weight_wrapper(module: nn.Module) -> tuple[str, str] | None:
    """The mechanism that computes the weight of a module from other tensors, and the remedy."""
    for hook in module._forward_pre_hooks.values():
        for base in type(hook).__mro__:
            if base.__name__ in _HOOKS:
                return _path(type(hook)), _HOOKS[base.__name__]
    stem = isinstance(module, _ConvNd)  # convolutions stay dense, inside of blocks as well
    for chain in [] if stem else getattr(module, "parametrizations", {}).values():
        return _path(type(chain[0])), _PARAMETRIZED
    return next(((quantised, _QUANTISED) for quantised in _quantised(module)), None)


def _quantised(module: nn.Module) -> Iterator[str]:
    """Descriptions of weights with scales, of a tensor subclass, in integers or in 8 bits."""
    tensors = {**module._parameters, **module._buffers}
    for name in sorted({*tensors, *module._modules} & _SCALE_NAMES):
        yield f"{_path(type(module))} with {name}"
    for name, tensor in tensors.items():
        if tensor is None or not (name in module._parameters or name == "weight"):
            continue
        if type(tensor.data) is not Tensor:
            yield f"{_path(type(tensor.data))} ({name})"
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1:
            yield f"{_path(type(module))} with {name} in {tensor.dtype}"


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
