"""Every path through a mixer: the Gram matrix of each weight, and an unchanged output."""

from types import SimpleNamespace

import pytest
import torch
from mamba_ssm import Mamba, Mamba2
from mamba_ssm.utils.generation import InferenceParams
from torch import nn
from transformers import FalconMambaConfig, Mamba2Config, MambaConfig
from transformers.models.falcon_mamba import modeling_falcon_mamba
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from apt.adapter.weight_tap import WeightTap
from apt.conformance.oracle import Oracle
from tests.kernels import mixers, stubs

HIDDEN, RANK, STATE, HEADS, WIDTH, GROUPS = 32, 4, 8, 4, 16, 2
LENGTH = 12  # two chunks, of which one is not full; Triton's interpreter is slow
SMALL = {"hidden_size": HIDDEN, "state_size": STATE, "num_hidden_layers": 1, "vocab_size": 64}


def strong(mixer):
    """Weights so large that every part of the mixer shows in its output."""
    torch.manual_seed(1)
    for name, parameter in mixer.named_parameters():
        if name.endswith(("x_proj.weight", "dt_proj.weight")):
            nn.init.normal_(parameter, std=0.6)
        elif name.endswith(("dt_proj.bias", "dt_bias", "conv1d.bias")):
            nn.init.normal_(parameter, std=0.5)
        elif name.endswith("proj.weight"):
            nn.init.normal_(parameter, std=0.2)
    return mixer


def mamba1(mixer, x):
    return mixers.mamba(mixer, x, rank=RANK, state=STATE)


def falcon(mixer, x):
    return mixers.mamba(mixer, x, rank=RANK, state=STATE, eps=mixer.rms_eps)


def second(mixer, x):
    return mixers.mamba2(mixer, x, heads=HEADS, width=WIDTH, groups=GROUPS, state=STATE, eps=1e-5)


def hf(kind, training=False, plain=False):
    """A mixer of transformers, with the kernels that it chose or without."""
    if kind == "mamba":
        config = MambaConfig(time_step_rank=RANK, **SMALL)
        made, module = modeling_mamba.MambaMixer(config, 0), modeling_mamba
    elif kind == "falcon_mamba":
        config = FalconMambaConfig(time_step_rank=RANK, **SMALL)
        module = modeling_falcon_mamba
        made = module.FalconMambaMixer(config, 0, initialize_mixer_weights=False)
        made.init_falcon_mamba_weights()
    else:
        config = Mamba2Config(
            num_heads=HEADS, head_dim=WIDTH, n_groups=GROUPS, chunk_size=8, **SMALL
        )
        made, module = modeling_mamba2.Mamba2Mixer(config, 0), modeling_mamba2
    mixer = strong(made).train(training)
    return SimpleNamespace(mixer=mixer, run=mixer.forward, module=module if plain else None)


def native(kind, cached=False, **options):
    """A mixer of mamba_ssm, on its fast path or off it, with a cache to fill or without."""
    if kind == "mamba":
        mixer = Mamba(HIDDEN, d_state=STATE, dt_rank=RANK, layer_idx=0, **options)
    else:
        mixer = Mamba2(
            HIDDEN, d_state=STATE, headdim=WIDTH, ngroups=GROUPS, chunk_size=8, layer_idx=0,
            **options,
        )  # fmt: skip
    mixer = strong(mixer).eval()

    def run(x):
        if not cached:
            return mixer(x)
        return mixer(x, inference_params=InferenceParams(max_seqlen=LENGTH, max_batch_size=len(x)))

    return SimpleNamespace(mixer=mixer, run=run, module=None)


# A path, its oracle, and the Linears that a forward hook sees on it.
PATHS = {
    "hf mamba, torch": (lambda: hf("mamba", plain=True), mamba1, {"in", "x", "out"}),
    "hf mamba, kernels": (lambda: hf("mamba"), mamba1, {"in", "x", "out"}),
    "hf mamba, fused": (lambda: hf("mamba", True), mamba1, {"in"}),
    "hf falcon, torch": (lambda: hf("falcon_mamba", plain=True), falcon, {"in", "x", "out"}),
    "hf falcon, kernels": (lambda: hf("falcon_mamba"), falcon, {"in", "x", "out"}),
    "hf mamba2, torch": (lambda: hf("mamba2", plain=True), second, {"in", "out"}),
    "hf mamba2, kernels": (lambda: hf("mamba2"), second, {"in", "out"}),
    "hf mamba2, fused": (lambda: hf("mamba2", True), second, {"in"}),
    "native mamba, fast": (lambda: native("mamba"), mamba1, set()),
    "native mamba, slow": (lambda: native("mamba", use_fast_path=False), mamba1, {"x", "out"}),
    "native mamba, prefill": (lambda: native("mamba", True), mamba1, {"x", "out"}),
    "native mamba2, fast": (lambda: native("mamba2"), second, {"in"}),
    "native mamba2, slow": (
        lambda: native("mamba2", use_mem_eff_path=False),
        second,
        {"in", "out"},
    ),
    "native mamba2, prefill": (lambda: native("mamba2", True), second, {"in", "out"}),
}


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """A path with its oracle."""
    make, oracle, fires = PATHS[request.param]
    made = make()
    if made.module is not None:
        for name in vars(made.module):
            if plain := getattr(getattr(made.module, name), "__wrapped__", None):
                monkeypatch.setattr(made.module, name, plain)
    torch.manual_seed(2)
    x = torch.randn(2, LENGTH, HIDDEN)
    return SimpleNamespace(mixer=made.mixer, run=made.run, oracle=oracle, x=x, fires=fires)


def linears(mixer):
    return {n: m for n, m in mixer.named_children() if isinstance(m, nn.Linear)}


@torch.no_grad()
def tapped(path):
    """The inputs that the tap reports by name, and the output inside the tap."""
    seen = {}

    def take(name, inputs):
        seen.setdefault(name, []).append(inputs.reshape(-1, inputs.shape[-1]).double())

    with WeightTap({name: layer.weight for name, layer in linears(path.mixer).items()}, take):
        output = path.run(path.x)
    return {name: torch.cat(rows) for name, rows in seen.items()}, output


def assert_near(found, expected, share=2e-5):
    assert float((found - expected).norm() / expected.norm()) < share


@torch.no_grad()
def assert_right(path):
    """Check Gram matrices and output by the oracle; each Linear must be reported once."""
    expected, output = path.oracle(path.mixer, path.x)
    inputs, under = tapped(path)
    assert torch.equal(under, path.run(path.x))
    assert_near(under.double(), output)
    assert inputs.keys() == expected.keys() == linears(path.mixer).keys()
    for name, rows in inputs.items():
        wanted = expected[name].reshape(-1, expected[name].shape[-1])
        assert len(rows) == path.x[..., 0].numel()
        assert_near(rows.T @ rows, wanted.T @ wanted)


def test_every_weight_is_captured_without_a_change_of_the_output(path):
    assert_right(path)


@torch.no_grad()
def test_oracle_observes_the_captured_inputs(path):
    with Oracle({name: m.weight for name, m in linears(path.mixer).items()}) as oracle:
        path.run(path.x)
    inputs, _ = tapped(path)
    assert oracle.seen.keys() == inputs.keys()
    for name, rows in inputs.items():
        assert_near(rows.T @ rows, oracle.seen[name].gram, 1e-6)


@torch.no_grad()
def test_forward_hooks_miss_the_fused_products(path):
    fired = set()
    for name, layer in linears(path.mixer).items():
        layer.register_forward_hook(lambda *_, name=name: fired.add(name.removesuffix("_proj")))
    path.run(path.x)
    assert fired == path.fires


def test_changed_weight_is_detected(path):
    expected = path.oracle(path.mixer, path.x)
    path.oracle = lambda *_: expected
    for layer in linears(path.mixer).values():
        before = layer.weight.data.clone()
        layer.weight.data[::2] *= 1.01  # a norm behind it would undo what is the same for all
        with pytest.raises(AssertionError):
            assert_right(path)
        layer.weight.data.copy_(before)
    assert_right(path)


def test_missing_bias_is_detected(path):
    mixer = path.mixer
    bias = mixer.dt_bias if hasattr(mixer, "dt_bias") else mixer.dt_proj.bias
    expected = path.oracle(mixer, path.x)
    with torch.no_grad():
        bias.zero_()
    path.oracle = lambda *_: expected
    with pytest.raises(AssertionError):
        assert_right(path)


def test_kernels_without_the_bias_are_detected(monkeypatch):
    def dropping(u, delta, A, B, C, D, z, delta_bias, softplus):
        return stubs.scan_fwd(u, delta, A, B, C, D, z, None, softplus)

    import selective_scan_cuda

    monkeypatch.setattr(selective_scan_cuda, "fwd", dropping)
    for name in ("hf mamba, kernels", "native mamba, fast"):
        make, oracle, fires = PATHS[name]
        made = make()
        x = torch.randn(2, LENGTH, HIDDEN)
        control = SimpleNamespace(mixer=made.mixer, run=made.run, oracle=oracle, x=x, fires=fires)
        with pytest.raises(AssertionError):
            assert_right(control)


def test_product_with_a_copy_of_a_weight_is_not_reported(path):
    name = "out_proj"
    weight = linears(path.mixer)[name].weight
    inputs = {}
    with torch.no_grad(), WeightTap({name: weight.clone()}, lambda key, x: inputs.update({key: x})):
        path.run(path.x)
    assert not inputs


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_decoding_step_is_captured(kind):
    made = native(kind)
    mixer, x = made.mixer, torch.randn(2, LENGTH, HIDDEN)
    expected, _ = (mamba1 if kind == "mamba" else second)(mixer, x)
    params = InferenceParams(max_seqlen=LENGTH, max_batch_size=2)
    mixer(x[:, :-1], inference_params=params)
    params.seqlen_offset = LENGTH - 1
    seen = {}
    weights = {name: layer.weight for name, layer in linears(mixer).items()}
    with WeightTap(weights, lambda name, rows: seen.update({name: rows})):
        mixer(x[:, -1:], inference_params=params)
    assert seen.keys() == expected.keys()
    for name, rows in seen.items():
        assert_near(rows.reshape(2, -1).double(), expected[name][:, -1])


def test_doctor_detects_wrong_kernels(monkeypatch):
    import selective_scan_cuda
    from apt_adapters import kernels

    assert kernels.scan_differs("cpu") < 1e-5
    assert kernels.convolution_differs("cpu") < 1e-6
    assert kernels.chunk_scan_differs("cpu") < 1e-4
    monkeypatch.setattr(
        selective_scan_cuda, "fwd", lambda u, dt, *rest: stubs.scan_fwd(u, 1.05 * dt, *rest)
    )
    assert kernels.scan_differs("cpu") > 1e-2
