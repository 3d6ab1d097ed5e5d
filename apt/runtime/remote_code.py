"""Code beside a packed model, for ``from_pretrained(…, trust_remote_code=True)``.

`apt-prune pack` copies this module beside the weights. Where APT is installed, the weights stay
packed in memory. Elsewhere they are expanded, and the model is a plain one of transformers.
"""

import json
import os
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import cached_file

# Some releases of transformers copy only the files that the first one imports.
from apt.runtime.matrix import Entry  # noqa: F401
from apt.runtime.packed_file import dense_tensors

_FOR_FILES = ("revision", "cache_dir", "token", "local_files_only", "subfolder", "force_download")


class PlainConfig:
    """Opens the configurations of packed models as plain ones of transformers.

    Some tools refuse a ``quantization_config`` that they do not know. So it gets another name.
    """

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: the configurations are of transformers' own classes."""

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> Any:
        """Read a configuration; see ``AutoConfig.from_pretrained``."""
        options.pop("quantization_config", None)  # it would replace the description of the weights
        found = AutoConfig.from_pretrained(name, **{**options, "trust_remote_code": False})
        config = found[0] if isinstance(found, tuple) else found
        config.apt_packed = config.quantization_config
        del config.quantization_config
        return found


class PackedModel:
    """Opens packed models. It is no model itself."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: the models are of transformers' own classes."""

    @classmethod
    def from_pretrained(cls, name: str, *arguments: Any, config: Any, **options: Any) -> Any:
        """Open a packed model as a causal language model of transformers.

        Args:
            name: a directory, or a name on the hub.
            arguments: further arguments of the model.
            config: its configuration, of `PlainConfig`.
            options: further arguments of ``from_pretrained``.
        """
        about = config.apt_packed
        del config.apt_packed
        kind = AutoModelForCausalLM._model_mapping[type(config)]
        try:
            from apt.runtime import PackedConfig  # noqa: F401  # registers the format
        except ImportError:
            where = {key: options[key] for key in _FOR_FILES if options.get(key) is not None}
            state = _dense_state(name, about, where)
            return kind.from_pretrained(
                None, *arguments, config=config, state_dict=state, **options
            )
        config.quantization_config, config.transformers_weights = about, about["weights"]
        return kind.from_pretrained(name, *arguments, config=config, **options)


def _dense_state(name: str, about: Any, where: dict[str, Any]) -> dict[str, Any]:
    """All tensors of a packed model, with its matrices expanded."""
    state: dict[str, Any] = {}
    for file in _files(name, about["weights"], where):
        try:
            state |= dense_tensors(str(cached_file(name, file, **where)), about["matrices"])
        except ValueError as error:
            raise OSError(f"{file} of {name} is damaged: {error}; get it again") from error
    if missing := sorted(about["matrices"].keys() - state.keys()):
        raise OSError(f"{name} lacks the mask of {missing[0]}; get it again")
    return state


def _files(name: str, weights: str, where: dict[str, Any]) -> list[str]:
    """The files of the weights: the single one, or those that an index names."""
    if not weights.endswith(".index.json"):
        return [weights]
    with open(str(cached_file(name, weights, **where)), encoding="utf-8") as file:
        named = set(json.load(file)["weight_map"].values())
    return sorted(os.path.basename(part) for part in named)
