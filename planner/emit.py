"""From a schedule to the two programs that run it: forward and backward ``torch.fx`` graphs.

Every execution of the schedule becomes one node; a recomputed operator appears several times. The generated code
releases each name after its last use, which is where the schedule frees the value, so what the simulator counted is
what the allocator sees. Views are made again wherever they are needed, from the one tensor of each storage that is
kept. A value that the backward program needs and the forward program made is saved by AOTAutograd between the two.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._functorch._aot_autograd.descriptors import SavedForBackwardsAOTOutput, SavedForBackwardsNoVcCheckAOTOutput
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state

from graph_capture.build import Binding
from graph_capture.graph import Graph
from graph_capture.joint import tensors_of
from planner.dropout import round_as_in_eager
from planner.errors import RewriteError
from planner.random_state import replay, save_random_state
from solvers.schedule import Compute, Schedule, programs_of

BATCH_NORM = torch.ops.aten._native_batch_norm_legit_functional.default
BATCH_NORM_WITHOUT_STATISTICS = torch.ops.aten._native_batch_norm_legit.no_stats
EXECUTION = "planned_execution"
"""Key in the `meta` of the first node of each execution: its position in the order of the schedule."""


@dataclass(frozen=True)
class Programs:
    """A schedule as two programs.

    **Fields:**

    - `forward`: the primals in; forward outputs, then what is saved for the backward, out.
    - `backward`: what was saved, then the tangents in; one gradient (or `None`) for each primal out.
    - `slice_ends`: for each slice of the backward the number of its body nodes up to the slice's end; equal ends belong
      to slices that are made together.
    - `slice_gradients`: for each slice the primals whose gradients it hands over.
    - `borders`: numbers of body nodes at which slices that wait for a later one would have ended.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    slice_ends: tuple[int, ...]
    slice_gradients: tuple[tuple[int, ...], ...]
    borders: tuple[int, ...]


def emit(graph: Graph, binding: Binding, schedule: Schedule, *, traceable: bool = False) -> Programs:
    """Turn a schedule of `graph` into programs; raises :class:`RewriteError` if it uses what is not in memory.

    With `traceable` the programs hold nothing but operators of torch without side effects on activations, for another
    compiler: no in-place forms, and random operators that run again carry their state through torch's own operators.
    """
    round_as_in_eager(binding.joint.module.graph, traceable=traceable)
    return _Emitter(graph, binding, schedule, traceable).emit()


class _Program:
    """One program under construction: an fx graph, and the node that at present stands for each joint node."""

    def __init__(self, binding: Binding, on_missing: Callable[[fx.Node], fx.Node]) -> None:
        self.graph = fx.Graph()
        self.binding = binding
        self.present: dict[fx.Node, fx.Node] = {}
        self.of_value: dict[int, list[fx.Node]] = {}
        self.inlined_present: list[fx.Node] = []
        self.bases = {base for bases in binding.bases for base in bases}
        self.on_missing = on_missing

    def define(self, node: fx.Node, emitted: fx.Node) -> None:
        self.present[node] = emitted
        if node in self.binding.inlined:
            self.inlined_present.append(node)
        for value in self.binding.value_of.get(node, ()):
            self.of_value.setdefault(value, []).append(node)

    def forget(self, value: int) -> None:
        for node in self.of_value.pop(value, ()):
            self.present.pop(node, None)

    def forget_inlined(self) -> None:
        """What was computed in passing, by the operator that has just run, is nowhere afterwards."""
        for node in self.inlined_present:
            self.present.pop(node, None)
        self.inlined_present.clear()

    def get(self, node: fx.Node) -> fx.Node:
        """The node that stands for `node` now; views are made again from the tensor that fills their storage.

        So are nodes that a compiler inlines into the operator that is being emitted.

        A view of several pieces is taken apart at once: tensors pass from one slice to the next, tuples cannot.
        """
        if node in self.present:
            return self.present[node]
        if node in self.bases or node.op in ("placeholder", "get_attr"):
            emitted = self.on_missing(node)
        elif _is_piece(node) and self.get(node.all_input_nodes[0]) and node in self.present:
            return self.present[node]
        else:
            emitted = self.graph.node_copy(node, self.get)
        self.define(node, emitted)
        for piece in node.users:
            if _is_piece(piece) and piece not in self.bases:
                self.define(piece, self.graph.node_copy(piece, lambda _: emitted))
        return emitted


class _Emitter:
    def __init__(self, graph: Graph, binding: Binding, schedule: Schedule, traceable: bool) -> None:
        self.traceable = traceable
        self.operators, self.binding, self.schedule = graph.operators, binding, schedule
        self.returned = {value.producer for value in graph.values if value.kind == "output"}
        self.joint = binding.joint
        order = schedule.order
        self.programs = programs_of(graph, order)
        self.runs = {index: order.count(index) for index in set(order) if is_random_operator(graph, index)}
        self.done: set[int] = set()
        self.executed = 0
        self.forward = _Program(binding, self._missing_in_forward)
        self.backward = _Program(binding, self._import)
        self.forward_states: dict[int, fx.Node] = {}
        self.backward_states: dict[int, fx.Node] = {}
        self.saved: list[tuple[fx.Node, fx.Node]] = []  # (node of the forward program, placeholder of the backward)
        self.anchor: fx.Node | None = None
        self.ends: list[int] = []
        self.slice_gradients: list[tuple[int, ...]] = []
        self.borders: list[int] = []

    def emit(self) -> Programs:
        for primal in self.joint.primals:
            self.forward.define(primal, _placeholder(self.forward.graph, primal))
        position = 0
        steps = self.schedule.steps
        number = 0
        while number < len(steps) and (not isinstance(steps[number], Compute) or self.programs[position] == "forward"):
            position += self._step(self.forward, self.forward_states, steps[number])
            number += 1
        outputs = [self.forward.get(n) if isinstance(n, fx.Node) else n for n in self.joint.forward_outputs]
        self._open_backward()
        for step in steps[number:]:
            self._step(self.backward, self.backward_states, step)
        return self._finish(outputs)

    def _open_backward(self) -> None:
        for tangent in self.joint.tangents:
            placeholder = _placeholder(self.backward.graph, tangent)
            self.anchor = self.anchor or placeholder
            self.backward.define(tangent, placeholder)

    def _step(self, program: _Program, states: dict[int, fx.Node], step: Any) -> int:
        if not isinstance(step, Compute):
            program.forget(step.value)
            return 0
        node = self.binding.nodes[step.operator]
        if node is not None:
            self._compute(program, states, step, node)
        if program is self.backward and step.operator not in self.done:
            self._deliver(step.operator)
        self.done.add(step.operator)
        self.executed += 1
        return 1

    def _compute(self, program: _Program, states: dict[int, fx.Node], step: Compute, node: fx.Node) -> None:
        operator = self.operators[step.operator]
        again = step.operator in self.done
        unread = node.args[3:5] if again and node.target is BATCH_NORM else ()
        for argument in node.all_input_nodes:
            if argument not in unread:
                program.get(argument)
        for value in operator.outputs:
            program.forget(value)
        before = next(reversed(program.graph.nodes))
        if step.reuses is not None and not self.traceable:
            emitted = self._in_place(program, step, node)
            program.forget(step.reuses)
        elif self.runs.get(step.operator, 0) > 1 and self.traceable:
            emitted = self._random_traceable(program, states, step.operator, node)
        elif self.runs.get(step.operator, 0) > 1:
            emitted = self._random(program, states, step.operator, node)
        elif again and node.target is BATCH_NORM:
            emitted = _without_statistics(program, node)
        else:
            emitted = program.graph.node_copy(node, program.get)
        before.next.meta[EXECUTION] = self.executed
        pieces = [u for u in node.users if _is_piece(u)]
        if emitted.target is BATCH_NORM_WITHOUT_STATISTICS:
            pieces = [u for u in pieces if u.args[1] < 3]  # type: ignore[operator]
        if not pieces:
            program.define(node, emitted)
        for piece in pieces:
            program.define(piece, program.graph.node_copy(piece, lambda n: emitted if n is node else program.get(n)))
        program.forget_inlined()

    def _in_place(self, program: _Program, step: Compute, node: fx.Node) -> fx.Node:
        form = self.binding.in_place[step.operator, step.reuses]  # type: ignore[index]
        arguments = [fx.map_arg(a, program.get) for a in node.args]
        if form.swapped:
            arguments[0], arguments[1] = arguments[1], arguments[0]
        emitted = program.graph.call_function(
            form.overload, tuple(arguments), fx.map_arg(dict(node.kwargs), program.get)
        )
        emitted.meta = copy.copy(node.meta)
        if step.operator not in self.returned:
            return emitted
        # What ran in place may be a view of what it wrote to, and the caller gets it. In eager it is none: autograd
        # treats a view otherwise when it is written to, and FSDP warns of it. The storage is the same.
        alone = program.graph.call_function(
            torch.ops.aten._unsafe_view.default, (emitted, list(node.meta["val"].shape))
        )
        alone.meta = copy.copy(node.meta)
        return alone

    def _random(self, program: _Program, states: dict[int, fx.Node], index: int, node: fx.Node) -> fx.Node:
        device = next(t.device.type for t in tensors_of(node))
        if index not in self.done:
            states[index] = program.graph.call_function(save_random_state, (device,))
            states[index].meta["val"] = _fake_like(node, self.operators[index].random_state_bytes)
            return program.graph.node_copy(node, program.get)
        if index not in states:
            states[index] = self._import_state(index)
        arguments = fx.map_arg(tuple(node.args), program.get)
        keywords = fx.map_arg(dict(node.kwargs), program.get)
        target: Any = node.target
        emitted = program.graph.call_function(replay, (states[index], device, target, *arguments), keywords)
        emitted.meta = copy.copy(node.meta)
        return emitted

    def _random_traceable(self, program: _Program, states: dict[int, fx.Node], index: int, node: fx.Node) -> fx.Node:
        arguments = fx.map_arg(tuple(node.args), program.get)
        keywords = fx.map_arg(dict(node.kwargs), program.get)
        target: Any = node.target
        if index in self.done:
            if index not in states:
                states[index] = self._import_state(index)
            emitted = program.graph.call_function(run_with_rng_state, (states[index], target, *arguments), keywords)
            emitted.meta = copy.copy(node.meta)
            return emitted
        both = program.graph.call_function(run_and_save_rng_state, (target, *arguments), keywords)
        state = _fake_like(node, self.operators[index].random_state_bytes)
        both.meta = {**node.meta, "val": (state, node.meta["val"])}
        states[index], emitted = (program.graph.call_function(operator.getitem, (both, i)) for i in range(2))
        states[index].meta["val"] = state
        emitted.meta = copy.copy(node.meta)
        return emitted

    def _deliver(self, index: int) -> None:
        """At the end of a slice its gradients are brought into the form in which autograd gets them."""
        delivery = self.binding.delivery
        if index not in delivery.complete_at and index not in delivery.slice_ends:
            return
        numbers = [number for number, end in enumerate(delivery.slice_ends) if end == index]
        if numbers and numbers[0] != len(self.ends):
            raise RewriteError(
                f"the schedule completes gradient slice {numbers[0]} when slice {len(self.ends)} is due: gradients "
                "must be delivered in captured order"
            )
        handed = [tuple(p for p, s in delivery.slice_of.items() if s == number) for number in numbers]
        for primal in itertools.chain(*handed):
            self.backward.get(self.joint.gradients[primal])
        end = sum(n.op != "placeholder" for n in self.backward.graph.nodes)
        if index in delivery.complete_at:
            self.borders.append(end)
        self.ends += [end] * len(numbers)
        self.slice_gradients += handed

    def _missing_in_forward(self, node: fx.Node) -> fx.Node:
        if node.op == "get_attr":
            return self.forward.graph.node_copy(node)
        raise RewriteError(f"the schedule uses {node} in the forward program while it is not in memory")

    def _import(self, node: fx.Node) -> fx.Node:
        """The backward program needs what the forward program holds at its end."""
        if node.op == "get_attr":
            return self.backward.graph.node_copy(node)
        if node not in self.forward.present:
            raise RewriteError(f"the schedule uses {node} in the backward program while it is not in memory")
        return self._import_as(node, self.forward.present[node])

    def _import_as(self, node: fx.Node, source: fx.Node) -> fx.Node:
        assert self.anchor is not None
        with self.backward.graph.inserting_before(self.anchor):
            placeholder = _placeholder(self.backward.graph, node)
        self.saved.append((source, placeholder))
        self.backward.present[node] = placeholder
        return placeholder

    def _import_state(self, index: int) -> fx.Node:
        source = self.forward_states[index]
        assert self.anchor is not None
        with self.backward.graph.inserting_before(self.anchor):
            placeholder = self.backward.graph.placeholder(f"random_state_{index}")
        placeholder.meta["val"] = source.meta["val"]
        self.saved.append((source, placeholder))
        return placeholder

    def _finish(self, outputs: list[Any]) -> Programs:
        checked = [s for s in self.saved if not s[0].meta.get("saved_tensor_with_no_vc_check", False)]
        unchecked = [s for s in self.saved if s[0].meta.get("saved_tensor_with_no_vc_check", False)]
        assert self.anchor is not None
        for _, placeholder in (*checked, *unchecked):
            self.anchor.prepend(placeholder)
        descriptions: list[Any] = list(self.joint.output_descriptions[: len(outputs)])
        descriptions += [SavedForBackwardsAOTOutput(i) for i in range(len(checked))]
        descriptions += [SavedForBackwardsNoVcCheckAOTOutput(i + len(checked)) for i in range(len(unchecked))]
        result = self.forward.graph.output((*outputs, *(s for s, _ in checked), *(s for s, _ in unchecked)))
        result.meta["desc"] = descriptions
        gradients = [self.backward.get(n) if isinstance(n, fx.Node) else n for n in self.joint.gradients]
        result = self.backward.graph.output(tuple(gradients))
        result.meta["desc"] = list(self.joint.output_descriptions[len(outputs) :])
        self.forward.graph.lint()
        self.backward.graph.lint()
        return Programs(
            forward=fx.GraphModule(self.joint.module, self.forward.graph, "PlannedForward"),
            backward=fx.GraphModule(self.joint.module, self.backward.graph, "PlannedBackward"),
            slice_ends=tuple(self.ends),
            slice_gradients=tuple(self.slice_gradients),
            borders=tuple(self.borders),
        )


def _without_statistics(program: _Program, node: fx.Node) -> fx.Node:
    """Batch normalisation once more: the first run updated the running statistics, which may have changed since."""
    x, weight, bias, _, _, training, momentum, eps = node.args
    arguments = fx.map_arg((x, weight, bias, training, momentum, eps), program.get)
    emitted = program.graph.call_function(BATCH_NORM_WITHOUT_STATISTICS, arguments, {})
    emitted.meta = {**node.meta, "val": node.meta["val"][:3]}
    return emitted


def is_random_operator(graph: Graph, index: int) -> bool:
    """Whether an operator draws random numbers."""
    return graph.operators[index].random_state_bytes > 0


def _is_piece(node: fx.Node) -> bool:
    return not isinstance(node.target, torch._ops.OpOverload) and getattr(node.target, "__name__", "") == "getitem"


def _placeholder(graph: fx.Graph, node: fx.Node) -> fx.Node:
    placeholder = graph.placeholder(node.name)
    placeholder.meta = copy.copy(node.meta)
    return placeholder


def _fake_like(node: fx.Node, size_bytes: int) -> torch.Tensor:
    fake_mode = tensors_of(node)[0].fake_mode  # type: ignore[attr-defined]
    with fake_mode:
        return torch.empty(size_bytes, dtype=torch.uint8)
