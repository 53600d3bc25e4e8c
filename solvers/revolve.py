"""Revolve on a training step: binomial checkpointing, treeverse, optimal checkpointing of a chain of equal steps.

Griewank, Walther: *Algorithm 799: revolve*, ACM TOMS 26 (2000); the schedule and its closed form are in
:mod:`solvers.binomial`. The forward phase is cut into the steps of a chain, as :mod:`solvers.chain_cuts` finds them;
with s slots the states before at most s steps are kept at a time, and a step runs forward again whenever a state after
it is wanted that is gone, so that O(log N) states suffice for O(log N) times the forward seconds. Chen's segments run
again once at most; here a step may run again many times, which is what small budgets ask for.

What the paper leaves open on a graph that is no plain chain: of a step that runs again only those operators do that
the next state needs, or, right before its backward, those that its backward needs; long-lived values (a mask that
every layer reads) and the outputs of operators that must not run twice are kept; a step is run for its backward when
the first backward operator asks for it. Numbers of slots are tried from many to few, all up to 32 and then a geometric
grid, every plan is judged by the simulator, and the cheapest taken that fits: a larger budget never costs more.

*Search class*: ordered; a state may be dropped and made again. *Bound*: none (0); among chains of equal steps the plan
has the fewest forward steps for its slots, on any other graph it is heuristic. *Limits*: unequal seconds and bytes are
not looked at; what lies inside of a step is never kept but in the last one, however loose the budget; plans in which
a step runs again more than `most_repetitions` times are left out, which also keeps 1300 steps within seconds.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import ClassVar

from graph_capture.graph import Graph
from solvers.binomial import Action, Advance, Record, repetition_number, revolve
from solvers.chain_cuts import Chain, chain_of
from solvers.hints import NO_HINTS, Hints
from solvers.schedule import Schedule
from solvers.solution import SearchClass, Solution, Solver
from solvers.structure import repeatable
from solvers.verdict import Verdict, judge, judge_best


@dataclass(frozen=True)
class Revolve(Solver):
    """Binomial checkpointing of the chain that the forward phase is.

    **Fields:**

    - `most_repetitions`: how often a step may run again, at most.
    """

    most_repetitions: int = 8
    name: ClassVar[str] = "revolve"

    def applies_to(self, graph: Graph) -> str | None:
        """The reason why the graph is no chain, if it is none."""
        if all(operator.phase == "forward" for operator in graph.operators):
            return None if not len(graph) else "does not apply: the graph has no backward phase"
        if chain_of(graph) is None:
            return "does not apply: nothing cuts the forward graph; behind every operator several are still read"
        return None

    def solve(self, graph: Graph, budget_bytes: int, hints: Hints = NO_HINTS) -> Solution:
        """The cheapest plan that fits the budget, over the numbers of slots."""
        verdict = Verdict.start(self, graph, budget_bytes, SearchClass.ORDERED)
        reason = self.applies_to(graph)
        if reason is not None:
            return verdict.not_applicable(reason)
        store_all = judge(graph, Schedule.store_all(graph))
        chain = chain_of(graph) if len(graph) else None
        if store_all.peak_bytes <= budget_bytes or chain is None:
            return verdict.conclude([store_all])
        steps = ChainSteps.of(graph, chain)
        orders = (steps.order(slots) for slots in self.slots(len(chain)))
        return verdict.conclude([store_all, *judge_best(graph, orders, budget_bytes)])

    def slots(self, n_steps: int) -> Iterator[int]:
        """The numbers of slots to try, from many to few."""
        slots = max(1, n_steps - 1)
        while slots >= 1 and repetition_number(n_steps, slots) <= self.most_repetitions:
            yield slots
            slots = slots - 1 if slots <= 32 else max(32, slots * 7 // 8)


@dataclass(frozen=True)
class ChainSteps:
    """The steps of a chain, and what has to run again of each.

    **Fields:**

    - `to_advance`: for each step the operators that make the next state. `to_record`: those that make what the
      backward of the step reads. Both in captured order.
    - `step_of_value`: which step has to be at hand when a backward operator reads a value that is made again: the
      step that makes it, or the one after it if the value is the state between the two.
    """

    graph: Graph
    to_advance: tuple[tuple[int, ...], ...]
    to_record: tuple[tuple[int, ...], ...]
    step_of_value: dict[int, int]

    @classmethod
    def of(cls, graph: Graph, chain: Chain) -> ChainSteps:
        """Find what each step makes for the steps after it and for its backward."""
        count = graph.last_forward + 1
        step_of = [bisect.bisect_left(chain.cuts, index) for index in range(count)]
        crossing: set[int] = set()
        for index in range(count):
            for value in graph.operators[index].inputs:
                if step_of[graph.values[value].producer] != step_of[index]:
                    crossing.add(value)
        read_backward = {
            value
            for operator in graph.operators[count:]
            if operator.phase == "backward"
            for value in operator.inputs
            if graph.values[value].producer < count
        }
        to_advance = _closure(graph, step_of, crossing - chain.long_lived, chain.long_lived & crossing)
        to_record = _closure(graph, step_of, read_backward - crossing, crossing)
        again = {o for operators in (*to_advance, *to_record) for o in operators}
        step_of_value = {value: step_of[o] + (value in crossing) for o in again for value in graph.operators[o].outputs}
        return cls(graph, to_advance, to_record, step_of_value)

    def order(self, slots: int) -> list[int]:
        """The executions of the schedule of revolve with so many slots."""
        last = len(self.to_record) - 1
        actions = revolve(last + 1, slots)
        done = last
        for action in actions:  # the forward phase itself, in which every operator runs
            if action == Record(last):
                break
        order: list[int] = []
        for index, operator in enumerate(self.graph.operators):
            if operator.phase == "backward":
                wanted = min((self.step_of_value.get(v, last) for v in operator.inputs), default=last)
                while done > wanted:
                    done = self._run(next(actions), order, done)
            order.append(index)
        return order

    def _run(self, action: Action, order: list[int], done: int) -> int:
        """Append what an action executes; returns the last step that was recorded."""
        if isinstance(action, Advance):
            for step in range(action.start, action.stop):
                order.extend(self.to_advance[step])
        elif isinstance(action, Record):
            order.extend(self.to_record[action.step])
            return action.step
        return done


def _closure(graph: Graph, step_of: list[int], targets: Set[int], kept: Set[int]) -> tuple[tuple[int, ...], ...]:
    """For each step the operators that make its `targets` from the state before it, `kept` values taken as given."""
    wanted = set(targets)
    again: list[list[int]] = [[] for _ in range(step_of[-1] + 1)]
    for index in range(len(step_of) - 1, -1, -1):
        operator = graph.operators[index]
        if not (repeatable(graph, index) and any(v in wanted for v in operator.outputs)):
            continue
        again[step_of[index]].append(index)
        for value in operator.inputs:
            if step_of[graph.values[value].producer] == step_of[index] and value not in kept:
                wanted.add(value)
    return tuple(tuple(reversed(operators)) for operators in again)
