"""The outputs of the dense model on the training text, computed once and kept on disk.

The outputs for each token are the largest logits, as log-probabilities, with their tokens, and the
last hidden state. Log-probabilities are normalised over the full vocabulary: all other tokens
together have the remaining probability.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apt.files.flushing import flush
from apt.recovery.log_probabilities import log_probabilities
from apt.text.language_model import language_model

_FILES = ("tokens.npy", "log_probabilities.npy", "hidden.npy")


class Teacher:
    """The outputs of the dense model on samples.

    Args:
        folder: the folder of the files that `write_teacher` has written.
    """

    def __init__(self, folder: Path) -> None:
        self._arrays = [np.load(folder / name, mmap_mode="r") for name in _FILES]

    def top(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of the largest logits and their log-probabilities (samples, seqlen, top).

        Args:
            rows: the samples, ``batch["row"]``.
        """
        tokens, logs = (torch.from_numpy(array[rows.cpu().numpy()]) for array in self._arrays[:2])
        return tokens.long(), logs.float()

    def hidden(self, rows: Tensor) -> Tensor:
        """The last hidden states (samples, seqlen, hidden) of the samples ``rows``."""
        return torch.from_numpy(self._arrays[2][rows.cpu().numpy()]).float()


@torch.no_grad()
def write_teacher(
    model: nn.Module,
    tokens: Tensor,
    top: int,
    folder: Path,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Run the dense model on ``tokens`` (samples, seqlen), and write its outputs.

    Args:
        folder: the folder to write; it exists only if it is complete.
        step: called with the number of finished samples, and of all samples.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(exist_ok=True)
    arrays: list[np.memmap[Any, Any]] = []
    reader, device = language_model(model), next(model.parameters()).device
    for index, sample in enumerate(tokens):
        output = reader(input_ids=sample[None].to(device), output_hidden_states=True)
        outputs = _outputs(output, top)
        if not arrays:
            arrays = [
                np.lib.format.open_memmap(
                    partial / name, "w+", value.dtype, (len(tokens), *value.shape)
                )
                for name, value in zip(_FILES, outputs, strict=True)
            ]
        for array, value in zip(arrays, outputs, strict=True):
            array[index] = value
        step(index + 1, len(tokens))
    for array in arrays:
        array.flush()
    flush(partial)
    partial.rename(folder)


def _outputs(output: Any, top: int) -> list[np.ndarray[Any, Any]]:
    """The arrays of a sample."""
    logs = output.logits[0].float().log_softmax(-1)
    values, tokens = logs.topk(min(top, logs.shape[-1]))
    hidden = output.hidden_states[-1][0]
    largest = torch.finfo(torch.float16).max
    return [
        tokens.to(torch.int32).cpu().numpy(),
        values.cpu().numpy().astype(np.float16),
        hidden.float().clamp(-largest, largest).cpu().numpy().astype(np.float16),
    ]


def divergence(logits: Tensor, tokens: Tensor, logs: Tensor) -> Tensor:
    """The mean Kullback-Leibler divergence from the dense model's distribution.

    All tokens without a known logit are one event.

    Args:
        logits: the logits of the pruned model (samples, seqlen, vocabulary).
        tokens, logs: the largest logits of the dense model, see `Teacher.top`.
    """
    student = log_probabilities(logits, tokens)
    shared = logs.exp() * (logs - student)
    return (shared.sum(-1) + _rest(logs, student)).mean()


def _rest(logs: Tensor, student: Tensor) -> Tensor:
    """The term of the divergence for all other tokens together."""
    tiny = 1e-6
    dense_rest, student_rest = (1 - value.exp().sum(-1) for value in (logs, student))
    dense_rest, student_rest = dense_rest.clamp_min(tiny), student_rest.clamp_min(tiny)
    return dense_rest * (dense_rest.log() - student_rest.log())


def relative_error(states: Tensor, dense: Tensor) -> Tensor:
    """The mean over tokens of ``‖h − h_dense‖² / ‖h_dense‖²``, of states (samples, seqlen, d)."""
    squares = (states.float() - dense).square().sum(-1)
    return (squares / dense.square().sum(-1).clamp_min(1e-12)).mean()
