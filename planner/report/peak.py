"""The instant at which the most memory is in use: what runs, what the bytes consist of, and which tensors they are."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from graph_capture.graph import Graph
from planner.folding import fold_label, template_of
from planner.report.lifetimes import alive_at
from solvers.schedule import Schedule
from solvers.simulator import Simulation

Lines = tuple[tuple[str, int], ...]
"""Labels and bytes."""


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

    @property
    def tensor(self) -> str:
        """Type and shape, as `float32[2, 3]`."""
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]" if self.dtype else self.kind


@dataclass(frozen=True)
class PeakReport:
    """The instant at which the most memory is in use.

    **Fields:**

    - `operator`, `phase`, `module`, `source`: what runs at that instant; `again` if it is a recomputation.
    - `seconds`: from the start of the step, as priced.
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
    seconds: float
    lines: Lines
    alive: tuple[AliveRow, ...]


def peak_report(graph: Graph, schedule: Schedule, simulation: Simulation) -> PeakReport | None:
    """The peak of a schedule; `None` if the graph has no operators."""
    order = schedule.order
    if not order:
        return None
    position = simulation.peak_position
    operator = graph.operators[order[position]]
    alive = alive_at(graph, schedule, position, later=simulation.regime == "later")
    return PeakReport(
        peak_bytes=simulation.peak_bytes,
        regime=simulation.regime,
        operator=operator.name,
        phase=operator.phase,
        module=operator.module,
        source=operator.source,
        again=order[position] in order[:position],
        seconds=sum(graph.operators[i].seconds for i in order[:position]),
        lines=peak_lines(graph, schedule, simulation),
        alive=_alive_rows(graph, alive),
    )


def peak_lines(graph: Graph, schedule: Schedule, simulation: Simulation) -> Lines:
    """What the peak of a schedule consists of; the lines add up to it."""
    lines: list[tuple[str, int]] = list(graph.resident_bytes.items())
    if simulation.regime == "later":
        lines.append((".grad of earlier micro-batches", graph.accumulated_gradient_bytes))
    if schedule.order:
        alive = alive_at(graph, schedule, simulation.peak_position, later=simulation.regime == "later")
        for kind in ("activation", "output", "gradient"):
            lines.append((f"{kind}s", sum(graph.values[v].size_bytes for v in alive if graph.values[v].kind == kind)))
        operator = graph.operators[schedule.order[simulation.peak_position]]
        lines.append(("workspace of the operator", operator.workspace_bytes))
    # Generator states that are kept for a replay, and what autograd copies when it takes a gradient over.
    lines.append(("random states and copies", simulation.peak_bytes - sum(size for _, size in lines)))
    return tuple((label, size) for label, size in lines if size)


def _alive_rows(graph: Graph, alive: Iterable[int]) -> tuple[AliveRow, ...]:
    groups: dict[Hashable, list[int]] = {}
    for index in sorted(alive):
        value = graph.values[index]
        producer = graph.operators[value.producer]
        key = (template_of(producer.module), producer.target, value.size_bytes, value.shape, value.dtype, value.kind)
        groups.setdefault(key, []).append(index)
    return tuple(sorted((_alive_row(graph, indices) for indices in groups.values()), key=lambda row: -row.size_bytes))


def _alive_row(graph: Graph, indices: Sequence[int]) -> AliveRow:
    first = graph.values[indices[0]]
    producers = [graph.operators[graph.values[i].producer] for i in indices]
    return AliveRow(
        label=fold_label([p.module for p in producers]) or "(model itself)",
        values=len(indices),
        size_bytes=sum(graph.values[i].size_bytes for i in indices),
        shape=first.shape,
        dtype=first.dtype,
        kind=first.kind,
        target=producers[0].target,
        source=producers[0].source,
    )
