"""The likelihoods of the choices of a question, from one pass through the question.

The harness runs a question once for each of its choices. Here a row of a batch is a question with
all its choices, one after the other. Each choice attends to the question and to itself, and has the
positions after the question. Only the needed logits are computed.
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

_LONGEST = 8  # the longest row, in lengths of the context: the cost of attention grows with it
# The largest differences of likelihoods by rounding, in nats and relative to the likelihood: in
# rows of the same shape with other tokens, and in rows of another shape.
_SAME_SHAPE = 1e-4
_FP32, _BF16 = 1e-3, 0.02


@dataclass
class Question:
    """The requests with the same context.

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
        """The tokens of the row; the last token of a choice is left out, as it predicts nothing."""
        return [*self.context, *(token for choice in self.choices for token in choice[:-1])]

    @property
    def branches(self) -> bool:
        """True if its row has tokens of several choices, which must not attend to each other."""
        return sum(len(choice) > 1 for choice in self.choices) > 1

    def places(self) -> Iterator[slice]:
        """The positions in the row of the tokens of each choice, without its last token."""
        start = len(self.context)
        for choice in self.choices:
            yield slice(start, start + len(choice) - 1)
            start += len(choice) - 1


class SharedContexts(HFLM):  # type: ignore[misc]
    """A model for the harness that runs a question once for all its choices.

    The longest question is a test: if the model refuses such a row, or computes other likelihoods,
    all choices are run one by one, as in the harness.
    """

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Likelihood]:
        questions = _questions(requests, self.max_length)
        simple = [question for question in questions if not question.branches]
        branching = self._served([question for question in questions if question.branches])
        size, likelihoods = int(self.batch_size), dict[int, Likelihood]()
        batches = [*_batches(branching, size), *_batches(simple, size)]
        for batch in tqdm(batches, disable=disable_tqdm, desc="Answering questions"):
            likelihoods |= self._likelihoods(batch)
        for index, likelihood in likelihoods.items():
            self.cache_hook.add_partial("loglikelihood", requests[index][0], likelihood)
        remaining = [index for index in range(len(requests)) if index not in likelihoods]
        if remaining:
            others = super()._loglikelihood_tokens([requests[i] for i in remaining], disable_tqdm)
            likelihoods |= zip(remaining, others, strict=True)
        return [likelihoods[index] for index in range(len(requests))]

    def _served(self, questions: Sequence[Question]) -> Sequence[Question]:
        """The questions within a sliding window; none if the model cannot run such rows."""
        window = getattr(self.config.get_text_config(), "sliding_window", None) or self.max_length
        supported = [question for question in questions if len(question.row) <= window]
        longest = max(supported, key=lambda question: len(question.row), default=None)
        return supported if longest is None or self._is_exact(longest) else []

    def _is_exact(self, question: Question) -> bool:
        """True if the likelihood of a choice does not depend on the choices before it."""
        first, last = [choice for choice in question.choices if len(choice) > 1][-2:]

        def likelihood(*before: list[int]) -> float:
            choices = [*before, last]
            row = Question(question.context, choices, [*range(len(choices))])
            return self._likelihoods([row])[len(before)][0]

        expected, rounding = likelihood(), _FP32 if self.model.dtype == torch.float32 else _BF16
        try:
            after_first = likelihood(first)
            after_other = likelihood(question.context[:1] * len(first))
        except Exception:  # models refuse masks and positions by exceptions of any type
            return False
        size = 1 + abs(expected)
        depends = not abs(after_other - after_first) <= _SAME_SHAPE * size
        return not depends and abs(after_first - expected) <= rounding * size

    def _likelihoods(self, batch: Sequence[Question]) -> dict[int, Likelihood]:
        """The likelihoods of the choices of some questions, by request."""
        inputs = _rows(batch, self.model.dtype, self.device)
        width = inputs["input_ids"].shape[1]
        kept = width - min(len(question.context) for question in batch) + 1
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            inputs["logits_to_keep"] = kept
        with torch.no_grad():
            logits = self.model(**inputs, use_cache=False).logits[:, -kept:]
        likelihoods = dict[int, Likelihood]()
        for question, row in zip(batch, logits, strict=True):
            last = len(question.context) - 1 - (width - kept)  # of the context
            for index, choice, place in zip(
                question.requests, question.choices, question.places(), strict=True
            ):
                choice_logits = row[place.start - (width - kept) : place.stop - (width - kept)]
                likelihoods[index] = _likelihood(
                    torch.cat([row[last : last + 1], choice_logits]), choice
                )
        return likelihoods


def _questions(requests: Sequence[Request], limit: int) -> list[Question]:
    """The questions, without requests of more than ``limit`` tokens before the last one.

    A row has at most ``limit`` tokens, and at most `_LONGEST` times the tokens of the context.
    """
    questions, open_questions = list[Question](), dict[tuple[int, ...], Question]()
    for index, (_, context, choice) in enumerate(requests):
        if len(context) + len(choice) - 1 > limit:
            continue
        question, longest = (
            open_questions.get(tuple(context)),
            min(limit, _LONGEST * len(context)),
        )
        if question is None or len(question.row) + len(choice) - 1 > longest:
            question = open_questions[tuple(context)] = Question(context, [], [])
            questions.append(question)
        question.choices.append(choice)
        question.requests.append(index)
    return questions


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
    """The tokens (rows, width) of questions; with branches, also positions and attention masks."""
    width = max(len(question.row) for question in batch)
    tokens = torch.zeros(len(batch), width, dtype=torch.long)
    for row, question in zip(tokens, batch, strict=True):
        row[: len(question.row)] = torch.tensor(question.row)
    if not any(question.branches for question in batch):
        return {"input_ids": tokens.to(device)}
    positions = torch.arange(width).repeat(len(batch), 1)
    visible = torch.eye(width, dtype=torch.bool).repeat(len(batch), 1, 1)  # padding sees itself
    for row, question in enumerate(batch):
        end = len(question.context)
        visible[row, :end, :end] = True
        for place in question.places():
            positions[row, place] = torch.arange(end, end + place.stop - place.start)
            visible[row, place, :end] = visible[row, place, place] = True
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(
        ~visible.tril(), torch.finfo(dtype).min
    )
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
