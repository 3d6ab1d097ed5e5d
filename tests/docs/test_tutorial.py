"""Every command and program of the tutorial runs, and does what the page says."""

import os
import re
import shlex
from pathlib import Path

from tests.helpers import ROOT

PAGE = ROOT / "docs/tutorial.md"
BLOCK = re.compile(r"```(console|python)\n(.*?)```", re.DOTALL)


def test_the_tutorial_runs(apt, tmp_path):
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
            run = apt(*words)
            assert run.code == 0, f"{line}\n{run.err}"
            outputs.append(run.out)
    told = "\n".join(outputs)
    assert "28 of 28 sites meet their pattern" in told
    assert "1,101,012 zeros kept" in told
    assert os.path.getsize("report.html") > 10_000
    assert scope["report"].sparsity == 0.5
