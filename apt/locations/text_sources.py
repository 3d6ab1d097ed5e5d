"""The names of texts that a user gives: one source, or a mix of several with their shares."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

from apt.errors import AptError, shortened
from apt.locations.paths import expanded, kind_at, portable

_SHARE = re.compile(r"\d+(\.\d*)?|\.\d+")


@dataclass(frozen=True)
class TextSource:
    """A source of text.

    Attributes:
        name: the name of a data set, or the path of a file.
        share: its share of all samples; the shares of a mix sum up to 1.
    """

    name: str
    share: float = 1.0


def text_sources(text: str) -> tuple[TextSource, ...]:
    """The sources that a text names, such as ``chat=0.5,code=0.3,wiki``.

    Names are separated by commas. A name may have a share after an equals sign. Shares are relative
    to each other. A name without a share has the share 1, or, if the sum of the shares is less than
    1, an equal part of the rest. A file whose path has a comma is one source.

    Raises:
        AptError: a name is empty or occurs twice, or a share is 0.
    """
    if "," not in text or kind_at(expanded(text)):
        return (TextSource(text),)
    pairs = [_read(part.strip(), text) for part in text.split(",")]
    if twice := {name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1}:
        raise _wrong(text, f"names {shortened(min(twice))} twice")
    left = 1 - sum(share or 0.0 for _, share in pairs)
    without = sum(share is None for _, share in pairs)
    default = left / without if without and left > 0 and without < len(pairs) else 1.0
    shares = [default if share is None else share for _, share in pairs]
    return tuple(
        TextSource(name, share / sum(shares))
        for (name, _), share in zip(pairs, shares, strict=True)
    )


def _read(part: str, text: str) -> tuple[str, float | None]:
    """The name and the share of a part of a mix; None for no share.

    No file that can be read has a name that ends in a number after an equals sign.
    """
    name, equals, share = part.rpartition("=")
    if not equals or not _SHARE.fullmatch(share):
        name, share = part, ""
    if not name:
        raise _wrong(text, "has a source without a name")
    if share and not float(share):
        raise _wrong(text, f"has a share of 0 for {shortened(name)}")
    return name, float(share) if share else None


def _wrong(text: str, problem: str) -> AptError:
    return AptError(
        f"the mix of texts {shortened(text)} {problem}",
        "write NAME=SHARE,NAME=SHARE, such as chat=0.5,code=0.3,wiki",
        ("calibration",),
    )


def portable_sources(text: str) -> str:
    """A source or a mix, without the parent folders of local paths."""
    sources = text_sources(text)
    if len(sources) == 1:
        return portable(text)
    return ",".join(f"{portable(each.name)}={each.share:.6g}" for each in sources)


def labels(names: Sequence[str]) -> dict[str, str]:
    """The names of sources in reports, where local files have no folders; all are different."""
    by_name = dict[str, str]()
    for name in names:
        label, number = portable(name), 1
        while label in by_name.values():
            number += 1
            label = f"{portable(name)} ({number})"
        by_name[name] = label
    return by_name


def apportioned(count: int, sources: tuple[TextSource, ...]) -> list[int]:
    """Whole numbers that sum up to ``count``, by the shares; at least 1 for each source.

    Raises:
        AptError: there are more sources than samples.
    """
    if count < len(sources):
        raise AptError(
            f"{count} samples are fewer than the {len(sources)} sources of the calibration",
            "use more samples, or fewer sources",
            ("samples", "calibration"),
        )
    exact = [count * source.share for source in sources]
    counts = [max(1, floor(number)) for number in exact]
    while (rest := count - sum(counts)) != 0:
        step = 1 if rest > 0 else -1
        gaps = [(number - whole) * step for number, whole in zip(exact, counts, strict=True)]
        places = [place for place, whole in enumerate(counts) if step > 0 or whole > 1]
        counts[max(places, key=lambda place: gaps[place])] += step
    return counts
