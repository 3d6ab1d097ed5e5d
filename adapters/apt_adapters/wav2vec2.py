"""wav2vec 2.0, HuBERT, WavLM and Data2VecAudio: encoders of sound."""

from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from apt.adapter import Input, Site, StackedAdapter


class Wav2Vec2Adapter(StackedAdapter):
    """An encoder of blocks behind convolutions, which stay dense."""

    stack_paths: ClassVar = {"encoder": "encoder.layers"}
    inputs = (
        Input("attention", tuple(f"attention.{name}_proj" for name in "qkv")),
        Input("heads", ("attention.out_proj",), residual=True),
        Input("mlp", ("feed_forward.intermediate_dense",)),
        Input("neurons", ("feed_forward.output_dense",), residual=True),
    )
    left_dense = ("attention.gru_rel_pos_linear",)  # of WavLM: the gates of positions

    def sites(self, block: nn.Module) -> list[Site]:
        """As declared; a post-norm block adds its second product to a normalised stream."""
        sites = super().sites(block)
        if "StableLayerNorm" in type(block).__name__:
            return sites
        last = "feed_forward.output_dense"
        return [
            replace(site, residual=False, added_to="mlp") if site.name == last else site
            for site in sites
        ]

    def positions(self, config: Any) -> int | None:
        """None: positions are convolutions."""
        return None
