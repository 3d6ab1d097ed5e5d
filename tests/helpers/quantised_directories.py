"""Directories of quantised safetensors files of tiny random mixtures, written by plain rules."""

import json
from dataclasses import dataclass, field

import torch
from safetensors.torch import load_file, save_file

from apt.checkpoints.quantised import Slices
from tests.helpers.mixtures import mixture

SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 16,
    "num_hidden_layers": 3, "dtype": torch.bfloat16,
}  # fmt: skip
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
])  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A way to write quantised weights.

    Attributes:
        family: the type of the model.
        parts: a function of a name and a weight that returns the stored tensors by their names.
        config: the entries of ``config.json``.
        chosen: the ends of the modules whose weights are quantised.
        count: the field with the number of experts.
    """

    family: str
    parts: object
    config: dict
    chosen: tuple = ("gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj")
    count: str = "num_experts"
    sizes: dict = field(default_factory=dict)


def fp8(name, weight):
    """Blocks of 32 × 32 with a scale each."""
    rows, columns = (-(-n // 32) for n in weight.shape)
    padded = torch.zeros(rows * 32, columns * 32)
    padded[: weight.shape[0], : weight.shape[1]] = weight.float()
    blocks = padded.view(rows, 32, columns, 32)
    scales = blocks.abs().amax((1, 3)) / 448
    numbers = (blocks / scales[:, None, :, None]).view(rows * 32, -1)
    numbers = numbers[: weight.shape[0], : weight.shape[1]].contiguous()
    return {name: numbers.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}


def mxfp4(name, weight):
    """Random numbers in the shape of a stack of experts (experts, in, out)."""
    experts, columns, out = weight.shape
    blocks = torch.randint(0, 256, (experts, out, columns // 32, 16), dtype=torch.uint8)
    scales = torch.randint(122, 126, blocks.shape[:3], dtype=torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


def integers(weight, group, bits):
    """Integers from 0 on (out, in), their zero points and scales (out, groups)."""
    groups = weight.float().view(weight.shape[0], -1, group)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).half()
    zeros = (-low / scales.float()).round().clamp(1, 2**bits - 1)
    values = (groups / scales.float()[..., None] + zeros[..., None]).round()
    return values.clamp(0, 2**bits - 1).view(weight.shape).int(), zeros.int(), scales


def words(values, bits):
    """Integers in words of 32 bits, along the last dimension, the lowest bits first."""
    rows = []
    for row in values.reshape(-1, values.shape[-1]).tolist():
        joined = sum(value << (bits * place) for place, value in enumerate(row))
        size = -(-len(row) * bits // 32) * 4
        rows.append(torch.frombuffer(bytearray(joined.to_bytes(size, "little")), dtype=torch.int32))
    return torch.stack(rows).view(*values.shape[:-1], -1)


def packed_int4(name, weight):
    """Symmetric integers of 4 bits in groups of 32, of compressed-tensors."""
    stem = name.removesuffix("weight")
    groups = weight.float().view(weight.shape[0], -1, 32)
    scales = (groups.abs().amax(2) / 7.5).to(torch.bfloat16)
    values = (groups / scales.float()[..., None]).round().clamp(-8, 7).view(weight.shape).int()
    return {
        f"{stem}weight_packed": words(values + 8, 4), f"{stem}weight_scale": scales,
        f"{stem}weight_shape": torch.tensor(weight.shape),
    }  # fmt: skip


def float_rows(name, weight):
    """FP8 with a scale for each row, of compressed-tensors."""
    scales = (weight.float().abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
    return {name: (weight / scales).to(torch.float8_e4m3fn), f"{name}_scale": scales}


def awq(name, weight):
    """Integers of 4 bits in groups of 32, packed along the outputs in the order of AWQ."""
    stem, order = name.removesuffix("weight"), torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    values, zeros, scales = (x.T for x in integers(weight, 32, 4))
    values, zeros = (x.reshape(len(x), -1, 8)[..., order].flatten(1) for x in (values, zeros))
    return {
        f"{stem}qweight": words(values, 4), f"{stem}qzeros": words(zeros, 4),
        f"{stem}scales": scales.contiguous(),
    }  # fmt: skip


def gptq(name, weight):
    """Integers of 4 bits in groups of inputs in any order, packed along the inputs."""
    stem, mixed = name.removesuffix("weight"), torch.randperm(weight.shape[1])
    values, zeros, scales = integers(weight[:, mixed], 32, 4)
    back = mixed.argsort()
    return {
        f"{stem}qweight": words(values[:, back], 4).T.contiguous(),
        f"{stem}qzeros": words(zeros.T - 1, 4), f"{stem}scales": scales.T.contiguous(),
        f"{stem}g_idx": (back // 32).int(),
    }  # fmt: skip


def nf4(name, weight):
    """NF4 in groups of 64, whose largest values are bytes of a table in groups of 256."""
    groups = weight.float().view(-1, 64)
    largest = groups.abs().amax(1)
    table, offset = torch.linspace(-1, 1, 256), largest.mean().item()
    nested = (largest - offset).abs().max().view(1)
    codes = ((largest - offset) / nested)[:, None].sub(table).abs().argmin(1).to(torch.uint8)
    absmax = table[codes.long()] * nested + offset
    numbers = (groups / absmax[:, None])[..., None].sub(NF4).abs().argmin(-1).flatten()
    data = (numbers[::2] << 4 | numbers[1::2]).to(torch.uint8).view(-1, 1)
    state = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [*weight.shape],
        "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset,
    }  # fmt: skip
    text = torch.tensor([*json.dumps(state).encode()], dtype=torch.uint8)
    return {
        name: data, f"{name}.absmax": codes, f"{name}.quant_map": NF4.clone(),
        f"{name}.nested_absmax": nested, f"{name}.nested_quant_map": table,
        f"{name}.quant_state.bitsandbytes__nf4": text,
    }  # fmt: skip


def mlx(bits):
    """Integers in groups of 32 with scales and biases."""

    def parts(name, weight):
        stem = name.removesuffix("weight")
        width = 8 if "gate.weight" in name else bits
        values, zeros, scales = integers(weight.flatten(0, -2), 32, width)
        shape = (*weight.shape[:-1], -1)
        return {
            f"{stem}weight": words(values, width).view(torch.uint32).view(shape),
            f"{stem}scales": scales.bfloat16().view(shape),
            f"{stem}biases": (-zeros * scales.float()).bfloat16().view(shape),
        }

    return parts


def _compressed(kind, **weights):
    weights = {"symmetric": True, "dynamic": False, **weights}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    ignored = ["lm_head", *(f"model.layers.{block}.mlp.gate" for block in range(3)),
               *(f"model.layers.{block}.mlp.shared_expert_gate" for block in range(3))]  # fmt: skip
    return {"quantization_config": {
        "quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group},
        "ignore": ignored, "quantization_status": "compressed", "kv_cache_scheme": None,
    }}  # fmt: skip


_BLOCKS = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
_ROUTERS = [f"model.layers.{block}.mlp.gate" for block in range(3)]
_MLX = {"group_size": 32, "bits": 4} | {
    name: {"group_size": 32, "bits": 8} for name in _ROUTERS
}  # fmt: skip
MADE = {
    "fp8": Made("qwen3_moe", fp8, {
        "quantization_config": {**_BLOCKS, "modules_to_not_convert": ["lm_head", *_ROUTERS]}
    }),
    "fp8-deepseek": Made(
        "deepseek_v3", fp8, {"quantization_config": {**_BLOCKS, "scale_fmt": "ue8m0"}},
        count="n_routed_experts", sizes={"q_lora_rank": 32, "kv_lora_rank": 32, "head_dim": 4},
    ),
    "mxfp4": Made(
        "gpt_oss", mxfp4, {"quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
        }}, ("gate_up_proj", "down_proj"), "num_local_experts",
    ),
    "compressed-int4": Made(
        "qwen3_moe", packed_int4,
        _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
    ),
    "compressed-fp8": Made(
        "qwen2_moe", float_rows,
        _compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        sizes={"shared_expert_intermediate_size": 64},
    ),
    "awq": Made("qwen3_moe", awq, {"quantization_config": {
        "quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True,
        "modules_to_not_convert": _ROUTERS,
    }}),
    "gptq": Made("qwen3_moe", gptq, {"quantization_config": {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False,
        "dynamic": {r"-:.*mlp\.gate$": {}},
    }}),
    "nf4": Made("qwen3_moe", nf4, {"quantization_config": {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16", "llm_int8_skip_modules": ["lm_head", *_ROUTERS],
    }}),
    "nf4-dense": Made("llama", nf4, {"quantization_config": {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16",
    }}),
    "mlx": Made(
        "qwen3_moe", mlx(4), {"quantization": _MLX, "quantization_config": _MLX},
        (*Made.chosen, "mlp.gate", "embed_tokens", "lm_head"),
    ),
    "mlx-mixtral": Made(
        "mixtral", mlx(3), {"quantization": {"group_size": 32, "bits": 3}},
        count="num_local_experts",
    ),
}  # fmt: skip


def write_directory(kind, directory, **sizes):
    """Write a quantised directory of two files, with an index, and the plain one beside it.

    Returns what was made how.
    """
    made, plain = MADE[kind], directory.with_name("plain")
    model = mixture(made.family, **{**SIZES, **made.sizes, **sizes}).to(torch.bfloat16)
    model.save_pretrained(plain)
    config = json.loads((plain / "config.json").read_text())
    tensors = load_file(plain / "model.safetensors")
    if kind.startswith("mlx"):
        tensors = _stacked(tensors)
    stored = {}
    for name, tensor in sorted(tensors.items()):
        module = name.removesuffix(".weight")
        chosen = module.endswith(made.chosen) and "router" not in name
        stored |= made.parts(name, tensor) if chosen else {name: tensor}
    write_files(directory, stored)
    (directory / "config.json").write_text(json.dumps({**config, **made.config}))
    return made


def write_files(directory, stored, count=2):
    """Write tensors to files and their index."""
    names, where = list(stored), {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = names[number * len(names) // count : (number + 1) * len(names) // count]
        save_file({name: stored[name] for name in part}, directory / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0, "total_parameters": 0}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _stacked(tensors):
    """Experts in the stacks of MLX."""
    matrices = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    stacks, others = {}, {}
    for name, tensor in tensors.items():
        before, found, after = name.partition(".experts.")
        if found:
            place, matrix, last = after.split(".")
            key = f"{before}.switch_mlp.{matrices.get(matrix, matrix)}.{last}"
            stacks.setdefault(key, {})[int(place)] = tensor
        else:
            others[name] = tensor
    stacks = {key: torch.stack([x[place] for place in sorted(x)]) for key, x in stacks.items()}
    return others | stacks


def slices_of(checkpoint, made, kept, blocks, values=None):
    """The slices of a model with some blocks, and the experts ``kept[block]`` of each."""
    sources, rows = {}, {}
    count = len(kept[0]) if made.family != "llama" else None
    for name, tensor in checkpoint.tensors.items():
        parts = name.split(".")
        if "layers" not in parts:
            sources[name] = name
            continue
        at = parts.index("layers") + 1
        block = int(parts[at])
        if block not in blocks:
            continue
        parts[at] = str(blocks.index(block))
        if "experts" in parts and parts[parts.index("experts") + 1].isdigit():
            at = parts.index("experts") + 1
            if int(parts[at]) not in kept[block]:
                continue
            parts[at] = str(kept[block].index(int(parts[at])))
        elif tensor.shape[0] == 8 and ("experts" in parts or {"gate", "router"} & {*parts}):
            rows[".".join(parts)] = kept[block]
        sources[".".join(parts)] = name
    record = {**checkpoint.config.to_dict(), "num_hidden_layers": len(blocks)}
    if count is not None:
        record[checkpoint.config.attribute_map.get(made.count, made.count)] = count
    for per_block in ("layer_types", "mlp_layer_types"):
        if isinstance(record.get(per_block), list):
            record[per_block] = [record[per_block][block] for block in blocks]
    config = type(checkpoint.config).from_dict(record)
    return Slices(config, sources, rows, blocks, count, values or {})


def removed_by_hand(checkpoint, slices):
    """The expanded tensors of a smaller model."""
    tensors = {}
    for name, source in slices.sources.items():
        tensor = checkpoint.read(source)
        tensors[name] = tensor[list(slices.rows[name])] if name in slices.rows else tensor
    return tensors
