"""Judges what a plan says of itself against its own graph and schedule.

Nothing that a plan states is believed if it can be computed: the peaks and the overhead come from the simulator, the
fingerprints from the graph. Prices are no part of the fingerprint, so the step's seconds are compared as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graph_capture.formats import format_bytes
from graph_capture.graph import Graph, GraphError
from planner.errors import InvalidPlanError, PinError
from planner.pins import Pins, pinned, unpinned
from planner.plan_parts import ParameterRow, parameter_fingerprint
from solvers.schedule import Schedule
from solvers.simulator import ScheduleError, Simulation, simulate, simulate_store_all

TOLERANCE = 1e-9
"""Relative: seconds are added up in another order by whoever adds them, bytes never are."""


@dataclass(frozen=True)
class Claims:
    """What a plan states and :func:`judge` verifies; the fields are those of the plan."""

    budget_bytes: int
    store_all_peak_bytes: int
    predicted_peak_bytes: int
    first_peak_bytes: int
    later_peak_bytes: int
    regime: str
    overhead: float
    lower_bound: float
    gap: float
    step_seconds: float
    loss_operators: int
    fingerprint: str
    structure_fingerprint: str
    parameters: tuple[ParameterRow, ...]
    parameter_fingerprint: str
    pins: Pins


def judge(
    graph_data: Mapping[str, Any], rows: Sequence[int | Sequence[int]], claims: Claims
) -> tuple[Graph, Schedule, Simulation, Simulation]:
    """Rebuild graph and schedule, and verify every claim; raises :class:`~planner.errors.InvalidPlanError`.

    **Returns:**

    Graph and schedule, and what the simulator says of the schedule and of the store-all step.
    """
    graph = _graph(graph_data)
    _same("graph's fingerprint", claims.fingerprint, graph.fingerprint)
    _same("graph's structure fingerprint", claims.structure_fingerprint, graph.structure_fingerprint)
    _same("parameter fingerprint", claims.parameter_fingerprint, parameter_fingerprint(claims.parameters))
    _same("number of loss operators", claims.loss_operators, sum(o.phase == "loss" for o in graph.operators))
    _check_pins(graph, claims.pins)
    schedule = Schedule.from_list(rows)
    try:
        simulation = simulate(graph, schedule)
        store_all = simulate_store_all(graph)
    except ScheduleError as error:
        raise InvalidPlanError(f"the plan's schedule is not legal: {error}") from error
    if simulation.peak_bytes > claims.budget_bytes:
        raise InvalidPlanError(
            f"the plan is over its budget: its peak is {format_bytes(simulation.peak_bytes)}, "
            f"the budget {format_bytes(claims.budget_bytes)}"
        )
    _same("predicted peak", claims.predicted_peak_bytes, simulation.peak_bytes)
    _same("peak of the first micro-batch", claims.first_peak_bytes, simulation.first_peak_bytes)
    _same("peak of a later micro-batch", claims.later_peak_bytes, simulation.later_peak_bytes)
    _same("regime that binds", claims.regime, simulation.regime)
    _same("store-all peak", claims.store_all_peak_bytes, store_all.peak_bytes)
    _close("step's seconds", claims.step_seconds, graph.step_seconds)
    overhead = simulation.recomputed_seconds / graph.step_seconds if graph.step_seconds else 0.0
    _close("overhead", claims.overhead, overhead)
    _close("gap", claims.gap, max(0.0, claims.overhead - claims.lower_bound))
    return graph, schedule, simulation, store_all


def _graph(data: Mapping[str, Any]) -> Graph:
    try:
        graph = Graph.from_dict(data)
        # Computed here, inside of the guard: it fails where a field holds what JSON cannot.
        _ = graph.fingerprint, graph.step_seconds
        return graph
    except (GraphError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise InvalidPlanError(f"the plan's graph cannot be rebuilt: {error}") from error


def _check_pins(graph: Graph, pins: Pins) -> None:
    """The graph must be what the pins make of it; nothing else may be released or said to be asked for."""
    try:
        expected = pinned(graph, pins, strict=False) if pins else unpinned(graph)
    except PinError as error:
        raise InvalidPlanError(f"the plan's pins contradict each other: {error}") from error
    if expected.fingerprint != graph.fingerprint:
        raise InvalidPlanError("the plan's graph is not pinned as its keep and recompute say")


def _same(what: str, stated: object, found: object) -> None:
    if stated != found:
        raise InvalidPlanError(f"the plan states {stated} as its {what}, its graph and schedule give {found}")


def _close(what: str, stated: float, found: float) -> None:
    if not math.isclose(stated, found, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
        raise InvalidPlanError(f"the plan states {stated:.9g} as its {what}, its graph and schedule give {found:.9g}")
