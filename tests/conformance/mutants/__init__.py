"""Mutants: adapters with one fault each, which the conformance kit must find."""

from dataclasses import dataclass

from tests.conformance.mutants import effecting
from tests.conformance.mutants.capturing import (
    AtTheEnd,
    Backwards,
    Disturbing,
    Doubled,
    Late,
    Leaking,
    LeakingOnError,
    Negated,
    OtherSamples,
    Swallowing,
    WrongInput,
)
from tests.conformance.mutants.declared import (
    AnotherEpsilon,
    ExpertsForgotten,
    FirstForgotten,
    KindForgotten,
    LastForgotten,
    MiddleForgotten,
    NoEffects,
    NoLimit,
    NoParameter,
    OneKind,
    Renamed,
    RouterPruned,
    SomeExpertsForgotten,
    TooLong,
    TooShort,
    TwiceAsLong,
    WrongEffects,
    altered,
    swapped,
)
from tests.conformance.mutants.entering import (
    ByShape,
    Cut,
    Detached,
    DetachedBefore,
    DoubledStream,
    FirstMasks,
    FlatStream,
    InInference,
    LiveCache,
    MixerCache,
    NoStream,
    SecondDropped,
    TowerTouched,
    TransposedStream,
    WithoutGradient,
    WrongEnter,
    WrongStep,
)
from tests.conformance.mutants.grouping import (
    AcrossHeads,
    AnotherField,
    AnotherFieldOfStates,
    AnotherReader,
    ColumnsStay,
    Concatenated,
    EarlierOutputs,
    EarlierParts,
    EarlierStates,
    EntriesAsOutputs,
    EntriesStay,
    FewExperts,
    GateForgotten,
    HalfHeads,
    Interleaved,
    NoBins,
    NoField,
    NoParameterOf,
    NoReader,
    NormedHeads,
    NormsForgotten,
    NoSite,
    NoSuchPart,
    OneReader,
    OneWidth,
    PartForgotten,
    ReadByNone,
    RouterForgotten,
    RowsOfExpertStay,
    RowsStay,
    TooLarge,
    TooMany,
    WrongOutputs,
    WrongReader,
)
from tests.conformance.mutants.models import JAMBA, MAMBA, MAMBA2, MOE, RIGHT


@dataclass(frozen=True)
class Mutant:
    """A wrong adapter.

    Attributes:
        adapter: its class.
        check: the check that finds it.
        message: a regular expression for the reported line.
        model: the model that it is checked with, of `MODELS`.
    """

    adapter: type
    check: str
    message: str
    model: str = "llama"


MUTANTS: dict[str, Mutant] = {
    "last block forgotten": Mutant(
        LastForgotten, "logits", r"model\.layers\.2 runs beside the blocks, but blocks\(\) leaves"
    ),
    "first block forgotten": Mutant(
        FirstForgotten, "logits", r"model\.layers\.0 runs beside the blocks, but blocks\(\) leaves"
    ),
    "every other block forgotten": Mutant(
        MiddleForgotten, "logits", r"model\.layers\.1 runs beside the blocks, but blocks\(\) leaves"
    ),
    "blocks with other names": Mutant(
        Renamed, "names", r"^layers\.0: the model has no such module, or it is not this block"
    ),
    "more positions than there are": Mutant(
        TooLong, "batches", r"does not accept 48 tokens, but positions\(\) is None", "short"
    ),
    "fewer positions than there are": Mutant(
        TooShort, "batches", r"the model accepts 16 tokens, but positions\(\) is 4"
    ),
    "extras without effects": Mutant(
        NoEffects, "effects", r"mixer\.conv1d is an extra, but has no effects", "mamba"
    ),
    "effects of others": Mutant(
        WrongEffects, "effects", r"mixer\.A_log: its effects have a Gram matrix that", "mamba"
    ),
    "an extra without parameter": Mutant(
        NoParameter, "names", r"layers\.0: there is no parameter mixer\.conv1d\.weights", "mamba"
    ),
    "a kind of block forgotten": Mutant(
        KindForgotten, "logits", r"model\.layers\.1 runs beside the blocks", "gemma"
    ),
    "first block's rotary for all": Mutant(
        OneKind, "blocks", r"model\.layers\.1: the state after it differs", "gemma"
    ),
    "example of one kind": Mutant(
        OneKind, "kinds", "no layer of kind 'full_attention'", "gemma, one kind"
    ),
    "experts forgotten": Mutant(
        ExpertsForgotten, "sites",
        r"experts\.gate_up_proj is not a site, not an extra, and not listed in left_dense",
        "jamba",
    ),
    "a shared expert forgotten": Mutant(
        altered(MOE, **{f"mlp_shared_expert_{name}_proj": None for name in ("gate", "up", "down")}),
        "sites", r"mlp\.shared_expert\.gate_proj\.weight is not a site", "qwen2-moe",
    ),
    "a shared expert taken for residual": Mutant(
        altered(MOE, mlp_shared_expert_down_proj={"residual": True}), "residual",
        r"shared_expert\.down_proj is declared residual, but", "qwen2-moe",
    ),
    "a router pruned": Mutant(
        RouterPruned, "sites", r"router is a site, but its product selects the experts", "jamba"
    ),
    "an expert forgotten": Mutant(
        SomeExpertsForgotten, "sites", r"experts\.gate_up_proj\[3\] is not a site", "jamba"
    ),
    "down_proj of experts at order 0": Mutant(
        altered(JAMBA, feed_forward_experts_down_proj={"order": 0}), "order",
        r"is multiplied before .*experts\.down_proj\.\d of order 0", "jamba",
    ),
    "step without gradient": Mutant(
        WithoutGradient, "gradients", r"model\.layers\.0: the output of step has no gradient"
    ),
    "step detached": Mutant(Detached, "gradients", r"0: the output of step has no gradient"),
    "state detached": Mutant(
        DetachedBefore, "gradients", r"layers\.0: no gradient flows from the output of step to the"
    ),
    "step in inference mode": Mutant(
        InInference, "gradients", r"layers\.0: the output of step has no gradient"
    ),
    "entered by shape": Mutant(
        ByShape, "batches", r"layers\.0: the state before it differs .* second batch of 2 × 16"
    ),
    "first batch's masks": Mutant(
        FirstMasks, "batches", r"layers\.0: .*on another length, 1 × 48 tokens", "eager"
    ),
    "cut to 32 tokens": Mutant(
        Cut, "batches", r"layers\.0: the state before it .*another length, 1 × 48 tokens"
    ),
    "live cache": Mutant(
        LiveCache, "repeat", r"layers\.0: a step changes its state or its call: .*a cache"
    ),
    "live cache of a mixer": Mutant(
        MixerCache, "repeat", r"layers\.0: a step changes its state or its call", "mamba"
    ),
    "stream doubled": Mutant(
        DoubledStream, "stream", r"model\.layers\.0: residual\(\) is not the stream"
    ),
    "stream zero": Mutant(NoStream, "stream", r"layers\.0: residual\(\) is not the stream"),
    "stream transposed": Mutant(
        TransposedStream, "stream", r"residual\(\) is of shape \(16, 2, 32\), not \(2, 16, 32\)"
    ),
    "stream flat": Mutant(
        FlatStream, "stream", r"residual\(\) is of shape \(32, 32\), not \(2, 16, 32\)"
    ),
    "k and v swapped": Mutant(
        swapped("k_proj", "v_proj"), "names",
        r"model\.layers\.0: the site of self_attn\.k_proj\.weight is named self_attn\.v_proj",
    ),
    "gate and up swapped": Mutant(
        swapped("gate_proj", "up_proj"), "names",
        r"the site of mlp\.gate_proj\.weight is named mlp\.up_proj",
    ),
    "experts swapped": Mutant(
        swapped("0", "1", JAMBA), "names",
        r"gate_up_proj\[0\] is named feed_forward\.experts\.gate_up_proj\.1", "jamba",
    ),
    "a name twice": Mutant(
        altered(v_proj={"name": "self_attn.k_proj"}), "names",
        r"the site of self_attn\.v_proj\.weight is named self_attn\.k_proj",
    ),
    "a Linear forgotten": Mutant(
        altered(o_proj=None), "sites", r"0\.self_attn\.o_proj\.weight is not a site, not an extra"
    ),
    "the wrong way round": Mutant(
        altered(o_proj={"transposed": True}), "orientation",
        r"o_proj is stored \(out, in\), but declared transposed=True",
    ),
    "another input": Mutant(
        WrongInput, "capture", "the captured rows are not the input of its weight"
    ),
    "an input twice": Mutant(Doubled, "capture", "saw 64 of 32 calibration tokens"),
    "down_proj at order 0": Mutant(
        altered(down_proj={"order": 0}), "order", r"is multiplied before .*down_proj of order 0"
    ),
    "all at order 0": Mutant(
        altered(
            **{name: {"order": 0} for name in ("o_proj", "gate_proj", "up_proj", "down_proj")}
        ),
        "order", r"0\.self_attn\.o_proj and mlp\.down_proj are residual, with different inputs",
    ),
    "routed without a router": Mutant(
        altered(down_proj={"routed": True, "residual": False}), "sites",
        r"mlp\.down_proj is declared routed, but every block multiplies it with every token",
    ),
    "not residual": Mutant(
        altered(v_proj={"residual": True}), "residual", "v_proj is declared residual, but"
    ),
    "residual": Mutant(
        altered(down_proj={"residual": False}), "residual",
        "down_proj adds its product to the residual stream, but is not declared",
    ),
    "another state": Mutant(
        WrongEnter, "blocks", r"layers\.0: the state before it differs from its input in the model"
    ),
    "another step": Mutant(
        WrongStep, "blocks", r"layers\.0: the state after it differs from its output in the model"
    ),
    "a second value dropped": Mutant(
        SecondDropped, "blocks", r"layers\.1: the state after it differs from its output", "echo"
    ),
    "a tower touched": Mutant(
        TowerTouched, "pruning", r"vision_tower\.\S+ is not a site, but pruning changes it", "llava"
    ),
    "capture leaves a hook": Mutant(
        Leaking, "untouched", r"capture leaves a forward hook on model\.layers\.0"
    ),
    "capture disturbs": Mutant(Disturbing, "untouched", "capture changes its output"),
    "capture leaves a hook on an error": Mutant(
        LeakingOnError, "exception", "behind when an exception ends it"
    ),
    "capture swallows": Mutant(Swallowing, "exception", "does not reach the caller"),
    "a part of channels forgotten": Mutant(
        PartForgotten, "groups", r"channels cannot be removed: .*up_proj"
    ),
    "the gate of channels forgotten": Mutant(
        GateForgotten, "groups", r"channels cannot be removed: .*in_proj", "mamba"
    ),
    "the router of experts forgotten": Mutant(
        RouterForgotten, "groups", r"experts cannot be removed: .*router", "jamba"
    ),
    "gate and up of experts taken for pairs": Mutant(
        Interleaved, "groups", "without some expert-channels differs from one that does not",
        "jamba",
    ),
    "pairs of gate and up taken for one after the other": Mutant(
        Concatenated, "groups", "without some expert-channels differs from one that does not",
        "gpt-oss",
    ),
    "no field for channels": Mutant(NoField, "groups", "channels cannot be removed"),
    "another reader": Mutant(
        AnotherReader, "groups", "without some heads differs from one that does not depend on"
    ),
    "a reader of other width": Mutant(
        WrongReader, "groups", r"0: mlp\.gate_proj has 32 inputs, not a multiple of 64 channels"
    ),
    "one of two readers": Mutant(
        OneReader, "groups", "without some channels differs from one that does not depend on",
        "mamba",
    ),
    "a reader that is no site": Mutant(
        NoSite, "groups", r"layers\.0: channels have the reader mlp\.none, which is no site"
    ),
    "permutable channels of which rows stay": Mutant(
        RowsStay, "permutable", r"^model\.layers\.0: the permutable inputs of mlp\.down_proj change"
    ),
    "permutable channels of experts of which rows stay": Mutant(
        RowsOfExpertStay, "permutable",
        r"the permutable inputs of feed_forward\.experts\.down_proj\.\d change the logits", "jamba",
    ),
    "values of several heads in one bin": Mutant(
        AcrossHeads, "permutable", r"inputs of self_attn\.o_proj change the logits in another order"
    ),
    "permutable inputs of no site": Mutant(
        ReadByNone, "permutable", r"the permutable inputs of mlp\.none are those of no site"
    ),
    "permutable inputs without columns": Mutant(
        ColumnsStay, "permutable", r"have no part in the columns of mlp\.down_proj\.weight"
    ),
    "more permutable inputs than there are": Mutant(
        TooLarge, "permutable", r"have 2 × \d+ entries from 0 in dimension 0 of mlp\.gate_proj"
    ),
    "permutable inputs of no parameter": Mutant(
        NoSuchPart, "permutable", r"have a part in mlp\.none, which is no parameter of the block"
    ),
    "channels without reader": Mutant(
        NoReader, "groups", r"layers\.0: channels have neither readers nor outputs"
    ),
    "a channel too many": Mutant(
        TooMany, "groups", r"channels have 65 entries in dimension 0 of mlp\.gate_proj\.weight"
    ),
    "a part without parameter": Mutant(
        NoParameterOf, "groups", r"channels have a part in mlp\.none\.weight, which is no param"
    ),
    "outputs of states that are decays": Mutant(
        WrongOutputs, "groups", "without some states differs from one that does not depend on",
        "mamba",
    ),
    "one width for any number of channels": Mutant(
        OneWidth, "groups",
        r"layers\.0: channels write 32 into intermediate_size .* if all 64 are kept, but it has 64",
    ),
    "a field on which no shape depends": Mutant(
        AnotherField, "groups", "channels write 64 into max_position_embeddings .* but it has 128"
    ),
    "a field of other groups": Mutant(
        AnotherFieldOfStates, "groups", "states write 8 into intermediate_size .* but it has 64",
        "mamba",
    ),
    "states with earlier entries of the convolution": Mutant(
        EarlierParts, "groups", "without some states differs from one that does not", "mamba2"
    ),
    "the same, as outputs as well": Mutant(
        EarlierStates, "groups", "without some states differs from one that does not", "mamba2"
    ),
    "states without the rows for B": Mutant(
        EntriesStay, "groups", r"states cannot be removed: .*x_proj", "mamba"
    ),
    "heads whose norm is over all of them": Mutant(
        NormedHeads, "groups", "without some heads differs from one that does not depend", "olmo2"
    ),
    "the same without their entries of the norm": Mutant(
        NormsForgotten, "groups", r"heads cannot be removed: .*_norm\.weight", "olmo2"
    ),
    "query heads that share no key": Mutant(
        NoBins, "groups", "without some heads differs from one that does not depend", "grouped"
    ),
    "half of each query head": Mutant(HalfHeads, "groups", r"heads cannot be removed: .*q_proj"),
    "captured rows negated": Mutant(
        Negated, "capture", "the right Gram matrix, but other signs or another order"
    ),
    "captured rows backwards": Mutant(
        Backwards, "capture", "the right Gram matrix, but other signs or another order"
    ),
    "captured rows of another sample": Mutant(
        OtherSamples, "capture", "the right Gram matrix, but other signs or another order"
    ),
    "captured at the end": Mutant(
        AtTheEnd, "capture", r"\w+ is captured after the block has run: that is too late"
    ),
    "no limit of positions": Mutant(
        NoLimit, "batches", r"does not accept 129 tokens, but positions\(\) is None", "opt"
    ),
    "twice as many positions as there are": Mutant(
        TwiceAsLong, "batches", r"does not accept 256 tokens, but positions\(\) is 256", "opt"
    ),
    "runs with another epsilon": Mutant(
        AnotherEpsilon, "running", "the model gives other logits within running"
    ),
    "fewer experts than a token is sent to": Mutant(
        FewExperts, "groups", "the model without most experts does not run: .*'least' too small",
        "jamba, three experts",
    ),
    "capture is late": Mutant(Late, "in_time", "an input is captured too late"),
}  # fmt: skip

HARMLESS: dict[str, tuple[type, str]] = {
    "rows for B as outputs": (EntriesAsOutputs, "mamba"),
    "entries for B in the convolution as outputs": (EarlierOutputs, "mamba2"),
}
"""Adapters that differ from the correct ones, but give the same smaller models."""

_BLIND = {  # what says nothing of a kind of extra, or the same as before
    ("conv1d", "reversed_weights"): "the windows of neighbours hold nearly the same tokens",
    ("D", "reversed_weights"): "a channel has one weight",
    ("D", "diagonal"): "a channel has one weight",
    ("D", "trace"): "a channel has one weight",
}
_CHANGES = (
    effecting.rolled, effecting.identity, effecting.mean, effecting.reversed_channels,
    effecting.reversed_weights, effecting.inverse, effecting.diagonal, effecting.trace,
)  # fmt: skip
for _model, _base in (("mamba", MAMBA), ("mamba2", MAMBA2)):
    for _kind in ("conv1d", "A_log", "D"):
        for _change in _CHANGES:
            _one = _model == "mamba2" and _kind == "A_log"  # which has one weight for a head
            if (("D" if _one else _kind), _change.__name__) not in _BLIND:
                MUTANTS[f"{_model}: {_change.__name__} effects of {_kind}"] = Mutant(
                    effecting.misreported(_kind, _change, _base), "effects",
                    rf"mixer\.{_kind}: its effects do not predict", _model,
                )  # fmt: skip
        # The choice remains the same, but the report gets the errors of another product.
        MUTANTS |= {
            f"{_model}: Gram matrices of {_kind} ten times as large": Mutant(
                effecting.misreported(_kind, effecting.tenfold, _base), "effects",
                rf"mixer\.{_kind}: its effects, divided by their energy, are [\d.]+ × the relative",
                _model,
            ),
            f"{_model}: a millionth of the energy of {_kind}": Mutant(
                effecting.misreported(_kind, effecting.unchanged, _base, 1e-6), "effects",
                rf"mixer\.{_kind}: its effects, divided by their energy, are [\d.]+e\+0[56] × the",
                _model,
            ),
        }  # fmt: skip
    MUTANTS |= {
        f"{_model}: the convolution as an effect": Mutant(
            effecting.removed_otherwise("conv1d", _base), "effects",
            r"conv1d: removal is 'effect', but its effects are those of 'product'", _model,
        ),
        f"{_model}: the decays as a product": Mutant(
            effecting.removed_otherwise("A_log", _base), "effects",
            r"A_log: removal is 'product', but the product is not linear in the weight", _model,
        ),
    }  # fmt: skip

if "jamba" not in RIGHT:
    MUTANTS = {n: m for n, m in MUTANTS.items() if not m.model.startswith(("jamba", "gpt-oss"))}
