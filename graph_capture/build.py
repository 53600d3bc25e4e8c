"""From the joint forward-backward graph to the :class:`~graph_capture.graph.Graph` that solvers work on.

A value is a storage: every node whose result lies in a storage that is already known is a view and costs nothing.
The loss that the caller computes between forward and backward appears as one operator of phase ``"loss"`` that makes
the tangents. Beside the graph stands a :class:`Binding`, which leads from operators and values back to the nodes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graph_capture.costs import CostModel, Price
from graph_capture.delivery import Delivery, plan_delivery
from graph_capture.errors import CaptureError
from graph_capture.fusible import copied_bytes, is_pointwise, statistics_bytes
from graph_capture.fusion import Fusion, find_fusion
from graph_capture.graph import Compiler, Graph, Operator, Phase, Value
from graph_capture.in_place import InPlaceForm, forms_of_kernel, in_place_forms
from graph_capture.joint import Joint, is_mutation, is_random, storage_key, tensors_of, written_storages
from graph_capture.rereads import read_again_in_passing
from graph_capture.workspace import Footprint, WorkspaceModel

LOSS_NAME = "loss"
CPU_RANDOM_STATE_BYTES = 5056
CUDA_RANDOM_STATE_BYTES = 16


@dataclass(frozen=True)
class Binding:
    """Leads from a graph back to the nodes of the joint graph that it was built from.

    **Fields:**

    - `nodes`: for each operator its node; `None` for the caller's loss.
    - `bases`: for each value the nodes that make it (the operator itself, or its getitems).
    - `value_of`: the values that a node's result lies in; resident memory is no value.
    - `in_place`: (operator, input value) to the form in which the operator runs in that input's allocation.
    - `delivery`: when each gradient is handed over.
    - `inlined`: nodes that are computed in passing by the operator that reads them, and views of such.
    """

    joint: Joint
    nodes: tuple[fx.Node | None, ...]
    bases: tuple[tuple[fx.Node, ...], ...]
    value_of: Mapping[fx.Node, tuple[int, ...]]
    in_place: Mapping[tuple[int, int], InPlaceForm]
    delivery: Delivery
    inlined: frozenset[fx.Node] = frozenset()


def build_graph(
    joint: Joint,
    cost: CostModel,
    workspace: WorkspaceModel,
    *,
    resident_bytes: Mapping[str, int] | None = None,
    gradient_accumulation: bool = False,
    name: str = "",
    compiler: Compiler = "eager",
) -> tuple[Graph, Binding]:
    """Build the graph of a joint program as the kernels of `compiler` run it.

    **Returns:**

    The graph, with one operator of phase `"loss"` if the backward takes tangents, and its binding.
    Raises :class:`CaptureError` if the backward needs old contents of a buffer that the forward overwrites.
    """
    return _Builder(joint, cost, workspace, compiler).build(dict(resident_bytes or {}), gradient_accumulation, name)


@dataclass
class _Draft:
    """An operator before the values' kinds and the gradients' delivery are known."""

    node: fx.Node | None
    phase: Phase
    inputs: tuple[int, ...]
    outputs: list[int] = field(default_factory=list)


class _Builder:
    def __init__(self, joint: Joint, cost: CostModel, workspace: WorkspaceModel, compiler: Compiler) -> None:
        self.joint, self.cost, self.workspace = joint, cost, workspace
        self.compiler: Compiler = compiler
        self.fusion = Fusion()
        self.storage_value: dict[int, int | None] = {}  # storage -> value; None if it is resident
        self.value_of: dict[fx.Node, tuple[int, ...]] = {}
        self.bases: list[list[fx.Node]] = []
        self.tensors: list[torch.Tensor] = []  # one tensor of each value, for its size and shape
        self.producer: list[int] = []
        self.drafts: list[_Draft] = []
        self.names: dict[str, int] = {}
        self.read_by: Counter[int] = Counter()  # value -> operators that read it
        self.written = written_storages(joint.module.graph)

    def build(self, resident: dict[str, int], accumulation: bool, name: str) -> tuple[Graph, Binding]:
        for node in (*self.joint.primals, *self.joint.module.graph.find_nodes(op="get_attr")):
            for tensor in tensors_of(node):
                self.storage_value[storage_key(tensor)] = None
            self.value_of[node] = ()
        forward, backward = self._phases()
        if self.compiler != "eager" and read_again_in_passing(forward, backward, self.written):
            forward, backward = self._phases()
        trained = {
            storage_key(t)
            for primal, gradient in zip(self.joint.primals, self.joint.gradients, strict=True)
            if isinstance(gradient, fx.Node)
            for t in tensors_of(primal)
        }
        self.fusion = find_fusion(forward, backward, written=self.written, trained=trained, compiler=self.compiler)
        for node in forward:
            self._add(node, "forward")
        self._add_tangents()
        for node in backward:
            self._add(node, "backward")
        self.read_by = Counter(v for draft in self.drafts for v in draft.inputs)
        footprints = [self._footprint(d.node) for d in self.drafts]
        values, delivery = self._values(footprints)
        operators, forms = self._operators(values, footprints, delivery)
        graph = Graph(
            operators=operators,
            values=values,
            resident_bytes=resident,
            accumulated_gradient_bytes=delivery.gradient_bytes,
            gradient_accumulation=accumulation,
            name=name,
        )
        nodes = tuple(d.node for d in self.drafts)
        bases = tuple(tuple(b) for b in self.bases)
        inlined = frozenset(self.fusion.inlined)
        return graph, Binding(self.joint, nodes, bases, self.value_of, forms, delivery, inlined)

    def _phases(self) -> tuple[list[fx.Node], list[fx.Node]]:
        """Forward and backward nodes, each in captured order; what depends on a tangent is backward."""
        backward: set[fx.Node] = set(self.joint.tangents)
        forward_nodes, backward_nodes = [], []
        for node in self.joint.module.graph.nodes:
            if node.op != "call_function":
                continue
            depends = any(i in backward for i in node.all_input_nodes)
            if depends and (is_mutation(node) or node.meta.get("partitioner_tag") == "must_be_in_forward"):
                raise CaptureError(
                    f"{describe(node)} writes a result of the backward pass into an input, which is not supported"
                )
            if depends or node.meta.get("partitioner_tag") == "is_backward":
                backward.add(node)
                backward_nodes.append(node)
            else:
                forward_nodes.append(node)
        needed = self._forward_cone()
        # AOTAutograd tags by trace position; a forward output computed late is forward all the same.
        late = [n for n in backward_nodes if n in needed]
        return forward_nodes + late, [n for n in backward_nodes if n not in needed]

    def _forward_cone(self) -> set[fx.Node]:
        cone: set[fx.Node] = set()
        stack = [n for n in self.joint.forward_outputs if isinstance(n, fx.Node)]
        stack += [n for n in self.joint.module.graph.nodes if n.op == "call_function" and is_mutation(n)]
        while stack:
            node = stack.pop()
            if node not in cone:
                cone.add(node)
                stack.extend(node.all_input_nodes)
        return cone

    def _add_tangents(self) -> None:
        if not self.joint.tangents:
            return
        draft = _Draft(None, "loss", ())
        self.drafts.append(draft)
        for node in self.joint.tangents:
            self._new_values(node, draft)

    def _add(self, node: fx.Node, phase: Phase) -> None:
        if node in self.fusion.inlined:
            read = (i for source in node.all_input_nodes for i in self.value_of.get(source, ()))
            self.value_of[node] = tuple(dict.fromkeys(read))
            return
        if node.target.__name__ == "getitem" and not isinstance(node.target, torch._ops.OpOverload):  # type: ignore[union-attr]
            self._add_piece(node)
            return
        inputs = dict.fromkeys(v for i in node.all_input_nodes for v in self.value_of.get(i, ()))
        keys = [storage_key(t) for t in tensors_of(node)]
        if keys and all(k in self.storage_value for k in keys) and not is_mutation(node) and not is_random(node):
            self.value_of[node] = self._values_at(keys)
            return
        draft = _Draft(node, phase, tuple(inputs))
        self.drafts.append(draft)
        self._new_values(node, draft)
        if is_mutation(node):
            self.value_of[node] = ()

    def _add_piece(self, node: fx.Node) -> None:
        """One result of an operator with several: it is a node that makes the value, or a view."""
        source = node.args[0]
        self.value_of[node] = self._values_at([storage_key(t) for t in tensors_of(node)])
        for value in self.value_of[node]:
            made_by_source = self.drafts[self.producer[value]].node is source
            if made_by_source and node not in self.bases[value]:
                self.bases[value] = [b for b in self.bases[value] if b is not source] + [node]

    def _values_at(self, keys: Sequence[int]) -> tuple[int, ...]:
        found = (self.storage_value[k] for k in keys)
        return tuple(dict.fromkeys(v for v in found if v is not None))

    def _new_values(self, node: fx.Node, draft: _Draft) -> None:
        made = []
        for tensor in tensors_of(node):
            key = storage_key(tensor)
            if key not in self.storage_value:
                value = len(self.bases)
                self.storage_value[key] = value
                self.bases.append([node])
                self.tensors.append(tensor)
                self.producer.append(len(self.drafts) - 1)
                draft.outputs.append(value)
            if self.storage_value[key] is not None:
                made.append(self.storage_value[key])
        self.value_of[node] = tuple(dict.fromkeys(made))

    def _values(self, footprints: Sequence[Footprint]) -> tuple[tuple[Value, ...], Delivery]:
        outputs = {v for n in self.joint.forward_outputs if isinstance(n, fx.Node) for v in self.value_of[n]}
        phases = [d.phase for d in self.drafts]
        delivery = plan_delivery(self.joint, self.value_of, self.producer, phases)
        values = []
        for index, tensor in enumerate(self.tensors):
            draft = self.drafts[self.producer[index]]
            retained = footprints[self.producer[index]].retained if draft.outputs[0] == index else 0
            after, copy = delivery.of_value.get(index, (None, 0))
            kind = "output" if index in outputs else "gradient" if after is not None else "activation"
            gradient = kind == "gradient"
            values.append(
                Value(
                    size_bytes=tensor.untyped_storage().nbytes() + retained,
                    producer=self.producer[index],
                    kind=kind,
                    delivered_after=after if gradient else None,
                    delivery_copy_bytes=copy if gradient else 0,
                    shape=tuple(int(s) for s in tensor.shape),
                    dtype=str(tensor.dtype).removeprefix("torch."),
                )
            )
        return tuple(values), delivery

    def _operators(
        self, values: Sequence[Value], footprints: Sequence[Footprint], delivery: Delivery
    ) -> tuple[tuple[Operator, ...], dict[tuple[int, int], InPlaceForm]]:
        operators: list[Operator] = []
        forms: dict[tuple[int, int], InPlaceForm] = {}
        for index, draft in enumerate(self.drafts):
            if draft.node is None:
                reason = "computed by the caller"
                operators.append(
                    Operator(
                        LOSS_NAME,
                        LOSS_NAME,
                        "loss",
                        (),
                        tuple(draft.outputs),
                        0.0,
                        recomputable=False,
                        keep_reason=reason,
                    )
                )
                continue
            node = draft.node
            pairs = []
            for form in self._in_place_forms(node):
                sources = self.value_of[form.argument]
                if form.argument in self.fusion.inlined or not self._may_be_written_over(sources, index, delivery):
                    continue
                fits = len(sources) == 1 and values[sources[0]].size_bytes == values[draft.outputs[0]].size_bytes
                if fits and values[sources[0]].kind == "activation" and len(draft.outputs) == 1:
                    pairs.append((sources[0], draft.outputs[0]))
                    forms[index, sources[0]] = form
            price = self._price(node)
            reason = self._keep_reason(draft, values)
            operators.append(
                Operator(
                    name=self._name(node),
                    target=str(node.target),
                    phase=draft.phase,
                    inputs=draft.inputs,
                    outputs=tuple(draft.outputs),
                    seconds=price.seconds,
                    flops=price.flops,
                    workspace_bytes=footprints[index].scratch,
                    recomputable=not reason,
                    keep_reason=reason,
                    random_state_bytes=_random_state_bytes(node),
                    in_place=tuple(pairs),
                    priced_by=price.priced_by,
                    module=module_of(node),
                    source=source_of(node),
                )
            )
        return tuple(operators), forms

    def _footprint(self, node: fx.Node | None) -> Footprint:
        if node is None:
            return Footprint()
        if node in self.fusion.generated:
            return self.workspace.of_kernel(statistics_bytes(node))
        called = self.workspace.of_node(node)
        if self.compiler == "eager":
            return called
        return Footprint(called.scratch + self.workspace.of_kernel(copied_bytes(node)).scratch, called.retained)

    def _price(self, node: fx.Node) -> Price:
        if node not in self.fusion.generated:
            return self.cost.price(node)
        return self.cost.price_of_kernel(*self.fusion.traffic_of(node))

    def _in_place_forms(self, node: fx.Node) -> list[InPlaceForm]:
        known = in_place_forms(node)
        return forms_of_kernel(node) if not known and node in self.fusion.generated and is_pointwise(node) else known

    def _may_be_written_over(self, sources: Sequence[int], reader: int, delivery: Delivery) -> bool:
        """Whether what an operator writes over was made in the same program: a compiler writes over nothing else.

        That is known of a value with one reader, in the same phase and before the next gradient is handed over: a
        schedule that keeps it for long could as well keep the reader's result, which is of the same size.
        """
        if self.compiler == "eager":
            return True
        if len(sources) != 1 or self.read_by[sources[0]] != 1:
            return False
        maker = self.producer[sources[0]]
        node = self.drafts[maker].node
        if node is None or not self.fusion.may_be_written_over(node):
            return False
        apart = any(maker <= end < reader for end in delivery.slice_ends)
        return self.drafts[maker].phase == self.drafts[reader].phase and not apart

    def _keep_reason(self, draft: _Draft, values: Sequence[Value]) -> str:
        node = draft.node
        assert node is not None
        if is_mutation(node):
            return "writes into a buffer or an input"
        reads_written = any(storage_key(t) in self.written for i in node.all_input_nodes for t in tensors_of(i))
        if reads_written and not _is_training_batch_norm(node):
            if draft.phase == "backward":
                raise CaptureError(
                    f"{describe(node)} needs the old contents of a buffer or input that the forward overwrites; eager "
                    "autograd refuses this too. Make the in-place update on a copy."
                )
            return "reads a buffer that the step changes"
        if draft.phase == "backward":
            return "made by the backward pass"
        if any(values[v].kind != "activation" for v in draft.outputs):
            return "its result is returned to the caller"
        if not draft.outputs:
            return "is run for its effect"
        return ""

    def _name(self, node: fx.Node) -> str:
        stem = f"{module_of(node) or 'model'}/{str(node.target).removeprefix('aten.')}"
        count = self.names[stem] = self.names.get(stem, 0) + 1
        return f"{stem}#{count}"


def _is_training_batch_norm(node: fx.Node) -> bool:
    """In training, batch normalisation reads its running statistics only to return new ones."""
    return "_native_batch_norm_legit" in str(node.target) and True in node.args


def _random_state_bytes(node: fx.Node) -> int:
    if not is_random(node):
        return 0
    on_cpu = all(t.device.type == "cpu" for t in tensors_of(node))
    return CPU_RANDOM_STATE_BYTES if on_cpu else CUDA_RANDOM_STATE_BYTES


def module_of(node: fx.Node) -> str:
    """Path of the innermost module that a node comes from, as in `named_modules`; empty for the root."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"^L\[['\"]\w+['\"]\]\.?(__self__\.?)?", "", path)
    return re.sub(r"_modules\[['\"](\w+)['\"]\]", r"\1", path)


def source_of(node: fx.Node) -> str:
    """`file.py:line` of the innermost frame that a node comes from, with the file's folder."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    path, line = frames[-1]
    return f"{'/'.join(path.split('/')[-2:])}:{line}"


def describe(node: Any) -> str:
    """A node for an error message: operator, module and source line."""
    where = [w for w in (module_of(node), source_of(node)) if w]
    return f"operator {node.target}" + (f" ({', '.join(where)})" if where else "")
