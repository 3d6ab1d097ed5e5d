"""The doctor's checks of the kernels of mamba_ssm and causal_conv1d: installed, and correct."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

from apt.errors import first_line
from apt.extending import Finding, try_import
from apt_adapters.scan import selective_scan

INSTALL = (
    "pip install --no-build-isolation 'apt-prune[mamba]' (needs nvcc of CUDA "
    f"{torch.version.cuda or '12 or 13'}, and wheel, ninja, packaging)"
)


def scan_differs(device: str = "cuda") -> float:
    """The largest difference between the kernel's scan and `selective_scan`."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    torch.manual_seed(0)
    u, dt = (torch.randn(2, 8, 32, device=device) for _ in range(2))
    b, c = (torch.randn(2, 4, 32, device=device) for _ in range(2))
    a = -torch.rand(8, 4, device=device)
    kernel = selective_scan_fn(u, dt, a, b, c, delta_softplus=True)
    reference = selective_scan(u, dt, a, b, c, delta_softplus=True)
    assert isinstance(reference, torch.Tensor)
    return float((kernel - reference).abs().max())


def chunk_scan_differs(device: str = "cuda") -> float:
    """The largest difference between the kernel's Mamba 2 scan and an equivalent Mamba 1 scan."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    torch.manual_seed(0)
    x = torch.randn(2, 32, 4, 16, device=device)
    dt = torch.rand(2, 32, 4, device=device)
    b, c = (torch.randn(2, 32, 1, 16, device=device) for _ in range(2))
    a = -torch.rand(4, device=device)
    kernel = mamba_chunk_scan_combined(x, dt, a, b, c, chunk_size=16)
    flat = x.flatten(2).transpose(1, 2)
    steps = dt.repeat_interleave(16, 2).transpose(1, 2)
    rates = a.repeat_interleave(16)[:, None].expand(-1, 16)
    reference = selective_scan(flat, steps, rates, b[:, :, 0].mT, c[:, :, 0].mT)
    assert isinstance(reference, torch.Tensor)
    return float((kernel.flatten(2).transpose(1, 2) - reference).abs().max())


def convolution_differs(device: str = "cuda") -> float:
    """The largest difference between the kernel's convolution and that of torch."""
    from causal_conv1d import causal_conv1d_fn

    torch.manual_seed(0)
    x, weight = torch.randn(2, 8, 32, device=device), torch.randn(8, 4, device=device)
    kernel = causal_conv1d_fn(x, weight, None, activation="silu")
    reference = F.silu(F.conv1d(F.pad(x, (3, 0)), weight[:, None], groups=8))
    return float((kernel - reference).abs().max())


def _check(name: str, module: str, runs: Callable[[], float]) -> Finding:
    package = try_import(name, module)
    if package is None:
        return Finding(name, "not installed: the slow path in torch is used", INSTALL)
    if package.broken:
        return Finding(name, package.state, f"rebuild it: {INSTALL}", broken=True)
    try:
        difference = runs()
    except Exception as error:
        state = f"{package.state}, does not run: {type(error).__name__}: {first_line(error)}"
        return Finding(name, state, f"rebuild it: {INSTALL}", broken=True)
    if difference > 1e-2:  # Mamba 2's kernels multiply in TF32
        state = f"{package.state}, runs, but is off by {difference:.1g}"
        return Finding(name, state, f"rebuild it: {INSTALL}", broken=True)
    return Finding(name, f"{package.state}, runs, within {difference:.0e} of torch")


@cache
def _on_gpu(second: bool) -> list[Finding]:
    runs = chunk_scan_differs if second else scan_differs
    return [
        _check("mamba-ssm", "mamba_ssm", runs),
        _check("causal-conv1d", "causal_conv1d", convolution_differs),
    ]


def _examine(family: str, second: bool, processor: str) -> list[Finding]:
    if not torch.cuda.is_available():
        return [Finding(family, f"{processor} on the processor")]
    findings = _on_gpu(second)
    problems = [finding for finding in findings if finding.remedy]
    if not problems:
        states = ", ".join(f"{finding.what} {finding.state}" for finding in findings)
        return [Finding(family, f"kernels on the GPU: {states}")]
    states = "; ".join(f"{finding.what} {finding.state}" for finding in problems)
    broken = any(finding.broken for finding in problems)
    return [Finding(family, f"torch on the GPU, slowly: {states}", problems[0].remedy, broken)]


def mamba() -> list[Finding]:
    """The findings for Mamba and FalconMamba."""
    return _examine("mamba", False, "APT's own scan")


def jamba() -> list[Finding]:
    """The findings for Jamba."""
    return _examine("jamba", False, "APT's own scan")


def mamba2() -> list[Finding]:
    """The findings for Mamba 2."""
    return _examine("mamba2", True, "transformers' scan in torch")


def falcon_h1() -> list[Finding]:
    """The findings for Falcon-H1."""
    return _examine("falcon-h1", True, "transformers' scan in torch")


def native() -> list[Finding]:
    """The findings for models of the package mamba_ssm."""
    if not torch.cuda.is_available():
        return [
            Finding(
                "mamba-ssm",
                "needs a GPU; its checkpoints are pruned on the processor as transformers' models",
            )
        ]
    return _examine("mamba-ssm", False, "")
