"""Arguments of wrong types are errors that name the argument, in every function for programs."""

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import apt as library
from tests.helpers import TEXT
from tests.helpers.families import random_model, random_tokens

TOKENS = random_tokens(4, 24)


def sparse():
    model = random_model("llama")
    for block in model.model.layers:
        block.mlp.up_proj.weight.data[::2] = 0
    return model


def prune(model=None, tokens=TOKENS, **given):
    given = {"pattern": "2:4", "method": "magnitude"} | given
    return library.prune(random_model("llama") if model is None else model, tokens, **given)


def shrink(model=None, tokens=TOKENS, **given):
    return library.shrink(random_model("llama") if model is None else model, tokens, **given)


def recover(model=None, tokens=TOKENS, **given):
    given = {"kind": "layers", "options": library.RecoverOptions(steps=1, batch=2)} | given
    return library.recover(sparse() if model is None else model, tokens, **given)


def perplexity(model=None, tokens=TOKENS):
    return library.perplexity(random_model("llama") if model is None else model, tokens)


NO_TOKENS = {
    "nothing": None, "a list": TOKENS.tolist(), "numpy": TOKENS.numpy(), "text": "words",
    "no values": TOKENS.to("meta"), "fp32": TOKENS.float(), "sparse": TOKENS.to_sparse(),
    "one sample": TOKENS[0], "no samples": TOKENS[:0],
}  # fmt: skip


@pytest.mark.parametrize("call", [prune, shrink, recover, perplexity])
@pytest.mark.parametrize("kind", NO_TOKENS)
def test_wrong_tokens_are_refused(call, kind):
    with pytest.raises(library.AptError, match="^tokens ") as refused:
        call(tokens=NO_TOKENS[kind])
    assert refused.value.options == ("tokens",)


@pytest.mark.parametrize("call", [prune, shrink, recover, perplexity])
@pytest.mark.parametrize("model", [LlamaForCausalLM, "zoo:llama", 5], ids=str)
def test_wrong_model_is_refused(call, model):
    with pytest.raises(library.AptError, match="^model is .*; give an object of the class Module"):
        call(model)


@pytest.mark.parametrize("call", [prune, perplexity, library.keep_zeros])
def test_model_on_the_meta_device_is_refused(call):
    with pytest.raises(library.AptError, match=r"embed_tokens.weight has no values in memory"):
        call(random_model("llama").to("meta"))


def test_none_as_a_model_is_refused():
    with pytest.raises(library.AptError, match="model is None; give an object"):
        library.prune_copy(None, TOKENS, pattern="2:4")


WRONG = [
    (prune, {"options": library.RecoverOptions()}, "options is of the class apt.RecoverOptions;"),
    (prune, {"options": library.PruneOptions}, "options is the class PruneOptions; give an object"),
    (prune, {"options": {"effort": "fast"}}, "options is of the class dict; give an object of"),
    (prune, {"selection": ["*.q_proj"]}, "selection is of the class list; give an object of the"),
    (prune, {"also": "conv1d"}, "also is 'conv1d'; give a sequence of texts"),
    (prune, {"also": [5]}, "also is of the class list; give a sequence of texts"),
    (prune, {"tokenizer": 5}, "tokenizer is of the class int; give one of transformers"),
    (prune, {"tokenizer": 0}, "tokenizer is of the class int; give one of transformers"),
    (prune, {"ranks": 5}, "ranks is 5; give an object of the class Ranks or None"),
    (prune, {"observe": None}, "observe is None; give a function"),
    (prune, {"activations": "tape"}, "activations is 'tape'; give 'memory' or 'cpu' or 'disk'"),
    (prune, {"pattern": (2, 4)}, "pattern is of the class tuple; give an object of the class P"),
    (prune, {"pattern": True}, "pattern is True; give an object of the class Pattern"),
    (prune, {"method": ""}, "no method ''"),
    (prune, {"adapter": ""}, "no adapter ''"),
    (prune, {"seed": 2**70}, "is out of range; give a whole number from -2**63 to 2**64 - 1"),
    (shrink, {"size": {"channels": 32}}, "size is of the class dict; give an object of the class"),
    (shrink, {"size": library.ShrinkOptions(sizes={"heads": "2"})}, "sizes has '2' for heads, not"),
    (shrink, {"size": library.ShrinkOptions(sizes={"heads": None})}, "sizes has None for heads"),
    (shrink, {"size": library.ShrinkOptions(sizes={"heads": np.nan})}, "heads=nan is no share"),
    (shrink, {"size": library.ShrinkOptions(sizes="heads=2")}, "sizes is 'heads=2', not Mapping"),
    (recover, {"kind": "distill", "dense": "zoo:llama"}, "dense is 'zoo:llama'; give an object"),
    (recover, {"kind": "distill"}, "recovery distill needs the dense model; give it"),
    (recover, {"folder": 5}, "folder is 5; give an object of the class Path or a text or None"),
    (recover, {"resume": "yes"}, "resume is 'yes'; give an object of the class bool"),
]


@pytest.mark.parametrize(("call", "given", "message"), WRONG, ids=[case[-1][:60] for case in WRONG])
def test_error_names_the_wrong_argument(call, given, message):
    with pytest.raises(library.AptError) as refused:
        call(**given)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("seed", ["x", None, 1.5, True])
@pytest.mark.parametrize("call", [prune, shrink, recover])
def test_seed_must_be_a_whole_number(call, seed):
    with pytest.raises(library.AptError, match=f"^seed is {seed!r}; give a whole number"):
        call(seed=seed)


def test_numpy_numbers_are_accepted():
    assert prune(pattern=np.float32(0.5), seed=np.int64(3)).sparsity == 0.5


def test_dense_model_of_another_family_or_vocabulary_is_refused():
    smaller = random_model("llama").get_input_embeddings()
    other = random_model("llama")
    other.set_input_embeddings(torch.nn.Embedding(100, smaller.embedding_dim))
    with pytest.raises(library.AptError, match="has 100 tokens, and the pruned one has 2048"):
        recover(kind="distill", dense=other)
    with pytest.raises(library.AptError, match="is of the family opt, and the pruned one of llama"):
        recover(kind="distill", dense=random_model("opt"))


@pytest.mark.parametrize(
    "given",
    [
        {"only": 5}, {"skip": None}, {"only": (5,)}, {"overrides": "*=0.5"},
        {"overrides": ("*=0.5",)}, {"overrides": {"*": 0.5}}, {"overrides": ((5, 0.5),)},
    ],
    ids=str,
)  # fmt: skip
def test_selection_refuses_other_types_than_globs(given):
    with pytest.raises(library.AptError) as refused:
        library.Selection(**given)
    assert refused.value.options == tuple(given)


@pytest.mark.parametrize("optimizer", ["adam", 5, torch.optim.AdamW])
def test_keep_zeros_refuses_other_objects_than_optimizers(optimizer):
    with pytest.raises(library.AptError, match="^optimizer is .*; give an object of the class Opt"):
        library.keep_zeros(sparse(), optimizer)


def test_calibration_tokens_refuse_wrong_tokenizers_and_amounts(tokenizer):
    with pytest.raises(library.AptError, match="tokenizer is of the class NoneType"):
        library.calibration_tokens(None, str(TEXT))
    for given in ({"samples": "2"}, {"seqlen": 8.5}, {"seed": None}, {"bos": "no"}):
        with pytest.raises(library.AptError, match=f"^{next(iter(given))} is "):
            library.calibration_tokens(tokenizer, str(TEXT), **given)
    with pytest.raises(library.AptError, match="source is 5; give a text"):
        library.evaluation_tokens(tokenizer, 5)


def test_bos_outside_the_vocabulary_is_refused():
    with pytest.raises(library.AptError, match="bos is 5000, and the model has 2048 tokens"):
        library.own_text(random_model("llama"), 2, 8, bos=5000)


@pytest.mark.parametrize("options", [None, 5, library.PruneRun, library.PruneOptions()], ids=str)
def test_run_refuses_other_objects_than_run_options(options):
    with pytest.raises(library.AptError, match="^options is .*; give an object of the class Prune"):
        library.run(options)


def test_huge_number_of_minutes_is_refused(checkpoint, tmp_path):
    run = {"model": str(checkpoint("llama")), "output": tmp_path / "out"}
    for options in (library.PruneRun, library.RecoverRun):
        with pytest.raises(library.AptError, match=r"must be above 0 and at most 1e\+06; it is a"):
            library.run(options(**run, minutes=1e308))


def test_missing_argument_is_a_type_error():
    with pytest.raises(TypeError, match="pattern"):
        library.prune(random_model("llama"), TOKENS)
