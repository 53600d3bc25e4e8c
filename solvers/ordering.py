"""A better order of first executions: topological ordering for the smallest peak (register sufficiency, pebbling).

The order of first executions is a lever of its own: another legal order may lower the peak with nothing recomputed.
Three searches, each better than the one before and dearer: greedy, beam (:mod:`solvers.free_order.beam`), and simulated
annealing on the order (:mod:`solvers.free_order.annealer`). The simulator says which order is best, and the captured
one is among them, so the answer is never worse. The problem is NP-hard; nothing is said of the optimum.

:func:`reordered` gives the graph in another order, on which any solver works as on a captured one. What it proves then
holds for that order of first executions only.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from graph_capture.graph import Graph
from solvers.precedence import violation
from solvers.schedule import Compute, Schedule, Step
from solvers.simulator import simulate, simulate_store_all


@dataclass(frozen=True)
class OrderSearch:
    """How hard to look for a better order.

    **Fields:**

    - `beam_width`: states that the beam keeps; fewer on graphs of more than 2,000 operators.
    - `moves`, `moves_per_operator`: length of the annealing, the larger of the two counts; the order is the same on
      every machine as long as the time limit is not hit.
    - `time_limit_seconds`: wall-clock limit on top, compilation aside. `seed`: of everything random.
    """

    beam_width: int = 64
    moves: int = 200_000
    moves_per_operator: int = 400
    time_limit_seconds: float = 10.0
    seed: int = 0

    def best(self, graph: Graph, target_bytes: int = 0) -> OrderFound:
        """The best legal order met; ends early once a peak is at most `target_bytes`. Needs numba for any search."""
        found = OrderFound(tuple(range(len(graph))), simulate_store_all(graph).peak_bytes, "captured")
        if not find_spec("numba") or len(graph) < 3:
            return found
        from solvers.free_order.annealer import Effort, FreeOrderAnnealer, warm_up

        warm_up()
        until = time.monotonic() + self.time_limit_seconds
        annealer = FreeOrderAnnealer(graph)
        affordable = int(4e9 / (len(graph) + 1) ** 2)
        for width in (1, max(1, min(self.beam_width, affordable))):
            if found.peak_bytes > target_bytes and time.monotonic() < until:
                found = found.better(graph, annealer.beam(width, self.seed), "greedy" if width == 1 else "beam")
        starts = dict.fromkeys([found.order, tuple(range(len(graph)))])
        for start in starts:
            seconds = until - time.monotonic()
            if found.peak_bytes > target_bytes and seconds > 0:
                moves = max(self.moves, self.moves_per_operator * len(graph))
                effort = Effort(seconds, max(1, moves // len(starts)))
                walked = annealer.lower_peak(start, target_bytes, seed=self.seed, effort=effort)
                found = found.better(graph, walked.best or walked.last, "local search")
        return found


@dataclass(frozen=True)
class OrderFound:
    """An order of all operators, the simulated peak of running each once in it, and which search found it."""

    order: tuple[int, ...]
    peak_bytes: int
    search: str

    def better(self, graph: Graph, order: Sequence[int], search: str) -> OrderFound:
        """This one, or `order` if its peak is smaller."""
        peak_bytes = simulate(graph.without_released, Schedule.from_order(graph, order)).peak_bytes
        return OrderFound(tuple(order), peak_bytes, search) if peak_bytes < self.peak_bytes else self


@dataclass(frozen=True)
class Reordering:
    """A graph in another order of its operators, and the way back.

    **Fields:**

    - `original`, `graph`: before and after; operator i of `graph` is operator `order[i]` of `original`. Values keep
      their numbers.
    """

    original: Graph
    graph: Graph
    order: tuple[int, ...]

    def schedule_of_original(self, schedule: Schedule) -> Schedule:
        """The same steps on `original`."""
        return Schedule(tuple(_renamed(step, self.order) for step in schedule.steps))

    def schedule_of_graph(self, schedule: Schedule) -> Schedule:
        """The same steps on `graph`."""
        place = [0] * len(self.order)
        for position, operator in enumerate(self.order):
            place[operator] = position
        return Schedule(tuple(_renamed(step, place) for step in schedule.steps))


def reordered(graph: Graph, order: Sequence[int]) -> Reordering:
    """`graph` with its operators in `order`; raises `ValueError` if a training step does not allow that order."""
    problem = violation(graph, order)
    if problem is not None or len(order) != len(graph):
        raise ValueError(f"not a legal order of first executions: {problem or 'an operator occurs twice'}")
    place = {operator: position for position, operator in enumerate(order)}
    values = tuple(
        dataclasses.replace(
            value,
            producer=place[value.producer],
            delivered_after=None if value.delivered_after is None else place[value.delivered_after],
        )
        for value in graph.values
    )
    operators = tuple(graph.operators[operator] for operator in order)
    return Reordering(graph, dataclasses.replace(graph, operators=operators, values=values), tuple(order))


def _renamed(step: Step, names: Sequence[int]) -> Step:
    return Compute(names[step.operator], step.reuses) if isinstance(step, Compute) else step
