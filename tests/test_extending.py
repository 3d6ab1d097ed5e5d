"""What plugins of other people import and return."""

import math

import pytest

import apt as library
from apt import AptError
from apt.solver import Solution, ss
from tests.families import random_model, random_tokens

TOKENS = random_tokens(samples=4)
LAYER_WISE = library.PruneOptions(error_aware=False)


def wrong(change):
    """A method whose correct solution is changed."""

    def mine(*given):
        return change(ss(*given))

    return mine


def without_mask(found):
    found.weight[found.mask.nonzero(as_tuple=True)[0][0]] = 1
    return found


WRONG = {
    "nothing": (lambda s: None, "returns NoneType, not an apt.solver.Solution, for SITE"),
    "the weight": (lambda s: s.weight, "returns Tensor, not an apt.solver.Solution, for SITE"),
    "a pair": (lambda s: (s.weight, s.mask), "returns tuple, not an apt.solver.Solution"),
    "no mask": (lambda s: Solution(s.weight, None), "returns NoneType as a mask, not a tensor"),
    "transposed": (
        lambda s: Solution(s.weight.T[:, :8], s.mask), "returns a weight of (32, 8), not (32, 32)"
    ),
    "a mask of a row": (lambda s: Solution(s.weight, s.mask[0]), "a mask of (32,), not (32, 32)"),
    "doubles": (
        lambda s: Solution(s.weight.double(), s.mask), "of torch.float64, not torch.float32"
    ),
    "a mask of floats": (
        lambda s: Solution(s.weight, s.mask.float()), "a mask of torch.float32, not torch.bool"
    ),
    "elsewhere": (
        lambda s: Solution(s.weight.to("meta"), s.mask), "returns a weight on meta, not cpu"
    ),
    "not zero": (without_mask, "returns a weight of SITE that is not zero at its mask"),
    "not finite": (
        lambda s: Solution(s.weight.masked_fill(~s.mask, math.nan), s.mask),
        "returns a weight of SITE that is not finite; use more damping",
    ),
    "dense": (lambda s: Solution(s.weight + 1, s.mask & False), "removes fewer weights of SITE"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_method_that_returns_something_else_is_told_in_one_line(name):
    change, said = WRONG[name]
    model, site = random_model("llama"), "model.layers.0.self_attn.q_proj"
    with pytest.raises(AptError) as caught:
        library.prune(model, TOKENS, pattern="0.5", method=wrong(change), options=LAYER_WISE)
    message = str(caught.value)
    assert message.startswith("in model.layers.0: method mine ")
    assert said.replace("SITE", site) in message
    assert site in message
    assert "\n" not in message
    assert "method" in caught.value.options
