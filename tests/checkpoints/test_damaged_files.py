"""Any configuration or journal is read, or refused with an error of one line."""

import json
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from apt.checkpoints.load import load, open_skeleton
from apt.engine.streamed import records_of
from apt.errors import AptError
from apt.locations.model_source import find
from apt.output.staging import Staging
from apt.planning.plan import make_plan
from apt.plugin.registry import registry
from apt.solver import parse_pattern
from tests.helpers.families import random_model

anything = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
numbers = st.one_of(st.integers(-2, 40), st.sampled_from([0.5, float("inf"), 2**70]))
values = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=3), st.just([]), st.just({}))
MIXER = ["layer", "expand", "d_conv", "d_state", "dt_rank", "headdim", "ngroups", "chunk_size",
         "dt_limit", "d_ssm", "rmsnorm"]  # fmt: skip
MODEL = ["vocab_size", "pad_vocab_size_multiple", "residual_in_fp32", "tie_embeddings", "rms_norm"]
mixers = st.one_of(
    values, st.dictionaries(st.sampled_from(MIXER), st.one_of(values, st.just("Mamba2")))
)
configs = st.builds(
    lambda given, mixer, layers: {**given, "ssm_cfg": mixer, "n_layer": layers},
    st.dictionaries(st.sampled_from(MODEL), values),
    mixers,
    st.one_of(st.integers(-1, 3), st.text(max_size=2), st.none()),
)


@contextmanager
def one_line():
    """Allow an `AptError` of one line."""
    try:
        yield
    except AptError as error:
        if "\n" in str(error):
            raise AssertionError("the error has several lines") from error


@anything
@given(config=configs, width=values)
@example(config={"ssm_cfg": {"layer": "Mamba2", "headdim": 0}, "n_layer": 1}, width=8)
@example(config={"ssm_cfg": "Mamba1", "n_layer": 1}, width=8)
def test_any_configuration_of_mamba_ssm_opens_or_is_refused_in_one_line(tmp_path, config, width):
    (tmp_path / "config.json").write_text(json.dumps({**config, "d_model": width}))
    with one_line():
        assert open_skeleton(find(str(tmp_path), registry()), registry()).checkpoint is not None


FIELDS = ["hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "hidden_act",
          "intermediate_size", "rope_theta", "rope_parameters", "head_dim", "model_type",
          "max_position_embeddings", "tie_word_embeddings", "dtype", "architectures", "auto_map",
          "pad_token_id", "rms_norm_eps", "layer_types", "use_cache",
          "num_hidden_layers"]  # fmt: skip


@cache
def config_of(variant):
    return random_model(variant).config.to_dict()


@anything
@given(
    variant=st.sampled_from(["llama", "opt", "bloom", "mamba", "mamba2"]),
    field=st.sampled_from(FIELDS),
    value=values,
)
@example(variant="llama", field="hidden_size", value="abc")
@example(variant="llama", field="num_attention_heads", value=0)
@example(variant="llama", field="num_hidden_layers", value=2**70)
@example(variant="bloom", field="model_type", value=None)
def test_any_configuration_of_transformers_opens_or_is_refused_in_one_line(
    tmp_path, variant, field, value
):
    config = config_of(variant) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with one_line():
        model = open_skeleton(find(str(tmp_path), registry()), registry())
        make_plan(model.module, model.adapter, parse_pattern("2:4"))


def test_configuration_with_endless_nesting_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"d_model":' + "[" * 100_000)
    with pytest.raises(AptError, match="^[^\n]* does not load[^\n]*$"):
        open_skeleton(find(str(tmp_path), registry()), registry())


@pytest.mark.parametrize("stored", [[1, 2], {"backbone": 3}, torch.zeros(3), {1: torch.zeros(3)}])
def test_invalid_weights_of_mamba_ssm_are_refused(tmp_path, stored):
    native = {"d_model": 8, "n_layer": 1, "vocab_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(native))
    torch.save(stored, tmp_path / "pytorch_model.bin")
    with pytest.raises(AptError, match="does not load|lacks|has"):
        load(open_skeleton(find(str(tmp_path), registry()), registry()))


json_values = st.recursive(
    values, lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(max_size=3), inner)),
    max_leaves=8,
)  # fmt: skip
site_fields = st.dictionaries(st.sampled_from(["name", "shape", "zeros", "pattern", "x"]), values)
expert_fields = st.dictionaries(st.sampled_from(["name", "experts", "merged"]), values)
lines = st.one_of(
    json_values,
    st.fixed_dictionaries({"run_inputs": json_values}),
    st.fixed_dictionaries(
        {
            "block": json_values,
            "sites": st.one_of(values, st.lists(site_fields)),
            "experts": st.one_of(values, st.lists(expert_fields)),
        }
    ),
)


@anything
@given(given=st.lists(lines, max_size=4), tail=st.binary(max_size=20), sealed=st.booleans())
def test_any_journal_is_read_or_refused_in_one_line(tmp_path, given, tail, sealed):
    work = Staging(tmp_path / "out")
    work.folder.mkdir(exist_ok=True)
    work.journal.path.unlink(missing_ok=True)
    if sealed:
        for line in given:
            if isinstance(line, dict):
                work.journal.add(line)
    else:
        raw = "".join(json.dumps(line) + "\n" for line in given).encode()
        work.journal.path.write_bytes(raw + tail)
    work = Staging(tmp_path / "out")
    with one_line(), work.locked():
        work.journal.read()
        for line in work.journal.lines:
            records_of(line, work.journal)
        assert work.finished_output is None
        work.begin({"model": 1}, resume=True)
