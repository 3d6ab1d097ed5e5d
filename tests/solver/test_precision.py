"""The precision of fp32 products: full inside the solver, restored afterwards."""

import threading

import pytest
import torch

import apt
from apt.solver.precision import full_precision
from tests.helpers.families import random_model, random_tokens

get = getattr(torch._C, "_get_fp32_precision_getter", None)
put = getattr(torch._C, "_set_fp32_precision_setter", None)
newer = pytest.mark.skipif(get is None, reason="this torch has the older setting alone")
BACKENDS = ("generic", "cuda", "mkldnn")
PLACES = [("generic", "all")] + [
    (backend, op) for backend in BACKENDS[1:] for op in ("all", "matmul", "conv", "rnn")
]
PRODUCTS = [("cuda", "matmul"), ("mkldnn", "matmul")]


def forget():
    torch.set_float32_matmul_precision("highest")
    for backend, op in PLACES if put else ():
        if op in ("all", "matmul"):
            put(backend, op, "none")


@pytest.fixture(autouse=True)
def as_at_the_start():
    """All settings have the defaults of torch."""
    forget()
    yield
    forget()


def knobs():
    """All settings as read from torch; "an error" if the older and the newer setting disagree."""
    result = {place: get(*place) for place in PLACES} if get else {}
    readings = {
        "older": torch.get_float32_matmul_precision,
        "cuda": lambda: torch.backends.cuda.matmul.allow_tf32,
        "cudnn": lambda: torch.backends.cudnn.allow_tf32,
    }
    for name, read in readings.items():
        try:
            result[name] = read()
        except RuntimeError:
            result[name] = "an error"
    return result


def everything():
    """All settings, and their values after changes of the settings that others inherit."""
    result = [knobs()]
    for backend in BACKENDS if get else ():
        for value in ("tf32", "ieee"):
            before = _own_of(backend)
            put(backend, "all", value)
            result.append(knobs())
            put(backend, "all", before)
    return result


def _own_of(backend):
    """The setting for all operations of a backend; "none" if it is inherited."""
    value = get(backend, "all")
    return value if backend == "generic" or value != get("generic", "all") else "none"


SETTINGS = {
    "nothing": [],
    "older": [lambda: torch.set_float32_matmul_precision("medium")],
    "older-high": [lambda: torch.set_float32_matmul_precision("high")],
    "older-cuda": [lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True)],
}
NEWER = {
    "all": [lambda: setattr(torch.backends, "fp32_precision", "tf32")],
    "all-ieee": [lambda: setattr(torch.backends, "fp32_precision", "ieee")],
    "cuda": [lambda: put("cuda", "all", "tf32")],
    "cuda-products": [lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")],
    "cpu-products": [lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16")],
    "all-and-cpu-products": [
        lambda: setattr(torch.backends, "fp32_precision", "tf32"),
        lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "tf32"),
    ],
    "all-but-cpu-products": [
        lambda: setattr(torch.backends, "fp32_precision", "tf32"),
        lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "ieee"),
    ],
    "both": [
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    ],
}
CASES = [
    *SETTINGS.values(),
    *(pytest.param(value, marks=newer, id=name) for name, value in NEWER.items()),
]


@pytest.mark.parametrize("setting", CASES)
def test_products_are_full_inside_and_settings_are_restored(setting):
    for one in setting:
        one()
    before = everything()
    for _ in range(2):
        with full_precision(), full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
            assert all(get(*place) in ("none", "ieee") for place in PRODUCTS if get)
            assert not torch.backends.cuda.matmul.allow_tf32
    assert everything() == before


@newer
def test_prune_restores_the_newer_setting():
    torch.backends.fp32_precision = "tf32"
    before = everything()
    report = apt.prune(random_model("llama"), random_tokens(), pattern="2:4")
    assert report.sparsity == 0.5
    assert everything() == before


@newer
def test_settings_of_full_products_are_not_changed():
    with full_precision():
        assert {get(*place) for place in PRODUCTS} == {"none"}


@newer
def test_last_thread_restores_the_settings():
    torch.backends.fp32_precision = "tf32"
    before, entered, leave = everything(), threading.Event(), threading.Event()

    def other():
        with full_precision():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with full_precision():
        thread.start()
        entered.wait()
    assert torch.get_float32_matmul_precision() == "highest"
    leave.set()
    thread.join()
    assert everything() == before
