"""``plan(model, budget)``: capture, solve, and put everything that was decided into a :class:`Plan`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from graph_capture.capture import Capture, capture
from graph_capture.costs import Costs, default_costs
from graph_capture.devices import Device
from graph_capture.graph import Compiler, Graph
from graph_capture.inputs import resolve_inputs
from graph_capture.watchers import unwatched
from planner.budget import Budget, parse_budget
from planner.describe import describe_environment, describe_inputs, describe_model, describe_solver
from planner.errors import error_for_solution
from planner.pins import NO_PINS, Patterns, Pins, pinned, pins_of
from planner.plan_file import Plan
from planner.plan_parts import BudgetRequest, LossPlace
from planner.ranks import refuse_wrapper
from planner.switches import refuse_checkpointing
from planner.warm_start import Start, schedules_of_start
from solvers.auto import chosen_solver
from solvers.hints import Hints, ProgressListener
from solvers.simulator import simulate, simulate_store_all
from solvers.solution import Solution, Solver

LossFn = Callable[[Any], torch.Tensor]


def plan(
    model: Any,
    budget: int | str | Budget,
    example_inputs: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    loss_fn: LossFn | None = None,
    solver: Solver | None = None,
    device: str | Device | None = None,
    time_limit_seconds: float | None = None,
    gradient_accumulation: bool = True,
    extra_bytes: Mapping[str, int] | None = None,
    costs: Costs | None = None,
    compiler: Compiler = "eager",
    keep: Patterns = (),
    recompute: Patterns = (),
    start: Start | None = None,
    progress: ProgressListener | None = None,
) -> Plan:
    """Decide what one training step of `model` keeps and what it recomputes, within a budget in bytes.

    Nothing is run and no activation is allocated; the model and the random state are left as they are.

    **Arguments:**

    - `budget`: bytes as an integer, or a text with a unit: `"12GiB"`, or `"60%"` of what eager PyTorch would need. It
      covers everything: parameters, buffers, inputs, gradients, activations, workspace, and `extra_bytes`.
    - `example_inputs`, `example_kwargs`: as the model is called; tensors may be fake. Known without being said for a
      Hugging Face model, an `ExportedProgram`, and an `fx.GraphModule` with `meta["val"]`.
    - `loss_fn`: takes the model's result and returns a scalar; needed only if the model does not return its loss.
    - `solver`: :class:`~solvers.auto.Auto` if not given; `time_limit_seconds` replaces its limit.
    - `device`: whose speed, kernels and allocator the plan is made for, by name (`graph_capture.devices.DEVICES`), or
      `"cuda"`, the card at hand; the one that the model's parameters are on if it is not given. For a card, a model on
      the CPU is planned with the operators that CUDA would run.
    - `gradient_accumulation`: whether the plan must also hold when `.grad` is there from the start. Say `False` if
      every step starts with `zero_grad(set_to_none=True)`: more of the budget is then left for activations.
    - `extra_bytes`: memory beside the step's, by label, such as optimizer state and a headroom for fragmentation.
    - `costs`: where the operators' seconds come from: a `"roofline"` of the device, each distinct operator `"measured"`
      on the device at hand (it then runs, on zeros), or `"flops"` alone. If not given: measured for `device="cuda"`,
      else the roofline.
    - `compiler`: whose kernels run the step: torch's own (`"eager"`), or those of `"inductor"`, in which neighbouring
      pointwise operators are fused: what is fused whatever the schedule costs no memory, and running a fused operator
      again costs what it reads (:mod:`graph_capture.fusion`). Fusion is Inductor's decision, so that the predicted peak
      is an estimate there.
    - `keep`, `recompute`: modules whose results are held, or are recomputed, whatever the solver would decide, by name
      or pattern such as `"transformer.h.*.attn"`; :mod:`planner.pins` says exactly what they mean.
    - `start`: an earlier plan of the same step, or a schedule such as that of :func:`planner.minimum_budget`, to start
      from. Where it fits, the default solver makes a plan, however little time it has, and none that costs more;
      solvers of a fixed form may leave it aside.
    - `progress`: called with a :class:`~solvers.hints.Progress` now and then while the solver works.

    **Returns:**

    A :class:`Plan`, verified by the simulator.

    Raises :class:`~planner.errors.BudgetError`, :class:`~planner.errors.PinError`,
    :class:`~planner.errors.CaptureError`, and :class:`~planner.errors.InfeasibleBudgetError` with the smallest budget
    known to work.
    """
    wanted = parse_budget(budget)
    solver = chosen_solver(solver, time_limit_seconds)
    pins = pins_of(keep, recompute)
    chosen = costs or default_costs(device)
    module, captured, capture_seconds = capture_with_peak(
        model,
        example_inputs,
        example_kwargs,
        loss_fn=loss_fn,
        device=device,
        gradient_accumulation=gradient_accumulation,
        extra_bytes=extra_bytes,
        costs=chosen,
        compiler=compiler,
        pins=pins,
    )
    budget_bytes, solution = solved(captured, wanted, solver, start, progress)
    return plan_of(module, captured, wanted, budget_bytes, solution, solver, capture_seconds, chosen, pins)


def capture_with_peak(
    model: Any,
    example_inputs: Sequence[Any],
    example_kwargs: Mapping[str, Any] | None,
    *,
    pins: Pins = NO_PINS,
    **options: Any,
) -> tuple[torch.nn.Module, Capture, float]:
    """The module, its captured step with its pins, and the seconds that it took; `options` as of :func:`capture`.

    Where eager cannot be counted on fake tensors, the store-all schedule's peak stands in for eager's.
    """
    started = time.perf_counter()
    module, args, kwargs = resolve_inputs(model, example_inputs, example_kwargs)
    refuse_wrapper(module)
    refuse_checkpointing(module)
    with unwatched():
        captured = capture(module, args, kwargs, **options)
    unless = "" if captured.compiler == "eager" else "one that Inductor computes in passing has nothing to pin"
    captured = dataclasses.replace(captured, graph=pinned(captured.graph, pins, unless=unless))
    seconds = time.perf_counter() - started
    if captured.eager_peak_bytes is None:
        store_all = simulate_store_all(captured.graph)
        captured = dataclasses.replace(captured, eager_peak_bytes=store_all.peak_bytes)
    return module, captured, seconds


def solved(
    captured: Capture, wanted: Budget, solver: Solver, start: Start | None, progress: ProgressListener | None
) -> tuple[int, Solution]:
    """The budget in bytes, and a solution that has a schedule; raises as :func:`plan` does where there is none."""
    assert captured.eager_peak_bytes is not None
    budget_bytes = wanted.resolve(captured.eager_peak_bytes)
    hints = Hints(schedules=schedules_of_start(captured.graph, start), progress=progress)
    hints.starting(solver)
    solution = solver.solve(captured.graph, budget_bytes, hints)
    if solution.schedule is None:
        raise error_for_solution(solution, captured.graph, budget_bytes, captured.eager_peak_bytes)
    return budget_bytes, solution


def plan_of(
    model: torch.nn.Module,
    captured: Capture,
    wanted: Budget,
    budget_bytes: int,
    solution: Solution,
    solver: Solver,
    capture_seconds: float,
    costs: Costs = "roofline",
    pins: Pins = NO_PINS,
) -> Plan:
    """Put a solution and where it comes from into a plan."""
    graph = captured.graph
    assert solution.schedule is not None
    assert captured.eager_peak_bytes is not None
    simulation = simulate(graph, solution.schedule)
    store_all = simulate_store_all(graph)
    overhead = simulation.recomputed_seconds / graph.step_seconds if graph.step_seconds else 0.0
    notes = list(captured.notes)
    if budget_bytes >= store_all.peak_bytes and not graph.released:
        notes.append("the budget covers the store-all schedule: nothing is recomputed")
    if solution.hit_limit and not solution.interrupted:
        notes.append("a limit ended the search: with more time a better plan or bound may be found")
    return Plan(
        environment=describe_environment(captured.device.name),
        model=describe_model(model),
        inputs=describe_inputs(captured.args, captured.kwargs),
        training=model.training,
        loss=LossPlace(location=captured.loss.location, outputs=captured.loss.outputs, note=captured.loss.note),
        budget=BudgetRequest(requested=str(wanted), covers=_covers(graph, budget_bytes)),
        program_fingerprint=captured.program_fingerprint,
        structure_fingerprint=graph.structure_fingerprint,
        fingerprint=graph.fingerprint,
        loss_operators=sum(o.phase == "loss" for o in graph.operators),
        solver=solution.solver,
        status=solution.status.name,  # type: ignore[arg-type]
        search_class=solution.search_class.value,
        bound_scope=solution.bound_scope,
        budget_bytes=budget_bytes,
        eager_peak_bytes=captured.eager_peak_bytes,
        eager_peak_source=captured.eager_peak_source,
        store_all_peak_bytes=store_all.peak_bytes,
        predicted_peak_bytes=simulation.peak_bytes,
        first_peak_bytes=simulation.first_peak_bytes,
        later_peak_bytes=simulation.later_peak_bytes,
        regime=simulation.regime,
        overhead=overhead,
        lower_bound=solution.lower_bound,
        gap=max(0.0, overhead - solution.lower_bound),
        solve_seconds=solution.seconds,
        capture_seconds=capture_seconds,
        step_seconds=graph.step_seconds,
        message=solution.message,
        notes=tuple(notes),
        pins=pins,
        settings=_settings(captured, solver) | {"costs": costs},
        schedule=solution.schedule,  # type: ignore[arg-type]
        graph=graph,  # type: ignore[arg-type]
    )


def _covers(graph: Graph, budget_bytes: int) -> tuple[tuple[str, int], ...]:
    """What the budget is for, line by line; what no line names is left for the schedule to fill."""
    lines = [(label, size) for label, size in graph.resident_bytes.items() if size]
    if graph.gradient_accumulation:
        lines.append(("gradients already accumulated", graph.accumulated_gradient_bytes))
    rest = budget_bytes - sum(size for _, size in lines)
    return (*lines, ("activations, new gradients, temporaries and workspace", max(0, rest)))


def _settings(captured: Capture, solver: Solver) -> dict[str, Any]:
    """What a fresh plan for the same model needs to know, when a call arrives that this one was not made for."""
    graph = captured.graph
    return {
        "solver": describe_solver(solver),
        "device": captured.device.name,
        "gradient_accumulation": graph.gradient_accumulation,
        "program_structure": captured.program_structure,
        "compiler": captured.compiler,
        "extra_bytes": {k: v for k, v in graph.resident_bytes.items() if k not in _OWN_LINES},
    }


_OWN_LINES = frozenset({"parameters", "buffers", "inputs", "bookkeeping"})
