"""Wrong in the groups that they declare."""

from dataclasses import replace

from apt.adapter import Part
from tests.conformance.mutants.models import JAMBA, LLAMA, MAMBA


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


def shifted(groups):
    """Each part of the query heads begins one entry too late."""
    parts = tuple(
        replace(part, each=part.each // 2) if "q_proj" in part.parameter else part
        for part in groups.parts
    )
    return replace(groups, parts=parts)


HalfHeads = regrouped(shifted, "heads")
FewExperts = regrouped(lambda groups: replace(groups, least=1), "experts", JAMBA)
