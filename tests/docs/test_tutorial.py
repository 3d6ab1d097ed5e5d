"""Every command and program of the tutorial runs on less text, with the described results."""

import os
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from tests.helpers import ROOT

PAGE = ROOT / "docs/tutorial.md"
SHORTER = {
    "--samples": "8", "--seqlen": "64", "--windows": "4", "--steps": "8",
    "--methods": "magnitude,wanda", "--patterns": "2:4",
}  # fmt: skip
"""Values that take less time than those of the page."""
QUICK = ("--rounds", 1, "--prompt", 16, "--generate", 4, "--batch", 1)
BLOCK = re.compile(r"```(console|python)\n(.*?)```", re.DOTALL)


@pytest.mark.usefixtures("forked_workers", "little_to_measure_on")
def test_tutorial_runs(apt, tmp_path):
    outputs, scope = [], {}
    assert Path.cwd() == tmp_path
    for language, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), scope)
            continue
        for line in text.splitlines():
            program, *words = shlex.split(line)
            if program == "pip":
                continue
            given = [SHORTER.get(before, word) for before, word in pairwise(["", *words])]
            run = apt(*given, *(QUICK if words[0] == "bench" else ()))
            assert run.code == 0, f"{line}\n{run.err}"
            outputs.append(run.out)
    told = "\n".join(outputs)
    assert "28 of 28 sites meet their pattern" in told
    assert "1,101,012 zeros kept" in told
    assert os.path.getsize("report.html") > 10_000
    assert scope["report"].sparsity == 0.5
