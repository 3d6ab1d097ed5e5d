"""BART, Marian, M2M-100 and Whisper: an encoder and a decoder with the same names of modules."""

from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from apt.adapter import Input, Site, StackedAdapter

_POST_NORM = ("Bart", "BlenderbotSmall", "Marian", "PLBart")  # the beginnings of names of classes


class BartAdapter(StackedAdapter):
    """BART and Marian (post-norm), mBART, M2M-100 and NLLB, Pegasus, Blenderbot and Whisper."""

    stack_paths: ClassVar = {"encoder": "encoder.layers", "decoder": "decoder.layers"}
    inputs = (
        Input("attention", tuple(f"self_attn.{name}_proj" for name in "qkv")),
        Input("heads", ("self_attn.out_proj",), residual=True),
        Input("cross attention", ("encoder_attn.q_proj",)),
        Input("encoder", ("encoder_attn.k_proj", "encoder_attn.v_proj"), crossing=True),
        Input("cross heads", ("encoder_attn.out_proj",), residual=True),
        Input("mlp", ("fc1",)),
        Input("neurons", ("fc2",), residual=True),
    )

    def inputs_of(self, block: nn.Module) -> tuple[Input, ...]:
        """Without those of a cross attention that never runs."""
        entries, dense = super().inputs_of(block), self.left_dense_of(block)
        return tuple(entry for entry in entries if not entry.linears[0].startswith(dense))

    def left_dense_of(self, block: nn.Module) -> tuple[str, ...]:
        """The cross attention of a decoder without an encoder, such as BartForCausalLM's."""
        config = getattr(getattr(block, "encoder_attn", None), "config", None)
        runs = getattr(config, "is_encoder_decoder", True)
        return (*super().left_dense_of(block), *(() if runs else ("encoder_attn",)))

    def sites(self, block: nn.Module) -> list[Site]:
        """As declared; a post-norm block adds its later products to a normalised stream."""
        sites = super().sites(block)
        if not type(block).__name__.startswith(_POST_NORM):
            return sites
        later = {"encoder_attn.out_proj": "cross attention", "fc2": "mlp"}
        return [
            replace(site, residual=False, added_to=later[site.name]) if site.name in later else site
            for site in sites
        ]

    def positions(self, config: Any) -> int | None:
        """The shorter of the positions of both sides; None for Whisper, which has its own."""
        return None if config.model_type == "whisper" else super().positions(config)
