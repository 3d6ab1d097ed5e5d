"""What has to be the same on all processes that work together, see `Ranks.check_alike`."""

from typing import Any

from torch import Tensor

from apt.engine.store import ModelStore
from apt.engine.task import WITHOUT_EFFECT
from apt.files.journal import Line
from apt.output.report import versions
from apt.text.datasets import digest


def running(options: dict[str, Any], *, stream: bool = False) -> Line:
    """What runs: the options that have an effect, and the versions.

    The kernels of the machines may differ. A streamed run makes other calls than one in memory.
    """
    effective = {key: value for key, value in options.items() if key not in WITHOUT_EFFECT}
    packages = {key: value for key, value in versions().items() if key != "platform"}
    return {"options": effective | {"stream": stream}, "versions": packages}


def read(store: ModelStore, tokens: Tensor) -> Line:
    """What was read: the hashes of the weights and of the tokens, and the dtypes of the model."""
    both = {"weights": store.weights, "tokens": digest(tokens)}
    return both | store.precision.record()
