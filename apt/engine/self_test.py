"""Short tests of the parts of a run on one device, compared with the CPU or with fp64."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException, start_processes

from apt import devices
from apt.adapter import Site
from apt.calibration.capture import as_rows
from apt.checkpoints.load import load, open_skeleton
from apt.checkpoints.safetensors_io import Shards
from apt.compute import compute_dtype, dtype_name
from apt.distributed.launch import joined
from apt.engine.packing import pack_model
from apt.engine.run import run
from apt.errors import first_line
from apt.locations.model_source import find
from apt.options import PackRun, PruneRun
from apt.output.report import Report
from apt.plugin.registry import Registry
from apt.solver import Gram, SolverOptions, joint_weights
from apt.text.sampling import generator

Outcome = Literal["passed", "failed", "not there"]

_CLOSE = 1e-3  # relative differences of fp32 results
_CLOSE_BF16 = 0.05  # where products may be bf16
_TIMEOUT = 300  # seconds, for two processes
_RUN: dict[str, Any] = {"samples": 8, "seqlen": 64, "pattern": "2:4"}


@dataclass(frozen=True)
class MachineTest:
    """The outcome of a test; ``detail`` is the measurement, or the problem."""

    what: str
    outcome: Outcome
    detail: str
    seconds: float


class NotThereError(Exception):
    """A device, model or earlier test that a test needs is missing."""


def self_test(
    device: str, registry: Registry, status: Callable[[str], None] = lambda text: None
) -> Iterator[MachineTest]:
    """Test products, solver, capture, a whole run, streaming, packed products, two processes.

    A test that fails does not end the others.

    Args:
        device: the device to test, as torch names it.
        status: called with the name of each test before it runs.
    """
    with TemporaryDirectory(prefix="apt-test-") as folder:
        machine = _DeviceTests(device, registry, Path(folder))
        for what, test in (
            ("products of matrices", machine.products),
            ("joint weights against fp64", machine.solver),
            ("captured inputs against the CPU", machine.capture),
            ("a run, its model opened again", machine.whole_run),
            ("the same run, streamed", machine.streamed),
            ("packed products against dense ones", machine.packed),
            ("two processes", machine.ranks),
        ):
            status(what)
            yield _run_test(what, test)


def _run_test(what: str, test: Callable[[], str]) -> MachineTest:
    started, outcome = time.perf_counter(), "passed"
    try:
        detail = test()
    except NotThereError as error:
        outcome, detail = "not there", str(error)
    except Exception as error:  # a broken machine may raise any exception
        outcome, detail = "failed", f"{type(error).__name__}: {first_line(error)}"
    return MachineTest(what, outcome, detail, time.perf_counter() - started)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _DeviceTests:
    """The tests on one device, which write into a folder."""

    device: str
    registry: Registry
    folder: Path

    def products(self) -> str:
        """The speed of each dtype, and the compute dtype of a model in bf16."""
        speeds = {
            dtype_name(dtype): devices.operations_per_second(dtype, self.device)
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        }
        speed_list = ", ".join(f"{name} {speed / 1e9:,.0f}" for name, speed in speeds.items())
        compute = dtype_name(compute_dtype(torch.bfloat16, self.device))
        return f"{speed_list} GFLOP/s; a model in bfloat16 computes in {compute}"

    def solver(self) -> str:
        """The exact weights for a mask, on strongly correlated inputs."""
        random = generator(0)
        inputs = torch.randn(1024, 128, generator=random).cumsum(1)
        weight = torch.randn(64, 128, generator=random)
        mask = torch.rand(64, 128, generator=random) < 0.5
        gram = Gram.of(inputs[None].to(self.device))
        damped = gram.damped(SolverOptions().damping)
        solution = joint_weights(
            weight.to(self.device), damped, mask.to(self.device), tolerance=1e-9
        )
        exact = _exact(weight.double(), damped.matrix.double().cpu(), mask)
        difference = _relative(solution.weight.double().cpu(), exact)
        return _within(difference, _CLOSE, "from fp64")

    def capture(self) -> str:
        """The Gram matrices of the inputs of the first block."""
        skeleton = open_skeleton(find(self._embedded_model(), self.registry), self.registry)
        tokens = torch.randint(0, 100, (2, 32), generator=generator(0))
        sums = []
        for device in ("cpu", self.device):
            opened = load(skeleton, torch.float32, device)
            block = opened.adapter.blocks(opened.module)[0][1]
            sites = opened.adapter.sites(block)
            rows = dict[str, Tensor]()

            weights = {site: site.oriented(site.weight(block)) for site in sites}

            def add(
                site: Site,
                inputs: Tensor,
                rows: dict[str, Tensor] = rows,
                weights: dict[Site, Tensor] = weights,
            ) -> None:
                rows[site.name] = as_rows(site, inputs, weights[site]).cpu()

            with torch.no_grad(), opened.adapter.capture(block, sites, add):
                opened.module(tokens.to(device))
            sums.append({name: x.T @ x for name, x in rows.items()})
        difference = max(_relative(sums[1][name], value) for name, value in sums[0].items())
        return _within(difference, _CLOSE, f"from the CPU, {len(sums[0])} sites")

    def whole_run(self) -> str:
        """The perplexity after a run, compared with the perplexity after a run on the CPU."""
        perplexity = self._prune("run", self.device)
        if not devices.is_accelerator(self.device):
            return f"perplexity {perplexity:.2f}"
        on_cpu = self._prune("cpu", "cpu")
        return _within(
            abs(perplexity / on_cpu - 1), _CLOSE_BF16, f"from the CPU's perplexity, {on_cpu:.2f}"
        )

    def streamed(self) -> str:
        """A streamed run writes the same bytes as a run in memory."""
        self._require("run")
        self._prune("streamed", self.device, stream=True)
        in_memory, streamed = (self._weights(name) for name in ("run", "streamed"))
        if in_memory.keys() != streamed.keys() or any(
            not in_memory[key].equal(streamed[key]) for key in in_memory
        ):
            raise ValueError("the weights are not those of the run in memory")
        return "the same bytes"

    def packed(self) -> str:
        """The logits of the packed model, compared with the logits of the pruned one."""
        from apt.runtime.load import load as load_packed

        self._require("run")
        target = self.folder / "packed"
        pack_model(PackRun(model=str(self.folder / "run"), output=target), self.registry)
        source = find(str(self.folder / "run"), self.registry)
        dense = load(open_skeleton(source, self.registry), torch.float32, self.device).module
        packed = load_packed(target, dtype=torch.float32).to(self.device)
        tokens = torch.randint(0, 100, (2, 32), generator=generator(0)).to(self.device)
        with torch.no_grad():
            logits = [model(tokens).logits.double().cpu() for model in (dense, packed)]
        return _within(_relative(logits[1], logits[0]), _CLOSE_BF16, "from the dense logits")

    def ranks(self) -> str:
        """Two processes write the model of one process, except for rounding."""
        if devices.is_accelerator(self.device) and torch.accelerator.device_count() < 2:
            raise NotThereError("needs two of these devices")
        self._require("run")
        target = self.folder / "ranks"
        arguments = (_free_port(), self._embedded_model(), self.device, target)
        context: Any = start_processes(_prune_as_rank, arguments, 2, join=False)  # type: ignore[no-untyped-call]
        end = time.perf_counter() + _TIMEOUT
        try:
            while not context.join(1, grace_period=10):  # one process may end before the other
                if time.perf_counter() > end:
                    for process in context.processes:
                        process.kill()
                    raise TimeoutError(f"not done after {_TIMEOUT} s")
        except ProcessException as error:  # the last line of the traceback has the error
            raise RuntimeError(str(error).strip().splitlines()[-1]) from error
        one, two = (_perplexity(Report.read(self.folder / name)) for name in ("run", "ranks"))
        return _within(abs(two / one - 1), _CLOSE_BF16, "from the perplexity of one process")

    def _embedded_model(self) -> str:
        """An embedded model."""
        for name, spec in self.registry.adapters.specs.items():
            if spec.zoo:
                return f"zoo:{name}"
        raise NotThereError("no adapter with an embedded model is installed")

    def _prune(self, name: str, device: str, *, stream: bool = False) -> float:
        """Prune the embedded model, and return its perplexity afterwards."""
        report = run(PruneRun(
            model=self._embedded_model(), output=self.folder / name, evaluation="builtin",
            device=device, stream=stream, **_RUN,
        ))  # fmt: skip
        perplexity = _perplexity(report)
        if not perplexity < 2 * float(report.scores["before"]["perplexity"]):
            raise ValueError(f"the perplexity after pruning is {perplexity:.4g}")
        return perplexity

    def _require(self, name: str) -> None:
        if not (self.folder / name / "config.json").is_file():
            raise NotThereError("needs the run before it")

    def _weights(self, name: str) -> dict[str, Tensor]:
        shards = Shards(self.folder / name)
        return {key: shards.read(key) for key in shards.entries}


def _prune_as_rank(rank: int, port: int, model: str, device: str, output: Path) -> None:
    """Prune as one of two processes."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update(
        {name: str(value) for name, value in variables.items()}, MASTER_ADDR="127.0.0.1"
    )
    with joined(device) as ranks:
        run(
            PruneRun(model=model, output=output, evaluation="builtin", device=device, **_RUN),
            ranks=ranks,
        )


def _free_port() -> int:
    """A free port."""
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _exact(weight: Tensor, matrix: Tensor, mask: Tensor) -> Tensor:
    """The least-squares weights for a mask, row by row in fp64."""
    rows = []
    for row, pruned in zip(weight, mask, strict=True):
        kept, solved = ~pruned, torch.zeros_like(row)
        solved[kept] = torch.linalg.solve(matrix[kept][:, kept], (matrix @ row)[kept])
        rows.append(solved)
    return torch.stack(rows)


def _relative(result: Tensor, exact: Tensor) -> float:
    return float((result - exact).norm() / exact.norm())


def _within(difference: float, limit: float, what: str) -> str:
    if not difference <= limit:
        raise ValueError(f"a relative difference of {difference:.2g} {what}")
    return f"a relative difference of {difference:.2g} {what}"


def _perplexity(report: Report) -> float:
    return float(report.scores["after"]["perplexity"])
