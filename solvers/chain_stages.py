"""A joint graph as a heterogeneous chain, and the way back: from operations on stages to executions of operators.

The forward phase is cut into stages (:mod:`solvers.chain_cuts`). A value that the forward phase reads in a later stage
than its own is part of the *boundary* that passes between them, a(k) of :mod:`solvers.chain_program`; a long-lived one
that passes is kept throughout, as is what an operator makes that must not run twice. The backward phase is cut where,
in captured order, its operators turn to the values of an earlier stage.

*The sizes are those of the simulator, but for details*: states of random operators, delivery copies, and in-place reuse
between stages are not counted. So plans are made for many budgets, and the simulator says what each of them needs
(:mod:`solvers.heterogeneous_chain`). Gradients of parameters, which stay, are part of δ.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

from graph_capture.graph import Graph
from solvers.chain_cuts import Chain as Cuts
from solvers.chain_cuts import forward_spans
from solvers.chain_program import Chain, Operation
from solvers.structure import repeatable

if TYPE_CHECKING:
    from solvers.block_options import BlockOption


def coarse_cuts(cuts: Cuts, max_stages: int) -> tuple[int, ...]:
    """At most `max_stages - 1` of the cuts, so that stages make about equally many bytes."""
    if len(cuts) <= max_stages:
        return cuts.cuts
    total, made = sum(cuts.step_bytes), 0
    chosen: list[int] = []
    for i, cut in enumerate(cuts.cuts):
        made += cuts.step_bytes[i]
        if made * max_stages >= total * (len(chosen) + 1) and len(chosen) < max_stages - 1:
            chosen.append(cut)
    return tuple(chosen)


def stage_cuts(graph: Graph, cuts: Cuts, max_stages: int) -> tuple[int, ...]:
    """Where to cut into at most `max_stages` stages: behind every operator over which nothing new passes, if few."""
    fresh = _fresh_cuts(graph, cuts.cuts, cuts.long_lived)
    return tuple(fresh) if len(fresh) < max_stages else coarse_cuts(cuts, max_stages)


def _fresh_cuts(graph: Graph, cuts: Sequence[int], long_lived: frozenset[int]) -> list[int]:
    """The cuts over which no value passes that has already passed one: the chain would count it in every boundary."""
    spans = [span for v, span in forward_spans(graph).items() if v not in long_lived]
    spans.sort()
    fresh: list[int] = []
    for cut in cuts:
        last = fresh[-1] if fresh else -1
        if not any(made <= last and cut < last_read for made, last_read in spans[: bisect.bisect(spans, (last + 1,))]):
            fresh.append(cut)
    return fresh


@dataclass(frozen=True)
class Stages:
    """The stages of a graph.

    **Fields:**

    - `forward`: for each stage its forward operators; `backward`: those of the backward phase (and the loss, which
      belongs to the last stage).
    - `boundary`: for each stage the values that it hands to later stages; `saved`: those of its values that its
      backward, or that of an earlier stage, reads. Neither has values that are kept throughout.
    """

    graph: Graph
    forward: tuple[range, ...]
    backward: tuple[tuple[int, ...], ...]
    boundary: tuple[frozenset[int], ...]
    saved: tuple[frozenset[int], ...]
    _again: dict[tuple[int, frozenset[int], frozenset[int]], tuple[int, ...]] = field(
        default_factory=dict[tuple[int, frozenset[int], frozenset[int]], tuple[int, ...]], repr=False, compare=False
    )

    @classmethod
    def of(cls, graph: Graph, cuts: Sequence[int], long_lived: frozenset[int]) -> Stages:
        """Cut `graph` behind the operators `cuts`, but for those over which nothing new passes."""
        count = graph.last_forward + 1
        cuts = _fresh_cuts(graph, cuts, long_lived)
        ends = [-1, *cuts, count - 1]
        forward = tuple(range(a + 1, b + 1) for a, b in pairwise(ends))

        def stage_of(operator: int) -> int:
            return bisect.bisect_left(cuts, operator)

        boundary: list[set[int]] = [set() for _ in forward]
        level: dict[int, int] = {}  # the stage at whose backward a value is still there, if it is saved or passed on
        spans = forward_spans(graph)
        for v, value in enumerate(graph.values):
            if value.producer < count and value.kind == "activation" and repeatable(graph, value.producer):
                made, last = stage_of(value.producer), stage_of(spans.get(v, (0, value.producer))[1])
                if last == made or v not in long_lived:
                    level[v] = last
                    for k in range(made, last):
                        boundary[k].add(v)
        saved: list[set[int]] = [set() for _ in forward]
        backward: list[list[int]] = [[] for _ in forward]
        stage = len(forward) - 1
        for index in range(count, len(graph)):
            operator = graph.operators[index]
            if operator.phase == "backward":
                stage = min([stage, *(level[v] for v in operator.inputs if v in level)])
                for v in operator.inputs:
                    if v in level and stage <= (made := stage_of(graph.values[v].producer)):
                        saved[made].add(v)
            backward[stage].append(index)
        frozen = [tuple(frozenset(s) for s in sets) for sets in (boundary, saved)]
        return cls(graph, forward, tuple(tuple(b) for b in backward), frozen[0], frozen[1])

    @cached_property
    def repeatable(self) -> tuple[bool, ...]:
        """For each operator whether it may run again."""
        return tuple(repeatable(self.graph, i) for i in range(len(self.graph)))

    @property
    def turn(self) -> int:
        """The first operator behind the forward phase."""
        return self.graph.last_forward + 1

    def order(
        self,
        operations: Iterable[Operation],
        *,
        hold_outputs: bool = False,
        options: Sequence[Sequence[BlockOption]] = (),
    ) -> list[int]:
        """The executions of a plan; the first forward of each stage is that of the captured order.

        **Arguments:**

        - `hold_outputs`: what a stage hands on was there for the backward of the next stage. Hold it until the backward
          of the stage itself, instead of making it once more: fewer seconds than the plan has, and more bytes.
        - `options`: of each stage, what the operations name.
        """
        order: list[int] = []
        visited: set[int] = set()
        plan = list(operations)
        for i, operation in enumerate(plan):
            stage = operation.stage
            chosen = options[stage][operation.option - 1] if operation.option else None
            if operation.kind == "backward":
                order += chosen.backward if chosen else self.backward[stage]
            elif stage not in visited:
                visited.add(stage)
                order += self.forward[stage]
            elif operation.kind == "all":
                passes_on, kept = plan[i + 1].kind != "backward", chosen.kept if chosen else self.saved[stage]
                if passes_on:
                    order += self.again(stage, kept | self.boundary[stage])
                else:
                    order += self.again(stage, kept, self.boundary[stage] if hold_outputs else frozenset())
            else:
                order += self.again(stage, self.boundary[stage])
        return order

    def again(self, stage: int, wanted: frozenset[int], there: frozenset[int] = frozenset()) -> tuple[int, ...]:
        """The operators of the stage that must run again to make the values `wanted`, those `there` left out."""
        known = self._again.get((stage, wanted, there))
        if known is None:  # hundreds of plans ask for the same few
            known = self._again[stage, wanted, there] = self._run_again(stage, wanted, there)
        return known

    def _run_again(self, stage: int, wanted: frozenset[int], there: frozenset[int]) -> tuple[int, ...]:
        needed = set(wanted - there)
        operators: list[int] = []
        for index in reversed(self.forward[stage]):
            operator = self.graph.operators[index]
            if self.repeatable[index] and not needed.isdisjoint(operator.outputs):
                needed.update(v for v in operator.inputs if v not in there)
                operators.append(index)
        return tuple(operators[::-1])

    def chain(self) -> Chain:
        """Seconds and bytes of the stages."""
        graph, stages = self.graph, range(len(self.forward))
        everything = [self.saved[k] | self.boundary[k] for k in stages]
        runs = [self.again(k, everything[k]) for k in stages]
        x = [0, *(self._bytes(values) for values in self.boundary)]
        xbar = [0, *(self._bytes(values) for values in everything)]
        drops = [self._forward_peak(self.again(k, self.boundary[k]), self.boundary[k]) for k in stages]
        delta, btmp = self._backward_bytes()
        return Chain(
            ftime=tuple(sum(graph.operators[i].seconds for i in run) for run in runs),
            btime=tuple(sum(graph.operators[i].seconds for i in run) for run in self.backward),
            x=tuple(x),
            xbar=tuple(xbar),
            ftmp=tuple(max(0, drops[k] - x[k + 1]) for k in stages),
            btmp=btmp,
            delta=delta,
            all_tmp=tuple(max(0, self._forward_peak(runs[k], everything[k]) - xbar[k + 1]) for k in stages),
        )

    def _bytes(self, values: Iterable[int]) -> int:
        return sum(self.graph.values[v].size_bytes for v in values)

    def _forward_peak(self, run: Sequence[int], stay: frozenset[int]) -> int:
        """The most bytes of values made in a run, when those in `stay` stay."""
        last = {v: i for i in run for v in (*self.graph.operators[i].outputs, *self.graph.operators[i].inputs)}
        alive, peak = 0, 0
        made: set[int] = set()
        for index in run:
            operator = self.graph.operators[index]
            made.update(operator.outputs)
            alive += self._bytes(operator.outputs)
            peak = max(peak, alive + operator.workspace_bytes - self._taken_over(index, last))
            touched = {*operator.outputs, *operator.inputs} & made - stay
            alive -= self._bytes(v for v in touched if last[v] == index)
        return peak

    def _backward_bytes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """δ and the temporaries of each backward, in store-all's order."""
        graph, count = self.graph, self.graph.last_forward + 1
        last = {v: uses[-1] if uses else graph.values[v].producer for v, uses in enumerate(graph.uses)}
        alive = 0
        delta, btmp = [0] * (len(self.forward) + 1), [0] * len(self.forward)
        for stage in reversed(range(len(self.forward))):
            delta[stage + 1] = alive
            for index in self.backward[stage]:
                operator = graph.operators[index]
                alive += self._bytes(operator.outputs)
                need = alive + operator.workspace_bytes - self._taken_over(index, last)
                btmp[stage] = max(btmp[stage], need - delta[stage + 1])
                for v in {*operator.outputs, *operator.inputs}:
                    if graph.values[v].producer >= count and last[v] == index and graph.values[v].kind == "activation":
                        alive -= graph.values[v].size_bytes
        return tuple(delta), tuple(btmp)

    def _taken_over(self, index: int, last: dict[int, int]) -> int:
        """Bytes of an input that the operator may take over, because nobody reads it later."""
        pairs = self.graph.operators[index].in_place
        return max((self.graph.values[source].size_bytes for source, _ in pairs if last[source] == index), default=0)
