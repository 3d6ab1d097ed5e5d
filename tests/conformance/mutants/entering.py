"""Adapters with faults in `enter` or `step`."""

import torch

from apt.adapter import Call, stubbed
from tests.conformance.mutants.models import LLAMA, MAMBA, Echo, Llava


class WrongStep(LLAMA):
    def step(self, block, state, call):
        return super().step(block, state, call) * (1 + 1e-6)


class WrongEnter(LLAMA):
    def enter(self, model, tokens):
        state, calls = super().enter(model, tokens)
        return state + 1e-6, calls


class SecondDropped(Echo):
    """Keeps the stream alone of what a block returns."""

    def step(self, block, state, call):
        return self.residual(super().step(block, state, call))


class TowerTouched(Llava):
    """Changes the part for images while the language model runs."""

    def enter(self, model, tokens):
        self._tower = model.model.vision_tower
        return super().enter(model, tokens)

    def step(self, block, state, call):
        next(self._tower.parameters()).data += 1e-3
        return super().step(block, state, call)


class WithoutGradient(LLAMA):
    @torch.no_grad()
    def step(self, block, state, call):
        return super().step(block, state, call)


class Detached(LLAMA):
    def step(self, block, state, call):
        return super().step(block, state, call).detach()


class DetachedBefore(LLAMA):
    def step(self, block, state, call):
        return super().step(block, state.detach(), call)


class InInference(LLAMA):
    def step(self, block, state, call):
        with torch.inference_mode():
            result = super().step(block, state, call)
        return result.clone()


class ByShape(LLAMA):
    def __init__(self):
        self._known = {}

    def enter(self, model, tokens):
        if tokens.shape not in self._known:
            self._known[tokens.shape] = super().enter(model, tokens)
        return self._known[tokens.shape]


class FirstMasks(LLAMA):
    def __init__(self):
        self._calls = None

    def enter(self, model, tokens):
        state, calls = super().enter(model, tokens)
        self._calls = self._calls or calls
        return state, self._calls


class Cut(LLAMA):
    def enter(self, model, tokens):
        return super().enter(model, tokens[:, :32])


class LiveCache(LLAMA):
    """Lets the model make its cache, which every step then adds to."""

    def enter(self, model, tokens):
        states, calls = [], []

        def stub(*args, **kwargs):
            states.append(args[0])
            calls.append(Call(args[1:], kwargs))
            return args[0]

        with stubbed([block for _, block in self.blocks(model)], stub), torch.no_grad():
            model.base_model(tokens, use_cache=True)
        return states[0], calls


class MixerCache(MAMBA):
    """The same of Mamba, whose steps give the same all the while."""

    enter = LiveCache.enter


class DoubledStream(LLAMA):
    def residual(self, state):
        return 2 * state


class NoStream(LLAMA):
    def residual(self, state):
        return torch.zeros_like(state)


class TransposedStream(LLAMA):
    def residual(self, state):
        return state.transpose(0, 1)


class FlatStream(LLAMA):
    def residual(self, state):
        return state.flatten(0, 1)
