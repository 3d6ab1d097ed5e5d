"""The pruning of one site: the method, applied to the target, and the measured error."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from apt.adapter import Adapter
from apt.calibration.targets import Sums, Targets
from apt.devices import synchronize
from apt.errors import AptError, plugin_error
from apt.events import SitePruned
from apt.planning.plan import Plan, PlannedSite
from apt.pruning.expert_choice import ExpertRemoval
from apt.solver import (
    ColumnGroups,
    Gram,
    GroupRemoval,
    MethodError,
    Pattern,
    Rounded,
    SitePattern,
    Solution,
    SolverError,
    SolverOptions,
    keeps_all,
    meets,
    relative_layer_error,
    rounded,
    solve_live,
    solve_masked,
)
from apt.solver.gram import DAMPING
from apt.tuning.block_tuning import BlockTuning
from apt.tuning.row_importance import RowImportance

P = TypeVar("P", bound=SitePattern, contravariant=True)


class SiteMethod(Protocol[P]):
    """A method: it takes a weight (out, in) in fp32, its Gram matrix and a pattern."""

    def __call__(
        self, weight: Tensor, gram: Gram, pattern: P, options: SolverOptions, /
    ) -> Solution:
        """Prune one layer and return the solution."""


class Method(SiteMethod[Pattern], Protocol):
    """A function that prunes one layer; the target of `apt.hookspecs.MethodSpec`.

    A run calls it for each site, without the dead inputs; for n:m, the weights of dead inputs are
    zero. The run checks the solution: the shapes and dtypes, a finite weight that is zero under the
    mask, and exactly the number of zeros of the pattern.
    """

    def __call__(
        self, weight: Tensor, gram: Gram, pattern: Pattern, options: SolverOptions, /
    ) -> Solution:
        """Prune one layer.

        Args:
            weight: the weight (out, in) in fp32. It may be changed.
            gram: the Gram matrix of its inputs (in, in). It must not be changed, since sites with
                the same input share it.
            pattern: `apt.solver.NM`, `apt.solver.Unstructured` with its ``per`` filled in, or
                another kind if the spec of the method names it or allows all.
            options: the damping, and the options that the spec of the method names.

        Returns:
            The weight, of the same shape and dtype, and its mask.

        Raises:
            SolverError: the layer has no solution; the message gives the reason.
        """


@dataclass(frozen=True)
class Recipe:
    """The options for pruning the blocks of a model; `apt.PruneOptions` determines them.

    Args:
        targets: the error-aware targets; None prunes layer-wise.
        row_importance: the weighting of rows in the choice of masks; None weights all rows alike.
        tuning: the tuning of a block after its sites are solved; None for no tuning.
        permute: True to change the places of inputs of n:m sites before they are pruned.
        ordered: True to solve the sites of a block in their order of execution, each on the outputs
            of the pruned sites before it (true-sequential).
        experts: the removal of experts, in a plan that removes experts.
        compute: the name of the dtype of products with fp32 weights, in the runs of blocks and in
            their tuning; see `apt.compute.mixed_precision`.
    """

    solver: SolverOptions = field(default_factory=SolverOptions)
    targets: Targets | None = None
    row_importance: RowImportance | None = None
    tuning: BlockTuning | None = None
    permute: bool = False
    ordered: bool = False
    experts: ExpertRemoval = field(default_factory=ExpertRemoval)
    compute: str = "float32"

    @property
    def error_aware(self) -> bool:
        """True if the activations of the dense model are computed as well."""
        return self.targets is not None

    @property
    def changes_kept_weights(self) -> bool:
        """True if experts that are kept may get other weights, in a run that removes experts."""
        return self.error_aware or self.experts.compensate or self.experts.merge


@dataclass(frozen=True)
class BlockPruning:
    """The job for the blocks of a model: the plan, the method, and the recipe.

    Attributes:
        plan: the target form of each site.
    """

    adapter: Adapter
    plan: Plan
    method: SiteMethod[Any]
    recipe: Recipe


@dataclass(frozen=True)
class SolvedSite:
    """A site with its solution written to the model, before its tuning.

    All solved sites of a block wait for its tuning. So only the Gram matrices are kept in fp32.

    Attributes:
        dense: its dense weight (out, in), in the stored dtype.
        matrix: the Gram matrix (in, in) of its inputs.
        mask: True where it is pruned (out, in).
        damping, residual: see `apt.solver.Solution`.
    """

    planned: PlannedSite
    dense: Tensor
    matrix: Tensor
    tokens: int
    mask: Tensor
    damping: float | None
    residual: float | None
    seconds: float


def solve_site(
    job: BlockPruning,
    block: nn.Module,
    planned: PlannedSite,
    sums: Sums,
    *,
    mean: float,
    scale: Tensor | None,
) -> SolvedSite:
    """Solve one site and write the solution to its weight in place.

    Args:
        mean: the mean square of the tokens that are added to the Gram matrix of a routed site
            with few tokens; see `Gram.with_missing_tokens`.
        scale: the factor of each row (out, 1) in the choice of the mask; None for equal rows.

    Raises:
        AptError: the site has no solution that is finite in the dtype of the weight. The weight is
            then unchanged.
    """
    started, scale = time.perf_counter(), torch.ones(()) if scale is None else scale
    weight = planned.site.oriented(planned.site.weight(block).data)
    stored, scale = weight.clone(), scale.to(weight.device)
    dense = stored.float()
    solution = _solution(job, planned, dense, sums, mean, scale)
    synchronize(weight.device)
    seconds = time.perf_counter() - started
    _check_weight(job.method, planned, dense, solution)
    pruned = (solution.weight / scale).add_(0.0).to(weight.dtype)  # no negative zeros
    _check_finite(planned, pruned)
    weight.copy_(pruned)
    return SolvedSite(
        planned, stored, sums.gram.matrix, sums.gram.tokens,
        solution.mask, solution.damping, solution.residual, seconds,
    )  # fmt: skip


def _check_weight(
    method: SiteMethod[Any], planned: PlannedSite, dense: Tensor, solution: Solution
) -> None:
    """Raise unless the weight is finite and has exactly its zeros, before a cast makes more."""
    assert planned.pattern is not None
    if not solution.weight.isfinite().all():
        message = f"{_name_of(method)} returns a weight of {planned.name} that is not finite"
        raise AptError(message, "use more damping, or another method", ("damping", "method"))
    if ((solution.weight != 0) & solution.mask).any():
        raise _refused(method, f"returns a weight of {planned.name} that is not zero at its mask")
    if keeps_all(planned.pattern):  # a sum can be zero by chance
        return
    unit = planned.pattern.unit
    if more := planned.pattern.surplus(solution.weight, dense):
        raise _refused(
            method,
            f"removes {more:,} {unit} more of {planned.name} than its pattern {planned.pattern}",
        )
    if not meets(solution.weight, planned.pattern):
        raise _refused(
            method, f"removes fewer {unit} of {planned.name} than its pattern {planned.pattern}"
        )


def _name_of(method: SiteMethod[Any]) -> str:
    function = method.choose if isinstance(method, GroupRemoval) else method
    return f"method {getattr(function, '__name__', type(function).__name__)}"


def _refused(method: SiteMethod[Any], problem: str) -> AptError:
    return plugin_error(_name_of(method), problem, "method", "method")


def chosen_groups(
    job: BlockPruning, block: nn.Module, planned: PlannedSite, sums: Sums
) -> ColumnGroups:
    """The pattern of a site with the groups that the method removes; no weight is changed."""
    pattern = cast(ColumnGroups, planned.pattern)
    dense = planned.site.oriented(planned.site.weight(block).data).float()
    equal_rows = torch.ones((), device=dense.device)
    kept = ~_solution(job, planned, dense, sums, 1.0, equal_rows).mask
    removed = pattern.zeros(kept).nonzero().squeeze(1).tolist()
    return replace(pattern, chosen=tuple(removed))


def _solution(
    job: BlockPruning, planned: PlannedSite, dense: Tensor, sums: Sums, mean: float, scale: Tensor
) -> Solution:
    """The solution of a site with the dense weight (out, in) in fp32, for scaled rows."""
    assert planned.pattern is not None
    gram = sums.gram.with_missing_tokens(mean) if planned.site.routed else sums.gram
    try:
        target = dense
        options, targets = job.recipe.solver, job.recipe.targets
        if targets is not None and not planned.site.routed:
            damped = gram.damped(options.damping)
            target = targets.weight(dense, planned.site, sums, damped)
        if keeps_all(planned.pattern):
            holds_zero = planned.grid is None or planned.grid.holds_zero
            zeros = dense == 0 if holds_zero else torch.zeros_like(dense, dtype=torch.bool)
            return solve_masked(target * scale, gram, zeros, options)
        return solve_live(job.method, target * scale, gram, planned.pattern, options)
    except MethodError as error:
        raise _refused(job.method, f"{error}, for {planned.name}") from error
    except SolverError as error:
        raise AptError(
            f"{planned.name} cannot be pruned: {error}", f"skip '{planned.name}'", ("skip",)
        ) from error
    except Exception as error:
        error.add_note(f"while {planned.name} was pruned")
        raise


def round_site(
    block: nn.Module, solved: SolvedSite, damping: float | None, stored: torch.dtype | None = None
) -> Rounded | None:
    """Round the kept weights of a site, as written to its module, if its target form has a grid.

    Returns:
        The weight on its grid; None without a grid.

    Args:
        stored: the dtype in which the integers times their scales are stored; None for the dtype of
            the weight.
    """
    if (grid := solved.planned.grid) is None:
        return None
    weight = solved.planned.site.oriented(solved.planned.site.weight(block).data)
    matrix = solved.matrix / max(solved.tokens, 1)
    mean = float(matrix.diagonal().mean())
    more = mean * (damping or DAMPING) or 1.0  # above 0, because of dead inputs
    matrix = matrix + more * torch.eye(len(matrix), device=matrix.device)
    result = rounded(weight.float(), matrix, grid, stored or weight.dtype)
    weight.copy_(result.weight)
    return result


def measured(block: nn.Module, solved: SolvedSite) -> SitePruned:
    """The record of a solved site, measured and checked on the written weight."""
    planned = solved.planned
    weight = planned.site.oriented(planned.site.weight(block).data)
    _check_finite(planned, weight)
    assert planned.pattern is not None
    if bool(((weight != 0) & solved.mask).any()) or not meets(weight, planned.pattern):
        raise RuntimeError(f"{planned.name}: the method did not meet {planned.pattern}")
    return SitePruned(
        planned.name,
        planned.site.kind,
        planned.shape,
        str(planned.pattern),
        int((weight == 0).sum()),
        relative_layer_error(solved.dense.float(), weight.float(), solved.matrix),
        solved.damping,
        solved.residual,
        solved.tokens,
        solved.seconds,
    )


def mean_square(grams: Iterable[Gram]) -> float:
    """The mean square of an activation over all tokens of ``grams``; 1 if they have no tokens."""
    sums = [(float(gram.matrix.diagonal().mean()), gram.tokens) for gram in grams]
    tokens = sum(count for _, count in sums)
    return sum(total for total, _ in sums) / tokens if tokens else 1.0


def _check_finite(planned: PlannedSite, weight: Tensor) -> None:
    """Raise if a weight is not finite in the dtype in which it is stored."""
    if not torch.isfinite(weight).all():
        message = f"the pruned weight of {planned.name} is not finite in {weight.dtype}"
        raise AptError(message, "try dtype float32, or more damping", ("dtype", "damping"))
