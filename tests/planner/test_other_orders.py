"""Schedules whose first executions stand in another legal order run, and train bit for bit as the plain model does."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from graph_capture.graph import Graph
from solvers.hints import NO_HINTS, Hints
from solvers.schedule import Schedule
from solvers.solution import SearchClass, Solution, Solver
from solvers.structure import repeatable
from solvers.verdict import Verdict, judge
from tests.models import MODELS
from tests.planner.compare import compare, plan_or_smallest
from tests.solvers.random_orders import random_order


@dataclass(frozen=True)
class Shuffled(Solver):
    """A random legal order of first executions, with some forward operators recomputed in the backward phase."""

    seed: int = 0
    name = "shuffled"

    def solve(self, graph: Graph, budget_bytes: int, hints: Hints = NO_HINTS) -> Solution:
        """One schedule, whatever the budget."""
        rng = random.Random(self.seed)
        order = random_order(graph, rng)
        assert order != list(range(len(graph)))
        backward = [p for p, i in enumerate(order) if graph.operators[i].phase == "backward"]
        for index in [i for i in order if repeatable(graph, i) and graph.operators[i].phase == "forward"][::3]:
            order.insert(rng.choice(backward), index)
        verdict = Verdict.start(self, graph, budget_bytes, SearchClass.FREE)
        return verdict.conclude([judge(graph, Schedule.from_order(graph, order))])


@pytest.mark.parametrize("name", ["resnet", "densenet", "gpt2_eager"])  # a U-Net has one legal order
def test_bit_equal_in_another_order(name: str) -> None:
    case = MODELS[name]()
    made = plan_or_smallest(case, "1TiB", Shuffled(seed=1))
    comparison = compare(name, case, made)
    assert not comparison.differences
    assert comparison.first_bytes <= made.first_peak_bytes
    assert comparison.later_bytes <= made.later_peak_bytes
