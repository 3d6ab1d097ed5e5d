"""The adapter conforms; the pattern is along the inputs, by a count without APT."""

import pytest
from apt_gpt2 import Gpt2Adapter, example
from transformers import AutoModelForCausalLM

import apt
from apt.testing import AdapterConformance, random_tokens


class TestGpt2(AdapterConformance):
    def adapter(self):
        return Gpt2Adapter()

    def model(self):
        return example()


@pytest.mark.parametrize(
    "options", [{}, {"method": "ss", "options": apt.PruneOptions(error_aware=False)}]
)
def test_pruned_gpt2_meets_2_4_along_the_inputs_after_loading(tmp_path, options):
    model = example()
    apt.prune(model, random_tokens(128), pattern="2:4", **options)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    outside = 0
    for block in loaded.transformer.h:
        for module in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            weight = module.weight.tolist()  # weight[i][o] multiplies input i for output o
            for out in range(len(weight[0])):
                for start in range(0, len(weight), 4):
                    assert sum(weight[start + i][out] != 0 for i in range(4)) == 2
            outside += sum(sum(w != 0 for w in row[:4]) != 2 for row in weight)
    assert outside > 0  # along the outputs there is no such pattern
