"""The environment of a process that torchrun has started."""

import pytest
import torch

from apt.distributed import launch
from apt.distributed.launch import joined
from apt.errors import AptError


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x', not a whole number from 1 up"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', not a whole number from 1 up"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "but MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "RANK": "x", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK is 'x'"),
        ({"WORLD_SIZE": "2", "RANK": "9", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK is 9"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "p"}, "PORT is 'p'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_invalid_environment_variables_are_refused(monkeypatch, variables, message):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(AptError, match=message), joined():
        pass


def test_more_ranks_than_accelerators_are_refused_except_on_the_cpu(monkeypatch):
    monkeypatch.setattr(launch, "best", lambda: "xpu")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launch._backend("cpu") == "cpu:gloo"
    with pytest.raises(AptError, match="this machine has 1 GPUs, too few for local rank 1"):
        launch._backend("auto")
