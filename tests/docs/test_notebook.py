"""The notebook of the documents runs in Jupyter's kernel, offline."""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tests.helpers import ROOT

NOTEBOOK = ROOT / "docs/tour.ipynb"


def test_the_notebook_runs_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # outputs would go stale
    for cell in notebook.cells:
        cell.source = cell.source.replace("samples=32, seqlen=256", "samples=4, seqlen=64")
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    told = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    before, after = told.partition("perplexity ")[2].split(" before, ")
    assert float(before) < float(after.split()[0])
    assert "70.00% zeros" in told
