"""From a model and example inputs to everything that a plan needs: the one entry of this package.

The model is copied without its memory, one training call is traced by TorchDynamo, its loss is found, the joint
forward-backward graph is built, and what eager would need is counted; nothing is run and nothing is allocated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from graph_capture.build import Binding, build_graph
from graph_capture.costs import CostModel, Costs, Price, cost_model
from graph_capture.cuda_kernels import CudaOperators
from graph_capture.devices import Device
from graph_capture.dynamo import CapturedCall, capture_call
from graph_capture.eager import eager_peak_bytes, rounded_up
from graph_capture.errors import CaptureError
from graph_capture.fake import fake_copy, fake_inputs, fake_mode_of
from graph_capture.graph import Compiler, Graph
from graph_capture.inputs import resolve_inputs
from graph_capture.joint import Joint
from graph_capture.loss import (
    LossChoice,
    check_scalar,
    choose_loss,
    insert_loss,
    outputs_of_loss,
    tensors_of_tangents,
)
from graph_capture.partitions import SavedOutputs, saved_by_pytorch
from graph_capture.prepare import differentiable_outputs
from graph_capture.target import absent_card, card_notes, target_of
from graph_capture.workspace import DeclaredWorkspace, MeasuredWorkspace, NoWorkspace, WorkspaceModel

LossFn = Callable[[Any], torch.Tensor]
BOOKKEEPING_BYTES = 64
"""The token, the loss's own gradient and the anchor of unplanned outputs: a few scalars."""


@dataclass(frozen=True)
class Capture:
    """One captured training step.

    **Fields:**

    - `graph`: operators and values of forward, loss and backward. `program_fingerprint`, `program_structure`: of
      the model's part alone, without prices and workspace; the same for planning and for running.
    - `loss`: where the loss comes from.
    - `eager_peak_bytes`: resident memory included; `None` if eager cannot run on fake tensors, in which case the peak
      of the store-all schedule is to stand in. `eager_peak_source` says which, and why.
    - `notes`: what the user should know: operators priced by bytes, workspace that was declared, the loss.
    - `saved_by_pytorch`: for each memory budget asked for, what PyTorch's partitioner would save.
    - `compiler`: whose kernels the graph is of.
    """

    graph: Graph
    program_fingerprint: str
    program_structure: str
    loss: LossChoice
    eager_peak_bytes: int | None
    eager_peak_source: str
    device: Device
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    notes: tuple[str, ...] = ()
    saved_by_pytorch: Mapping[float, SavedOutputs] = field(default_factory=dict)
    compiler: Compiler = "eager"


def capture(
    model: Any,
    example_inputs: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    loss_fn: LossFn | None = None,
    device: str | Device | None = None,
    gradient_accumulation: bool = True,
    extra_bytes: Mapping[str, int] | None = None,
    costs: Costs = "roofline",
    memory_budgets: Sequence[float] = (),
    compiler: Compiler = "eager",
) -> Capture:
    """Capture one training step.

    **Arguments:**

    - `example_inputs`, `example_kwargs`: as the model is called; tensors may be fake.
    - `loss_fn`: takes the model's result, returns a scalar tensor.
    - `device`: whose speed, kernels and allocator are assumed, `"cuda"` for the card at hand; the one that the
      parameters are on if it is not given. For a card, a model on the CPU is captured as CUDA would run it.
    - `extra_bytes`: memory beside the model's, by label (optimizer state, headroom), resident for the whole step.
    - `costs`: where the operators' seconds come from: a `"roofline"` of the device, each distinct operator
      `"measured"` on it, or `"flops"` alone.
    - `compiler`: whose kernels run the model; the caller's loss is run by PyTorch's own.
    - `memory_budgets`: values of PyTorch's `activation_memory_budget` to see what its partitioner would save with.

    Raises :class:`CaptureError`.
    """
    module, args, kwargs = resolve_inputs(model, example_inputs, example_kwargs)
    _check_trainable(module)
    if compiler not in get_args(Compiler):
        raise CaptureError(f"compiler is {compiler!r}; it must be 'eager' or 'inductor'")
    target = target_of(module, device)
    workspace = workspace_model(target)
    try:
        cost = cost_model(costs, target)
    except ValueError as error:
        raise CaptureError(str(error)) from error
    mode = fake_mode_of(module, (args, kwargs))
    with _RandomStateKept():
        twin = fake_copy(module, mode)
        fake_args, fake_kwargs = fake_inputs((args, kwargs), mode)
        with mode:
            call = capture_call(twin._call_impl, fake_args, fake_kwargs)
            loss_call, loss = _loss(call, loss_fn)
            card = absent_card(module, target)
            joint = call.joint(loss.outputs, card, compiler)
    resident = with_declared(resident_bytes(module, args, kwargs, target.allocation_bytes), extra_bytes or {})
    build = _Build(cost, workspace, resident, gradient_accumulation, type(module).__name__, card)
    graph, _ = dataclasses.replace(build, compiler=compiler)(joint)
    bare, binding = bare_graph(joint, compiler)
    saved = saved_by_pytorch(bare, binding, memory_budgets)
    if loss_call is not None:
        graph = _with_loss(graph, joint, call, loss_call, build)
    graph = round_allocations(graph, target)
    kernels = CudaOperators(card) if card is not None else contextlib.nullcontext()
    with _RandomStateKept(), kernels:
        unit = target.allocation_bytes
        peak, source = _eager_peak(twin, fake_args, fake_kwargs, loss, loss_fn, mode, workspace, graph, unit)
    notes = notes_of(graph, loss, workspace, cost) + (card_notes(graph, card) if card is not None else ())
    prints = bare.fingerprint, bare.structure_fingerprint
    return Capture(graph, *prints, loss, peak, source, target, args, kwargs, notes, saved, compiler)


def bare_graph(joint: Joint, compiler: Compiler = "eager") -> tuple[Graph, Binding]:
    """The graph of a joint program without prices, workspace and resident memory: what fingerprints are taken of."""
    return build_graph(joint, _Free(), NoWorkspace(), compiler=compiler)


def workspace_model(device: Device) -> WorkspaceModel:
    """Measured on the CPU at hand, declared for a device that is not here."""
    return MeasuredWorkspace() if device.name == "cpu" else DeclaredWorkspace(device.library_workspace_bytes)


def resident_bytes(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], unit_bytes: int = 1
) -> dict[str, int]:
    """Bytes that are in memory whatever the schedule, by label; every storage once, in multiples of `unit_bytes`."""
    seen: set[int] = set()

    def size(tensors: Any) -> int:
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                total += rounded_up(storage.nbytes(), unit_bytes)
        return total

    return {
        "parameters": size(module.parameters()),
        "buffers": size(module.buffers()),
        "inputs": size(t for t in tree_leaves((tuple(args), dict(kwargs))) if isinstance(t, torch.Tensor)),
        "bookkeeping": BOOKKEEPING_BYTES,
    }


def with_declared(own_bytes: Mapping[str, int], extra_bytes: Mapping[str, int]) -> dict[str, int]:
    """The step's own lines and the declared ones; raises :class:`CaptureError` where one would replace the other."""
    for label in extra_bytes:
        if label in own_bytes:
            raise CaptureError(
                f"extra_bytes declares {label!r}, which is counted from the model itself: give memory beside the step "
                "another label"
            )
    return {**own_bytes, **extra_bytes}


def round_allocations(graph: Graph, device: Device) -> Graph:
    """Sizes as the device's allocator hands them out."""
    unit = device.allocation_bytes
    if unit == 1:
        return graph
    values = tuple(dataclasses.replace(v, size_bytes=rounded_up(v.size_bytes, unit)) for v in graph.values)
    pairs = zip(values, graph.values, strict=True)
    padding = sum(v.size_bytes - before.size_bytes for v, before in pairs if v.kind == "gradient")
    accumulated = graph.accumulated_gradient_bytes and graph.accumulated_gradient_bytes + padding
    return dataclasses.replace(graph, values=values, accumulated_gradient_bytes=accumulated)


class _Free(CostModel):
    """No price: fingerprints do not depend on it."""

    def price(self, node: Any) -> Price:
        """Always nothing."""
        return Price(0.0, 0, "bytes")

    def price_of_kernel(self, moved_bytes: int, launches: int) -> Price:
        """Always nothing."""
        return Price(0.0, 0, "bytes")


@dataclass(frozen=True)
class _Build:
    cost: CostModel
    workspace: WorkspaceModel
    resident: Mapping[str, int]
    gradient_accumulation: bool
    name: str
    card: Device | None = None
    compiler: Compiler = "eager"

    def __call__(self, joint: Joint) -> tuple[Graph, Binding]:
        return build_graph(
            joint,
            self.cost,
            self.workspace,
            resident_bytes=self.resident,
            gradient_accumulation=self.gradient_accumulation,
            name=self.name,
            compiler=self.compiler,
        )


class _RandomStateKept:
    """Random state of Python and torch is the same after as before."""

    def __enter__(self) -> None:
        self.state = random.getstate(), torch.get_rng_state()

    def __exit__(self, *_: object) -> None:
        random.setstate(self.state[0])
        torch.set_rng_state(self.state[1])


def _check_trainable(module: nn.Module) -> None:
    lazy = [name for name, parameter in module.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise CaptureError(
            f"parameter {lazy[0]!r} of {type(module).__name__} has no shape yet: call the model once, so that its lazy "
            "modules make their parameters, before planning"
        )
    if not any(p.requires_grad for p in module.parameters()):
        raise CaptureError(
            f"{type(module).__name__} has no parameter that requires a gradient: there is no backward pass to plan. "
            "Unfreeze what you train before planning."
        )
    if not module.training:
        raise CaptureError(f"{type(module).__name__} is in eval mode; a plan is for training: call model.train() first")
    if not torch.is_grad_enabled():
        raise CaptureError("planning runs under torch.no_grad(): leave it, a training step is captured")


def _loss(call: CapturedCall, loss_fn: LossFn | None) -> tuple[CapturedCall | None, LossChoice]:
    differentiable = differentiable_outputs(call.module)
    if not differentiable:
        raise CaptureError("no output of the model requires a gradient: there is no backward pass to plan")
    if loss_fn is None:
        return None, choose_loss(call.result, call.outputs, differentiable)

    def loss_of_result(result: Any) -> torch.Tensor:
        return loss_fn(result)

    loss_call = capture_call(loss_of_result, (call.result,), {})
    check_scalar(loss_call.result)
    chosen = outputs_of_loss(loss_call.real_inputs, call.outputs)
    if not chosen or not differentiable_outputs(loss_call.module):
        raise CaptureError("loss_fn does not depend on any output of the model that requires a gradient")
    if not loss_call.module.graph.find_nodes(op="output")[0].all_input_nodes[0].op.startswith("call"):
        return None, LossChoice("inside the model", chosen)  # `loss_fn` only picks one of the outputs
    return loss_call, LossChoice("loss_fn", chosen)


def _with_loss(graph: Graph, joint: Joint, call: CapturedCall, loss_call: CapturedCall, build: _Build) -> Graph:
    loss_graph, binding = build(loss_call.joint((0,), build.card))
    # Primal 0 is the token; the others are the loss's inputs in order.
    position = {id(value): index + 1 for index, value in enumerate(loss_call.real_inputs)}
    outputs = tensors_of_tangents(joint, call.outputs, call.real_inputs)
    gradient_of = [position.get(id(output)) for output in outputs]
    return insert_loss(graph, loss_graph, binding, gradient_of, outputs, build.workspace)


def _eager_peak(
    twin: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    loss: LossChoice,
    loss_fn: LossFn | None,
    mode: Any,
    workspace: WorkspaceModel,
    graph: Graph,
    unit_bytes: int,
) -> tuple[int | None, str]:
    """Eager's peak on fake tensors, resident memory included; `None` and the reason where the model cannot run."""

    def loss_of(result: Any) -> torch.Tensor:
        if loss_fn is not None:
            return loss_fn(result)
        tensors = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.requires_grad]
        named = result.get("loss") if isinstance(result, dict) else getattr(result, "loss", None)
        scalar = named if isinstance(named, torch.Tensor) else next((t for t in tensors if t.dim() == 0), None)
        if loss.location == "inside the model" and scalar is not None:
            return scalar
        return torch.stack([t.sum() for t in tensors]).sum()

    try:
        above = eager_peak_bytes(
            twin,
            args,
            kwargs,
            loss_of,
            mode=mode,
            workspace=workspace,
            gradient_accumulation=graph.gradient_accumulation,
            unit_bytes=unit_bytes,
        )
    except Exception as error:  # whatever user code raises on tensors without data
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return None, f"store-all's peak: eager cannot run on fake tensors ({reason})"
    return above + graph.resident_total_bytes, "one eager step on fake tensors"


def notes_of(
    graph: Graph, loss: LossChoice, workspace: WorkspaceModel, cost: CostModel | None = None
) -> tuple[str, ...]:
    """What the user should know: the loss, what was declared or estimated, operators that were priced by bytes."""
    notes = [loss.note] if loss.note else []
    if cost is not None and (estimated := cost.estimated):
        names = ", ".join(sorted(estimated))
        notes.append(f"seconds are estimated, since they are too large or not safe to try alone, for {names}")
    if isinstance(workspace, MeasuredWorkspace) and workspace.declared:
        notes.append(
            "workspace is a declared bound, since they are too large or not safe to try alone, for "
            + ", ".join(sorted(workspace.declared))
        )
    by_bytes = [o for o in graph.operators if o.priced_by == "bytes" and o.phase != "loss"]
    heavy = sorted({o.target for o in by_bytes if o.seconds > 0.01 * graph.step_seconds})
    if heavy:
        notes.append(f"priced by bytes moved, for want of a FLOP formula: {', '.join(heavy)}")
    return tuple(notes)
