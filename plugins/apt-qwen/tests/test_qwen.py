"""Both generations conform, and a pruned model loads."""

from apt_qwen import QwenAdapter, example
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import apt
from apt.testing import AdapterConformance, random_tokens


class TestQwen3(AdapterConformance):
    def adapter(self):
        return QwenAdapter()

    def model(self):
        return example()


class TestQwen2(AdapterConformance):
    def adapter(self):
        return QwenAdapter()

    def model(self):
        return Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                tie_word_embeddings=True,
            )
        )  # fmt: skip


def test_pruned_qwen_model_meets_the_pattern_after_loading(tmp_path):
    model = example()
    report = apt.prune(model, random_tokens(128), pattern="2:4")
    assert len(report.sites) == 14
    model.save_pretrained(tmp_path)
    weight = AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[1].mlp.up_proj.weight
    assert ((weight.view(64, 8, 4) != 0).sum(-1) == 2).all()
