"""``export_policy(plan, model, ...)``: the best policy of `torch.utils.checkpoint` within a plan's budget."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from graph_capture.formats import format_bytes
from graph_capture.graph import Graph
from graph_capture.inputs import resolve_inputs
from planner.block_search import find_blocks
from planner.budget import Budget, parse_budget
from planner.errors import NoScheduleError, PlanMismatchError
from planner.export.blocks import Block, Decisions, blocks_of, recomputed_seconds, selective_schedule
from planner.export.choose import Chooser
from planner.export.fake_step import FakeStep
from planner.export.policy import BlockPolicy, SelectivePolicy
from planner.export.trace import trace_blocks
from planner.export.wrapping import wrap_blocks
from planner.measure import LossFn
from planner.plan_file import Plan
from planner.report.lifetimes import alive_after_forward
from planner.world import model_differences, shown
from solvers.simulator import simulate
from solvers.snapshot.engine import EnginePool

ROUNDS = 6
"""How often the program's budget is corrected by what its proposal needed beyond, or left of, the real one."""

SLACK = 1e-3
"""A proposal that leaves more than this fraction of the budget unused is followed by another one."""


def export_policy(
    plan: Plan,
    model: Any,
    example_inputs: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    loss_fn: LossFn | None = None,
    blocks: Sequence[str] | None = None,
    budget: int | str | Budget | None = None,
    time_limit_seconds: float = 10.0,
) -> SelectivePolicy:
    """The policy of PyTorch's selective checkpointing that recomputes least within the budget of `plan`.

    **Arguments:**

    - `model`, `example_inputs`, `example_kwargs`, `loss_fn`: those that the plan was made for. Nothing is run.
    - `blocks`: names of the modules that may be checkpointed; without it those of the outermost lists of equal modules.
    - `budget`: another one than the plan's.
    - `time_limit_seconds`: for each of the few small mixed-integer programs.

    Every policy is judged by torch's own code on fake tensors: the predicted peak is that of the step as torch runs it.
    Its overhead is that of everything that runs again, with the plan's prices, so that it compares with the plan's.

    Raises :class:`PlanMismatchError` for another model or a plan for Inductor, and
    :class:`~planner.errors.NoScheduleError` where no policy that was looked at fits; checkpointing every block as a
    whole is among them.
    """
    module, args, kwargs = resolve_inputs(model, example_inputs, example_kwargs)
    differences = model_differences(plan, module, args, kwargs)
    if differences:
        raise PlanMismatchError(
            f"the plan was made for something else: {shown(differences)}. Plan this model with plan(model, ...)."
        )
    if plan.compiler != "eager":
        raise PlanMismatchError(
            f"the plan was made for the kernels of {plan.compiler}, and torch.utils.checkpoint runs torch's own: "
            "export a plan that was made without compiler=..."
        )
    step = FakeStep.of(module, args, kwargs, loss_fn, plan.settings["device"])
    names = tuple(blocks) if blocks is not None else find_blocks(module)
    _check_names(module, names)
    graph = plan.to_graph().without_released
    search = _Search(plan, graph, step, blocks_of(graph, trace_blocks(step, names)))
    wanted = plan.budget_bytes if budget is None else parse_budget(budget).resolve(plan.eager_peak_bytes)
    decisions, peak_bytes = search.best(wanted, time_limit_seconds)
    return search.policy(decisions, peak_bytes, wanted)


def _check_names(model: nn.Module, names: Sequence[str]) -> None:
    known = dict(model.named_modules())
    unknown = [name for name in names if name not in known or not name]
    if unknown:
        raise PlanMismatchError(f"the model has no block {unknown[0]!r}; name modules as in named_modules()")


@dataclass(frozen=True)
class _Search:
    plan: Plan
    graph: Graph
    step: FakeStep
    blocks: tuple[Block, ...]
    peaks: dict[Any, int] = field(default_factory=dict[Any, int])

    def best(self, budget_bytes: int, time_limit_seconds: float) -> tuple[Decisions, int]:
        """The cheapest decisions that fit, and their peak: the program's, its budget lowered until they fit, against
        what the plan keeps and against checkpointing everything."""
        everything: Decisions = {b.name: b.forced for b in self.blocks if not b.obstacle}
        fitting: list[tuple[float, int, Decisions]] = []
        peaks: list[int] = []

        def judge(decisions: Decisions) -> int:
            peak = self.peak_bytes(decisions)
            peaks.append(peak)
            if peak <= budget_bytes:
                fitting.append((self.overhead(decisions), peak, decisions))
            return peak

        chooser = Chooser(self.graph, self.blocks, time_limit_seconds)
        aim = budget_bytes + max(0, self.simulated_bytes(everything) - judge(everything))
        judge(self.kept())
        with EnginePool() as pool:
            for _ in range(ROUNDS):
                decisions = chooser.choose(aim, pool)
                if decisions is None:
                    break
                best = min((row[0] for row in fitting), default=math.inf)
                excess = judge(decisions) - budget_bytes
                improved = min((row[0] for row in fitting), default=math.inf) < best
                if excess <= 0 and not (improved and -excess > SLACK * budget_bytes):
                    break
                aim -= excess  # less where the proposal is over the budget, more where it leaves some of it unused
        if not fitting:
            barred = "; ".join(f"{b.name} cannot be: {b.obstacle}" for b in self.blocks if b.obstacle)
            raise NoScheduleError(
                f"no policy of whole blocks fits the budget of {format_bytes(budget_bytes)}: the smallest peak of one "
                f"is {format_bytes(min(peaks))}. The plan itself needs "
                f"{format_bytes(self.plan.predicted_peak_bytes)}: use rewrite(model, plan), or raise the budget."
                f"{f' Not all blocks can be checkpointed: {barred}.' if barred else ''}",
                smallest_known_budget_bytes=min(peaks),
            )
        _, peak, decisions = min(fitting, key=lambda row: row[:2])
        return decisions, peak

    def kept(self) -> Decisions:
        """What the plan keeps, as decisions: a block of which it releases nothing is not checkpointed."""
        alive = alive_after_forward(self.plan.to_graph(), self.plan.to_schedule())
        runs = Counter(self.plan.to_schedule().order)
        decisions: dict[str, frozenset[int] | None] = {}
        for block in self.blocks:
            if block.obstacle:
                continue
            saved = {i for i in block.savable if alive.intersection(self.graph.operators[i].outputs)} | block.forced
            recomputes = any(runs[i] > 1 for i in block.members)
            decisions[block.name] = frozenset(saved) if recomputes else None
        return decisions

    def peak_bytes(self, decisions: Decisions) -> int:
        """Peak of a step as torch runs it, everything that a budget covers included."""
        key = tuple(decisions.items())
        if key not in self.peaks:
            contexts = {b.block: b.context_fn() for b in self._blocks(decisions) if b.mode != "none"}
            # A later micro-batch holds all gradients at every instant, a first one those that are made: it needs less.
            self.peaks[key] = self.graph.resident_total_bytes + self.step.peak_bytes(
                lambda twin: wrap_blocks(twin, contexts), gradient_accumulation=self.graph.gradient_accumulation
            )
        return self.peaks[key]

    def simulated_bytes(self, decisions: Decisions) -> int:
        """Peak of the same step as a schedule of the captured graph, where nothing is written in place."""
        return simulate(self.graph, selective_schedule(self.graph, self.blocks, decisions)).peak_bytes

    def overhead(self, decisions: Decisions) -> float:
        """Everything that runs again, as a fraction of the step."""
        seconds = recomputed_seconds(self.graph, self.blocks, decisions)
        return seconds / self.graph.step_seconds if self.graph.step_seconds else 0.0

    def policy(self, decisions: Decisions, peak_bytes: int, budget_bytes: int) -> SelectivePolicy:
        """Everything about the decisions."""
        kept = self.kept()
        notes = [f"{b.name} is not checkpointed: {b.obstacle}" for b in self.blocks if b.obstacle]
        if self.plan.pins.recompute:
            notes.append("what the plan was asked to recompute may be kept: a policy has no such pins")
        return SelectivePolicy(
            torch=str(torch.__version__),
            model=self.plan.model.class_name,
            plan_fingerprint=self.plan.fingerprint,
            budget_bytes=budget_bytes,
            predicted_peak_bytes=peak_bytes,
            overhead=self.overhead(decisions),
            plan_overhead=self.plan.overhead,
            plan_lower_bound=self.plan.lower_bound,
            plan_peak_bytes=self.plan.predicted_peak_bytes,
            kept_overhead=self.overhead(kept),
            kept_peak_bytes=self.peak_bytes(kept),
            blocks=tuple(self._blocks(decisions)),
            notes=tuple(notes),
        )

    def _blocks(self, decisions: Decisions) -> list[BlockPolicy]:
        rows: list[BlockPolicy] = []
        for block in self.blocks:
            saved = decisions.get(block.name)
            if saved is None:
                rows.append(BlockPolicy(block=block.name, mode="none", reason=block.obstacle))
                continue
            save: dict[str, list[int]] = {}
            for index in sorted(saved):
                call = block.savable[index]
                save.setdefault(call.operator, []).append(call.occurrence)
            values = (v for i in saved for v in self.graph.operators[i].outputs)
            rows.append(
                BlockPolicy(
                    block=block.name,
                    mode="selective" if save else "full",
                    save={name: tuple(numbers) for name, numbers in save.items()},
                    saved_bytes=sum(self.graph.values[v].size_bytes for v in values),
                    recomputed_seconds=recomputed_seconds(self.graph, [block], decisions),
                )
            )
        return rows
