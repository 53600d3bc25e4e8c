"""A plan for a graph that `torch.compile` hands over: there is no module, only a function and its inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from graph_capture.build import Binding, build_graph
from graph_capture.capture import (
    Capture,
    bare_graph,
    notes_of,
    resident_bytes,
    round_allocations,
    with_declared,
    workspace_model,
)
from graph_capture.costs import cost_model
from graph_capture.eager import eager_peak_bytes
from graph_capture.fake import fake_tensor
from graph_capture.graph import Graph
from graph_capture.joint import Joint
from graph_capture.loss import LossChoice
from graph_capture.prepare import differentiable_outputs, example_value, output_nodes
from graph_capture.target import device_of, target_of
from planner.api import plan_of, solved
from planner.compile_options import CompileOptions
from planner.decide import Decider
from planner.errors import CaptureError
from planner.out_of_memory import Expectation
from planner.pins import pinned
from planner.plan_file import Plan
from planner.ranks import compare_plans, from_first_rank
from solvers.schedule import Schedule
from solvers.simulator import simulate_store_all


class CompiledFunction(nn.Module):
    """Stands for the function of a graph: has the parameters and buffers among its inputs, under the model's names."""

    def __init__(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        super().__init__()
        self.graph_module = [module]  # in a list: it is no part of the function's parameters
        self.inputs: list[Any] = []
        mode = FakeTensorMode()
        fakes = [fake_tensor(value, mode) if isinstance(value, torch.Tensor) else value for value in example_inputs]
        names = module.meta.get("dynamo_flat_name_to_original_fqn", {})
        for node, value in zip(module.graph.find_nodes(op="placeholder"), fakes, strict=True):
            name = str(names.get(node.name, node.name))
            if isinstance(value, nn.Parameter):
                self._parameters[name] = value
            elif "_buffers" in str(getattr(node, "_dynamo_source", "")):
                self._buffers[name] = value
            else:
                self.inputs.append(value)
        self.mode, self._arguments = mode, tuple(fakes)

    def forward(self, *_: Any) -> Any:
        """The graph with its own inputs."""
        return self.graph_module[0](*self._arguments)


@dataclass
class CompileDecider:
    """Decides for the graphs of one `torch.compile`: makes or takes its plan at the first training graph.

    **Fields:**

    - `ranks`: those of a data-parallel run, which share one plan. `plan`: once it is there.
    """

    options: CompileOptions
    ranks: tuple[int, ...]
    plan: Plan | None = None
    changes: list[str] = field(default_factory=list)
    others: dict[str, Expectation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.plan = self.options.given_plan
        if self.plan is not None and len(self.ranks) > 1:
            compare_plans(self.ranks, self.plan.identity, repr(self.plan))

    def callbacks(
        self, module: fx.GraphModule, example_inputs: Sequence[Any]
    ) -> tuple[Callable[[fx.GraphModule], Sequence[int]], Callable[[Joint], tuple[Graph, Binding, Schedule]]]:
        """What :class:`~planner.backend.PlannedBackend` asks for, for one graph."""
        known = self._decider()
        if known is not None:
            return known.select_loss, known.decide
        loss = loss_of_graph(module)
        function = CompiledFunction(module, example_inputs)
        eager = _eager_peak(function, loss, self.options.gradient_accumulation)

        def decide(joint: Joint) -> tuple[Graph, Binding, Schedule]:
            def make() -> str:
                return plan_joint(joint, function, loss, eager, self.options).to_json()

            text = from_first_rank(self.ranks, make) if len(self.ranks) > 1 else make()
            self.plan = Plan.from_json(text)
            if self.options.on_plan is not None:
                self.options.on_plan(self.plan)
            decider = self._decider()
            assert decider is not None
            return decider.decide(joint)

        return lambda _: loss.outputs, decide

    def expect(self, graph: Graph) -> Expectation | None:
        """As :meth:`planner.decide.Decider.expect`."""
        decider = self._decider()
        return decider.expect(graph) if decider is not None else None

    def _decider(self) -> Decider | None:
        if self.plan is None:
            return None
        return Decider(
            self.plan, "replan" if self.options.plan is None else self.options.on_change, self.changes, self.others
        )


def loss_of_graph(module: fx.GraphModule) -> LossChoice:
    """The one scalar output that requires a gradient, if it is the only one; else the loss comes from all outputs."""
    differentiable = differentiable_outputs(module)
    outputs = output_nodes(module)
    scalars = tuple(i for i in differentiable if example_value(outputs[i]).dim() == 0)
    if len(scalars) == 1:
        return LossChoice("inside the model", scalars)
    note = "the loss is computed outside of the compiled function and is not in the budget; compile it, too"
    return LossChoice("outside the budget", tuple(differentiable), note)


def plan_joint(
    joint: Joint,
    function: CompiledFunction,
    loss: LossChoice,
    eager: tuple[int | None, str],
    options: CompileOptions,
) -> Plan:
    """Solve for one joint graph, with prices; raises as :func:`planner.plan` does."""
    started = time.perf_counter()
    device = target_of(function, options.device)
    try:
        cost = cost_model(options.chosen_costs, device)
    except ValueError as error:
        raise CaptureError(str(error)) from error
    workspace = workspace_model(device)
    resident = with_declared(resident_bytes(function, function.inputs, {}), options.extra_bytes)
    with _disable_current_modes():
        graph, _ = build_graph(
            joint,
            cost,
            workspace,
            resident_bytes=resident,
            gradient_accumulation=options.gradient_accumulation,
            name="compiled function",
            compiler=options.chosen_compiler,
        )
        bare, _ = bare_graph(joint, options.chosen_compiler)
        graph = pinned(round_allocations(graph, device), options.pins)
        store_all = simulate_store_all(graph).peak_bytes
        above, source = eager
        captured = Capture(
            graph=graph,
            program_fingerprint=bare.fingerprint,
            program_structure=bare.structure_fingerprint,
            loss=loss,
            eager_peak_bytes=store_all if above is None else above + graph.resident_total_bytes,
            eager_peak_source=source,
            device=device,
            args=tuple(function.inputs),
            kwargs={},
            notes=notes_of(graph, loss, workspace, cost),
            compiler=options.chosen_compiler,
        )
        wanted, solver = options.wanted, options.chosen_solver
        seconds = time.perf_counter() - started
        budget_bytes, solution = solved(captured, wanted, solver, options.given_start, options.progress)
        costs, pins = options.chosen_costs, options.pins
        return plan_of(function, captured, wanted, budget_bytes, solution, solver, seconds, costs, pins)


def _eager_peak(function: CompiledFunction, loss: LossChoice, accumulation: bool) -> tuple[int | None, str]:
    """Eager's peak above what is resident, on fake tensors; `None` and the reason if the graph cannot run on them."""

    def loss_of(outputs: Any) -> torch.Tensor:
        if loss.location == "inside the model":
            return outputs[loss.outputs[0]]
        return torch.stack([outputs[i].sum() for i in loss.outputs]).sum()

    try:
        with torch.random.fork_rng(devices=[]):
            peak = eager_peak_bytes(
                function,
                function.inputs,
                {},
                loss_of,
                mode=function.mode,
                workspace=workspace_model(device_of(function)),
                gradient_accumulation=accumulation,
            )
    except Exception as error:  # whatever an operator raises on tensors without data
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return None, f"store-all's peak: the graph cannot run on fake tensors ({reason})"
    return peak, "one eager step of the compiled graph on fake tensors"
