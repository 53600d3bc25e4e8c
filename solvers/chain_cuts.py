"""Where the forward phase of a joint graph can be cut into segments, and what a segment keeps and recomputes.

On a chain every operator is a cut. A real forward graph is a chain only of blocks, and some values ignore the blocks:
a mask or position ids that every layer reads, the encoder's output that every decoder layer reads, the skips of a
U-Net. So a *cut* here is a position in captured order over which, apart from *long-lived* values, the outputs of one
operator pass: everything after it depends on everything before it only through them and the long-lived ones. Where
nothing is long-lived these are exactly the operators that dominate all that follows them, provided that the branches
of a block stand together in the order (a position inside of two interleaved branches is no cut).

A value counts as long-lived if the forward phase reads it over more than a given share of its operators, or if it is
negligibly small. The share is tried at 1 (none), 1/2, 1/4, ... 1/16; the one is taken for which the bytes of the
long-lived values plus the bytes of the largest step between two cuts are least: roughly what no choice of segments
could do without.

Given the cuts at which a solver decides to end its segments (a subset), *every* value that is read in the forward
phase of a later segment than its own is kept: the boundary, and those long-lived values that pass it. A value that
crosses no chosen cut is inside of its segment, long-lived or not.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from graph_capture.graph import Graph
from solvers.structure import repeatable

_SHARES = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
_NEGLIGIBLE = 1e-4  # of the bytes that the forward phase makes


@dataclass(frozen=True)
class Chain:
    """A forward phase as a chain of steps.

    **Fields:**

    - `cuts`: the forward operators behind which the graph may be cut, in order.
    - `step_bytes`: bytes made in each of the `len(cuts) + 1` steps between the cuts.
    - `long_lived`: the values that were left out of account to find the cuts.
    """

    cuts: tuple[int, ...]
    step_bytes: tuple[int, ...]
    long_lived: frozenset[int]

    def __len__(self) -> int:
        return len(self.step_bytes)


def chain_of(graph: Graph) -> Chain | None:
    """The forward phase as a chain; `None` if nothing cuts it."""
    count = graph.last_forward + 1
    spans = forward_spans(graph)
    negligible = _NEGLIGIBLE * sum(graph.values[v].size_bytes for o in graph.operators[:count] for v in o.outputs)
    best: tuple[float, Chain] | None = None
    for share in _SHARES:
        long_lived = {
            v for v, (a, b) in spans.items() if b - a > share * count or graph.values[v].size_bytes <= negligible
        }
        cuts = _cuts(graph, {v: span for v, span in spans.items() if v not in long_lived})
        if not any(cuts):  # behind operator 0 there is always one, with nothing inside of its segment
            continue
        step_bytes = _step_bytes(graph, cuts)
        kept = sum(graph.values[v].size_bytes for v in long_lived)
        score = kept + max(step_bytes)
        if best is None or score < best[0]:
            best = score, Chain(cuts, step_bytes, frozenset(long_lived))
    return best[1] if best else None


def no_chain_reason(graph: Graph) -> str | None:
    """Why a solver of chains does not apply to the graph; `None` if it does (or if there is nothing to do)."""
    if all(operator.phase == "forward" for operator in graph.operators):
        return None if not len(graph) else "does not apply: the graph has no backward phase"
    if chain_of(graph) is None:
        return "does not apply: nothing cuts the forward graph; behind every operator several are still read"
    return None


def segment_order(graph: Graph, boundaries: Sequence[int]) -> list[int]:
    """Executions that keep the values at `boundaries` and recompute each segment once, as a whole, in its backward.

    The last segment is not recomputed: its backward comes first, while it is still in memory. Values of operators
    that must not run twice are kept wherever they are.
    """
    segments = _recomputations(graph, boundaries)
    missing = {v: s for s, operators in segments.items() for o in operators for v in graph.operators[o].outputs}
    order: list[int] = []
    for index, operator in enumerate(graph.operators):
        if operator.phase == "backward":
            for segment in sorted({missing[v] for v in operator.inputs if v in missing}, reverse=True):
                if segment in segments:
                    order += segments.pop(segment)
        order.append(index)
    return order


def _recomputations(graph: Graph, boundaries: Sequence[int]) -> dict[int, list[int]]:
    """For each segment but the last the operators that its backward needs again, in captured order."""
    count = graph.last_forward + 1
    wanted: set[int] = set()
    for operator in graph.operators[count:]:
        if operator.phase == "backward":
            wanted.update(v for v in operator.inputs if graph.values[v].producer < count)
    crossing = _crossing(graph, boundaries)
    wanted -= crossing
    again: dict[int, list[int]] = {}
    end_of_recomputed = boundaries[-1] if boundaries else -1
    for index in range(end_of_recomputed, -1, -1):
        operator = graph.operators[index]
        if repeatable(graph, index) and any(v in wanted for v in operator.outputs):
            wanted.update(v for v in operator.inputs if v not in crossing)
            again.setdefault(bisect.bisect_left(boundaries, index), []).append(index)
    return {segment: operators[::-1] for segment, operators in again.items()}


def _crossing(graph: Graph, boundaries: Sequence[int]) -> set[int]:
    """The values that the forward phase reads in a later segment than the one that makes them."""

    def segment(operator: int) -> int:
        return bisect.bisect_left(boundaries, operator)

    spans = forward_spans(graph)
    return {v for v, (made, last_read) in spans.items() if segment(made) != segment(last_read)}


def forward_spans(graph: Graph) -> dict[int, tuple[int, int]]:
    """For each value that the forward phase reads: its producer and the last forward operator that reads it."""
    spans: dict[int, tuple[int, int]] = {}
    for index, operator in enumerate(graph.operators[: graph.last_forward + 1]):
        for value in operator.inputs:
            spans[value] = (graph.values[value].producer, index)
    return spans


def _cuts(graph: Graph, spans: dict[int, tuple[int, int]]) -> tuple[int, ...]:
    """The forward operators behind which outputs of at most one operator are still to be read."""
    count = graph.last_forward + 1
    reach: dict[int, int] = {}
    for made, last_read in spans.values():
        reach[made] = max(reach.get(made, made), last_read)
    change = [0] * (count + 1)
    for made, last_read in reach.items():
        change[made] += 1
        change[last_read] -= 1
    open_producers = 0
    cuts: list[int] = []
    for index in range(count - 1):
        open_producers += change[index]
        if open_producers <= 1:
            cuts.append(index)
    return tuple(cuts)


def _step_bytes(graph: Graph, cuts: Iterable[int]) -> tuple[int, ...]:
    ends = [-1, *cuts, graph.last_forward]
    made = [sum(graph.values[v].size_bytes for v in o.outputs) for o in graph.operators[: graph.last_forward + 1]]
    return tuple(sum(made[a + 1 : b + 1]) for a, b in pairwise(ends))
