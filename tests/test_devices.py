"""Devices: all properties of an accelerator come from torch's module for its kind."""

from types import SimpleNamespace

import pytest
import torch

from apt import devices


@pytest.fixture
def machine_with(monkeypatch):
    """A function that gives this machine an accelerator of some kind."""

    def give(kind, **module):
        calls = []
        known = {
            "get_device_name": lambda device: f"the {kind} of a maker",
            "get_device_properties": lambda device: SimpleNamespace(total_memory=2**30),
            "max_memory_allocated": lambda device: 2**20,
            "reset_peak_memory_stats": lambda device: calls.append(("forget", device)),
        }
        made = SimpleNamespace(**{n: f for n, f in (known | module).items() if f is not None})
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
        real = torch.get_device_module
        monkeypatch.setattr(
            torch, "get_device_module",
            lambda device: made if torch.device(device).type == kind else real(device),
        )  # fmt: skip
        monkeypatch.setattr(
            torch.accelerator, "synchronize", lambda device: calls.append(("synchronize", device))
        )
        return calls

    return give


@pytest.mark.parametrize(("kind", "best"), [("cuda", "cuda"), ("xpu", "xpu"), ("mps", "cpu")])
def test_default_device_is_an_accelerator_that_can_solve(machine_with, kind, best):
    assert devices.default_device() == "cpu"
    machine_with(kind)
    assert devices.default_device() == best
    assert devices.device_kinds() == ("cpu", kind)


def test_properties_of_an_accelerator_come_from_its_module(machine_with):
    calls = machine_with("xpu", is_bf16_supported=lambda: True)
    assert devices.name_of("xpu:1") == "the xpu of a maker"
    assert devices.total_memory("xpu") == 2**30
    assert devices.peak_allocated("xpu") == 2**20
    assert devices.multiplies_bf16("xpu")
    devices.synchronize("xpu:1")
    devices.reset_peak("xpu")
    assert calls == [("synchronize", torch.device("xpu:1")), ("forget", "xpu")]


def test_unknown_properties_of_an_accelerator_are_left_out(machine_with):
    names = ("get_device_name", "get_device_properties", "max_memory_allocated",
             "reset_peak_memory_stats")  # fmt: skip
    machine_with("mps", **dict.fromkeys(names))
    assert devices.name_of("mps") == "mps"
    assert devices.total_memory("mps") == devices.peak_allocated("mps") == 0
    assert not devices.multiplies_bf16("mps")
    devices.reset_peak("mps")


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "meta"])
def test_cpu_has_no_accelerator_memory_and_no_queue(device):
    assert not devices.is_accelerator(device)
    assert devices.total_memory(device) == 0
    devices.synchronize(device)


@pytest.mark.parametrize("kind", [None, "mps"])
def test_random_states_are_restored(machine_with, kind):
    """This includes mps, whose module has no function for the state of one device."""
    if kind is not None:
        machine_with(kind)
    before = torch.get_rng_state()
    with devices.keep_random_states():
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_without_onednn_is_slow(monkeypatch):
    monkeypatch.setattr(devices, "_seconds_of_product", lambda dtype, device, size: dtype.itemsize)
    for supported in (True, False):
        devices._cpu_multiplies_faster.cache_clear()
        monkeypatch.setattr(
            torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda known=supported: known
        )
        assert devices.multiplies_fast(torch.bfloat16, "cpu") is supported
    devices._cpu_multiplies_faster.cache_clear()


def test_half_precision_with_slower_instructions_is_slow(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(
        devices, "_seconds_of_product", lambda dtype, device, size: 1 / dtype.itemsize
    )
    devices._cpu_multiplies_faster.cache_clear()
    assert not devices.multiplies_fast(torch.bfloat16, "cpu")
    assert devices.multiplies_fast(torch.float32, "cpu")
    devices._cpu_multiplies_faster.cache_clear()


def test_speed_of_products_keeps_the_number_of_threads():
    threads = torch.get_num_threads()
    assert devices.operations_per_second(torch.float32, "cpu") > 1e8
    assert torch.get_num_threads() == threads
