"""The backend that TorchDynamo calls for every guarded graph of a rewritten model.

Dynamo guards what a captured graph bakes in (shapes, numbers, flags, modules, parameters), so a change between calls
arrives here as a *new* graph and is answered: inference graphs run plainly; a training graph that the plan was made
for gets the plan's schedule; the same graph at other shapes gets the same decisions if they fit, else a fresh plan or
one clear error, as the user chose.

Written for torch 2.11 to 2.13: ``aot_module_simplified`` and its `partition_fn` are semi-private.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import TracingContext

from graph_capture.build import Binding
from graph_capture.decompositions import decompositions_for
from graph_capture.dynamo import aot_settings
from graph_capture.graph import Compiler, Graph, Phase
from graph_capture.joint import Joint, partitioner, tangent_positions
from graph_capture.prepare import differentiable_outputs, output_nodes, prepare
from graph_capture.watchers import watched_again
from planner.emit import Programs, emit
from planner.marks import markable
from planner.out_of_memory import Expectation, explained
from planner.slices import ABSENT, Slice, boxed, cut
from planner.tokens import OutputWatch, UnplannedOutput, missing_outputs, start_call, token_gradient
from planner.watching import begin_call
from solvers.schedule import Schedule

Decide = Callable[[Joint], tuple[Graph, Binding, Schedule]]
SelectLoss = Callable[[fx.GraphModule], Sequence[int]]
Expect = Callable[[Graph], Expectation | None]


def _expect_nothing(graph: Graph) -> Expectation | None:
    return None


@dataclass
class CompileRecord:
    """What happened to one graph that Dynamo handed over; kept for tests and reports."""

    kind: str
    operators: int = 0
    recomputed: int = 0


@dataclass
class PlannedBackend:
    """Dynamo backend of one rewritten model.

    **Fields:**

    - `select_loss`: which outputs of a graph the loss comes from.
    - `decide`: the schedule for a joint graph; raises if there is none.
    - `records`: one entry for each graph compiled.
    - `compiler`: `"eager"` runs torch's kernels one by one, `"inductor"` compiles the programs. `kernels`: those that
      the schedules are made for.
    - `expect`: what the schedule that was decided for a graph is predicted to need, for messages.
    """

    select_loss: SelectLoss
    decide: Decide
    records: list[CompileRecord] = field(default_factory=list)
    compiler: Compiler = "eager"
    kernels: Compiler = "eager"
    expect: Expect = _expect_nothing

    def __call__(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one guarded graph."""
        outputs = differentiable_outputs(module)
        if not (torch.is_grad_enabled() and outputs):
            self.records.append(CompileRecord("inference"))
            return watched_program(module.forward)
        return self._training(module, example_inputs, self.select_loss(module))

    def _compile(
        self, expectation: Expectation | None, phase: Phase, module: fx.GraphModule
    ) -> Callable[[list[Any]], Any]:
        if self.compiler == "eager":
            return explained(markable(boxed(module), module), module, phase, expectation)
        from planner.inductor import compile_program

        return explained(compile_program(module, backward=phase == "backward"), module, phase, expectation)

    def _training(
        self, module: fx.GraphModule, example_inputs: Sequence[Any], loss: Sequence[int]
    ) -> Callable[..., Any]:
        prepared = prepare(module, example_inputs, loss)
        emitted: list[tuple[Binding, Programs, Expectation | None]] = []

        def partition(joint: Joint) -> tuple[fx.GraphModule, fx.GraphModule]:
            graph, binding, schedule = self.decide(joint)
            programs = emit(graph, binding, schedule, traceable=self.compiler == "inductor")
            emitted.append((binding, programs, self.expect(graph)))
            recomputed = len(schedule.order) - len(graph)
            self.records.append(CompileRecord("training", len(graph), recomputed))
            return programs.forward, programs.backward

        def forward_compiler(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            # AOTAutograd refuses retain_graph=True unless it knows that no buffer is donated; unset is not enough.
            metadata = TracingContext.get().fw_metadata
            assert metadata is not None
            metadata.bw_donated_idxs = []
            return self._compile(emitted[0][2], "forward", gm)

        def backward_compiler(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            return run_first_slice  # the slices were cut from the same program

        def run_first_slice(arguments: list[Any]) -> tuple[Any, ...]:
            _resolve(arguments, len(binding.joint.tangents))
            state = dict(enumerate(arguments))
            arguments.clear()
            results: list[Any] = [None] * n_gradients
            state[ABSENT] = absent_gradients(binding, missing_outputs())
            slices[0].run_into(state, results)
            results[0] = token_gradient(state)
            return tuple(results)

        run_first_slice._boxed_call = True  # type: ignore[attr-defined]
        with aot_settings(self.kernels):
            compiled = aot_module_simplified(
                prepared.module,
                list(prepared.example_inputs),
                fw_compiler=forward_compiler,
                bw_compiler=backward_compiler,
                decompositions=dict(decompositions_for(self.kernels)),
                partition_fn=partitioner(partition),
                keep_inference_input_mutations=True,
            )
        ((binding, programs, expectation),) = emitted
        slices = cut(programs, functools.partial(self._compile, expectation, "backward"))
        n_gradients = len(binding.joint.gradients)
        detached = prepared.detached_outputs
        planned = sorted(set(differentiable_outputs(module)) - set(detached))
        hidden = (*detached, *outputs_that_feed(module, planned))
        numbers = tangent_positions(binding.joint)
        rows, late = _later_slices(binding)
        call = _TrainingCall(self, compiled, slices, rows, late, expectation, planned, numbers, detached, hidden)
        return watched_program(call)


@dataclass(frozen=True, eq=False)
class _TrainingCall:
    """What a call with gradients runs: the forward program, and a watch over what arrives for the backward one.

    **Fields:**

    - `slices`: of the backward program; `later`, `late`: as of :func:`_later_slices`.
    - `planned`, `detached`, `hidden`: positions of outputs: those whose gradients the plan knows; those that are cut
      off from it; those of which part of the gradient is not seen from outside. `numbers`: as of :class:`OutputWatch`.
    """

    backend: PlannedBackend
    compiled: Callable[..., Any]
    slices: Sequence[Slice]
    later: tuple[tuple[int, tuple[int, ...]], ...]
    late: frozenset[int]
    expectation: Expectation | None
    planned: Sequence[int]
    numbers: Sequence[int]
    detached: Sequence[int]
    hidden: Sequence[int]

    def __call__(self, *arguments: Any) -> Any:
        """Run the forward program; the slices of the backward wait for its gradients."""
        listener = begin_call(self.backend, self.expectation, arguments)
        results = list(self.compiled(*start_call(self.slices, arguments, self.later, self.late)))
        watch = OutputWatch.on(results, self.planned, self.numbers)
        if listener is not None:
            listener.forward_ended(results)
            watch.listener = listener
        if self.detached:
            anchor = torch.zeros((), requires_grad=True)
            for position in self.detached:
                results[position] = UnplannedOutput.apply(anchor, position, results[position])
        watch.hidden = tuple((p, weakref.ref(results[p])) for p in self.hidden)
        return tuple(results)


def _resolve(arguments: list[Any], n_tangents: int) -> None:
    """Carry out conjugations and negations that autograd left for later: a backward is traced for plain tangents."""
    for position in range(len(arguments) - n_tangents, len(arguments)):
        tangent = arguments[position]
        if tangent.is_conj() or tangent.is_neg():
            arguments[position] = tangent.resolve_conj().resolve_neg()


def watched_program(run: Callable[..., Any]) -> Callable[..., Any]:
    """What Dynamo calls in the place of a graph: dispatch modes that were put aside for its guards see it run."""

    def call(*arguments: Any) -> Any:
        with watched_again():
            return run(*arguments)

    return call


def outputs_that_feed(module: fx.GraphModule, planned: Collection[int]) -> tuple[int, ...]:
    """The loss outputs that another one is computed from: part of their gradient arises inside of the model."""
    outputs = output_nodes(module)
    sources: dict[fx.Node, set[fx.Node]] = {}
    for node in module.graph.nodes:
        sources[node] = {a for i in node.all_input_nodes for a in (i, *sources[i])}
    return tuple(i for i in planned if any(outputs[i] in sources[outputs[j]] for j in planned))


def absent_gradients(binding: Binding, missing: Collection[int]) -> frozenset[int]:
    """The primals whose gradients depend only on tangents that did not arrive: they have none, as in eager."""
    if not missing:
        return frozenset()
    joint = binding.joint
    reaches: dict[fx.Node, frozenset[int]] = {t: frozenset({i}) for i, t in enumerate(joint.tangents)}
    for node in joint.module.graph.nodes:
        if node not in reaches:
            reaches[node] = frozenset[int]().union(*(reaches[i] for i in node.all_input_nodes))
    gradients = ((p, g) for p, g in enumerate(joint.gradients) if isinstance(g, fx.Node))
    return frozenset(p for p, g in gradients if reaches[g] <= set(missing))


def _later_slices(binding: Binding) -> tuple[tuple[tuple[int, tuple[int, ...]], ...], frozenset[int]]:
    """For every slice but the first, last one first: its number and the arguments that it makes gradients for."""
    delivery = binding.delivery
    rows = []
    for number in range(len(delivery.slice_ends) - 1, 0, -1):
        # Primal 0 is the token, so argument i is primal i + 1.
        rows.append((number, tuple(p - 1 for p, s in delivery.slice_of.items() if s == number)))
    return tuple(rows), frozenset(p for _, positions in rows for p in positions)
