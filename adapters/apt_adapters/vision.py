"""Encoders of images, and of images and texts: ViT, DeiT, CLIP and SigLIP."""

from typing import Any, ClassVar

from apt.adapter import Input, StackedAdapter


class VitAdapter(StackedAdapter):
    """ViT and DeiT, whose modules transformers 4 names otherwise."""

    stack_paths: ClassVar = {"encoder": "layers", "encoder of transformers 4": "encoder.layer"}
    inputs = (
        Input(
            "attention",
            tuple(f"attention.{name}_proj" for name in "qkv")
            + tuple(f"attention.attention.{name}" for name in ("query", "key", "value")),
        ),
        Input("heads", ("attention.o_proj", "attention.output.dense"), residual=True),
        Input("mlp", ("mlp.fc1", "intermediate.dense")),
        Input("neurons", ("mlp.fc2", "output.dense"), residual=True),
    )

    def positions(self, config: Any) -> int | None:
        """None: the size of the images is fixed."""
        return None


class ClipAdapter(StackedAdapter):
    """CLIP and SigLIP: a tower for images and a tower for texts, or one of them alone."""

    stack_paths: ClassVar = {
        "vision": "vision_model.encoder.layers",
        "text": "text_model.encoder.layers",
        "tower": "encoder.layers",
    }
    inputs = (
        Input("attention", tuple(f"self_attn.{name}_proj" for name in "qkv")),
        Input("heads", ("self_attn.out_proj",), residual=True),
        Input("mlp", ("mlp.fc1",)),
        Input("neurons", ("mlp.fc2",), residual=True),
    )

    def positions(self, config: Any) -> int | None:
        """The positions of the texts; None for images alone."""
        return super().positions(getattr(config, "text_config", config))
