"""Chooses, for every block, whether it is checkpointed and what its policy saves: a small mixed-integer program.

Under selective checkpointing costs add up: what runs again is everything that is not saved. Memory nearly adds up, too.
With every block checkpointed and nothing saved, a simulation says how much there is at every instant; what is saved
adds its bytes from the end of its block's forward to its block's backward, and a block that is not checkpointed adds
what it then holds. So with s[o] = 1 if operator o is saved and w[b] = 1 if block b is checkpointed:

    minimise     Σ_b Σ_{o in b} seconds(o) · (w[b] − s[o])                      s[o] ≤ w[b]
    at each peak bytes there + Σ_b (Σ_o bytes(o) · s[o] + held(b) · (1 − w[b])) ≤ budget      b: not yet at its backward

The program proposes; whether a proposal fits is for torch's own code on fake tensors to say (:mod:`make`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from graph_capture.graph import Graph
from planner.export.blocks import Block, Decisions, reruns, selective_schedule, stays
from solvers.schedule import Schedule
from solvers.simulator import timeline_of
from solvers.snapshot.engine import EnginePool, Limits
from solvers.snapshot.milp import LinearProgram

MIB = 2.0**20


@dataclass(frozen=True)
class _Stay:
    """When a block's saved results are in memory, as positions in the schedule in which nothing is saved."""

    block: Block
    begin: int
    rerun: int
    end: int


@dataclass(frozen=True)
class Chooser:
    """The program of one graph, for any budget."""

    graph: Graph
    blocks: tuple[Block, ...]
    time_limit_seconds: float

    def choose(self, budget_bytes: int, pool: EnginePool) -> Decisions | None:
        """The cheapest decisions that the program believes to fit; `None` if there are none."""
        free = [block for block in self.blocks if not block.obstacle]
        program = LinearProgram()
        wrapped = {b.name: program.add_column(self._seconds(b)) for b in free}
        saved: dict[int, int] = {}
        for block in free:
            for index in block.savable:
                saved[index] = program.add_column(-self.graph.operators[index].seconds)
                program.at_most([(saved[index], 1.0), (wrapped[block.name], -1.0)], 0.0)
                if index in block.forced:
                    program.at_least([(saved[index], 1.0), (wrapped[block.name], -1.0)], 0.0)
        if not self._add_memory(program, free, wrapped, saved, budget_bytes):
            return None
        if not program.costs:
            return {}
        answer = pool.solve(program.serialized(), Limits(self.time_limit_seconds, relative_gap=1e-4))
        if not answer.has_point:
            return None
        on = {column for column, value in answer.columns.items() if value > 0.5}
        decisions: dict[str, frozenset[int] | None] = {}
        for block in free:
            chosen = frozenset(i for i in block.savable if saved[i] in on)
            decisions[block.name] = chosen if wrapped[block.name] in on else None
        return decisions

    def _seconds(self, block: Block) -> float:
        return math.fsum(self.graph.operators[i].seconds for i in block.rerun)

    def _add_memory(
        self,
        program: LinearProgram,
        free: Sequence[Block],
        wrapped: dict[str, int],
        saved: dict[int, int],
        budget_bytes: int,
    ) -> bool:
        """A row for the peak of every span between two changes; whether all of them can hold."""
        schedule = selective_schedule(self.graph, self.blocks, {b.name: b.forced for b in free})
        stays_ = _stays(self.graph, schedule, free)
        cuts = sorted({0, *(p for s in stays_ for p in (s.begin, s.rerun, s.end))})
        regimes = ("first", "later") if self.graph.gradient_accumulation else ("first",)
        timelines = [timeline_of(self.graph, schedule, regime) for regime in regimes]
        for begin, end in zip(cuts, [*cuts[1:], len(schedule.order)], strict=True):
            there = max((t for line in timelines for t in line[begin:end]), default=0)
            terms: list[tuple[int, float]] = []
            constant = there / MIB
            for stay in stays_:
                name = stay.block.name
                if stay.begin <= begin < stay.rerun:
                    terms += [(saved[i], self._bytes(stay.block, i) / MIB) for i in stay.block.savable]
                    terms += [(wrapped[name], -self._held(stay.block) / MIB)]
                    constant += self._held(stay.block) / MIB
                elif stay.rerun <= begin < stay.end:
                    unneeded = [i for i in stay.block.savable if not self._needed(i)]
                    terms += [(saved[i], self._bytes(stay.block, i) / MIB) for i in unneeded]
            if not terms and constant > budget_bytes / MIB:
                return False
            program.at_most(terms, budget_bytes / MIB - constant)
        return True

    def _bytes(self, block: Block, index: int) -> int:
        """What saving an operator's results adds; nothing if they stay anyway."""
        if index in block.forced or stays(self.graph, index, block.members):
            return 0
        return sum(self.graph.values[v].size_bytes for v in self.graph.operators[index].outputs)

    def _needed(self, index: int) -> bool:
        values = self.graph.operators[index].outputs
        return any(self.graph.operators[i].phase == "backward" for v in values for i in self.graph.uses[v])

    def _held(self, block: Block) -> int:
        """What a block holds for its backward when it is not checkpointed."""
        total = 0
        for index in reruns(self.graph, block, block.forced):
            for v in self.graph.operators[index].outputs:
                if any(self.graph.operators[i].phase == "backward" for i in self.graph.uses[v]):
                    total += self.graph.values[v].size_bytes
        return total


def _stays(graph: Graph, schedule: Schedule, blocks: Sequence[Block]) -> list[_Stay]:
    order = schedule.order
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for position, index in enumerate(order):
        first.setdefault(index, position)
        last[index] = position
    found: list[_Stay] = []
    for block in blocks:
        again = [last[i] for i in block.rerun if last[i] != first[i]]
        begin = max(first[i] for i in block.members) + 1
        start = min(again, default=first[block.start])
        found.append(_Stay(block, begin, start, max(again, default=start - 1) + 1))
    return found
