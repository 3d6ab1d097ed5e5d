"""APT's versions of published methods beside the authors' own code, on the same weights and inputs.

Each checkout is optional; its code is run as it is, see `authors_code`::

    python benchmarks/authors.py --alphapruning AlphaPruning --owl OWL --dsnot DSnoT \
        --llm-pruner LLM-Pruner --spp SPP --sparsegpt sparsegpt

Everything is in fp32. SmolLM2 takes minutes, ``--model zoo:llama`` seconds.
"""

import argparse
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import authors_code as theirs
import torch
from apt_plugins.allocations import MAX_SHIFT, OUTLIER, SPREAD, outlier_shares
from apt_plugins.baselines import wanda
from apt_plugins.dsnot import CYCLES, refined
from apt_plugins.spectra import tail_from_middle, tail_from_peak
from apt_plugins.spp import SppConfig, SppLinear
from common import open_model, sample, save
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from apt.adapter import Adapter, Groups, Site
from apt.adapter.recording import eval_mode
from apt.calibration.batches import Batch, enter
from apt.planning.allocation import Unallocated
from apt.planning.plan import make_plan
from apt.plugin.registry import registry
from apt.solver import NM, Gram, Pattern, SolverOptions, Unstructured, solve_live, ss
from apt.text.datasets import documents

Row = dict[str, str]
Inputs = dict[str, list[Tensor]]  # of the sites, by name; one (tokens, in) for each sample

Zeros = tuple[Tensor, Tensor]  # ours and theirs (out, in)

EXAMPLES = 10  # samples of 64 tokens for LLM-Pruner's gradients
MAPPINGS = {
    "xmin_peak": {"alphapruning": "block_wise", "alphapruning-matrix": "layer_wise"},
    "xmin_mid": {"alphapruning-mid": "block_wise"},
}
"""AlphaPruning's kinds of exponents, and the mappings of our allocations that use them."""
CHOICES = {
    "vectorize": "llm-pruner-vector",
    "param_first": "llm-pruner",
    "param_second": "llm-pruner-second",
    "param_mix": "llm-pruner-mix",
}
"""LLM-Pruner's kinds of importances, and our methods."""


@dataclass(frozen=True)
class Subject:
    """The model on which both sides run.

    Attributes:
        model, adapter: the model in fp32, and its adapter.
        tokens: token ids (samples, seqlen).
        indices: the blocks for comparisons of single layers.
        sparsity: the sparsity.
    """

    model: nn.Module
    adapter: Adapter
    tokens: Tensor
    indices: Sequence[int]
    sparsity: float

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks in order."""
        return [block for _, block in self.adapter.blocks(self.model)]

    def batches(self) -> list[Batch]:
        """The states before the first block, one sample in each batch."""
        return enter(self.adapter, self.model, self.tokens, 1)

    def unallocated(self) -> Unallocated:
        """The model with the same sparsity for all sites."""
        plan = make_plan(self.model, self.adapter, Unstructured(self.sparsity))
        return Unallocated(self.model, self.adapter, plan, self.tokens)

    def allocated(self, allocation: str) -> dict[str, float]:
        """The sparsities of the sites by an allocation of APT."""
        return dict(registry().allocations.get(allocation).load()(self.unallocated()))

    def names(self) -> list[str]:
        """The full names of the Linears in the blocks, in the order of their modules."""
        return [
            f"{name}.{path}"
            for name, block in self.adapter.blocks(self.model)
            for path, module in block.named_modules()
            if isinstance(module, nn.Linear)
        ]


def largest(ours: Tensor, code: Tensor) -> str:
    """The largest difference, relative to the largest value."""
    return f"{float((ours - code).abs().max() / code.abs().max()):.1e} of the largest value"


def agreement(pairs: Sequence[Zeros]) -> str:
    """The share of our zeros that are zeros of theirs too, and their number of zeros."""
    both = sum(int((ours & code).sum()) for ours, code in pairs)
    own, other = (sum(int(pair[side].sum()) for pair in pairs) for side in (0, 1))
    return f"{both / own:.3%} of our {own:,} zeros are theirs; {other - own:+,} zeros there"


def rows_told(pairs: Sequence[Zeros]) -> str:
    """The number of identical rows, and of those that have another number of zeros there."""
    same = sum(int((ours == code).all(1).sum()) for ours, code in pairs)
    counted = sum(int((ours.sum(1) != code.sum(1)).sum()) for ours, code in pairs)
    rows = sum(len(ours) for ours, _ in pairs)
    return f"{same:,} of {rows:,} rows identical, {counted:,} have another count there"


def rank_correlation(ours: Tensor, code: Tensor) -> float:
    """Spearman's correlation of two vectors without ties."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (ours, code)])
    return float(torch.corrcoef(ranks)[0, 1])


def alphapruning(checkout: Path, subject: Subject) -> Iterator[Row]:
    """The exponents of all weights, and the sparsities from them."""
    weights = {name: subject.model.get_submodule(name).weight.detach() for name in subject.names()}
    for kind, ours in (("xmin_peak", tail_from_peak), ("xmin_mid", tail_from_middle)):
        code = torch.tensor(theirs.alphas(checkout, subject.blocks, kind))
        own = torch.tensor([ours(weight) for weight in weights.values()])
        worst = (own - code).abs()
        yield {
            "compared": f"α by {kind}, {len(code)} weights",
            "difference": f"largest {float(worst.max()):.1e}, mean {float(worst.mean()):.1e}",
        }
        for allocation, mapping in MAPPINGS[kind].items():
            shares = theirs.alpha_shares(
                checkout, subject.blocks, code.tolist(), mapping, subject.sparsity, SPREAD
            )
            found = subject.allocated(allocation)
            gap = max(abs(found[name] - s) for name, s in zip(weights, shares, strict=True))
            yield {
                "compared": f"sparsities by {kind}, {mapping}, at {subject.sparsity:.0%}",
                "difference": f"largest {gap:.1e}; theirs {min(shares):.3f} to {max(shares):.3f}",
            }


def owl(checkout: Path, subject: Subject) -> Iterator[Row]:
    """The shares of outliers, and the sparsities of the blocks."""
    outliers, code = theirs.owl(
        checkout, subject.adapter, subject.blocks, subject.batches(),
        subject.sparsity, OUTLIER, MAX_SHIFT,
    )  # fmt: skip
    found = outlier_shares(subject.unallocated())
    gap = max(abs(found[index] - share) for index, share in enumerate(outliers))
    yield {
        "compared": f"shares of outliers, {len(code)} blocks",
        "difference": f"largest {gap:.1e}; theirs {min(outliers):.2%} to {max(outliers):.2%}",
    }
    shares = subject.allocated("owl")
    gap = max(
        abs(shares[f"{name}.{site.name}"] - code[index])
        for index, (name, block) in enumerate(subject.adapter.blocks(subject.model))
        for site in subject.adapter.sites(block)
    )
    yield {
        "compared": f"sparsities at {subject.sparsity:.0%}",
        "difference": f"largest {gap:.1e}; theirs {min(code):.3f} to {max(code):.3f}",
    }


def captured(subject: Subject) -> Iterator[tuple[int, nn.Module, list[Batch], Inputs]]:
    """The chosen blocks with the states before them and the inputs of their sites."""
    adapter, batches = subject.adapter, subject.batches()
    for index, block in enumerate(subject.blocks):
        inputs: Inputs = {site.name: [] for site in adapter.sites(block)}

        def add(site: Site, rows: Tensor, inputs: Inputs = inputs) -> None:
            inputs[site.name].append(rows.reshape(-1, rows.shape[-1]).float())

        with adapter.capture(block, adapter.sites(block), add):
            after = [adapter.step(block, batch.state, batch.calls[index]) for batch in batches]
        if index in subject.indices:
            yield index, block, batches, inputs
        for batch, state in zip(batches, after, strict=True):
            batch.state = state


def gram(samples: Sequence[Tensor]) -> Gram:
    """The Gram matrix of some samples."""
    total = Gram(samples[0].shape[-1])
    for inputs in samples:
        total.add(inputs)
    return total


def patterns(subject: Subject) -> list[tuple[Pattern, tuple[int, int] | None]]:
    """The patterns for single layers, with n and m of n:m."""
    return [(Unstructured(subject.sparsity), None), (NM(2, 4), (2, 4))]


def dsnot(checkout: Path, subject: Subject) -> Iterator[Row]:
    """The zeros of all layers of the chosen blocks."""
    zeros: dict[Pattern, list[Zeros]] = {}
    for index, block, batches, inputs in captured(subject):
        for pattern, nm in patterns(subject):
            code = theirs.dsnot(
                checkout, subject.adapter, block, index, batches, nm, subject.sparsity, CYCLES
            )
            for name, samples in inputs.items():
                weight, sums = block.get_submodule(name).weight.detach(), gram(samples)
                start = wanda(weight, sums, pattern, SolverOptions()).mask
                mask = refined(weight, sums, start, nm[1] if nm else None, CYCLES)
                own = weight.masked_fill(mask, 0) == 0
                zeros.setdefault(pattern, []).append((own, code[name]))
    for pattern, pairs in zeros.items():
        yield {
            "compared": f"{len(pairs)} masks at {pattern}, {CYCLES} exchanges",
            "difference": f"{agreement(pairs)}; {rows_told(pairs)}",
        }


@torch.no_grad()
def sparsegpt(checkout: Path, subject: Subject) -> Iterator[Row]:
    """The zeros and weights of the first and the last layer of the chosen blocks."""
    for pattern, nm in patterns(subject):
        zeros, gaps, errors = list[Zeros](), list[float](), list[Tensor]()
        for _, block, _, inputs in captured(subject):
            for name in (next(iter(inputs)), list(inputs)[-1]):
                weight, sums = block.get_submodule(name).weight.detach(), gram(inputs[name])
                own = solve_live(ss, weight, sums, pattern, SolverOptions()).weight
                code = theirs.sparsegpt(checkout, weight, inputs[name], nm, subject.sparsity)
                zeros.append((own == 0, code == 0))
                gaps.append(float((own - code).norm() / code.norm()))
                errors.append(torch.tensor([relative_error(weight, v, sums) for v in (own, code)]))
        ours, other = torch.stack(errors).mean(0).tolist()
        yield {
            "compared": f"{len(zeros)} weights at {pattern}",
            "difference": f"{agreement(zeros)}; weights differ by {max(gaps):.1e} at most; "
            f"layer errors {ours:.5f}, theirs {other:.5f}",
        }


def relative_error(weight: Tensor, pruned: Tensor, sums: Gram) -> float:
    """The relative layer error of a pruned weight."""
    gap = pruned - weight
    return float(((gap @ sums.matrix) * gap).sum() / ((weight @ sums.matrix) * weight).sum())


def llm_pruner(checkout: Path, subject: Subject) -> Iterator[Row]:
    """The importances of groups of heads and of channels."""
    tokens = subject.tokens.flatten()[: EXAMPLES * 64].view(-1, 64)
    adapter = subject.adapter
    for kind, choice in CHOICES.items():
        scores = registry().shrink_methods.get(choice).load()(subject.model, adapter, tokens)
        gradients(subject.model, tokens)
        found: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for name, block in adapter.blocks(subject.model):
            for groups in adapter.groups(block, subject.model.config):
                if groups.kind == "channels" or len(groups.parts) == 4:
                    code = theirs.taylor(checkout, *ordered(block, groups), kind)
                    code = code.view(groups.count, -1).sum(1)
                    pair = (scores[name][groups.kind].detach(), code.detach())
                    found.setdefault(groups.kind, []).append(pair)
        for groups_kind, pairs in found.items():
            ranks = min(rank_correlation(*pair) for pair in pairs)
            gap = max(float(((a - b).abs() / b).max()) for a, b in pairs)
            yield {
                "compared": f"{kind}, {groups_kind} of {len(pairs)} blocks",
                "difference": f"largest relative {gap:.1e}; rank correlation at least {ranks:.6f}",
            }


def gradients(model: nn.Module, tokens: Tensor) -> None:
    """``grad``, and ``acc_grad`` of the squares of the samples' gradients, as in hf_prune.py."""
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.acc_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
    for part in (*tokens.split(1), tokens):
        model.zero_grad()
        model(part, labels=part).loss.backward()
        if len(part) < len(tokens):
            for parameter in parameters:
                parameter.acc_grad += parameter.grad.square() / len(tokens)


def ordered(block: nn.Module, groups: Groups) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The weights whose rows, and whose columns, belong to groups.

    Where several entries of one weight belong to one of another, their code adds those at equal
    distances, and not those of the same head. The entries are put in that order.
    """
    sides: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    least = min(part.each for part in groups.parts)
    for part in groups.parts:
        parameter = block.get_parameter(part.parameter)
        index = torch.arange(groups.count * part.each).view(groups.count, -1, least)
        index = index.transpose(0, 1).flatten()
        changed = nn.Parameter(parameter.detach().index_select(part.dim, index))
        changed.grad = parameter.grad.index_select(part.dim, index)
        changed.acc_grad = parameter.acc_grad.index_select(part.dim, index)
        sides[part.dim].append(changed)
    return sides


def spp(checkout: Path, subject: Subject) -> Iterator[Row]:
    """A layer's outputs, the gradients of its adapter, and its weights after a merge."""
    linear = subject.model.get_submodule(subject.names()[0])
    weight = linear.weight.detach()
    weight = weight.masked_fill(weight.abs() < weight.abs().median(), 0)
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 16, weight.shape[1], generator=draw)
    first = torch.randn(16, weight.shape[1], generator=draw)
    factors = torch.randn(1, weight.shape[0], generator=draw)
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    base.weight.data = weight.clone()
    layer = SppLinear(base, "a", SppConfig())
    layer.spp_A["a"].data, layer.spp_c["a"].data = first.clone(), factors.T.clone()
    outputs = layer(inputs)
    outputs.square().mean().backward()
    layer.merge()
    own = {
        "outputs": outputs.detach(),
        "gradients of A": layer.spp_A["a"].grad,
        "gradients of c": layer.spp_c["a"].grad.T,
        "merged weights": base.weight.data,
    }
    code = theirs.spp(checkout, weight, inputs, first, factors, SppConfig().scale)
    for name, value in code.items():
        yield {"compared": f"{name}, no dropout", "difference": largest(own[name], value)}


COMPARISONS: dict[str, Callable[[Path, Subject], Iterator[Row]]] = {
    "AlphaPruning": alphapruning,
    "OWL": owl,
    "DSnoT": dsnot,
    "LLM-Pruner": llm_pruner,
    "SPP": spp,
    "SparseGPT": sparsegpt,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in COMPARISONS:
        parser.add_argument(f"--{name.lower()}", type=Path, metavar="CHECKOUT")
    parser.add_argument("--model", help="SmolLM2 by default")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--blocks", type=int, nargs="+", help="the first, middle and last one")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def version(checkout: Path) -> str:
    """The commit of a checkout."""
    git = ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(git, capture_output=True, check=True, text=True).stdout.strip()


def opened(options: argparse.Namespace) -> Subject:
    model, tokenizer = open_model(options.model)
    texts = documents("builtin", "calibration", registry())
    tokens = sample(tokenizer, list(texts), options.samples, options.seqlen)
    module = model.module.float()
    count = len(model.adapter.blocks(module))
    blocks = options.blocks or sorted({0, count // 2, count - 1})
    return Subject(module, model.adapter, tokens, blocks, options.sparsity)


def main() -> None:
    options = arguments()
    subject = opened(options)
    rows = []
    for name, compare in COMPARISONS.items():
        checkout = getattr(options, name.lower().replace("-", "_"))
        if checkout is None:
            continue
        commit = version(checkout)
        with eval_mode(subject.model), subject.adapter.running(subject.model):
            found = list(compare(checkout, subject))
        table = Table("compared", "difference", title=f"{name} {commit}", title_justify="left")
        for row in found:
            table.add_row(*row.values())
        Console(width=160).print(table)
        rows += [{"code": name, "checkout": commit, **row} for row in found]
    save(options.json, rows)


if __name__ == "__main__":
    main()
