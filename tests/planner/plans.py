"""Small plans for tests, without torch: a chain of equal layers and its backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graph_capture.graph import Graph, Operator, Value
from planner.plan_file import Plan
from planner.plan_parts import BudgetRequest, Environment, LossPlace, ModelIdentity, OtherInput, TensorInput
from solvers.schedule import Schedule
from solvers.simulator import simulate

LAYERS = 6
RECOMPUTE_ONE = (0, 1, 2, 3, 4, 5, 6, 7, 3, 8, 9, 10, 11)
"""Layer 3 runs again right before its backward, in a chain of six layers."""


def chain(layers: int = LAYERS, *, gradient_accumulation: bool = False) -> Graph:
    """`layers` forward operators of 100 bytes each, and a backward that reads them in reverse."""
    operators: list[Operator] = []
    values: list[Value] = []
    for i in range(layers):
        inputs = (i - 1,) if i else ()
        module, source = f"layers.{i}", f"model.py:{10 + i}"
        operators.append(Operator(f"f{i}", "aten.mm", "forward", inputs, (i,), 1.0, 10, module=module, source=source))
        values.append(Value(100, i, shape=(5, 5), dtype="float32"))
    for j in range(layers):
        i, made = layers - 1 - j, layers + j
        inputs = (i, made - 1) if j else (i,)
        operators.append(Operator(f"b{i}", "aten.addmm", "backward", inputs, (made,), 2.0, module=f"layers.{i}"))
        values.append(Value(100, made, shape=(5, 5), dtype="float32"))
    # One parameter's gradient, so that the two regimes differ.
    last = len(operators)
    operators.append(Operator("g0", "aten.mm", "backward", (len(values) - 1,), (len(values),), 1.0, module="layers.0"))
    values.append(Value(40, last, kind="gradient", delivered_after=last, shape=(10,), dtype="float32"))
    return Graph(
        tuple(operators),
        tuple(values),
        {"parameters": 40, "inputs": 10},
        accumulated_gradient_bytes=40,
        gradient_accumulation=gradient_accumulation,
        name="chain",
    )


def plan_fields(graph: Graph | None = None, order: Sequence[int] | None = None) -> dict[str, Any]:
    """Fields of a consistent plan; by default layer 3 of a chain of six is recomputed."""
    if graph is None:
        graph = chain()
        order = (*RECOMPUTE_ONE, len(graph) - 1) if order is None else order
    schedule = Schedule.store_all(graph) if order is None else Schedule.from_order(graph, order)
    simulation = simulate(graph, schedule)
    store_all = simulate(graph, Schedule.store_all(graph))
    overhead = simulation.recomputed_seconds / graph.step_seconds
    return {
        "environment": Environment(
            python="3.11", torch="2.13", platform="Linux", device="cpu", default_dtype="float32"
        ),
        "model": ModelIdentity.of("models.Chain", [("weight", (2, 5), "float32", True)]),
        "inputs": [
            TensorInput(path="args[0]", shape=(2,), dtype="int64"),
            OtherInput(path="kwargs['mask']", value="None"),
        ],
        "training": True,
        "loss": LossPlace(location="inside the model", outputs=(0,)),
        "budget": BudgetRequest(requested="90%", covers=(("parameters", 40), ("inputs", 10))),
        "program_fingerprint": "program",
        "structure_fingerprint": graph.structure_fingerprint,
        "fingerprint": graph.fingerprint,
        "loss_operators": 0,
        "solver": "auto",
        "status": "FEASIBLE",
        "search_class": "ORDERED",
        "bound_scope": "every schedule, in whatever order",
        "budget_bytes": simulation.peak_bytes + 5,
        "eager_peak_bytes": store_all.peak_bytes,
        "eager_peak_source": "simulated",
        "store_all_peak_bytes": store_all.peak_bytes,
        "predicted_peak_bytes": simulation.peak_bytes,
        "first_peak_bytes": simulation.first_peak_bytes,
        "later_peak_bytes": simulation.later_peak_bytes,
        "regime": simulation.regime,
        "overhead": overhead,
        "lower_bound": 0.0,
        "gap": overhead,
        "solve_seconds": 0.5,
        "capture_seconds": 1.0,
        "step_seconds": graph.step_seconds,
        "message": "",
        "notes": ("a note",),
        "settings": {"solver": "auto", "options": {"seed": 0}, "extra_bytes": {}},
        "schedule": schedule.to_list(),
        "graph": graph.to_dict(),
    }


def make_plan(**changes: Any) -> Plan:
    """A plan with some fields changed."""
    return Plan(**{**plan_fields(), **changes})
