"""Adapters with faults in the captured inputs, or in the effects of the capture."""

from contextlib import contextmanager, suppress

from tests.conformance.mutants.models import LLAMA


class WrongInput(LLAMA):
    def capture(self, block, sites, sink):
        return super().capture(block, sites, lambda site, rows: sink(site, rows.roll(1, -1)))


class Doubled(LLAMA):
    def capture(self, block, sites, sink):
        def twice(site, rows):
            sink(site, rows)
            sink(site, rows)

        return super().capture(block, sites, twice)


class Rows(LLAMA):
    """Captures inputs with the right Gram matrix."""

    def capture(self, block, sites, sink):
        return super().capture(block, sites, lambda site, rows: sink(site, self.changed(rows)))


class Negated(Rows):
    def changed(self, rows):
        return -rows


class Backwards(Rows):
    def changed(self, rows):
        return rows.flip(1)


class OtherSamples(Rows):
    def changed(self, rows):
        return rows.flip(0)


class AtTheEnd(LLAMA):
    """Hands all inputs over when the block has run."""

    @contextmanager
    def capture(self, block, sites, sink):
        kept = []
        with super().capture(block, sites, lambda *given: kept.append(given)):
            yield
        for given in kept:
            sink(*given)


class Leaking(LLAMA):
    @contextmanager
    def capture(self, block, sites, sink):
        block.register_forward_hook(lambda module, args, output: None)
        with super().capture(block, sites, sink):
            yield


class LeakingOnError(LLAMA):
    @contextmanager
    def capture(self, block, sites, sink):
        handle = block.register_forward_hook(lambda module, args, output: None)
        with super().capture(block, sites, sink):
            yield
        handle.remove()


class Late(LLAMA):
    """Hands inputs over after their products."""

    @contextmanager
    def capture(self, block, sites, sink):
        handles = [
            block.get_submodule(site.name).register_forward_hook(
                lambda module, args, output, site=site: sink(site, args[0])
            )
            for site in sites
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class Swallowing(LLAMA):
    @contextmanager
    def capture(self, block, sites, sink):
        def quiet(site, rows):
            with suppress(Exception):
                sink(site, rows)

        with super().capture(block, sites, quiet):
            yield


class Disturbing(LLAMA):
    @contextmanager
    def capture(self, block, sites, sink):
        handle = block.register_forward_hook(lambda module, args, output: output * 1.001)
        with super().capture(block, sites, sink):
            yield
        handle.remove()
