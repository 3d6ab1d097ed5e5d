"""Adapters that declare wrong groups."""

from dataclasses import replace

from apt.adapter import Part
from tests.conformance.mutants.models import JAMBA, LLAMA, MAMBA, MAMBA2, GptOss


def regrouped(change, kind="channels", base=LLAMA):
    """The groups of one kind are changed by ``change``."""

    class Regrouped(base):
        def groups(self, block, config):
            known = super().groups(block, config)
            return [change(groups) if groups.kind == kind else groups for groups in known]

    return Regrouped


def without_part(path, kind="channels", base=LLAMA, **equal):
    """One part is forgotten."""

    def change(groups):
        def forgotten(part):
            same = all(getattr(part, name) == value for name, value in equal.items())
            return part.parameter == path and same

        return replace(groups, parts=tuple(p for p in groups.parts if not forgotten(p)))

    return regrouped(change, kind, base)


PartForgotten = without_part("mlp.up_proj.weight")
GateForgotten = without_part("mixer.in_proj.weight", base=MAMBA, start=64)
RouterForgotten = without_part("feed_forward.router.weight", "experts", JAMBA)
NoField = regrouped(lambda groups: replace(groups, fields={}))
WrongReader = regrouped(lambda groups: replace(groups, readers=("mlp.gate_proj",)))
AnotherReader = regrouped(lambda groups: replace(groups, readers=("self_attn.q_proj",)), "heads")
OneReader = regrouped(lambda groups: replace(groups, readers=("mixer.out_proj",)), base=MAMBA)
NoSite = regrouped(lambda groups: replace(groups, readers=("mlp.none",)))
NoReader = regrouped(lambda groups: replace(groups, readers=()))
TooMany = regrouped(lambda groups: replace(groups, count=groups.count + 1))
NoParameterOf = regrouped(
    lambda groups: replace(groups, parts=(*groups.parts, Part("mlp.none.weight")))
)
WrongOutputs = regrouped(
    lambda groups: replace(groups, outputs=(groups.parts[2],)), "states", MAMBA
)
EntriesStay = regrouped(lambda groups: replace(groups, parts=groups.parts[1:]), "states", MAMBA)
# The rows for B will do as outputs, in place of those for C: a state that nothing enters is zero.
EntriesAsOutputs = regrouped(
    lambda groups: replace(groups, outputs=(groups.parts[0],)), "states", MAMBA
)


def of_convolution(change, parts):
    """The parts in the convolution are changed by ``change``."""
    return tuple(change(part) if "conv1d" in part.parameter else part for part in parts)


def earlier(groups):
    """A part begins 2 × count earlier. With two groups of heads, those of C become those of B."""
    return lambda part: replace(part, start=part.start - 2 * groups.count)


EarlierParts = regrouped(
    lambda groups: replace(groups, parts=of_convolution(earlier(groups), groups.parts)),
    "states", MAMBA2,
)  # fmt: skip
EarlierStates = regrouped(
    lambda groups: replace(
        groups,
        parts=of_convolution(earlier(groups), groups.parts),
        outputs=of_convolution(earlier(groups), groups.outputs),
    ),
    "states", MAMBA2,
)  # fmt: skip
EarlierOutputs = regrouped(
    lambda groups: replace(groups, outputs=of_convolution(earlier(groups), groups.outputs)),
    "states", MAMBA2,
)  # fmt: skip


def written(kind="channels", base=LLAMA, **fields):
    """Some fields of the configuration get other values."""
    return regrouped(lambda groups: replace(groups, fields={**groups.fields, **fields}), kind, base)


OneWidth = written(intermediate_size=lambda kept: 32)  # that of half of the channels
AnotherField = written(max_position_embeddings=int)
AnotherFieldOfStates = written("states", MAMBA, intermediate_size=int)


NoBins = regrouped(lambda groups: replace(groups, bins=1), "heads")


def with_norms(groups):
    """Heads with their entries of the norms of q and k, which are over all heads together."""
    norms = tuple(Part(f"self_attn.{name}_norm.weight", each=8) for name in "qk")
    return replace(groups, parts=(*groups.parts, *norms))


NormedHeads = regrouped(with_norms, "heads")
NormsForgotten = regrouped(lambda groups: groups, "heads")


def shifted(groups):
    """Each part of the query heads begins one entry too late."""
    parts = tuple(
        replace(part, each=part.each // 2) if "q_proj" in part.parameter else part
        for part in groups.parts
    )
    return replace(groups, parts=parts)


HalfHeads = regrouped(shifted, "heads")


def interleaved(groups):
    """The rows of the gate and the others are taken for pairs, where they are one after another."""
    twice = [part for part in groups.parts if part.start]
    paths = {part.parameter for part in twice}
    pairs = tuple(replace(part, each=2, start=0) for part in twice)
    return replace(groups, parts=(*(p for p in groups.parts if p.parameter not in paths), *pairs))


def concatenated(groups):
    """The rows of pairs are taken for rows of the gate, and then the others."""
    pairs = [part for part in groups.parts if part.each == 2]
    parts = [part for part in groups.parts if part.each != 2]
    parts += [replace(p, each=1, start=start) for p in pairs for start in (0, groups.count)]
    return replace(groups, parts=tuple(parts))


Interleaved = regrouped(interleaved, "expert-channels", JAMBA)
Concatenated = regrouped(concatenated, "expert-channels", GptOss)
FewExperts = regrouped(lambda groups: replace(groups, least=1), "experts", JAMBA)


def repermuted(change, base=LLAMA):
    """The permutable inputs are changed by ``change``, if that returns something."""

    class Repermuted(base):
        def permutable(self, block, config):
            known = super().permutable(block, config)
            return [change(permutable) or permutable for permutable in known]

    return Repermuted


def no_up(permutable):
    """The rows of ``up_proj`` are forgotten."""
    parts = tuple(part for part in permutable.parts if "up_proj" not in part.parameter)
    return replace(permutable, parts=parts)


def across_heads(permutable):
    """The values of all key/value heads are in one bin."""
    if permutable.bins > 1:
        parts = tuple(replace(p, each=p.each * permutable.bins) for p in permutable.parts)
        return replace(permutable, parts=parts, size=permutable.size * permutable.bins, bins=1)
    return None


def no_gate_up(permutable):
    """The rows of the gate and of the other weight of an expert are forgotten."""
    if permutable.expert is None:
        return None
    parts = tuple(part for part in permutable.parts if "gate_up" not in part.parameter)
    return replace(permutable, parts=parts)


RowsStay = repermuted(no_up)
RowsOfExpertStay = repermuted(no_gate_up, JAMBA)
AcrossHeads = repermuted(across_heads)
ReadByNone = repermuted(lambda permutable: replace(permutable, reader="mlp.none"))
ColumnsStay = repermuted(lambda permutable: replace(permutable, parts=permutable.parts[:-1]))
TooLarge = repermuted(lambda permutable: replace(permutable, bins=permutable.bins + 1))
NoSuchPart = repermuted(
    lambda permutable: replace(permutable, parts=(Part("mlp.none"), *permutable.parts))
)
