"""A loaded packed model that is changed in many ways, against the dense model with the same change.

Each change is made before the prompt, before the first token after it, and after two tokens. The
number of blocks that ran a token in one call is counted: the fast path is taken where it knows all
parts, and only there.
"""

import contextlib
import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.llama import modeling_llama

import apt.runtime as runtime
from apt.packing.directory import pack
from apt.runtime.decoding import Decoder
from apt.runtime.linear import PackedLinear, kernels
from tests.helpers.families import STACKED

pytestmark = [
    pytest.mark.skipif(
        getattr(kernels(), "Block", None) is None, reason="needs apt-kernels with its library"
    ),
    pytest.mark.filterwarnings("ignore"),
]
CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=60, max_position_embeddings=64, attention_bias=True,
    attn_implementation="sdpa", pad_token_id=0, eos_token_id=1,
)  # fmt: skip
DENSE = ("q_proj", "v_proj", "down_proj")  # so that peft and torch change them as they know
PROMPT, TOKENS = torch.tensor([[5, 17, 3, 40, 22, 8, 31]]), (9, 33, 2, 50, 7)
# The calls before the change, and the number of sequences; some changes of a cache need one.
STAGES = {"prompt": (0, 2), "decode": (1, 1), "later": (3, 1)}


class Run:
    """A model that reads a prompt and then single tokens, and the change between two calls."""

    def __init__(self, model, stack):
        self.model, self.stack, self.seen = model, stack, []
        self.cache = DynamicCache(config=model.config)
        self.call = lambda model, tokens: model(tokens, past_key_values=self.cache).logits
        self.gradients = False

    @property
    def layer(self):
        return self.model.model.layers[1]

    def see(self, *_):
        """Note a call: a hook."""
        self.seen.append(1)

    def step(self, tokens):
        with contextlib.nullcontext() if self.gradients else torch.no_grad():
            return self.call(self.model, tokens).detach().float()


CHANGES: dict[str, tuple[int, Callable]] = {}
"""The changes, with the number of blocks of two that run a later token in one call."""


def change(served):
    def named(function):
        CHANGES[function.__name__.replace("_", " ")] = served, function
        return function

    return named


def lora(run, *targets):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False)
    peft.inject_adapter_in_model(config, run.model)
    run.model.eval()
    return [
        m for m in run.model.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)
    ]


@change(0)
def lora_on_queries_and_values(run):
    lora(run, "q_proj", "v_proj")


@change(0)
def lora_on_the_mlp(run):
    lora(run, "down_proj")


@change(0)
def lora_whose_weights_come_later(run):
    parts = lora(run, "q_proj", "v_proj")
    weights = [part.lora_B["default"].weight for part in parts]
    kept = [weight.data.clone() for weight in weights]
    own, calls = run.call, []

    def call(model, tokens):
        calls.append(1)
        for weight, later in zip(weights, kept, strict=True):  # as peft draws and trains them
            weight.data = later if len(calls) > 2 else torch.zeros_like(later)
        return own(model, tokens)

    run.call = call


@change(1)
def lora_on_one_block(run):
    lora(run, "layers.1.mlp.down_proj")


@change(0)
def lora_that_is_merged(run):
    for part in lora(run, "v_proj"):
        part.merge()


@change(2)
def lora_that_is_merged_and_unloaded(run):
    for owner in list(run.model.modules()):
        for name, part in list(owner.named_children()):
            if name == "v_proj" and isinstance(part, nn.Linear):
                torch.manual_seed(0)
                part.weight.data += 0.1 * torch.randn_like(part.weight)


def scaled(module, factor=1.3):
    own = module.forward

    def forward(*given, **named):
        found = own(*given, **named)
        if isinstance(found, tuple):
            return (factor * found[0], *found[1:])
        return factor * found

    module.forward = forward


@change(2)  # the block runs inside of the method that replaced it
def forward_of_a_block(run):
    scaled(run.layer)


@change(1)
def forward_of_attention(run):
    scaled(run.layer.self_attn)


@change(1)
def forward_of_the_mlp(run):
    scaled(run.layer.mlp)


@change(1)
def forward_of_a_norm(run):
    scaled(run.layer.post_attention_layernorm)


@change(1)
def forward_of_a_packed_matrix(run):
    scaled(run.layer.self_attn.k_proj)


@change(1)
def forward_of_a_dense_matrix(run):
    scaled(run.layer.self_attn.q_proj)


@change(1)
def forward_of_the_activation(run):
    scaled(run.layer.mlp.act_fn)


@change(2)
def forward_that_is_the_own_one(run):
    for part in run.model.modules():
        if part is not run.model and not list(part.children()):
            part.forward = part.forward


def subclass(module):
    kind = type(module)

    class Other(kind):
        def forward(self, *given, **named):
            found = super().forward(*given, **named)
            return (1.2 * found[0], *found[1:]) if isinstance(found, tuple) else 1.2 * found

    module.__class__ = Other


@change(2)
def subclass_of_the_block(run):
    subclass(run.layer)


@change(1)
def subclass_of_attention(run):
    subclass(run.layer.self_attn)


@change(1)
def subclass_of_the_mlp(run):
    subclass(run.layer.mlp)


@change(1)
def subclass_of_a_norm(run):
    subclass(run.layer.input_layernorm)


@change(1)
def subclass_of_a_matrix(run):
    subclass(run.layer.mlp.up_proj)


def patched(run, owner, name, factor):
    own = getattr(owner, name)

    def other(*given, **named):
        return factor(own(*given, **named))

    setattr(owner, name, other)
    run.stack.callback(setattr, owner, name, own)


@change(0)
def class_of_mlps(run):
    patched(run, modeling_llama.LlamaMLP, "forward", lambda y: 1.3 * y)


@change(0)
def class_of_norms(run):
    patched(run, modeling_llama.LlamaRMSNorm, "forward", lambda y: 1.3 * y)


@change(0)
def function_of_the_rotation(run):
    patched(run, modeling_llama, "apply_rotary_pos_emb", lambda qk: (1.1 * qk[0], qk[1]))


@change(1)
def hook_on_the_mlp(run):
    run.layer.mlp.register_forward_hook(lambda m, x, y: 1.3 * y)


@change(1)
def hook_before_a_matrix(run):
    run.layer.self_attn.q_proj.register_forward_pre_hook(lambda m, x: (1.3 * x[0],))


@change(1)
def hook_with_names_before_attention(run):
    def hook(module, given, named):
        return given, {**named, "hidden_states": 1.3 * named["hidden_states"]}

    run.layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)


@change(2)
def hook_on_a_block(run):
    run.layer.register_forward_hook(lambda m, x, y: 1.3 * y)


@change(1)
def hook_on_the_activation(run):
    run.layer.mlp.act_fn.register_forward_hook(run.see)


@change(1)
def hook_for_gradients(run):
    run.layer.mlp.register_full_backward_hook(run.see)


@change(2)
def hook_that_is_removed(run):
    run.layer.mlp.register_forward_hook(run.see).remove()


@change(1)
def hooks_in_a_new_table(run):
    run.layer.mlp._forward_hooks = type(run.layer.mlp._forward_hooks)()
    run.layer.mlp.register_forward_hook(run.see)


@change(0)
def hook_on_all_modules(run):
    kinds = (modeling_llama.LlamaMLP, modeling_llama.LlamaAttention)

    def hook(module, given, found):
        run.seen.append(1) if isinstance(module, kinds) else None

    run.stack.callback(nn.modules.module.register_module_forward_hook(hook).remove)


@change(0)
def hook_before_all_modules(run):
    def hook(module, given):
        return (1.3 * given[0],) if isinstance(module, modeling_llama.LlamaMLP) else None

    run.stack.callback(nn.modules.module.register_module_forward_pre_hook(hook).remove)


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


@change(1)
def parametrization_of_a_matrix(run):
    parametrize.register_parametrization(run.layer.self_attn.q_proj, "weight", Twice())


@change(1)
def parametrization_of_a_norm(run):
    parametrize.register_parametrization(run.layer.input_layernorm, "weight", Twice())


@change(1)
def masks_of_torch(run):
    prune.l1_unstructured(run.layer.mlp.down_proj, "weight", 0.5)


@change(2)
def masks_of_torch_that_are_applied(run):
    prune.l1_unstructured(run.layer.mlp.down_proj, "weight", 0.5)
    prune.remove(run.layer.mlp.down_proj, "weight")


def attention(module, query, key, value, mask, **named):
    found, _ = modeling_llama.eager_attention_forward(
        module, query, key, value, mask, named["scaling"] * 0.5
    )
    return found, None


@change(0)
def attention_of_ones_own(run):
    AttentionInterface.register("fuzzed", attention)
    run.stack.callback(ALL_ATTENTION_FUNCTIONS._global_mapping.pop, "fuzzed")
    run.model.set_attn_implementation("fuzzed")
    run.call = lambda model, tokens: (
        model(tokens, past_key_values=run.cache, attention_mask=causal(run, tokens)).logits
    )


def causal(run, tokens):
    count, before = tokens.shape[1], run.cache.get_seq_length()
    mask = torch.full((count, before + count), float("-inf")).triu(before + 1)
    return mask[None, None]


@change(0)
def attention_of_ones_own_as_sdpa(run):
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    AttentionInterface.register("sdpa", lambda *a, **n: (1.3 * own(*a, **n)[0], None))
    run.stack.callback(AttentionInterface.register, "sdpa", own)


@change(0)  # with a mask
def attention_eager(run):
    run.model.set_attn_implementation("eager")


class Halved(DynamicCache):
    def update(self, keys, values, *given, **named):
        keys, values = super().update(keys, values, *given, **named)
        return keys, 0.5 * values


def as_kind(cache, kind):
    found = copy.deepcopy(cache)
    found.__class__ = kind
    return found


@change(0)
def cache_of_a_subclass(run):
    run.cache = as_kind(run.cache, Halved)


@change(0)
def cache_with_a_method_of_its_own(run):
    own = run.cache.update
    run.cache.update = lambda k, v, *a, **n: (lambda kv: (kv[0], 0.5 * kv[1]))(own(k, v, *a, **n))


@change(1)
def cache_with_a_part_of_a_subclass(run):
    class Part(DynamicLayer):
        def update(self, keys, values, *given, **named):
            keys, values = super().update(keys, values, *given, **named)
            return keys, 0.5 * values

    run.cache.layers[1].__class__ = Part


@change(0)
def class_of_caches(run):
    patched(run, DynamicLayer, "update", lambda kv: (kv[0], 0.5 * kv[1]))


@change(0)
def cache_that_is_static(run):
    other = StaticCache(config=run.model.config, max_cache_len=32)
    for index, part in enumerate(run.cache.layers):
        if part.get_seq_length():
            other.update(part.keys, part.values, index)
    run.cache = other


def crop(cache):
    """Remove two tokens. Transformers 4 cannot crop a cache without tokens."""
    if cache.get_seq_length():
        cache.crop(-2)


@change(2)
def cache_that_is_cropped(run):
    crop(run.cache)


@change(2)
def cache_that_is_copied_and_cropped(run):
    other = copy.deepcopy(run.cache)
    crop(run.cache)
    run.step(torch.tensor([[44]]))
    run.cache = other


@change(2)
def cache_whose_tensors_were_kept(run):
    kept = [(part.keys, part.values) for part in run.cache.layers]
    crop(run.cache)
    for token in (44, 45, 46):
        run.step(torch.tensor([[token]]))
    run.cache = DynamicCache(config=run.model.config)
    for index, (keys, values) in enumerate(kept):
        if keys is not None:
            run.cache.update(keys, values, index)


@change(2)
def cache_that_two_continue(run):
    other = copy.copy(run.cache)
    other.layers = [copy.copy(part) for part in run.cache.layers]
    for token in (44, 45):
        run.step(torch.tensor([[token]]))
    run.cache = other


@change(2)
def cache_that_is_repeated_and_selected(run):
    if run.cache.get_seq_length():
        run.cache.batch_repeat_interleave(2)
        run.cache.batch_select_indices(torch.tensor([1]))


@change(2)
def cache_in_another_layout(run):
    for part in run.cache.layers:
        if part.is_initialized:
            part.keys = part.keys.transpose(1, 2).contiguous().transpose(1, 2)
            part.values = part.values.transpose(2, 3).contiguous().transpose(2, 3)


@change(0)
def cache_with_gradients(run):
    run.gradients = True
    for part in run.cache.layers:
        if part.is_initialized:
            part.keys, part.values = part.keys.clone().requires_grad_(), part.values.clone()
    run.model.model.embed_tokens.weight.requires_grad_()


@change(2)
def dtype_of_the_model(run):
    nn.Module.float(nn.Module.double(run.model))


@change(1)
def weight_of_a_norm_as_another_parameter(run):
    run.layer.input_layernorm.weight = nn.Parameter(torch.linspace(0.5, 2, 64), False)
    run.layer.post_attention_layernorm.weight = nn.Parameter(torch.ones(64), False)
    run.layer.mlp.act_fn = nn.GELU()


@change(2)
def weight_of_a_norm_as_other_data(run):
    run.layer.input_layernorm.weight.data = torch.linspace(0.5, 2, 64)


@change(2)
def weights_in_place(run):
    with torch.no_grad():
        run.layer.input_layernorm.weight.mul_(1.5)
        run.layer.self_attn.q_proj.bias.add_(1)
        run.layer.mlp.down_proj.weight.mul_(1.5)


@change(2)
def weights_in_place_unseen_by_autograd(run):
    run.layer.input_layernorm.weight.data.mul_(1.5)
    run.layer.self_attn.k_proj.bias.data.add_(1)
    run.layer.mlp.down_proj.weight.data.mul_(1.5)


@change(2)
def matrix_in_the_place_of_a_packed_one(run):
    torch.manual_seed(3)
    run.layer.mlp.up_proj = nn.Linear(64, 128, bias=False).eval().requires_grad_(False)


@change(2)
def bias_that_is_gone(run):
    run.layer.self_attn.o_proj.bias = None


@change(2)
def matrices_of_another_block(run):
    run.layer.mlp = run.model.model.layers[0].mlp


@change(2)
def numbers_of_attention_and_norms(run):
    run.layer.self_attn.scaling *= 1.5
    for norm in (run.layer.input_layernorm, run.layer.post_attention_layernorm):
        norm.variance_epsilon = 0.5


@change(1)
def numbers_of_one_norm(run):
    run.layer.input_layernorm.variance_epsilon = 0.5


@change(1)
def activation(run):
    run.layer.mlp.act_fn = nn.GELU()


@change(1)
def block_that_is_removed(run):
    run.model.model.layers = run.model.model.layers[:1]


@change(2)
def blocks_that_change_places(run):
    first, second = run.model.model.layers
    first.mlp, second.mlp = second.mlp, first.mlp


@change(0)
def gradients_of_all_norms(run):
    run.gradients = True
    for layer in run.model.model.layers:
        layer.input_layernorm.weight.requires_grad_()


@change(1)
def gradients_of_a_norm(run):
    run.gradients = True
    run.layer.post_attention_layernorm.weight.requires_grad_()


@change(2)  # in the second call of each token, without gradients
def gradients_of_the_embeddings(run):
    run.gradients = True

    def call(model, tokens):
        given = model.model.embed_tokens(tokens).detach().requires_grad_()
        logits = model(inputs_embeds=given, past_key_values=copy.deepcopy(run.cache)).logits
        logits.square().sum().backward()
        with torch.no_grad():
            model(tokens, past_key_values=run.cache)
        return given.grad

    run.call = call


@change(2)
def gradients_that_nothing_needs(run):
    run.gradients = True


@change(2)
def parameters_by_torch_func(run):
    changed = {"model.layers.1.input_layernorm.weight": torch.linspace(0.5, 2, 64)}
    run.call = lambda model, tokens: (
        torch.func.functional_call(model, changed, (tokens,), {"past_key_values": run.cache}).logits
    )


@change(0)
def vmap_over_tokens(run):
    def call(model, tokens):
        given = model.model.embed_tokens(tokens)[None]
        taken = [copy.deepcopy(run.cache)]

        def one(embedded):
            cache = copy.deepcopy(taken[0])
            return model(inputs_embeds=embedded, past_key_values=cache).logits

        found = torch.func.vmap(one)(given)[0]
        model(tokens, past_key_values=run.cache)
        return found

    run.call = call
    run.model.set_attn_implementation("eager")


@change(0)
def derivative_in_a_direction(run):
    def call(model, tokens):
        given = model.model.embed_tokens(tokens)
        cache = copy.deepcopy(run.cache)
        model.set_attn_implementation("eager")  # sdpa has no such derivative
        _, found = torch.func.jvp(
            lambda x: model(inputs_embeds=x, past_key_values=cache).logits,
            (given,), (torch.ones_like(given),),
        )  # fmt: skip
        model(tokens, past_key_values=run.cache)
        return found

    run.call = call


@change(0)
def accelerate_offload(run):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(run.model, execution_device="cpu")


@change(0)
def accelerate_offload_of_buffers(run):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(run.model, execution_device="cpu", offload_buffers=True)


@change(0)
def training(run):
    run.model.train()


@change(1)
def training_of_a_part(run):
    run.layer.self_attn.attention_dropout = 0.5
    run.layer.self_attn.train()
    own = run.call

    def call(model, tokens):
        torch.manual_seed(0)
        return own(model, tokens)

    run.call = call


@change(2)
def hidden_states_of_one_call(run):
    run.model(PROMPT, output_hidden_states=True)


@change(0 if STACKED else 2)  # transformers 4 captures by other methods, outside of a block
def hidden_states_of_all_calls(run):
    def call(model, tokens):
        found = model(tokens, past_key_values=run.cache, output_hidden_states=True)
        return torch.cat(found.hidden_states, -1)

    run.call = call


@change(0)
def attentions_of_all_calls(run):
    run.model.set_attn_implementation("eager")

    def call(model, tokens):
        found = model(tokens, past_key_values=run.cache, output_attentions=True)
        return torch.cat(found.attentions, 1)

    run.call = call


@change(0)
def modes_that_see_operations(run):
    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is nn.functional.silu:
                run.seen.append(1)
            return function(*args, **(kwargs or {}))

    run.stack.enter_context(Mode())


@change(0)
def modes_that_see_dispatched_operations(run):
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.silu.default:
                run.seen.append(1)
            return function(*args, **(kwargs or {}))

    run.stack.enter_context(Mode())


@change(2)
def default_device(run):
    run.stack.enter_context(torch.device("cpu"))


@change(2)
def inference_mode(run):
    with torch.enable_grad():  # which it has again at its end
        run.stack.enter_context(torch.inference_mode())


@change(2)
def model_that_is_copied(run):
    run.model = copy.deepcopy(run.model)


@change(2)
def model_that_is_pickled(run):
    run.model = pickle.loads(pickle.dumps(run.model))


@change(2)
def state_that_is_loaded(run):
    state = {k: v.clone() for k, v in run.model.state_dict().items()}
    state["model.layers.1.input_layernorm.weight"] *= 2
    run.model.load_state_dict(state)


@change(2)
def state_that_is_assigned(run):
    state = {k: v.clone() for k, v in run.model.state_dict().items()}
    state["model.layers.1.input_layernorm.weight"] *= 2
    run.model.load_state_dict(state, assign=True)


@change(1)
def call_that_is_compiled(run):
    own = run.layer.mlp._call_impl
    run.layer.mlp._compiled_call_impl = lambda *given: 1.3 * own(*given)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The dense and the packed model."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("fuzz")
    model, names = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG)), []
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) and path != "lm_head":
                module.weight.normal_(std=0.2)
                module.weight[torch.rand_like(module.weight) < 0.5] = 0
                if not path.endswith(DENSE):
                    names.append(f"{path}.weight")
                if module.bias is not None:
                    module.bias.normal_()
            elif "norm" in path:
                module.weight.uniform_(0.5, 1.5)
    model.save_pretrained(folder / "dense")
    (folder / "packed").mkdir()
    pack(folder / "dense", dict.fromkeys(names), folder / "packed")
    packed = runtime.load(folder / "packed")
    assert sum(isinstance(m, PackedLinear) for m in packed.modules()) == 8
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense", attn_implementation="sdpa")
    return dense.eval().requires_grad_(False), packed


def outputs(model, function, before, sequences, served):
    """The outputs of the calls after a change, the records of hooks, and the blocks in one call.

    Args:
        model: the model, which is copied.
        function: the change.
        before: the number of calls before it.
        sequences: the number of sequences in each call.
        served: a list that grows by one for each block that runs a token in one call.
    """
    with contextlib.ExitStack() as stack:
        run, found, counts = Run(copy.deepcopy(model), stack), [], []
        calls = [PROMPT, *(torch.tensor([[token]]) for token in TOKENS)]
        calls = [torch.cat([tokens + shift for shift in range(sequences)]) for tokens in calls]
        for number, tokens in enumerate(calls):
            if number == before:
                with torch.no_grad():
                    function(run)
            served.clear()
            logits = run.step(tokens)
            if number >= before:
                found.append(logits)
                counts += [len(served)] if number else []
        return found, run.seen, counts


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", CHANGES)
def test_changed_packed_model_equals_the_changed_dense_model(models, name, stage, monkeypatch):
    (blocks, function), (before, sequences) = CHANGES[name], STAGES[stage]
    served, run = [], Decoder.run
    monkeypatch.setattr(Decoder, "run", lambda *given: served.append(1) or run(*given))
    dense, packed = models
    expected, seen, none = outputs(dense, function, before, sequences, served)
    found, noticed, counts = outputs(packed, function, before, sequences, served)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
    assert len(noticed) == len(seen)
    assert not any(none)
    assert counts == [blocks] * len(counts)
