"""The recording of calls: runs with stubs determine the form of a block's output."""

from collections import UserDict

import pytest
import torch
from torch import nn

from apt.adapter import DecoderAdapter, record_calls, stub_output
from apt.errors import AptError


class Model(nn.Module):
    """Three blocks, and a function of the model for the output of a block."""

    def __init__(self, take):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.take = take

    @property
    def base_model(self):
        return self

    def forward(self, tokens, use_cache):
        state = torch.ones(*tokens.shape, 4)
        for place, block in enumerate(self.blocks):
            state = self.take(block(state, place=place))
        return state


def pair(result):
    state, _ = result
    return state


def triple(result):
    state, _, _ = result
    return state


def normed(result):
    return result.float()


def as_it_is(result):
    return result


FORMS = {as_it_is: 1, pair: 2, triple: 3, normed: None}
"""The number of values that a block returns; None for the stream without a tuple."""


@pytest.mark.parametrize("take", FORMS, ids=lambda take: take.__name__)
def test_record_calls_finds_the_form_of_the_output(take):
    model = Model(take)
    state, calls = record_calls(model, list(model.blocks), torch.zeros(2, 3))
    assert state.shape == (2, 3, 4)
    assert [call.kwargs for call in calls] == [{"place": place} for place in range(3)]
    given = torch.tensor(1)
    found = stub_output((given,), {}, model.blocks[0])
    values = found if isinstance(found, tuple) else [found]
    assert [value for value in values if value is not None] == [given]
    assert FORMS[take] == (len(found) if isinstance(found, tuple) else None)


class Passing(Model):
    """Each block takes a second value from the block before, by position or by its name."""

    def __init__(self, by_name):
        super().__init__(None)
        self.blocks = nn.ModuleList(Counting() for _ in range(3))
        self.by_name = by_name

    def forward(self, tokens, use_cache):
        state, other = torch.ones(*tokens.shape, 4), None
        for block in self.blocks:
            state, other = block(state, other=other) if self.by_name else block(state, other)
        return state


class Counting(nn.Module):
    """Adds what it was given, and passes on one more."""

    def forward(self, state, other=None):
        other = 0 if other is None else other
        return state + other, other + 1


@pytest.mark.parametrize(("by_name", "key"), [(False, 0), (True, "other")])
def test_values_beside_the_stream_are_part_of_the_state(by_name, key):
    model, adapter = Passing(by_name), DecoderAdapter()
    state, calls = record_calls(model, list(model.blocks), torch.zeros(2, 3))
    assert [(call.carried, call.keeps) for call in calls] == [({}, 2), ({key: 1}, 2), ({key: 1}, 2)]
    for block, call in zip(model.blocks, calls, strict=True):
        state = adapter.step(block, state, call)
    assert state[1] == 3
    assert adapter.residual(state).equal(torch.full((2, 3, 4), 1.0 + 0 + 1 + 2))


class Sharing(Model):
    """The first block fills a mapping that later blocks read, as keys and values are shared."""

    def __init__(self):
        super().__init__(None)
        self.blocks = nn.ModuleList(Filling() for _ in range(3))

    def forward(self, tokens, use_cache):
        state, shared = torch.ones(*tokens.shape, 4), UserDict()
        for block in self.blocks:
            state = block(state, shared=shared)
        return state


class Filling(nn.Module):
    """Adds what the first block of a run was given."""

    def forward(self, state, shared):
        shared.setdefault("first", state)
        return state + shared["first"]


def test_shared_mappings_are_part_of_the_state():
    model, adapter = Sharing(), DecoderAdapter()
    state, calls = record_calls(model, list(model.blocks), torch.zeros(2, 3))
    assert [call.shared for call in calls] == [("shared",)] * 3
    states = [state, 10 * state]
    for block, call in zip(model.blocks, calls, strict=True):  # two streams in turn
        states = [adapter.step(block, each, call) for each in states]
    for factor, after in zip((1.0, 10.0), states, strict=True):
        assert adapter.residual(after).equal(torch.full((2, 3, 4), factor * 4))
        assert after[-1]["shared"]["first"].equal(torch.full((2, 3, 4), factor))
    assert not any(call.kwargs["shared"] for call in calls)


def test_record_calls_raises_the_error_of_the_longest_run():
    unpacked = []

    def fail(result):
        state, _ = result
        if unpacked:
            raise KeyError("the second block")
        unpacked.append(state)
        return state

    model = Model(fail)
    with pytest.raises(KeyError, match="the second block"):
        record_calls(model, list(model.blocks), torch.zeros(2, 3))


def test_uncalled_blocks_are_an_error_with_their_number():
    model = Model(pair)
    with pytest.raises(AptError, match="Model called 3 of its 4 blocks"):
        record_calls(model, [*model.blocks, nn.Linear(4, 4)], torch.zeros(2, 3))


def test_stub_of_an_unrecorded_block_returns_a_tuple():
    given = torch.tensor(1)
    assert stub_output(((given,),), {}, nn.Linear(2, 2)) == (given,)
