"""Which schedule a captured training graph runs: the plan's, the same decisions at other shapes, or a fresh one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from graph_capture.build import Binding, build_graph
from graph_capture.capture import bare_graph, round_allocations, workspace_model
from graph_capture.costs import cost_model
from graph_capture.devices import device_by_name
from graph_capture.formats import format_bytes
from graph_capture.graph import Graph
from graph_capture.joint import Joint, tensors_of
from graph_capture.prepare import differentiable_outputs, example_value, output_nodes
from planner.errors import PlanMismatchError, error_for_solution
from planner.out_of_memory import Expectation
from planner.pins import pinned
from planner.plan_file import Plan
from solvers.registry import solver_class
from solvers.schedule import Schedule
from solvers.simulator import ScheduleError, simulate

OnChange = Literal["replan", "error"]


class PlanChangedWarning(UserWarning):
    """The model is called in a way that the plan was not made for, and a fresh plan was made for it."""


@dataclass(frozen=True)
class Decider:
    """Decides for one rewritten model.

    **Fields:**

    - `on_change`: `"replan"` makes a fresh plan within the same budget when the graph is another one, `"error"`
      refuses. The same graph at other shapes keeps its decisions as long as they fit.
    - `changes`: why fresh plans were made; whoever calls the model empties it, and warns.
    - `others`: what calls that the plan was not made for are predicted to need, by the fingerprints of their graphs.
    """

    plan: Plan
    on_change: OnChange
    changes: list[str] = field(default_factory=list)
    others: dict[str, Expectation] = field(default_factory=dict)

    def select_loss(self, module: fx.GraphModule) -> Sequence[int]:
        """The outputs that the loss comes from: the plan's, if they can be; else the one scalar; else all."""
        differentiable = differentiable_outputs(module)
        planned = self.plan.loss.outputs
        values = [example_value(node) for node in output_nodes(module)]
        inside = self.plan.loss.location == "inside the model"
        if set(planned) <= set(differentiable) and (not inside or all(values[i].dim() == 0 for i in planned)):
            return planned
        scalars = [i for i in differentiable if values[i].dim() == 0]
        return scalars if len(scalars) == 1 else differentiable

    def decide(self, joint: Joint) -> tuple[Graph, Binding, Schedule]:
        """The schedule for a joint graph; raises :class:`PlanMismatchError` or `InfeasibleBudgetError`."""
        bare, binding = bare_graph(joint, self.plan.compiler)
        order = self._planned_order(bare)
        if bare.fingerprint == self.plan.program_fingerprint:
            return bare, binding, Schedule.from_order(bare, order)
        same_structure = bare.structure_fingerprint == self.plan.settings.get("program_structure")
        priced = self._priced(joint)
        if same_structure:
            peak = _peak_or_none(priced, order)
            if peak is not None and peak <= self.plan.budget_bytes:
                self._expect_other(bare, priced, Schedule.from_order(priced, order), peak)
                return bare, binding, Schedule.from_order(bare, order)
            reason = (
                "the model returns a result that the plan recomputes"
                if peak is None
                else f"the same graph at larger shapes needs {format_bytes(peak)} with the plan's decisions, the "
                f"budget is {format_bytes(self.plan.budget_bytes)}"
            )
        else:
            reason = self._difference(bare, binding)
        if self.on_change == "error":
            raise PlanMismatchError(
                f"the plan does not fit this call: {reason}. Plan again with these inputs, or allow it with "
                "rewrite(model, plan, on_change='replan')."
            )
        self.changes.append(reason)
        return bare, binding, self._replan(priced, bare)

    def expect(self, bare: Graph) -> Expectation | None:
        """What the schedule that was decided for a graph is predicted to need."""
        if bare.fingerprint != self.plan.program_fingerprint:
            return self.others.get(bare.fingerprint)
        made = self.plan
        return Expectation(made.predicted_peak_bytes, made.budget_bytes, made.to_graph(), made.to_schedule())

    def _expect_other(self, bare: Graph, priced: Graph, schedule: Schedule, peak_bytes: int) -> None:
        self.others[bare.fingerprint] = Expectation(peak_bytes, self.plan.budget_bytes, priced, schedule)

    def _planned_order(self, bare: Graph) -> list[int]:
        """The plan's executions as operators of the model's own graph, whose loss is a single operator."""
        first = next((i for i, o in enumerate(self.plan.to_graph().operators) if o.phase == "loss"), 0)
        count = self.plan.loss_operators
        order: list[int] = []
        for operator in self.plan.to_schedule().order:
            if operator < first:
                order.append(operator)
            elif operator == first:
                order.append(first)
            elif operator >= first + count:
                order.append(operator - count + 1)
        return order

    def _priced(self, joint: Joint) -> Graph:
        """The graph with prices, workspace and resident memory of this call."""
        settings = self.plan.settings
        device = device_by_name(settings["device"])
        storages = {
            t.untyped_storage()._cdata: t.untyped_storage().nbytes() for p in joint.primals for t in tensors_of(p)
        }
        planned = self.plan.to_graph().resident_bytes
        fixed = sum(planned.get(k, 0) for k in ("parameters", "buffers"))
        resident = {
            "model and inputs": max(fixed, sum(storages.values())),
            "bookkeeping": planned.get("bookkeeping", 0),
        }
        resident |= settings.get("extra_bytes", {})
        graph, _ = build_graph(
            joint,
            cost_model(settings.get("costs", "roofline"), device),
            workspace_model(device),
            resident_bytes=resident,
            gradient_accumulation=settings["gradient_accumulation"],
            compiler=self.plan.compiler,
        )
        return round_allocations(self._with_loss(graph), device)

    def _with_loss(self, graph: Graph) -> Graph:
        """The memory of the caller's loss, scaled from the plan's shapes to this call's: the loss is not seen here."""
        at = next((i for i, o in enumerate(graph.operators) if o.phase == "loss"), None)
        planned = self.plan.to_graph()
        made = [v for o in planned.operators if o.phase == "loss" for v in o.outputs]
        last = {v: max(planned.uses[v], default=planned.values[v].producer) for v in made}
        handed = {v for v in made if planned.operators[last[v]].phase == "backward"}
        before = sum(planned.values[v].size_bytes for v in handed)
        if at is None or not before:
            return graph
        needed = 0
        for index, operator in enumerate(planned.operators):
            if operator.phase == "loss":
                alive = (v for v in made if planned.values[v].producer <= index <= last[v])
                needed = max(needed, operator.workspace_bytes + sum(planned.values[v].size_bytes for v in alive))
        loss = graph.operators[at]
        tangents = sum(graph.values[v].size_bytes for v in loss.outputs)
        scaled = dataclasses.replace(loss, workspace_bytes=max(0, math.ceil(needed * tangents / before) - tangents))
        return dataclasses.replace(graph, operators=(*graph.operators[:at], scaled, *graph.operators[at + 1 :]))

    def _replan(self, priced: Graph, bare: Graph) -> Schedule:
        chosen: dict[str, Any] = self.plan.settings["solver"]
        solver = solver_class(chosen["name"])(**chosen["options"])
        with _disable_current_modes():
            # A module that computes nothing in this mode of the model has nothing to pin.
            priced = pinned(priced, self.plan.pins, strict=False)
            solution = solver.solve(priced, self.plan.budget_bytes)
        if solution.schedule is None:
            raise error_for_solution(solution, priced, self.plan.budget_bytes)
        self._expect_other(bare, priced, solution.schedule, solution.predicted_peak_bytes)
        return Schedule.from_order(bare, solution.schedule.order)

    def _difference(self, bare: Graph, binding: Binding) -> str:
        """How the graph at hand differs from the plan's, in words."""
        types = {t.device.type for p in binding.joint.primals for t in tensors_of(p) if t.dim()}
        name, on_card = self.plan.settings["device"], bool(device_by_name(self.plan.settings["device"]).memory_bytes)
        elsewhere = ""
        if types == {"cpu"} and on_card:
            elsewhere = f"the plan is for {name} and the model is on the CPU, whose kernels are others: "
        elif types == {"cuda"} and not on_card:
            elsewhere = f"the plan is for {name} and the model is on a GPU, whose kernels are others: "
        return elsewhere + self._first_difference(bare)

    def _first_difference(self, bare: Graph) -> str:
        planned = [o for o in self.plan.to_graph().operators if o.phase != "loss"]
        given = [o for o in bare.operators if o.phase != "loss"]
        for mine, theirs in zip(planned, given, strict=False):
            if mine.target != theirs.target:
                where = " ".join(p for p in (theirs.module, f"({theirs.source})" if theirs.source else "") if p)
                where = where or "the model"
                return f"at {where} the model runs {theirs.target}, the plan {mine.target} (another mode, flag or code)"
        if len(planned) != len(given):
            return f"the model runs {len(given)} operators, the plan has {len(planned)}"
        return "the same operators are connected in another way"


def _peak_or_none(graph: Graph, order: Sequence[int]) -> int | None:
    """Peak of the plan's decisions on another graph of the same structure; `None` if they are not legal there."""
    try:
        return simulate(graph, Schedule.from_order(graph, order)).peak_bytes
    except ScheduleError:
        return None
