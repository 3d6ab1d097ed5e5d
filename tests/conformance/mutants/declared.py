"""Adapters with wrong declarations of sites, blocks or experts."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

from apt.adapter import DecoderAdapter, Site
from tests.conformance.mutants.models import JAMBA, LLAMA, MAMBA, OPT, Gemma


def altered(base=LLAMA, **changes):
    """Sites of which some are altered: ``o_proj={…}`` replaces fields, None drops the site."""

    class Altered(base):
        def sites(self, block):
            kept = []
            for site in super().sites(block):
                names = (site.kind.rpartition(".")[2], site.kind.replace(".", "_"))
                change = next((changes[name] for name in names if name in changes), {})
                if change is not None:
                    kept.append(replace(site, **change))
            return kept

    return Altered


def swapped(one, other, base=LLAMA):
    """Each of two sites has the other's name."""

    class Swapped(base):
        def sites(self, block):
            def name(text):
                return {one: other, other: one}.get(text, text)

            def of(site):
                start, _, last = site.name.rpartition(".")
                kind, _, expert = start.rpartition(".") if site.expert is not None else ("", "", "")
                return f"{start}.{name(last)}" if not kind else f"{kind}.{expert}.{name(last)}"

            return [replace(site, name=of(site)) for site in super().sites(block)]

    return Swapped


class LastForgotten(LLAMA):
    def blocks(self, model):
        return super().blocks(model)[:-1]


class FirstForgotten(LLAMA):
    def blocks(self, model):
        return super().blocks(model)[1:]


class MiddleForgotten(LLAMA):
    def blocks(self, model):
        return super().blocks(model)[::2]


class Renamed(LLAMA):
    def blocks(self, model):
        return [(name.removeprefix("model."), block) for name, block in super().blocks(model)]


class TooLong(OPT):
    """On a model whose positions are a table of 32 rows."""

    def positions(self, config):
        return None


class TooShort(LLAMA):
    """Takes the window of the attention for the number of positions."""

    def positions(self, config):
        return 4


class NoLimit(OPT):
    """On a model whose positions are a table of 128 rows."""

    def positions(self, config):
        return None


class TwiceAsLong(OPT):
    def positions(self, config):
        return 2 * config.max_position_embeddings


class AnotherEpsilon(LLAMA):
    """Runs the model with another epsilon in its norms."""

    @contextmanager
    def running(self, model):
        norms = [m for m in model.modules() if hasattr(m, "variance_epsilon")]
        before = [norm.variance_epsilon for norm in norms]
        for norm in norms:
            norm.variance_epsilon = 1e-4
        try:
            yield
        finally:
            for norm, epsilon in zip(norms, before, strict=True):
                norm.variance_epsilon = epsilon


class NoEffects(MAMBA):
    def effects(self, block, extras, sink):
        return nullcontext()


class WrongEffects(MAMBA):
    def effects(self, block, extras, sink):
        def shifted(extra, gram, energy):
            sink(extra, gram.roll(1, -1), energy)

        return super().effects(block, extras, shifted)


class NoParameter(MAMBA):
    def extras(self, block):
        return [replace(e, parameter=f"{e.parameter}s") for e in super().extras(block)]


class KindForgotten(Gemma):
    """Knows the blocks with a window only."""

    def blocks(self, model):
        return [b for b in super().blocks(model) if b[1].self_attn.is_sliding]


class OneKind(Gemma):
    """The first block's masks and rotary embeddings for all blocks."""

    def enter(self, model, tokens):
        state, calls = super().enter(model, tokens)
        return state, [calls[0]] * len(calls)


class ExpertsForgotten(JAMBA):
    """The Linears only; experts are multiplied all at once, where they are no matrices."""

    def sites(self, block):
        return [site for site in super().sites(block) if site.expert is None]

    def step(self, block, state, call):
        return DecoderAdapter.step(self, block, state, call)


class SomeExpertsForgotten(JAMBA):
    def sites(self, block):
        return [site for site in super().sites(block) if site.expert != 3]


class RouterPruned(JAMBA):
    def sites(self, block):
        sites, router = super().sites(block), "feed_forward.router"
        if self.experts_of(block):
            sites.append(Site(router, f"{router}.weight", "router", len(sites)))
        return sites
