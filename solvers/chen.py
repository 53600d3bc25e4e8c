"""Sublinear memory by segments: gradient checkpointing, sqrt(N) checkpointing, activation checkpointing.

Chen, Xu, Zhang, Guestrin: *Training Deep Nets with Sublinear Memory Cost*, arXiv 1604.06174 (2016). The forward phase
is cut into segments; the values at the cuts are kept, the inside of a segment is dropped and recomputed once, as a
whole, when its backward needs it. Both of the paper's forms are here:

* :class:`ChenSqrt`, section 4.1: ⌈√N⌉ segments of equally many steps of a chain of N. O(√N) memory on a chain.
* :class:`ChenGreedy`, section 4.3, Algorithm 3: a segment ends at the first cut at which it has made more than *b*
  bytes; the threshold *b* is searched for (the paper: a grid around √(xy); here: a geometric grid over all sizes,
  every plan judged by the simulator, and the cheapest taken that fits).

What a cut is on a graph that is no chain, and what is kept there, stands in :mod:`solvers.chain_cuts`. Three details
that the paper leaves open: the last segment is not recomputed, because its backward comes first; of a segment only
the operators run again that its backward needs; operators that must not run twice keep their outputs.

*Search class*: persistent chain, with each operator at most twice. *Bound*: none (0); the schedules are heuristic.
*Limits*: memory is spent in steps of a whole segment, so a loose budget still costs much of a forward phase; a graph
without a cut, or without a backward phase, is refused by ``applies_to``.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from graph_capture.graph import Graph
from solvers.chain_cuts import Chain, chain_of, no_chain_reason, segment_order
from solvers.hints import NO_HINTS, Hints
from solvers.schedule import Schedule
from solvers.solution import SearchClass, Solution, Solver
from solvers.verdict import Verdict, judge, judge_best


def equal_segments(chain: Chain) -> tuple[int, ...]:
    """The cuts that split a chain of N steps into ⌈√N⌉ segments of as equal numbers of steps as can be."""
    steps = len(chain)
    segments = math.isqrt(steps - 1) + 1
    return tuple(chain.cuts[i * steps // segments - 1] for i in range(1, segments))


def greedy_segments(chain: Chain, threshold_bytes: float) -> tuple[int, ...]:
    """Algorithm 3 of the paper: cut where the segment has made more than `threshold_bytes`."""
    boundaries: list[int] = []
    made = 0
    for cut, step_bytes in zip(chain.cuts, chain.step_bytes, strict=False):
        made += step_bytes
        if made > threshold_bytes:
            boundaries.append(cut)
            made = 0
    return tuple(boundaries)


class _Segments(Solver):
    """What the two forms share: the chain is found, plans are judged, store-all is among them."""

    def applies_to(self, graph: Graph) -> str | None:
        """The reason why the graph has no segments, if it has none."""
        return no_chain_reason(graph)

    def solve(self, graph: Graph, budget_bytes: int, hints: Hints = NO_HINTS) -> Solution:
        """The cheapest of the solver's plans that fits the budget."""
        verdict = Verdict.start(self, graph, budget_bytes, SearchClass.PERSISTENT_CHAIN)
        reason = self.applies_to(graph)
        if reason is not None:
            return verdict.not_applicable(reason)
        store_all = judge(graph, Schedule.store_all(graph))
        if store_all.peak_bytes <= budget_bytes:
            return verdict.conclude([store_all])
        chain = chain_of(graph)
        plans = self._plans(chain) if chain else iter(())
        orders = (segment_order(graph, boundaries) for boundaries in plans)
        return verdict.conclude([store_all, *judge_best(graph, orders, budget_bytes)])

    @abc.abstractmethod
    def _plans(self, chain: Chain) -> Iterator[tuple[int, ...]]:
        """The boundaries of every plan to try."""


@dataclass(frozen=True)
class ChenSqrt(_Segments):
    """⌈√N⌉ equal segments: one plan, whatever the budget."""

    name: ClassVar[str] = "chen-sqrt"

    def _plans(self, chain: Chain) -> Iterator[tuple[int, ...]]:
        yield equal_segments(chain)


@dataclass(frozen=True)
class ChenGreedy(_Segments):
    """Segments of at least so many bytes, with a search for how many.

    **Fields:**

    - `thresholds`: how many thresholds between the largest step and all bytes are tried.
    """

    thresholds: int = 48
    name: ClassVar[str] = "chen-greedy"

    def _plans(self, chain: Chain) -> Iterator[tuple[int, ...]]:
        total, largest = sum(chain.step_bytes), max(chain.step_bytes)
        least = max(1, min(largest, total // len(chain)))
        seen: set[tuple[int, ...]] = set()
        for i in range(self.thresholds):
            boundaries = greedy_segments(chain, least * (max(total, 1) / least) ** (i / max(1, self.thresholds - 1)))
            if boundaries not in seen:
                seen.add(boundaries)
                yield boundaries
