"""Products of one run of a block are used in the next one."""

import torch
from torch import nn

from apt.calibration.stored_products import StoredProducts


@torch.no_grad()
def test_products_inside_of_an_attention_of_torch_are_stored():
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
    weights = {"inputs": attention.in_proj_weight, "outputs": attention.out_proj.weight}
    products = StoredProducts(weights)
    with products.run({"outputs"}):
        first, _ = attention(x, x, x)
    attention.in_proj_weight.zero_()  # a second product with it would show
    attention.out_proj.weight.mul_(2)
    attention.out_proj.bias.mul_(2)
    with products.run(()):
        second, _ = attention(x, x, x)
    assert torch.equal(second, 2 * first)
