"""Masks that move during a training of several processes."""

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from apt.checkpoints.masks import masks_of
from apt.recovery.moving_masks import MovingMasks
from tests.helpers.families import adapter_of, random_model
from tests.helpers.processes import forked

NEVER, ONCE = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"


def moved(rank, size):
    """The masks of a rank after a move, and the number of exchanges."""
    torch.manual_seed(0)
    model = random_model("llama")
    adapter = adapter_of(model)
    for name, block in adapter.blocks(model):
        for site in adapter.sites(block):
            weight = model.get_parameter(f"{name}.{site.parameter}").data
            weight.masked_fill_(torch.rand(weight.shape) < 0.5, 0)
    masks = masks_of(model, adapter)
    moving = MovingMasks(model, adapter, masks, steps=8)
    order = [name for name in masks if name != NEVER and not (rank and name == ONCE)]
    for name in reversed(order) if rank else order:
        draw = torch.Generator().manual_seed(rank)
        moving.add_gradient(name, torch.randn(masks[name].shape, generator=draw) / size)
    number = moving.move(1, torch.optim.SGD(model.parameters(), lr=0.1))
    return masks, number


def as_a_rank(rank, size, folder):
    """The program of each process."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size
    )
    torch.save(moved(rank, size), f"{folder}/{rank}")
    dist.destroy_process_group()


def test_ranks_with_different_gradients_move_the_same_masks(tmp_path):
    multiprocessing.start_processes(
        as_a_rank, (2, str(tmp_path)), 2, start_method=forked.get_start_method()
    )
    (first, count), (second, same) = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert count == same > 0
    assert all(torch.equal(first[name], second[name]) for name in first)
    (alone, _), (other, _) = moved(0, 1), moved(1, 1)
    changed = {name for name in first if not torch.equal(first[name], alone[name])}
    assert NEVER not in changed  # without a gradient on any rank
    assert torch.equal(first[NEVER], other[NEVER])
    assert torch.equal(first[ONCE], alone[ONCE])  # the other rank adds zeros
    assert len(changed) == len(first) - 2
