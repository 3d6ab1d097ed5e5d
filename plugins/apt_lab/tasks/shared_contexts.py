"""The likelihoods of the choices of a question, from one pass through the question.

The harness runs a question once for each of its choices. Here a row of a batch is a question with
all of its choices, one after the other: each attends to the question and to itself, and has the
positions that follow the question. Only the logits that are needed are computed.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

Request = tuple[tuple[str, str], list[int], list[int]]  # texts, and tokens: context and choice
Likelihood = tuple[float, bool]  # the sum over the tokens; True if each of them is the likeliest

_LONGEST = 8  # times the length of the context, for a row: attention costs more with its length
# Differences of likelihoods that rounding explains, in nats and as a share of the likelihood: with
# other tokens in rows of the same shape, and in rows of another shape.
_SAME_SHAPE = 1e-4
_FP32, _BF16 = 1e-3, 0.02


@dataclass
class Question:
    """The requests that have one context.

    Attributes:
        context: the tokens of the context.
        choices: the tokens of the choice of each request.
        requests: the indices of the requests.
    """

    context: list[int]
    choices: list[list[int]]
    requests: list[int]

    @property
    def row(self) -> list[int]:
        """Its tokens: nothing is predicted from the last token of a choice."""
        return [*self.context, *(token for choice in self.choices for token in choice[:-1])]

    @property
    def branches(self) -> bool:
        """True if its row has tokens of several choices, which must not attend to each other."""
        return sum(len(choice) > 1 for choice in self.choices) > 1

    def places(self) -> Iterator[slice]:
        """The places in the row of the tokens of each choice but the last one."""
        start = len(self.context)
        for choice in self.choices:
            yield slice(start, start + len(choice) - 1)
            start += len(choice) - 1


class SharedContexts(HFLM):  # type: ignore[misc]
    """A model for the harness that runs a question once, whatever the number of its choices.

    A model that refuses such rows, or computes other likelihoods with them, is run as the harness
    does. The longest question tells.
    """

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Likelihood]:
        questions = _questions(requests, self.max_length)
        simple = [question for question in questions if not question.branches]
        branching = self._served([question for question in questions if question.branches])
        size, found = int(self.batch_size), dict[int, Likelihood]()
        batches = [*_batches(branching, size), *_batches(simple, size)]
        for batch in tqdm(batches, disable=disable_tqdm, desc="Answering questions"):
            found |= self._likelihoods(batch)
        for index, likelihood in found.items():
            self.cache_hook.add_partial("loglikelihood", requests[index][0], likelihood)
        rest = [index for index in range(len(requests)) if index not in found]
        if rest:
            alone = super()._loglikelihood_tokens([requests[i] for i in rest], disable_tqdm)
            found |= zip(rest, alone, strict=True)
        return [found[index] for index in range(len(requests))]

    def _served(self, questions: Sequence[Question]) -> Sequence[Question]:
        """The questions, or those within a sliding window; none if the model cannot run them."""
        window = getattr(self.config.get_text_config(), "sliding_window", None) or self.max_length
        served = [question for question in questions if len(question.row) <= window]
        longest = max(served, key=lambda question: len(question.row), default=None)
        return served if longest is None or self._is_exact(longest) else []

    def _is_exact(self, question: Question) -> bool:
        """True if a choice has the likelihood that it has alone, whatever the choice before it."""
        first, last = [choice for choice in question.choices if len(choice) > 1][-2:]

        def likelihood(*before: list[int]) -> float:
            choices = [*before, last]
            row = Question(question.context, choices, [*range(len(choices))])
            return self._likelihoods([row])[len(before)][0]

        alone, rounding = likelihood(), _FP32 if self.model.dtype == torch.float32 else _BF16
        try:
            behind = likelihood(first)
            behind_another = likelihood(question.context[:1] * len(first))
        except Exception:  # models refuse masks and positions by exceptions of any type
            return False
        size = 1 + abs(alone)
        leaks = not abs(behind_another - behind) <= _SAME_SHAPE * size
        return not leaks and abs(behind - alone) <= rounding * size

    def _likelihoods(self, batch: Sequence[Question]) -> dict[int, Likelihood]:
        """The likelihoods of the choices of some questions, by request."""
        given = _rows(batch, self.model.dtype, self.device)
        width = given["input_ids"].shape[1]
        wanted = width - min(len(question.context) for question in batch) + 1
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            given["logits_to_keep"] = wanted
        with torch.no_grad():
            logits = self.model(**given, use_cache=False).logits[:, -wanted:]
        found = dict[int, Likelihood]()
        for question, row in zip(batch, logits, strict=True):
            last = len(question.context) - 1 - (width - wanted)  # of the context
            for index, choice, place in zip(
                question.requests, question.choices, question.places(), strict=True
            ):
                own = row[place.start - (width - wanted) : place.stop - (width - wanted)]
                found[index] = _likelihood(torch.cat([row[last : last + 1], own]), choice)
        return found


def _questions(requests: Sequence[Request], limit: int) -> list[Question]:
    """The questions, of those requests that have at most ``limit`` tokens before the last one.

    A row has at most ``limit`` tokens, and not many more than the context, which it saves.
    """
    found, started = list[Question](), dict[tuple[int, ...], Question]()
    for index, (_, context, choice) in enumerate(requests):
        if len(context) + len(choice) - 1 > limit:
            continue
        question, most = started.get(tuple(context)), min(limit, _LONGEST * len(context))
        if question is None or len(question.row) + len(choice) - 1 > most:
            question = started[tuple(context)] = Question(context, [], [])
            found.append(question)
        question.choices.append(choice)
        question.requests.append(index)
    return found


def _batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Questions of similar lengths, the longest first, with ``size`` choices or one question."""
    batch, choices = list[Question](), 0
    for question in sorted(questions, key=lambda question: -len(question.row)):
        if batch and choices + len(question.choices) > size:
            yield batch
            batch, choices = [], 0
        batch.append(question)
        choices += len(question.choices)
    if batch:
        yield batch


def _rows(batch: Sequence[Question], dtype: torch.dtype, device: Any) -> dict[str, Any]:
    """The tokens (rows, width) of questions; for branches, positions and what attends to what."""
    width = max(len(question.row) for question in batch)
    tokens = torch.zeros(len(batch), width, dtype=torch.long)
    for row, question in zip(tokens, batch, strict=True):
        row[: len(question.row)] = torch.tensor(question.row)
    if not any(question.branches for question in batch):
        return {"input_ids": tokens.to(device)}
    positions = torch.arange(width).repeat(len(batch), 1)
    seen = torch.eye(width, dtype=torch.bool).repeat(len(batch), 1, 1)  # padding sees itself
    for row, question in enumerate(batch):
        end = len(question.context)
        seen[row, :end, :end] = True
        for place in question.places():
            positions[row, place] = torch.arange(end, end + place.stop - place.start)
            seen[row, place, :end] = seen[row, place, place] = True
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen.tril(), torch.finfo(dtype).min)
    return {
        "input_ids": tokens.to(device),
        "position_ids": positions.to(device),
        "attention_mask": mask.unsqueeze(1).to(device),
    }


def _likelihood(logits: Tensor, choice: Sequence[int]) -> Likelihood:
    """The likelihood of the tokens of a choice, by the logits (tokens, vocabulary) before each."""
    tokens = torch.tensor(choice, device=logits.device)
    likely = logits.float().log_softmax(-1)
    value = likely.gather(1, tokens.unsqueeze(1)).sum()
    return float(value), bool((likely.argmax(-1) == tokens).all())
