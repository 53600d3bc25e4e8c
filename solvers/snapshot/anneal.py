"""Simulated annealing on sequences of executions, from a sequence that almost fits.

Kirkpatrick, Gelatt, Vecchi 1983, with the budget as a penalty whose price grows as the temperature falls. First
executions keep captured order; a move adds a chain of recomputations just before a user, removes up to six, or moves
one or a run of them. From store-all it finds little; from the lifted answer of a snapshot relaxation, which is almost
right, it mends in seconds what the relaxation does not see. It gives no bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graph_capture.graph import Graph
from solvers import compiled
from solvers.backends import backend
from solvers.schedule import outside_loss
from solvers.snapshot.lift import prune
from solvers.snapshot.reduction import can_repeat, constant_bytes

if TYPE_CHECKING:
    from solvers.snapshot.kernel import Tables

CHUNKS = 100
"""Temperature steps of one annealing; between them it can be stopped."""


@dataclass(frozen=True)
class Cooling:
    """Temperature and the price of excess memory, both geometric; in percent of the store-all step.

    **Fields:**

    - `first_temperature`, `last_temperature`: an increase of this much is accepted with probability 1/e.
    - `first_price`, `last_price`: percent per relative excess of the peak over the budget.
    - `excess_share`: price of the excess summed over all executions, as a share of the price of the peak's.
    """

    first_temperature: float = 0.3
    last_temperature: float = 0.01
    first_price: float = 60.0
    last_price: float = 700.0
    excess_share: float = 0.05


@dataclass(frozen=True)
class Annealed:
    """Outcome: the cheapest sequence within the budget (`None`: none met), where the walk ended, and its moves."""

    best: list[int] | None
    last: list[int]
    percent: float
    moves: int


class Annealer:
    """The tables of one graph, built once per solve."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.tables = _tables(graph)
        self._moves_per_second = 2e4

    def evaluate(self, order: Sequence[int]) -> tuple[float, int, list[int]]:
        """Recomputed percent, peak bytes, and the bytes at each execution, of a sequence in captured order."""
        import numpy as np

        from solvers.snapshot import kernel

        sequence = np.array(outside_loss(self.graph, order), dtype=np.int64)
        length = len(sequence)
        profile = np.empty(length, np.int64)
        n_values = len(self.graph.values)
        scratch = (np.empty(length + 1, np.int64), np.empty(n_values, np.bool_), np.empty(n_values, np.int64))
        replayed = np.zeros(len(self.graph), np.bool_)
        percent = kernel.price(self.tables, sequence, length, scratch[0])
        peak, _ = kernel.memory(self.tables, sequence, length, 1 << 62, *scratch, replayed, profile, 0.0, 0.0, 0.0)
        return float(percent), int(peak), profile.tolist()

    def polish(self, order: Sequence[int], budget_bytes: int) -> list[int]:
        """Drop recomputations that the budget does not need; `order` must fit."""
        import numpy as np

        from solvers.snapshot import kernel

        sequence = np.array(prune(self.graph, outside_loss(self.graph, order)), dtype=np.int64)
        length = kernel.drop_needless(self.tables, sequence, len(sequence), budget_bytes)
        return sequence[:length].tolist()

    def anneal(
        self,
        order: Sequence[int],
        budget_bytes: int,
        *,
        seed: int,
        cooling: Cooling,
        seconds: float,
        moves: int | None = None,
        stop: Callable[[float], bool] = lambda percent: False,
    ) -> Annealed:
        """Walk from `order` for `seconds`, or for exactly `moves` moves (then the same on every machine).

        `stop` is asked after each chunk, with the percent of the best sequence so far, whether to end.
        """
        import numpy as np

        from solvers.snapshot import kernel

        start = outside_loss(self.graph, order)
        capacity = max(4 * len(self.graph), 2 * len(start)) + 16
        sequence = np.zeros(capacity, np.int64)
        sequence[: len(start)] = start
        best = np.zeros(capacity, np.int64)
        rng = np.array([scrambled(seed)], dtype=np.uint64)
        length, best_length, percent, done, share = len(start), 0, float("inf"), 0, 0.0
        began = time.monotonic()
        while share < 1.0:
            chunk = max(1, moves // CHUNKS) if moves else max(10, int(self._moves_per_second * seconds / CHUNKS))
            temperature = cooling.first_temperature * (cooling.last_temperature / cooling.first_temperature) ** share
            price = cooling.first_price * (cooling.last_price / cooling.first_price) ** share
            excess_price = price * cooling.excess_share
            chunk_began = time.monotonic()
            length, best_length, percent = kernel.walk(
                self.tables, rng, sequence, length, best, best_length, percent, budget_bytes, chunk, temperature,
                price, excess_price,
            )  # fmt: skip
            done += chunk
            elapsed = time.monotonic() - began
            share = done / moves if moves else elapsed / max(seconds, 1e-9)
            if not moves:
                self._moves_per_second = chunk / max(1e-6, time.monotonic() - chunk_began)
            if stop(float(percent)):
                break
        found = prune(self.graph, best[:best_length].tolist()) if best_length else None
        return Annealed(found, sequence[:length].tolist(), float(percent), done)


class LateAnnealer:
    """Asked for the annealer of a graph, gives it once compiled code is ready, and `None` until then."""

    def __init__(self, graph: Graph, wait: bool = False) -> None:
        """With `wait` the first question waits for the compilation."""
        self.graph, self.wait = graph, wait
        self._annealer: Annealer | None = None

    def __call__(self) -> Annealer | None:
        """The annealer, made once; `None` without numba, and while its code is being compiled."""
        if self._annealer is None and compiled.ready(self.wait):
            self._annealer = Annealer(self.graph)
        return self._annealer


def scrambled(seed: int) -> int:
    """A nonzero 64-bit state from a small seed (splitmix64)."""
    mask = (1 << 64) - 1
    x = (seed + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return (x ^ (x >> 31)) or 1


def _rows(rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    import numpy as np

    starts = np.zeros(len(rows) + 1, np.int64)
    starts[1:] = np.cumsum([len(row) for row in rows])
    return starts, np.array([v for row in rows for v in row], dtype=np.int64)


def _tables(graph: Graph) -> Tables:
    import numpy as np

    with backend("numba"):
        from solvers.snapshot.kernel import Tables

    operators, values = graph.operators, graph.values
    stays = np.array([v.kind != "activation" for v in values], dtype=np.bool_)
    size = np.array([v.size_bytes for v in values], dtype=np.int64)
    constant = constant_bytes(graph, rereads=True)
    input_start, inputs = _rows([o.inputs for o in operators])
    output_start, outputs = _rows([o.outputs for o in operators])
    in_place_start, in_place = _rows([[source for source, _ in o.in_place] for o in operators])
    step_seconds = graph.step_seconds or 1.0
    return Tables(
        input_start=input_start,
        inputs=inputs,
        output_start=output_start,
        outputs=outputs,
        in_place_start=in_place_start,
        in_place=in_place,
        producer=np.array([v.producer for v in values], dtype=np.int64),
        size=np.where(stays, 0, size),
        stays=stays,
        released=np.array(graph.released, dtype=np.int64),
        running=np.array(constant.while_running, dtype=np.int64),
        afterwards=np.array(constant.afterwards, dtype=np.int64),
        workspace=np.array([o.workspace_bytes for o in operators], dtype=np.int64),
        random_state=np.array([o.random_state_bytes for o in operators], dtype=np.int64),
        repeatable=np.array(can_repeat(graph), dtype=np.bool_),
        is_loss=np.array([o.phase == "loss" for o in operators], dtype=np.bool_),
        cost=np.array([100.0 * o.seconds / step_seconds for o in operators]),
        last_forward=graph.last_forward,
        last_loss=max((i for i, o in enumerate(operators) if o.phase == "loss"), default=-1),
    )
