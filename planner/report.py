"""What a plan decided, module by module, and what fills the memory at its peak.

Computed from the plan's own graph and schedule, without the model and without torch. Equal blocks are folded into one
row: `h.{0-11}.attn` stands for twelve modules of which each keeps, releases and recomputes the same.

A forward value is *kept* if it is in memory when the forward program ends, and *released* if the store-all schedule
would have it there and this one does not. What is released is computed again in the backward program.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graph_capture.graph import Graph
from planner.folding import fold_label, template_of
from solvers.schedule import Compute, Schedule, programs_of

if TYPE_CHECKING:
    from planner.plan_file import Plan


@dataclass(frozen=True)
class ModuleRow:
    """One module, or several equal ones, and the forward operators that are its own.

    **Fields:** (sums over all of its modules)

    - `modules`: how many modules the row stands for.
    - `operators`, `recomputed_operators`: forward operators, and those of them that run more than once.
    - `kept_bytes`, `released_bytes`: of values that store-all keeps for the backward phase.
    - `recomputed_seconds`: of all executions after the first.
    """

    label: str
    modules: int
    operators: int
    recomputed_operators: int
    kept_bytes: int
    released_bytes: int
    recomputed_seconds: float


@dataclass(frozen=True)
class AliveRow:
    """One value, or several equal ones, in memory at the peak; `size_bytes` is the sum."""

    label: str
    values: int
    size_bytes: int
    shape: tuple[int, ...]
    dtype: str
    kind: str
    target: str
    source: str


@dataclass(frozen=True)
class PeakReport:
    """The instant at which the most memory is in use.

    **Fields:**

    - `operator`, `phase`, `module`, `source`: what runs at that instant; `again` if it is a recomputation.
    - `lines`: what the peak consists of, by label; they add up to `peak_bytes`.
    - `alive`: the values in memory, the biggest rows first.
    """

    peak_bytes: int
    regime: str
    operator: str
    phase: str
    module: str
    source: str
    again: bool
    lines: tuple[tuple[str, int], ...]
    alive: tuple[AliveRow, ...]


@dataclass(frozen=True)
class PlanReport:
    """Both halves of the report of one plan."""

    modules: tuple[ModuleRow, ...]
    peak: PeakReport


def report_on(plan: Plan) -> PlanReport:
    """The report of a plan."""
    return PlanReport(_modules(plan.to_graph(), plan.to_schedule()), _peak(plan))


def _modules(graph: Graph, schedule: Schedule) -> tuple[ModuleRow, ...]:
    kept = _alive_after_forward(graph, schedule)
    saved = _alive_after_forward(graph, Schedule.store_all(graph)) | kept
    runs = Counter(schedule.order)
    members: dict[str, list[int]] = {}
    for index, operator in enumerate(graph.operators):
        if operator.phase == "forward":
            members.setdefault(operator.module, []).append(index)
    rows: list[ModuleRow] = []
    for module, indices in members.items():
        values = [v for i in indices for v in graph.operators[i].outputs if v in saved]
        rows.append(
            ModuleRow(
                label=module,
                modules=1,
                operators=len(indices),
                recomputed_operators=sum(runs[i] > 1 for i in indices),
                kept_bytes=sum(graph.values[v].size_bytes for v in values if v in kept),
                released_bytes=sum(graph.values[v].size_bytes for v in values if v not in kept),
                recomputed_seconds=sum((runs[i] - 1) * graph.operators[i].seconds for i in indices),
            )
        )
    return tuple(_merge_modules(group) for group in _folded(rows))


def _module_key(row: ModuleRow) -> Hashable:
    # Seconds of equal blocks may differ in their last digits where they were measured.
    return row.operators, row.recomputed_operators, row.kept_bytes, row.released_bytes, f"{row.recomputed_seconds:.2g}"


def _merge_modules(group: Sequence[ModuleRow]) -> ModuleRow:
    return ModuleRow(
        label=fold_label([row.label for row in group]) or "(model itself)",
        modules=len(group),
        operators=sum(row.operators for row in group),
        recomputed_operators=sum(row.recomputed_operators for row in group),
        kept_bytes=sum(row.kept_bytes for row in group),
        released_bytes=sum(row.released_bytes for row in group),
        recomputed_seconds=sum(row.recomputed_seconds for row in group),
    )


def _folded(rows: Iterable[ModuleRow]) -> list[list[ModuleRow]]:
    groups: dict[Hashable, list[ModuleRow]] = {}
    for row in rows:
        groups.setdefault((template_of(row.label), _module_key(row)), []).append(row)
    return list(groups.values())


def _alive_after_forward(graph: Graph, schedule: Schedule) -> set[int]:
    """Activations of the forward phase that are in memory when the forward program ends."""
    forward_executions = programs_of(graph, schedule.order).count("forward")
    alive: set[int] = set()
    position = 0
    for step in schedule.steps:
        if isinstance(step, Compute):
            if position == forward_executions:
                break
            if step.reuses is not None:
                alive.discard(step.reuses)
            alive.update(graph.operators[step.operator].outputs)
            position += 1
        else:
            alive.discard(step.value)
    return {v for v in alive if graph.values[v].kind == "activation"}


def _peak(plan: Plan) -> PeakReport:
    graph, schedule, simulation = plan.to_graph(), plan.to_schedule(), plan.simulation()
    order = schedule.order
    index = order[simulation.peak_position]
    operator = graph.operators[index]
    alive = _alive_at(graph, schedule, simulation.peak_position, simulation.regime == "later")
    lines: list[tuple[str, int]] = list(graph.resident_bytes.items())
    if simulation.regime == "later":
        lines.append((".grad of earlier micro-batches", graph.accumulated_gradient_bytes))
    for kind in ("activation", "output", "gradient"):
        size = sum(graph.values[v].size_bytes for v in alive if graph.values[v].kind == kind)
        lines.append((f"{kind}s", size))
    lines.append(("workspace of the operator", operator.workspace_bytes))
    # Generator states that are kept for a replay, and what autograd copies when it takes a gradient over.
    lines.append(("random states and copies", simulation.peak_bytes - sum(size for _, size in lines)))
    return PeakReport(
        peak_bytes=simulation.peak_bytes,
        regime=simulation.regime,
        operator=operator.name,
        phase=operator.phase,
        module=operator.module,
        source=operator.source,
        again=index in order[: simulation.peak_position],
        lines=tuple((label, size) for label, size in lines if size),
        alive=_alive_rows(graph, alive),
    )


def _alive_at(graph: Graph, schedule: Schedule, position: int, later: bool) -> set[int]:
    """Values in memory while execution `position` runs, its inputs and outputs included."""
    last_read = _last_reads(graph, schedule)
    alive: set[int] = set()
    done: set[int] = set()
    executed = -1
    for step in schedule.steps:
        if not isinstance(step, Compute):
            alive.discard(step.value)
            continue
        executed += 1
        if step.reuses is not None:
            alive.discard(step.reuses)
        alive.update(graph.operators[step.operator].outputs)
        if executed == position:
            return alive
        done.add(step.operator)
        if later:  # a new gradient goes as soon as it has been added to `.grad`, unless it is read again
            alive = {v for v in alive if not _added(graph, v, done) or last_read.get(v, -1) > executed}
    return alive


def _added(graph: Graph, value: int, done: set[int]) -> bool:
    return graph.values[value].kind == "gradient" and graph.values[value].delivered_after in done


def _last_reads(graph: Graph, schedule: Schedule) -> dict[int, int]:
    return {v: position for position, index in enumerate(schedule.order) for v in graph.operators[index].inputs}


def _alive_rows(graph: Graph, alive: Iterable[int]) -> tuple[AliveRow, ...]:
    groups: dict[Hashable, list[int]] = {}
    for index in sorted(alive):
        value = graph.values[index]
        producer = graph.operators[value.producer]
        key = (template_of(producer.module), producer.target, value.size_bytes, value.shape, value.dtype, value.kind)
        groups.setdefault(key, []).append(index)
    rows: list[AliveRow] = []
    for indices in groups.values():
        first = graph.values[indices[0]]
        producers = [graph.operators[graph.values[i].producer] for i in indices]
        rows.append(
            AliveRow(
                label=fold_label([p.module for p in producers]) or "(model itself)",
                values=len(indices),
                size_bytes=sum(graph.values[i].size_bytes for i in indices),
                shape=first.shape,
                dtype=first.dtype,
                kind=first.kind,
                target=producers[0].target,
                source=producers[0].source,
            )
        )
    return tuple(sorted(rows, key=lambda row: -row.size_bytes))
