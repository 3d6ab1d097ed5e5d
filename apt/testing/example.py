"""A small model of an adapter's family, to check the adapter with."""

from typing import Any

from torch import Tensor

from apt.errors import AptError
from apt.models import load, skeleton
from apt.plugins import Registry
from apt.source import find
from apt.testing.checks import Subject
from apt.testing.suite import random_tokens


def subject(registry: Registry, adapter: str, model: str | None = None) -> Subject:
    """What to check the adapter of that name with.

    Args:
        registry: the plugins.
        adapter: the adapter's name.
        model: a model reference; by default the adapter's own example (`AdapterSpec.example`), else
            its embedded checkpoint.

    Raises:
        AptError: the adapter is unknown, cannot be imported, has neither, or is for other models.
    """
    spec = registry.adapters.get(adapter)
    if model is None and spec.example is None and spec.zoo is None:
        raise AptError(
            f"adapter '{spec.name}' declares no example", "give a MODEL, small as it may be"
        )
    if model is None and spec.example is not None:
        module: Any = spec.load_example()
        made = Subject(spec.load()(), module.eval(), _tokens(module))
    else:
        found = load(skeleton(find(model or f"zoo:{spec.name}", registry), registry, spec.name))
        made = Subject(found.adapter, found.module, _tokens(found.module))
    made.blocks()
    return made


def _tokens(module: Any) -> Tensor:
    return random_tokens(module.config.vocab_size)
