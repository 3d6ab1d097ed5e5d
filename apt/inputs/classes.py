"""The classes of samples as numbers of a model's classes."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from apt.errors import AptError, shortened
from apt.plugin.documents import Label


def class_numbers(
    labels: Sequence[Label | None], classes: Mapping[str, int], source: str
) -> Tensor | None:
    """The numbers (samples,) of the classes of samples; None if the class of one is not known.

    The name of a class counts more than its number, since a data set may have another order.

    Args:
        classes: the numbers of the classes of the model by their names; empty for a model without
            classes.
        source: the name of the source, for messages.

    Raises:
        AptError: the model has no such class.
    """
    known = [label for label in labels if label is not None]
    if not classes or len(known) < len(labels):
        return None
    by_name = {name.lower(): number for name, number in classes.items()}
    return torch.tensor([_number(label, by_name, source) for label in known])


def _number(label: Label, by_name: Mapping[str, int], source: str) -> int:
    """The number of a class of the model."""
    found = by_name.get((label.name or "").lower(), label.index)
    if found is None or found not in by_name.values():
        name = label.name or label.index
        message = f"{shortened(source)} has the class {name!r}, and the model has only"
        raise AptError(
            f"{message} {shortened(', '.join(by_name))}", "give its own classes",
            ("calibration", "evaluation"),
        )  # fmt: skip
    return found
