"""The model families that ship with APT, one file each."""

from apt.hookspecs import hookimpl
from apt.specs import AdapterSpec


@hookimpl
def apt_adapters() -> list[AdapterSpec]:
    """LLaMA, OPT, BLOOM and Mamba, and one for what has none."""
    return [
        AdapterSpec(
            "llama",
            "LLaMA and models built like it (SmolLM2, Mistral)",
            "apt_adapters.llama:LlamaAdapter",
            model_types=("llama", "mistral"),
            zoo="apt_adapters:zoo/llama",
        ),
        AdapterSpec(
            "opt",
            "OPT, the post-norm 350m included",
            "apt_adapters.opt:OptAdapter",
            model_types=("opt",),
            zoo="apt_adapters:zoo/opt",
        ),
        AdapterSpec(
            "bloom",
            "BLOOM and BLOOMZ",
            "apt_adapters.bloom:BloomAdapter",
            model_types=("bloom",),
            zoo="apt_adapters:zoo/bloom",
        ),
        AdapterSpec(
            "mamba",
            "Mamba and FalconMamba, dt_proj included",
            "apt_adapters.mamba:MambaAdapter",
            model_types=("mamba", "falcon_mamba"),
            zoo="apt_adapters:zoo/mamba",
        ),
        AdapterSpec(
            "auto",
            "Any causal language model of transformers, found by running it; ask for it by name",
            "apt_adapters.auto:AutoAdapter",
        ),
    ]
