"""The weight tap reports every form of a product, and changes no result."""

import pytest
import torch
from torch.nn import functional as F

from apt.adapter.weight_tap import WeightTap

W = torch.randn(6, 4)  # (out, in)
STORED_IN_OUT = W.T.contiguous()
X = torch.randn(2, 5, 4)
ROWS = X.reshape(-1, 4)

PRODUCTS = {
    "linear": (W, lambda: F.linear(X, W)),
    "linear-keywords": (W, lambda: F.linear(X, weight=W, bias=torch.zeros(6))),
    "linear-all-keywords": (W, lambda: F.linear(input=X, weight=W)),
    "at-transposed": (W, lambda: X @ W.T),
    "at-left": (W, lambda: W @ X.transpose(1, 2)),
    "matmul": (W, lambda: torch.matmul(X, W.t())),
    "matmul-keyword": (W, lambda: torch.matmul(X, other=W.t())),
    "method": (W, lambda: X.matmul(W.T)),
    "mm": (W, lambda: torch.mm(ROWS, W.T)),
    "mm-method": (W, lambda: W.mm(ROWS.T)),
    "addmm": (STORED_IN_OUT, lambda: torch.addmm(torch.zeros(6), ROWS, STORED_IN_OUT)),
    "baddbmm": (
        STORED_IN_OUT,
        lambda: torch.baddbmm(torch.zeros(6), ROWS[None], STORED_IN_OUT[None]),
    ),
    "bmm-keywords": (W, lambda: torch.bmm(ROWS[None], mat2=W.T[None])),
    "module": (W, lambda: _linear()(X)),
    "view": (W, lambda: F.linear(X, W.view(6, 4))),
}


def _linear():
    module = torch.nn.Linear(4, 6, bias=False)
    module.weight = torch.nn.Parameter(W)
    return module


@pytest.mark.parametrize("name", PRODUCTS)
def test_each_product_is_reported_once(name):
    weight, product = PRODUCTS[name]
    seen = []
    plain = product()
    with WeightTap({"w": weight}, lambda key, x: seen.append((key, x))):
        tapped = product()
    assert torch.equal(plain, tapped)
    assert [key for key, _ in seen] == ["w"]
    assert torch.equal(seen[0][1].reshape(-1, 4), ROWS)


def test_products_inside_of_an_attention_of_torch_are_reported():
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(4, 2, batch_first=True)
    weights = {"inputs": attention.in_proj_weight, "outputs": attention.out_proj.weight}
    plain, seen = attention(X, X, X)[0], []
    with WeightTap(weights, lambda key, x: seen.append((key, x))):
        tapped = attention(X, X, X)[0]
    assert torch.equal(plain, tapped)
    assert [key for key, _ in seen] == ["inputs", "outputs"]
    assert torch.equal(seen[0][1].transpose(0, 1), X)
    last = attention.out_proj(seen[1][1]).unflatten(0, (5, 2)).transpose(0, 1)
    assert torch.allclose(last, plain)


def test_other_products_are_not_reported():
    other = torch.randn(6, 4)
    part = W[:4]
    with WeightTap({"w": W}, lambda key, x: pytest.fail("seen")):
        F.linear(X, other)
        X @ part.T
        X @ W.clone().T


def test_no_product_is_reported_after_an_exception():
    seen = []
    with pytest.raises(RuntimeError), WeightTap({"w": W}, lambda key, x: seen.append(key)):
        raise RuntimeError
    F.linear(X, W)
    assert seen == []
