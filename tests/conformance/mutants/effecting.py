"""Adapters that report wrong effects of extras, or declare the wrong removal."""

from dataclasses import replace

import torch

from tests.conformance.mutants.models import MAMBA

_OTHER = {"product": "effect", "effect": "product"}


def misreported(kind, change, base=MAMBA, energies=1.0):
    """The Gram matrices of one kind of extra are changed by ``change``; it is the only kind.

    Its energies are multiplied by ``energies``.
    """

    class Misreported(base):
        def extras(self, block):
            return [extra for extra in super().extras(block) if extra.kind == kind]

        def effects(self, block, extras, sink):
            def changed(extra, gram, energy):
                sink(extra, change(gram), energy * energies)

            return super().effects(block, extras, changed)

    return Misreported


def removed_otherwise(kind, base=MAMBA):
    """The only kind of extra is declared with the other removal."""

    class Otherwise(base):
        def extras(self, block):
            return [
                replace(extra, removal=_OTHER[extra.removal])
                for extra in super().extras(block)
                if extra.kind == kind
            ]

    return Otherwise


def rolled(gram):
    """Each channel has the matrix of its neighbour."""
    return gram.roll(1, 0)


def reversed_channels(gram):
    return gram.flip(0)


def reversed_weights(gram):
    return gram.flip(1, 2)


def identity(gram):
    return torch.eye(gram.shape[-1]).expand(gram.shape).to(gram).clone()


def mean(gram):
    """All channels have one matrix."""
    return gram.mean(0, keepdim=True).expand(gram.shape).clone()


def inverse(gram):
    """What has a small effect has a large one."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    return torch.diag_embed(1 / (diagonal + 1e-9 * diagonal.max()))


def diagonal(gram):
    """Two weights are taken for independent."""
    return torch.diag_embed(gram.diagonal(dim1=1, dim2=2))


def trace(gram):
    """All weights of a channel are taken for equal."""
    return identity(gram) * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]


def tenfold(gram):
    return 10 * gram


def unchanged(gram):
    return gram
