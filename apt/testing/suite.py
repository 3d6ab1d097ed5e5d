"""The conformance checks as a test class."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Adapter
from apt.adapter.text_config import text_config
from apt.checkpoints.load import load, load_tokenizer, open_skeleton
from apt.conformance.checks import CHECKS, Subject
from apt.conformance.outcomes import outcome, spec_of
from apt.locations.model_source import find
from apt.plugin.registry import registry


def random_tokens(vocabulary: int, samples: int = 4, seqlen: int = 24) -> Tensor:
    """Random token ids (samples, seqlen), the same on each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (samples, seqlen), generator=generator)


def embedded(name: str = "llama") -> tuple[Any, Any]:
    """The tiny trained model that ships with an adapter, and its tokenizer.

    Args:
        name: the name of the adapter.

    Raises:
        AptError: there is no such adapter, or no model ships with it.
    """
    source = find(f"zoo:{name}", registry())
    model = load(open_skeleton(source, registry(), name)).module
    return model, load_tokenizer(source)


class AdapterConformance(ABC):
    """A base class of tests: pytest runs one test for each check of a subclass ``TestMyAdapter``.

    >>> class TestMine(AdapterConformance):
    ...     def adapter(self):
    ...         return MyAdapter()
    ...
    ...     def model(self):
    ...         return MyModelForCausalLM(MyConfig(hidden_size=32, num_hidden_layers=2))
    """

    @abstractmethod
    def adapter(self) -> Adapter:
        """The adapter to check."""

    @abstractmethod
    def model(self) -> nn.Module:
        """A model of the adapter's family; a tiny random one is enough."""

    def tokens(self, model: nn.Module) -> Tensor:
        """Token ids (samples, seqlen)."""
        return random_tokens(text_config(model.config).vocab_size)


def _test(name: str) -> Callable[[AdapterConformance], None]:
    def test(self: AdapterConformance) -> None:
        adapter, model = self.adapter(), self.model()
        subject = Subject(adapter, model, self.tokens(model), spec_of(adapter))
        if problem := outcome(name, subject).problem:
            raise AssertionError(problem)

    test.__doc__ = CHECKS[name].__doc__
    return test


for _name in CHECKS:
    setattr(AdapterConformance, f"test_{_name}", _test(_name))
