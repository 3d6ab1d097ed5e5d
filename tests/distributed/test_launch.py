"""The environment of a process that torchrun has started."""

import pytest

from apt.distributed.launch import joined
from apt.errors import AptError


@pytest.mark.parametrize(
    ("variables", "said"),
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
def test_nonsense_of_the_environment_is_named(monkeypatch, variables, said):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(AptError, match=said), joined():
        pass
