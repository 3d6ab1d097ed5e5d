"""With and without the parallel residual, the adapter conforms, and a pruned model loads."""

from apt_neox import NeoxAdapter, example
from transformers import AutoModelForCausalLM

import apt
from apt.testing import AdapterConformance, random_tokens


class TestParallel(AdapterConformance):
    def adapter(self):
        return NeoxAdapter()

    def model(self):
        return example()


class TestSequential(TestParallel):
    def model(self):
        return example(parallel=False)


def test_pruned_neox_model_meets_the_pattern_after_loading(tmp_path):
    model = example()
    report = apt.prune(model, random_tokens(128), pattern="2:4")
    assert len(report.sites) == 8
    model.save_pretrained(tmp_path)
    block = AutoModelForCausalLM.from_pretrained(tmp_path).gpt_neox.layers[0]
    weight = block.attention.query_key_value.weight
    assert ((weight.view(96, 8, 4) != 0).sum(-1) == 2).all()
