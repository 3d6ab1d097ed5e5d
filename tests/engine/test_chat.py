"""A notice for a chat model that is calibrated without conversations."""

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers import TEXT

SAID = "has no conversations"
SMALL = ("--samples", 2, "--seqlen", 32, "--calibration")
COMMANDS = {
    "prune": ("prune", "--sparsity", 0.5, "--method", "wanda"),
    "shrink": ("shrink", "--size", "channels=0.5"),
}


@pytest.fixture
def chat_model(checkpoint, tmp_path):
    """A random LLaMA whose tokenizer has a chat template."""
    folder = tmp_path / "chat-model"
    shutil.copytree(checkpoint("llama"), folder)
    place = folder / "tokenizer_config.json"
    config = json.loads(place.read_text())
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    place.write_text(json.dumps(config | {"chat_template": template}))
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_chat_model_without_conversations_is_told(apt, chat_model, command):
    result = apt(*COMMANDS[command], chat_model, *SMALL, TEXT, "-o", "out")
    assert result.code == 0, result.err
    (line,) = (line for line in result.err.splitlines() if SAID in line)
    assert line.startswith(f"calibration: {TEXT.name} {SAID}, and chat-model is a chat model")
    assert str(chat_model.parent) not in line


@pytest.mark.parametrize("text", ["builtin:chat", f"{TEXT},builtin:chat"])
def test_conversations_anywhere_in_the_calibration_are_enough(apt, chat_model, text):
    result = apt(*COMMANDS["prune"], chat_model, *SMALL, text, "-o", "out")
    assert result.code == 0, result.err
    assert SAID not in result.err


def test_another_model_is_not_told(apt, checkpoint):
    result = apt(*COMMANDS["prune"], checkpoint("llama"), *SMALL, TEXT, "-o", "out")
    assert result.code == 0, result.err
    assert SAID not in result.err
    report = json.loads(Path("out/apt_report.json").read_text())
    assert "sources" not in report["calibration"]
