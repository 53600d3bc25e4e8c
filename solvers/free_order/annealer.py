"""Simulated annealing over sequences in free order: for the smallest peak, or for the least recomputation in a budget.

Kirkpatrick, Gelatt, Vecchi 1983; the moves are those of FastSA (Imanishi et al., NeurIPS 2023). One object holds the
tables of a graph; the walks themselves are compiled (:mod:`solvers.free_order.moves`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graph_capture.graph import Graph, Operator, Value
from solvers.free_order.tables import lengths_of, order_of, problem_of, state_of
from solvers.snapshot.anneal import scrambled

if TYPE_CHECKING:
    from solvers.free_order.kernel import State

CHUNKS = 200
"""Temperature steps of one walk; between them it can be stopped."""


@dataclass(frozen=True)
class Effort:
    """When a walk ends: after `seconds`, or after `moves` moves if that is sooner (then it is the same everywhere)."""

    seconds: float
    moves: int | None = None


@dataclass(frozen=True)
class Cooling:
    """Temperature and the price of excess memory, both geometric; in percent of the store-all step.

    **Fields:**

    - `first_temperature`, `last_temperature`: an increase of this much is accepted with probability 1/e.
    - `first_price`, `last_price`: percent for a peak of twice the budget.
    """

    first_temperature: float
    last_temperature: float
    first_price: float
    last_price: float


PEAK = Cooling(first_temperature=2.0, last_temperature=0.02, first_price=100.0, last_price=100.0)
"""For the smallest peak: temperatures in percent of the peak at the start."""

RECOMPUTATION = Cooling(first_temperature=1.0, last_temperature=0.01, first_price=300.0, last_price=1000.0)
"""For the least recomputation within a budget."""

HOT = Cooling(first_temperature=4.0, last_temperature=0.01, first_price=300.0, last_price=1000.0)
"""The same, for small graphs, whose walks end early in a valley."""

POLISH = Cooling(first_temperature=0.15, last_temperature=0.005, first_price=300.0, last_price=1000.0)
"""The same, from a sequence that is nearly right."""


@dataclass(frozen=True)
class Walked:
    """Outcome of a walk: the best sequence met (`None`: none that fits), where it ended, and its number of moves."""

    best: list[int] | None
    last: list[int]
    moves: int


class FreeOrderAnnealer:
    """Walks of one graph. Sequences must have their first runs in a legal order (:mod:`solvers.precedence`)."""

    def __init__(self, graph: Graph, captured_order: bool = False) -> None:
        """With `captured_order` the walks keep captured first executions: they stay in the ordered class."""
        self.graph, self.captured_order = graph, captured_order
        self._moves_per_second = 5e4

    def lower_peak(self, order: Sequence[int], target_bytes: int, *, seed: int, effort: Effort) -> Walked:
        """Look for an order of smaller peak, nothing being recomputed; ends early at `target_bytes`."""
        from solvers.free_order.kernel import peak_of

        state = self._state(order)
        start_bytes = int(peak_of(state.top))
        if start_bytes <= target_bytes:
            return Walked(list(order), list(order), 0)
        # the price is relative to the target: make it percent of the peak at the start
        scale = max(1, target_bytes) / start_bytes
        cooling = Cooling(PEAK.first_temperature, PEAK.last_temperature, 100.0 * scale, 100.0 * scale)
        best = state.slots[0].copy()
        walked = self._walk(
            state, best, float(start_bytes), target_bytes, cooling, seed, effort, False, lambda p: p <= target_bytes
        )
        return walked

    def anneal(
        self,
        order: Sequence[int],
        budget_bytes: int,
        *,
        seed: int,
        effort: Effort,
        cooling: Cooling = RECOMPUTATION,
        stop: Callable[[float], bool] = lambda percent: False,
    ) -> Walked:
        """Look for the cheapest sequence within the budget; `stop` is asked with the percent of the best so far."""
        import numpy as np

        from solvers.free_order.kernel import peak_of

        state = self._state(order)
        best, percent = np.full_like(state.slots[0], -1), float("inf")
        if peak_of(state.top) <= budget_bytes:
            best, percent = state.slots[0].copy(), float(state.cost[0])
        return self._walk(state, best, percent, budget_bytes, cooling, seed, effort, True, stop)

    def reduce(self, order: Sequence[int], budget_bytes: int) -> list[int]:
        """Drop recomputations that the budget does not need; `order` must fit."""
        from solvers.free_order.moves import drop_needless

        state = self._state(order)
        drop_needless(self.problem, state, budget_bytes)
        return order_of(state.slots[0])

    def beam(self, width: int, seed: int) -> list[int]:
        """The order that a beam of `width` states finds; width 1 is greedy."""
        import numpy as np

        from solvers.free_order.beam import beam

        problem = problem_of(self.graph, lengths_of(self.graph, range(len(self.graph))))
        codes = np.random.default_rng(seed).integers(1, 1 << 63, len(self.graph), dtype=np.uint64)
        size = np.array([v.size_bytes for v in self.graph.values], dtype=np.int64)
        return beam(problem, size, codes, width).tolist()

    def peak_bytes(self, order: Sequence[int]) -> int:
        """The peak of a sequence as the walks count it."""
        from solvers.free_order.kernel import peak_of

        return int(peak_of(self._state(order).top))

    def _state(self, order: Sequence[int]) -> State:
        self.problem = problem_of(self.graph, lengths_of(self.graph, order), self.captured_order)
        return state_of(self.graph, self.problem, order)

    def _walk(
        self,
        state: State,
        best: Any,
        best_energy: float,
        budget_bytes: int,
        cooling: Cooling,
        seed: int,
        effort: Effort,
        recompute: bool,
        stop: Callable[[float], bool],
    ) -> Walked:
        import numpy as np

        from solvers.free_order.moves import walk

        rng = np.array([scrambled(seed)], dtype=np.uint64)
        done, share = 0, 0.0
        began = time.monotonic()
        while share < 1.0 and not stop(best_energy):
            chunk = max(1, (effort.moves or int(self._moves_per_second * effort.seconds)) // CHUNKS)
            temperature = cooling.first_temperature * (cooling.last_temperature / cooling.first_temperature) ** share
            price = cooling.first_price * (cooling.last_price / cooling.first_price) ** share
            chunk_began = time.monotonic()
            best_energy = float(
                walk(
                    self.problem,
                    state,
                    rng,
                    best,
                    best_energy,
                    budget_bytes,
                    price,
                    temperature,
                    chunk,
                    recompute,
                    self.captured_order,
                )
            )
            done += chunk
            now = time.monotonic()
            share = done / effort.moves if effort.moves else (now - began) / max(effort.seconds, 1e-9)
            self._moves_per_second = chunk / max(1e-6, now - chunk_began)
            if now - began > effort.seconds:
                break
        found = order_of(best)
        return Walked(found or None, order_of(state.slots[0]), done)


@functools.cache
def warm_up() -> None:
    """Compile, or load what an earlier process compiled, before anybody's clock runs."""
    operators = (Operator("a", "a", "forward", (), (0,), 1.0), Operator("b", "b", "forward", (0,), (1,), 1.0))
    annealer = FreeOrderAnnealer(Graph(operators, (Value(1, 0), Value(1, 1))))
    annealer.beam(1, 0)
    annealer.lower_peak([0, 1], 0, seed=0, effort=Effort(1.0, 1))
    annealer.reduce([0, 1], 2)
