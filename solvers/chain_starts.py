"""Orders of the classic chain methods, as places to start a search from: Chen's segments, rotor's plans, revolve's.

Each is built in milliseconds and judged by whoever asks. Loose budgets are met by few segments, tight ones by many or
by running steps again several times; the orders come from loose to tight, so that the first that fits is among the
cheapest of its family.
"""

from __future__ import annotations

from collections.abc import Iterator

from graph_capture.graph import Graph
from solvers.chain_cuts import Chain, chain_of, segment_order
from solvers.chain_stages import stage_cuts
from solvers.chen import ChenGreedy, ChenSqrt, equal_segments, greedy_segments
from solvers.heterogeneous_chain import WIDEST, HeterogeneousChain
from solvers.hints import Suggestion
from solvers.revolve import ChainSteps, Revolve

THRESHOLDS = 32
MOST_REVOLVE_ORDERS = 40

ROTOR_UNITS, MOST_STAGES = 120, 160
"""The heterogeneous chain's programme is asked with coarse memory, and on chains of up to so many stages."""

FINE_UNITS, FINE_STAGES, FINE_OPTIONS = 1000, 200, 12
"""What the slow suggestions ask of it."""

TABLE_BYTES = 4e8
"""How large the tables of the fine programme may be; its units are as fine as that allows."""


def chain_suggestions(graph: Graph, budget_bytes: int) -> Iterator[Suggestion]:
    """Orders of executions of `graph` by the chain methods; none where nothing cuts its forward phase."""
    chain = chain_of(graph) if any(o.phase == "backward" for o in graph.operators) else None
    if chain is None:
        return
    yield Suggestion(ChenSqrt.name, segment_order(graph, equal_segments(chain)))
    total, largest = sum(chain.step_bytes), max(chain.step_bytes)
    least = max(1, min(largest, total // len(chain)))
    seen: set[tuple[int, ...]] = set()
    for i in reversed(range(THRESHOLDS)):
        boundaries = greedy_segments(chain, least * (max(total, 1) / least) ** (i / (THRESHOLDS - 1)))
        if boundaries not in seen:
            seen.add(boundaries)
            yield Suggestion(ChenGreedy.name, segment_order(graph, boundaries))
    for i in reversed(range(THRESHOLDS)):
        boundaries = tapered_segments(graph, chain, least * (max(total, 1) / least) ** (i / (THRESHOLDS - 1)))
        if boundaries not in seen:
            seen.add(boundaries)
            yield Suggestion(ChenGreedy.name, segment_order(graph, boundaries))
    if len(stage_cuts(graph, chain, len(graph))) < MOST_STAGES:
        rotor = HeterogeneousChain(units=ROTOR_UNITS)
        for order in rotor.orders(graph, budget_bytes):
            yield Suggestion(rotor.name, order)
    steps = ChainSteps.of(graph, chain)
    slots = list(Revolve(most_repetitions=4).slots(len(chain)))
    for count in slots[:: max(1, len(slots) // MOST_REVOLVE_ORDERS)]:
        yield Suggestion(Revolve.name, steps.order(count))


def fine_chain_suggestions(graph: Graph, budget_bytes: int) -> Iterator[Suggestion]:
    """The plans of a fine table of the heterogeneous chain's programme that come nearest to the budget.

    Where memory binds in every layer (a long model whose gradients fill it as its activations go), rounding to coarse
    units, and few options per stage, cost most of what there is. The table takes a second or more.
    """
    chain = chain_of(graph) if any(o.phase == "backward" for o in graph.operators) else None
    if chain is None:
        return
    stages = len(stage_cuts(graph, chain, FINE_STAGES)) + 1
    units = min(FINE_UNITS, int(TABLE_BYTES / (2 * 8 * WIDEST * stages**2)))  # two tables of 8 bytes a cell
    rotor = HeterogeneousChain(units=max(1, units), max_stages=FINE_STAGES, options=FINE_OPTIONS)
    for order in rotor.orders_nearest(graph, budget_bytes):
        yield Suggestion(rotor.name, order)


def tapered_segments(graph: Graph, chain: Chain, threshold_bytes: float) -> tuple[int, ...]:
    """Segments whose own bytes and those of the boundaries kept before them stay below one threshold.

    The backward of the last segment finds all boundaries in memory, that of the first one none: so segments may be the
    larger the earlier they come, which levels the peaks that equal segments leave uneven.
    """
    boundaries: list[int] = []
    made, kept = 0, 0
    for cut, step_bytes in zip(chain.cuts, chain.step_bytes, strict=False):
        made += step_bytes
        if made + kept > threshold_bytes:
            boundaries.append(cut)
            kept += sum(graph.values[v].size_bytes for v in graph.operators[cut].outputs)
            made = 0
    return tuple(boundaries)
