"""The documents of a source of text: plain texts, and conversations."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from apt.errors import AptError, first_line

_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}
_LISTS = (("messages", "role", "content"), ("conversations", "from", "value"))
_PAIRS = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
_TWO_TEXTS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("source", "target"))
_ONE_TEXT = ("text", "sentence")
LABELS = ("label", "label_text")
"""The columns of the number or the name of a class, and of its name beside the number."""


@dataclass(frozen=True)
class Conversation:
    """A conversation, or a question with its answer.

    Attributes:
        messages: the role (``"system"``, ``"user"`` or ``"assistant"``) and the text of each.
    """

    messages: tuple[tuple[str, str], ...]

    def rendered(self, tokenizer: Any) -> str:
        """The text that a model reads, by the chat template of its tokenizer.

        Without a template, each message is a paragraph after its role. The BOS token at the
        beginning is left out, since the samples have it.

        Raises:
            AptError: the template refuses the conversation.
        """
        if not has_template(tokenizer):
            return "\n\n".join(f"{role.capitalize()}: {text}" for role, text in self.messages)
        try:
            text = _templated(tokenizer, self.messages)
        except Exception:  # templates raise any error, for instance about a system message
            try:
                text = _templated(tokenizer, _without_system(self.messages))
            except Exception as error:
                message = "the chat template of the tokenizer refuses a conversation"
                hint = "use conversations of a user and an assistant in turn, or plain text"
                raise AptError(f"{message}: {first_line(error)}", hint, ("calibration",)) from error
        return text.removeprefix(tokenizer.bos_token or "")

    @property
    def size(self) -> int:
        """The number of characters."""
        return sum(len(text) for _, text in self.messages)


@dataclass(frozen=True)
class Label:
    """The class of a document.

    Attributes:
        index: its number; None if only its name is known.
        name: its name; None if only its number is known.
    """

    index: int | None
    name: str | None = None


class Texts(str):
    """A text with its class, or two texts that are no conversation, such as two sentences.

    A model that reads one text reads both, joined by a blank line.

    Attributes:
        parts: the texts.
        label: the class; None if it is not known.
        score: how similar people found two texts; None if it is not known.
    """

    parts: tuple[str, ...]
    label: Label | None
    score: float | None

    def __new__(
        cls, parts: tuple[str, ...], label: Label | None = None, score: float | None = None
    ) -> "Texts":
        """A document of one or two texts."""
        made = super().__new__(cls, "\n\n".join(parts))
        made.parts, made.label, made.score = parts, label, score
        return made


Document = str | Conversation
"""A text, which may be `Texts`, or a conversation."""


def has_template(tokenizer: Any) -> bool:
    """True if a tokenizer has a chat template, so that its model is a chat model."""
    return bool(getattr(tokenizer, "chat_template", None))


def _templated(tokenizer: Any, messages: Iterable[tuple[str, str]]) -> str:
    entries = [{"role": role, "content": text} for role, text in messages]
    return str(tokenizer.apply_chat_template(entries, tokenize=False))


def _without_system(messages: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    """The messages, with the system's texts at the beginning of the user's first message."""
    system = [text for role, text in messages if role == "system"]
    rest = [message for message in messages if message[0] != "system"]
    if system and rest:
        rest[0] = rest[0][0], "\n\n".join([*system, rest[0][1]])
    return rest


def conversation_of(row: Any) -> Conversation | None:
    """The conversation in a row of a data set; None if it has none.

    It is in the field ``messages``, or ``conversations`` as ShareGPT has them, or in two fields:
    ``prompt`` and ``completion``, ``instruction`` and ``output`` (with ``input``, as Alpaca has
    it), or ``question`` and ``answer``.
    """
    if not isinstance(row, dict):
        return None
    for field, role, content in _LISTS:
        if isinstance(row.get(field), list):
            return _listed(row[field], role, content)
    for first, second in _PAIRS:
        if isinstance(row.get(first), str) and isinstance(row.get(second), str):
            more = row.get("input") if first == "instruction" else None
            question = "\n\n".join(
                [row[first], more] if isinstance(more, str) and more else [row[first]]
            )
            return Conversation((("user", question), ("assistant", row[second])))
    return None


def label_of(row: Any) -> Label | None:
    """The class of a row of a data set; None if it has none. A number below zero means none."""
    number, name = (row.get(column) for column in LABELS)
    if isinstance(number, str):
        return Label(None, number)
    if not isinstance(number, int) or number < 0:
        return None
    return Label(int(number), name if isinstance(name, str) else None)


def score_of(row: Any) -> float | None:
    """The score of a row of two texts; None if it has no finite one.

    It is a number in the column ``score``, or one with a fraction in the column ``label``, as GLUE
    has it.
    """
    score, label = row.get("score"), row.get("label")
    if not isinstance(score, int | float) or isinstance(score, bool):
        score = label if isinstance(label, float) else math.nan
    return float(score) if math.isfinite(score) else None


def texts_of(row: Any) -> Texts | None:
    """Two texts of a row of a data set, or its one text if it has a class; else None.

    Two texts are in the columns ``sentence1`` and ``sentence2``, ``premise`` and ``hypothesis``, or
    ``source`` and ``target``; one is in ``text`` or ``sentence``, or the only string.
    """
    if not isinstance(row, dict):
        return None
    label = label_of(row)
    pairs = _TWO_TEXTS if "text" not in row else ()
    for names in pairs:
        if all(isinstance(row.get(name), str) for name in names):
            return Texts(tuple(row[name] for name in names), label, score_of(row))
    if label is None:
        return None
    strings = [name for name, value in row.items() if isinstance(value, str)]
    others = [name for name in strings if name not in LABELS]
    name = next((name for name in _ONE_TEXT if name in strings), None)
    name = others[0] if name is None and len(others) == 1 else name
    return Texts((row[name],), label) if name else None


def _listed(messages: list[Any], role: str, content: str) -> Conversation | None:
    """The conversation of a list of messages; None if the list is something else."""
    pairs = list[tuple[str, str]]()
    for each in messages:
        who = each.get(role) if isinstance(each, dict) else None
        text = _text_in(each.get(content)) if isinstance(who, str) else None
        if text is None or not isinstance(who, str):
            return None
        pairs.append((_ROLES.get(who, who), text))
    return Conversation(tuple(pairs)) if pairs else None


def _text_in(content: Any) -> str | None:
    """The text of a message, which may be a list of parts such as texts and images."""
    if content is None or isinstance(content, str):  # None: a call of a tool
        return content or ""
    if not isinstance(content, list):
        return None
    texts = [part.get("text") for part in content if isinstance(part, dict)]
    return "\n".join(text for text in texts if isinstance(text, str))
