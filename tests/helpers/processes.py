"""Processes that run the command line, forked from a process with the slow imports."""

import multiprocessing
import os
import socket
import sys

import pytest

from apt.cli import main

forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(
    ["tests.helpers.families", "tests.helpers.processes", "apt.cli.pruning",
     "apt_lab.benchmark.subject", "transformers.models.llama.modeling_llama",
     "transformers.models.opt.modeling_opt"]
)  # fmt: skip


def _enter(folder):
    """Change to a folder, and append all further output to its file ``said``."""
    os.chdir(folder)
    with open("said", "a") as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)


def _pytest(folder, files):
    _enter(folder)
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *files]))


def _command(folder, arguments, environment, before):
    os.environ.update(environment)
    _enter(folder)
    sys.argv = ["apt", *map(str, arguments)]
    if before:
        before()
    main()


def start(folder, *arguments, before=None, **environment):
    """Start ``apt`` in a folder, with its output appended to a file ``said``.

    Args:
        folder: its working directory.
        arguments: of the command line.
        before: a function that the process calls first.
        environment: the variables to add to ``os.environ``.
    """
    process = forked.Process(target=_command, args=(folder, arguments, environment, before))
    process.start()
    return process


def run_pytest(folder, *files):
    """Run the tests in files of a folder; the exit status and the output of pytest."""
    process = forked.Process(target=_pytest, args=(folder, files))
    process.start()
    process.join()
    return process.exitcode, (folder / "said").read_text()


def on_ranks(size, folder, *arguments, before=None):
    """Run ``apt`` on ranks with the variables of torchrun; the exit statuses and the output.

    Args:
        before: a function that each process calls first.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        start(folder, *arguments, before=before, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(size)
    ]
    for rank in ranks:
        rank.join()
    return [rank.exitcode for rank in ranks], (folder / "said").read_text()
