"""The file of masks."""

import json

import pytest
import torch
from safetensors.torch import save_file

from apt.checkpoints.masks import MASKS, read_masks, read_orders, write_masks
from apt.errors import AptError

MASK = {"block.q.weight": torch.rand(6, 5) < 0.5, "block.k.weight": torch.rand(3, 9) < 0.5}
ORDERS = {"block.q": [4, 2, 0, 1, 3]}


def test_masks_and_orders_are_read_as_they_were_written(tmp_path):
    write_masks(MASK, tmp_path / MASKS, ORDERS)
    masks = read_masks(tmp_path / MASKS)
    assert masks.keys() == MASK.keys()
    assert all(torch.equal(masks[name], MASK[name]) for name in MASK)
    assert read_orders(tmp_path / MASKS) == ORDERS


def test_equal_masks_have_equal_bytes(tmp_path):
    """safetensors writes the entries of its metadata in a random order."""
    places = [tmp_path / f"{number}.safetensors" for number in range(8)]
    for place in places:
        write_masks(MASK, place, ORDERS)
    assert len({place.read_bytes() for place in places}) == 1


def test_a_file_with_separate_entries_of_metadata_is_read(tmp_path):
    bits = {"a": torch.tensor([0b10100000], dtype=torch.uint8)}
    save_file(bits, tmp_path / MASKS, {"shapes": json.dumps({"a": [1, 4]})})
    assert read_masks(tmp_path / MASKS)["a"].tolist() == [[True, False, True, False]]
    assert read_orders(tmp_path / MASKS) == {}


@pytest.mark.parametrize("entry", ["3", "[]", "{", '{"shapes": 3}', '{"orders": "[]"}'])
def test_damaged_metadata_is_a_one_line_error(tmp_path, entry):
    save_file({"a": torch.zeros(1, dtype=torch.uint8)}, tmp_path / MASKS, {"apt_masks": entry})
    with pytest.raises(AptError, match="is not a file of masks"):
        read_masks(tmp_path / MASKS)
