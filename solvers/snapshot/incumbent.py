"""The best sequence so far: every sequence that the search meets is judged here, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from graph_capture.graph import Graph
from solvers.schedule import Schedule
from solvers.simulator import Simulation, simulate
from solvers.snapshot.anneal import Annealer
from solvers.snapshot.relaxation import PERCENT
from solvers.turn import released_order


@dataclass(frozen=True)
class NearMiss:
    """A sequence that does not fit: its peak as a multiple of the budget, its recomputed percent."""

    ratio: float
    percent: float
    order: list[int]

    def score(self) -> float:
        """Smaller is better to start from; a percent of excess memory counts as much as a percent of the step."""
        return self.percent + PERCENT * (self.ratio - 1.0)


NO_MISS = NearMiss(math.inf, math.inf, [])


@dataclass
class Incumbent:
    """What is known of one graph and budget; percent means percent of the store-all step.

    **Fields:**

    - `counter`: gives what counts sequences in compiled code before the simulator judges them, if it is at hand.
    - `order`, `percent`, `peak_bytes`, `by`: the cheapest sequence that fits, and which method found it.
    - `smallest_peak_bytes`: of any sequence met, `lowest` that sequence, if it is not store-all's.
    - `near_miss`: the best to start from of those that do not fit.
    """

    graph: Graph
    budget_bytes: int
    smallest_peak_bytes: int
    counter: Callable[[], Annealer | None]
    order: list[int] | None = None
    percent: float = math.inf
    peak_bytes: int = 0
    by: str = ""
    near_miss: NearMiss = field(default=NO_MISS)
    lowest: list[int] | None = None

    def offer(self, order: list[int], by: str) -> None:
        """Take an order if it is of this class and better than what is known; most are counted and forgotten."""
        if not in_captured_order(order):
            return
        order = released_order(self.graph, order)
        counter = self.counter()
        if counter is not None:
            percent, peak_bytes, _ = counter.evaluate(order)
            over = peak_bytes > self.budget_bytes
            miss = NearMiss(peak_bytes / max(1, self.budget_bytes), percent, order)
            useful = miss.score() < self.near_miss.score() if over else percent < self.percent
            if not useful and peak_bytes >= self.smallest_peak_bytes:
                return
        simulation = self.consider(order, by)
        if self.budget_bytes and simulation.peak_bytes > self.budget_bytes:
            miss = NearMiss(simulation.peak_bytes / self.budget_bytes, percent_of(self.graph, simulation), order)
            self.near_miss = min(self.near_miss, miss, key=NearMiss.score)

    def consider(self, order: list[int], by: str = "lifting") -> Simulation:
        """Simulate a sequence, and take it if it is the best that fits."""
        order = released_order(self.graph, order)
        simulation = simulate(self.graph, Schedule.from_order(self.graph, order))
        if simulation.peak_bytes < self.smallest_peak_bytes:
            self.smallest_peak_bytes, self.lowest = simulation.peak_bytes, list(order)
        percent = percent_of(self.graph, simulation)
        if simulation.peak_bytes <= self.budget_bytes and percent < self.percent:
            self.order, self.percent, self.peak_bytes = list(order), percent, simulation.peak_bytes
            self.by = by
        return simulation

    def take_near_miss(self) -> NearMiss:
        """Hand out the near miss, once."""
        miss, self.near_miss = self.near_miss, NO_MISS
        return miss


def in_captured_order(order: Sequence[int]) -> bool:
    """Whether operators first run in captured order."""
    count = 0
    for operator in order:
        if operator > count:
            return False
        count += operator == count
    return True


def percent_of(graph: Graph, simulation: Simulation) -> float:
    """Recomputed seconds in percent of the store-all step."""
    return PERCENT * simulation.recomputed_seconds / graph.step_seconds if graph.step_seconds else 0.0
