"""Write a solver: one class in one file, judged by the simulator like every other.

    python examples/write_a_solver.py [--layers 12] [--budget 60%]

`DropCheapest` runs again, right before the backward pass, what is cheapest for its bytes, one value after the other,
until the step fits. It is the first idea that anybody has, and it proves nothing; `Auto` beside it says how far from
the best possible it is. To make it known to the command line, add a row to `solvers/registry.py`, and one to the table
of `tests/solvers/test_table.py`, which runs every check that there is on it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from graph_capture.graph import Graph
from planner import parse_budget, plan
from solvers.hints import NO_HINTS, Hints
from solvers.schedule import Schedule
from solvers.solution import SearchClass, Solution, Solver
from solvers.verdict import Candidate, Verdict, judge


@dataclass(frozen=True)
class DropCheapest(Solver):
    """Greedy by seconds per byte. Options are fields; the time that it takes is counted by the verdict.

    **Fields:**

    - `attempts`: how many sets of values are tried at most.
    """

    attempts: int = 200
    name: ClassVar[str] = "drop-cheapest"

    def solve(self, graph: Graph, budget_bytes: int, hints: Hints = NO_HINTS) -> Solution:
        """The first schedule that fits, as more and more is run again; every attempt is judged by the simulator."""
        verdict = Verdict.start(self, graph, budget_bytes, SearchClass.ORDERED)
        candidates = [judge(graph, Schedule.store_all(graph))]
        chosen: set[int] = set()
        for operator in _by_price(graph)[: self.attempts]:
            if candidates[-1].peak_bytes <= budget_bytes:
                break
            chosen.add(operator)
            candidates.append(_attempt(graph, chosen))
        # No lower bound is claimed: this search knows none. What was met on the way tells which budget would do.
        return verdict.conclude(candidates)


def _by_price(graph: Graph) -> list[int]:
    """Forward operators whose values the backward pass reads, the cheapest second per byte first."""
    prices: dict[int, float] = {}
    for index, operator in enumerate(graph.operators):
        size = sum(graph.values[v].size_bytes for v in operator.outputs)
        read_late = any(graph.operators[i].phase == "backward" for v in operator.outputs for i in graph.uses[v])
        makes_activations = all(graph.values[v].kind == "activation" for v in operator.outputs)
        if operator.phase == "forward" and operator.recomputable and size and read_late and makes_activations:
            prices[index] = operator.seconds / size
    return sorted(prices, key=prices.__getitem__)


def _attempt(graph: Graph, chosen: set[int]) -> Candidate:
    """Run each chosen operator again right before the first operator of the backward pass that reads what it makes."""
    order: list[int] = []
    waiting = set(chosen)
    for index, operator in enumerate(graph.operators):
        if operator.phase == "backward":
            needed = {graph.values[v].producer for v in operator.inputs} & waiting
            again = _with_inputs(graph, needed, waiting)
            waiting -= set(again)
            order.extend(again)
        order.append(index)
    return judge(graph, Schedule.from_order(graph, order))


def _with_inputs(graph: Graph, needed: set[int], waiting: set[int]) -> list[int]:
    """The operators, and those among `waiting` that make what they read, in captured order."""
    todo, found = list(needed), set(needed)
    while todo:
        for producer in graph.producers(todo.pop()):
            if producer in waiting and producer not in found:
                found.add(producer)
                todo.append(producer)
    return sorted(found)


def main() -> None:
    """Plan the same model with this solver and with the one that is chosen by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--budget", default="60%")
    options = parser.parse_args()

    import torch

    layers = (nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)) for _ in range(options.layers))
    model, inputs = nn.Sequential(*layers), (torch.zeros(4096, 256),)
    for solver in (DropCheapest(), None):
        made = plan(
            model,
            parse_budget(options.budget),
            inputs,
            loss_fn=lambda result: result.square().mean(),
            solver=solver,
            gradient_accumulation=False,
            time_limit_seconds=10,
        )
        print(
            f"{made.solver:<14}  peak {made.predicted_peak_bytes:,} of {made.budget_bytes:,} bytes, "
            f"overhead {made.overhead:.3%}, lower bound {made.lower_bound:.3%}, status {made.status}"
        )


if __name__ == "__main__":
    main()
