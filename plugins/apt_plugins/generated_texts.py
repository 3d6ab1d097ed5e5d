"""Embedded texts that are written when they are read: conversations, and mathematics.

The conversations ask about summaries of Wikipedia articles, and the answers quote them. The
problems of mathematics have worked solutions. Every text is the same at each reading, on each
version of Python: of `random`, only ``random()`` is promised to stay.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from importlib.resources import as_file, files
from itertools import islice
from math import gcd
from random import Random
from typing import TypeVar

from apt.extending import Conversation, Split, read_file

T = TypeVar("T")
_PROBLEMS = {"calibration": 4000, "evaluation": 400}
_SEEDS = {"calibration": 1, "evaluation": 2}
_SENTENCE = re.compile(r"(?<=[a-z0-9)][.!?])\s+(?=[A-Z])")
_YEAR = re.compile(r"\b(1[0-9]{3}|20[0-2][0-9])\b")
_LONGEST = 1500  # characters of a summary that a conversation quotes


class _Draw:
    """Draws of one text."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def below(self, count: int) -> int:
        """A whole number from 0 to below ``count``."""
        return int(self._random.random() * count)

    def number(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``."""
        return low + self.below(high - low + 1)

    def one(self, items: Sequence[T]) -> T:
        """One of some items."""
        return items[self.below(len(items))]


def chat(split: Split) -> Iterator[Conversation]:
    """Conversations about the articles of the embedded corpus, those of a split."""
    draw = _Draw(_SEEDS[split])
    for title, text in _articles(split):
        if len(text) <= _LONGEST and len(_sentences(text)) > 1:
            yield Conversation(tuple(_turns(draw, title, text)))


def _articles(split: Split) -> Iterator[tuple[str, str]]:
    """The titles and the summaries of a split, the last ones first: a mix reads the first ones."""
    parts = {name: _lines(f"{name}.txt.gz", "\n\n") for name in ("calibration", "evaluation")}
    titles = _lines("sources.txt.gz", "\n")
    start = len(parts["calibration"]) if split == "evaluation" else 0
    own = zip(titles[start : start + len(parts[split])], parts[split], strict=True)
    return reversed(list(own))


def _lines(name: str, separator: str) -> list[str]:
    with as_file(files("apt_plugins") / "data" / name) as path:
        text = "\n\n".join(each for each in read_file(path) if isinstance(each, str))
    return text.strip("\n").split(separator)


def _sentences(text: str) -> list[str]:
    return _SENTENCE.split(text.replace("\n", " "))


def _turns(draw: _Draw, title: str, text: str) -> Iterator[tuple[str, str]]:
    """The messages of one conversation."""
    sentences = _sentences(text)
    if draw.below(4) == 0:
        yield "system", draw.one(_SYSTEM)
    yield "user", draw.one(_FIRST).format(title)
    about = draw.number(1, min(3, len(sentences)))
    yield "assistant", " ".join(sentences[:about])
    if rest := sentences[about:]:
        yield "user", draw.one(_MORE)
        yield "assistant", " ".join(rest)
    kind = draw.below(6)
    if kind < len(_TASKS):
        question, answer = _TASKS[kind](draw, title, sentences)
        yield "user", question
        yield "assistant", answer
    elif kind == len(_TASKS):
        yield "user", draw.one(_THANKS)
        yield "assistant", draw.one(_WELCOME)


def _points(draw: _Draw, title: str, sentences: list[str]) -> tuple[str, str]:
    question = draw.one(("Write that as a list.", f"Give me notes on {title}, as bullet points."))
    return question, "\n".join(f"- {sentence}" for sentence in sentences)


def _short(draw: _Draw, title: str, sentences: list[str]) -> tuple[str, str]:
    question = draw.one(("In one sentence, please.", f"Summarise {title} in a single sentence."))
    return question, sentences[0]


def _years(draw: _Draw, title: str, sentences: list[str]) -> tuple[str, str]:
    years = sorted(set(_YEAR.findall(" ".join(sentences))))
    if not years:
        return "Did you mention any year?", "No, I did not mention a year."
    listed = years[0] if len(years) == 1 else f"{', '.join(years[:-1])} and {years[-1]}"
    return draw.one(
        ("Which years did you mention?", "What are the dates?")
    ), f"I mentioned {listed}."


def _record(draw: _Draw, title: str, sentences: list[str]) -> tuple[str, str]:
    words = sum(len(sentence.split()) for sentence in sentences)
    question = "Return it as JSON with the keys title, summary and words."
    quoted = sentences[0].replace("\\", "\\\\").replace('"', '\\"')
    named = title.replace("\\", "\\\\").replace('"', '\\"')
    return question, f'{{"title": "{named}", "summary": "{quoted}", "words": {words}}}'


_TASKS: tuple[Callable[[_Draw, str, list[str]], tuple[str, str]], ...] = (
    _points, _short, _years, _record,
)  # fmt: skip
_SYSTEM = (
    "You are a helpful assistant.", "Answer briefly and truthfully.",
    "You are an assistant who knows an encyclopedia well. If you do not know something, say so.",
)  # fmt: skip
_FIRST = (
    "Tell me about {}.", "What do you know about {}?", "{}: what is that?", "Please explain {}.",
    "I have read the name {} today. Can you tell me more?", "who or what is {}",
    "I am writing a text about {}. How would you begin it?", "Hello! Do you know {}?",
)  # fmt: skip
_MORE = (
    "What else is there to say?", "Can you say more about that?", "Go on.", "More details, please.",
    "Is there anything else that I should know?", "And then?",
)  # fmt: skip
_THANKS = ("Thank you!", "Thanks, that helps.", "Great, that is all I wanted to know.")
_WELCOME = (
    "You are welcome! Ask me again if you need anything else.", "I am glad that it helped.",
    "You're welcome. Is there another subject that you would like to hear about?",
)  # fmt: skip


def mathematics(split: Split) -> Iterator[Conversation]:
    """Problems of school mathematics with worked solutions; no problem is in both splits."""
    others = set(islice(_problems("calibration"), _PROBLEMS["calibration"]))
    excluded = others if split == "evaluation" else set[tuple[str, str]]()
    fresh = (pair for pair in _problems(split) if pair not in excluded)
    for question, answer in islice(fresh, _PROBLEMS[split]):
        yield Conversation((("user", question), ("assistant", answer)))


def _problems(split: Split) -> Iterator[tuple[str, str]]:
    draw = _Draw(_SEEDS[split])
    while True:
        yield draw.one(_KINDS)(draw)


_NAMES = ("Mary", "Amir", "Chen", "Olga", "Kofi", "Lucía", "Jonas", "Priya", "Tom", "Aiko")
_THINGS = ("apples", "notebooks", "pencils", "stamps", "marbles", "cards", "bottles", "tickets")


def _shopping(draw: _Draw) -> tuple[str, str]:
    name, thing = draw.one(_NAMES), draw.one(_THINGS)
    count, price = draw.number(2, 12), draw.number(15, 480)
    total = count * price
    paid = 20 if total <= 2000 else 50 if total <= 5000 else 100
    question = (
        f"{name} buys {count} {thing} at ${price / 100:.2f} each and pays with ${paid}. "
        "How much change is there?"
    )
    answer = (
        f"The {thing} cost {count} × ${price / 100:.2f} = ${total / 100:.2f}.\n"
        f"The change is ${paid}.00 − ${total / 100:.2f} = ${paid - total / 100:.2f}.\n"
        f"The answer is ${paid - total / 100:.2f}."
    )
    return question, answer


def _sharing(draw: _Draw) -> tuple[str, str]:
    name, thing = draw.one(_NAMES), draw.one(_THINGS)
    first, gift, factor = draw.number(20, 90), draw.number(3, 19), draw.number(2, 5)
    left = first - gift
    question = (
        f"{name} has {first} {thing}. {name} gives {gift} of them away and then buys {factor} "
        f"times as many as are left. How many {thing} does {name} have in the end?"
    )
    answer = (
        f"After giving {gift} away, {name} has {first} − {gift} = {left} {thing}.\n"
        f"{name} buys {factor} × {left} = {factor * left} more.\n"
        f"Together that is {left} + {factor * left} = {left * (factor + 1)}.\n"
        f"The answer is {left * (factor + 1)}."
    )
    return question, answer


def _linear(draw: _Draw) -> tuple[str, str]:
    x, a, b = draw.number(-12, 12), draw.number(2, 15), draw.number(1, 40)
    c = a * x + b
    answer = (
        f"Subtract {b} from both sides: {a}x = {c} − {b} = {c - b}.\n"
        f"Divide by {a}: x = {c - b}/{a} = {x}.\nTherefore $x = {x}$."
    )
    return f"Solve for x: ${a}x + {b} = {c}$.", answer


def _quadratic(draw: _Draw) -> tuple[str, str]:
    r, s = sorted((draw.number(1, 12), draw.number(1, 12)))
    answer = (
        f"We look for two numbers with the sum {r + s} and the product {r * s}: {r} and {s}.\n"
        f"So $x^2 - {r + s}x + {r * s} = (x - {r})(x - {s})$.\n"
        + (
            f"The only solution is $x = {r}$."
            if r == s
            else f"The solutions are $x = {r}$ and $x = {s}$."
        )
    )
    return f"Find all real solutions of $x^2 - {r + s}x + {r * s} = 0$.", answer


def _percent(draw: _Draw) -> tuple[str, str]:
    price, percent = draw.number(4, 60) * 20, draw.number(1, 15) * 5
    off = price * percent // 100
    answer = (
        f"{percent} % of {price} is {price} × {percent}/100 = {off}.\n"
        f"The new price is {price} − {off} = {price - off}.\nThe answer is {price - off} dollars."
    )
    return (
        f"A coat costs {price} dollars. Its price falls by {percent} %. What is the new price?",
        answer,
    )


def _speed(draw: _Draw) -> tuple[str, str]:
    speed, hours, more = draw.number(8, 24) * 5, draw.number(2, 6), draw.number(1, 3)
    slow = speed - draw.number(1, 6) * 5
    first, second = speed * hours, slow * more
    answer = (
        f"In the first part it covers {speed} km/h × {hours} h = {first} km.\n"
        f"In the second part it covers {slow} km/h × {more} h = {second} km.\n"
        f"Altogether that is {first} + {second} = {first + second} km."
    )
    return (
        f"A train runs for {hours} hours at {speed} km/h and then for {more} hours at {slow} km/h. "
        "How far does it travel?", answer,
    )  # fmt: skip


def _fractions(draw: _Draw) -> tuple[str, str]:
    a, b = (Fraction(draw.number(1, 9), draw.number(2, 12)) for _ in range(2))
    shared = a.denominator * b.denominator // gcd(a.denominator, b.denominator)
    left, right = a.numerator * shared // a.denominator, b.numerator * shared // b.denominator
    answer = (
        f"The least common denominator is {shared}.\n"
        f"{a} = {left}/{shared} and {b} = {right}/{shared}.\n"
        f"The sum is ({left} + {right})/{shared} = {left + right}/{shared} = {a + b}."
    )
    return f"Compute {a} + {b} as a fraction in lowest terms.", answer


def _divisor(draw: _Draw) -> tuple[str, str]:
    factor = draw.number(2, 18)
    a, b = sorted((factor * draw.number(2, 25), factor * draw.number(2, 25)), reverse=True)
    lines, x, y = list[str](), a, b
    while y:
        lines.append(f"{x} = {x // y} · {y} + {x % y}")
        x, y = y, x % y
    answer = "By the algorithm of Euclid:\n" + "\n".join(lines)
    return f"What is the greatest common divisor of {a} and {b}?", f"{answer}\nSo it is {x}."


def _derivative(draw: _Draw) -> tuple[str, str]:
    a, b, c, n = draw.number(2, 9), draw.number(2, 9), draw.number(1, 20), draw.number(3, 6)
    power = f"x^{n - 1}" if n > 2 else "x"
    answer = (
        f"By the power rule, the derivative of ${a}x^{n}$ is ${a * n}{power}$, that of ${b}x^2$ is "
        f"${2 * b}x$, and a constant has the derivative 0.\n"
        f"So $f'(x) = {a * n}{power} + {2 * b}x$."
    )
    return f"Differentiate $f(x) = {a}x^{n} + {b}x^2 + {c}$.", answer


def _area(draw: _Draw) -> tuple[str, str]:
    sides, factor = draw.one(((3, 4, 5), (5, 12, 13), (8, 15, 17), (7, 24, 25))), draw.number(1, 6)
    a, b, c = (side * factor for side in sides)
    answer = (
        f"By the theorem of Pythagoras the hypotenuse is √({a}² + {b}²) = √{a * a + b * b} = "
        f"{c} cm.\nThe perimeter is {a} + {b} + {c} = {a + b + c} cm, and the area is "
        f"½ · {a} · {b} = {Fraction(a * b, 2)} cm²."
    )
    question = (
        f"The legs of a right triangle are {a} cm and {b} cm long. Find its perimeter and area."
    )
    return question, answer


def _series(draw: _Draw) -> tuple[str, str]:
    first, step, count = draw.number(1, 20), draw.number(2, 9), draw.number(8, 40)
    last = first + (count - 1) * step
    total = count * (first + last) // 2
    shown = ", ".join(str(first + step * place) for place in range(3))
    answer = (
        f"The last term is {first} + {count - 1} · {step} = {last}.\n"
        f"The sum is n(a₁ + aₙ)/2 = {count} · ({first} + {last})/2 = {total}."
    )
    return f"What is the sum of the first {count} terms of the sequence {shown}, …?", answer


def _remainder(draw: _Draw) -> tuple[str, str]:
    base, power, modulus = draw.number(2, 9), draw.number(5, 14), draw.number(5, 13)
    lines, value = list[str](), 1
    for exponent in range(1, power + 1):
        value = value * base % modulus
        lines.append(f"{base}^{exponent} ≡ {value}")
    answer = f"Modulo {modulus}: " + ", ".join(lines) + f".\nThe remainder is {value}."
    return f"Find the remainder of {base}^{power} divided by {modulus}.", answer


def _chance(draw: _Draw) -> tuple[str, str]:
    red, blue = draw.number(2, 12), draw.number(2, 12)
    total = red + blue
    both = Fraction(red * (red - 1), total * (total - 1))
    answer = (
        f"The first ball is red with the probability {red}/{total}, and the second one then with "
        f"{red - 1}/{total - 1}.\nTogether: {red}/{total} · {red - 1}/{total - 1} = {both}."
    )
    return (
        f"A bag has {red} red and {blue} blue balls. Two are drawn without putting the first back. "
        "What is the probability that both are red?", answer,
    )  # fmt: skip


_KINDS: tuple[Callable[[_Draw], tuple[str, str]], ...] = (
    _shopping, _sharing, _linear, _quadratic, _percent, _speed, _fractions, _divisor, _derivative,
    _area, _series, _remainder, _chance,
)  # fmt: skip
