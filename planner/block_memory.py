"""Memory of a whole model whose blocks are planned one by one.

The model runs once on fake tensors, with every planned block in the form of its memory alone: what its plan keeps until
the backward, and what it needs at most while it runs. What is around the blocks (embeddings, head, loss) runs as in
eager. So the peak of the step comes from the allocations that the step will make, and nothing is compiled for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from graph_capture.eager import eager_peak_bytes
from graph_capture.graph import Graph
from graph_capture.workspace import WorkspaceModel
from solvers.schedule import Schedule
from solvers.simulator import simulate


@dataclass(frozen=True)
class BlockMemory:
    """What one planned block needs, resident memory and inputs left aside.

    **Fields:**

    - `forward_bytes`: at most while its forward runs, outputs included.
    - `saved_bytes`: between forward and backward, outputs left aside.
    - `backward_bytes`: at most while its backward runs, its gradients included.
    """

    forward_bytes: int
    saved_bytes: int
    backward_bytes: int

    @classmethod
    def of(cls, graph: Graph, schedule: Schedule) -> BlockMemory:
        """From the simulator; `graph` must not count accumulated gradients."""
        timeline = [size - graph.resident_total_bytes for size in simulate(graph, schedule).timeline_bytes]
        position = next(i for i, o in enumerate(schedule.order) if graph.operators[o].phase == "loss")
        loss = graph.operators[schedule.order[position]]
        tangents = sum(graph.values[v].size_bytes for v in loss.outputs) + loss.workspace_bytes
        outputs = sum(v.size_bytes for v in graph.values if v.kind == "output")
        return cls(
            forward_bytes=max(timeline[:position], default=0),
            saved_bytes=max(0, timeline[position] - tangents - outputs),
            backward_bytes=max(timeline[position + 1 :], default=0),
        )


@dataclass(frozen=True)
class BlockCall:
    """How a block was called: its inputs, and what it returned (fake tensors)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


def record_calls(
    model: nn.Module, blocks: Mapping[str, nn.Module], run: Callable[[], Any]
) -> tuple[dict[str, BlockCall], Any]:
    """Run the model once and return each block's call, and the model's result. A block that ran twice has no entry."""
    calls: dict[str, list[BlockCall]] = {name: [] for name in blocks}
    handles = []
    for name, block in blocks.items():

        def record(_: nn.Module, args: Any, kwargs: Any, result: Any, name: str = name) -> None:
            calls[name].append(BlockCall(tuple(args), dict(kwargs), result))

        handles.append(block.register_forward_hook(record, with_kwargs=True))
    try:
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: found[0] for name, found in calls.items() if len(found) == 1}, result


def whole_peak_bytes(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    blocks: Mapping[str, tuple[nn.Module, BlockCall, BlockMemory]],
    loss_of: Callable[[Any], torch.Tensor],
    *,
    mode: FakeTensorMode,
    workspace: WorkspaceModel,
    gradients_stay: bool,
) -> int:
    """Peak of one step above what is resident. Without `gradients_stay` each one is taken away when it is complete."""
    handles = []
    if not gradients_stay:
        for parameter in model.parameters():
            if parameter.requires_grad:
                handles.append(parameter.register_post_accumulate_grad_hook(_take_away))
    try:
        with contextlib.ExitStack() as stack:
            for block, call, memory in blocks.values():
                stack.enter_context(_stub(block, call, memory))
            return eager_peak_bytes(
                model, args, kwargs, loss_of, mode=mode, workspace=workspace, gradient_accumulation=False
            )
    finally:
        for handle in handles:
            handle.remove()


def _take_away(parameter: torch.Tensor) -> None:
    parameter.grad = None


@contextlib.contextmanager
def _stub(block: nn.Module, call: BlockCall, memory: BlockMemory) -> Iterator[None]:
    leaves, spec = tree_flatten(call.result)
    shapes = [
        (tuple(leaf.shape), leaf.dtype, leaf.requires_grad) if isinstance(leaf, torch.Tensor) else leaf
        for leaf in leaves
    ]
    parameters = [p for p in block.parameters() if p.requires_grad]

    def forward(*args: Any, **kwargs: Any) -> Any:
        inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        made = iter(_Block.apply(memory, shapes, *inputs, *parameters))
        return tree_unflatten([next(made) if isinstance(s, tuple) else s for s in shapes], spec)

    vars(block)["forward"] = forward
    try:
        yield
    finally:
        del vars(block)["forward"]


def _bytes(size: int) -> torch.Tensor:
    return torch.empty(max(0, size), dtype=torch.uint8)


class _Block(torch.autograd.Function):
    """A block as the allocations that it makes."""

    @staticmethod
    def forward(ctx: Any, memory: BlockMemory, shapes: Sequence[Any], *tensors: torch.Tensor) -> tuple[Any, ...]:
        """Allocate and release what the forward needs at most, then the outputs and what is saved."""
        _bytes(memory.forward_bytes)
        ctx.memory, ctx.inputs = memory, list(tensors)  # inputs stay until the backward
        ctx.kept = _bytes(memory.saved_bytes)
        made = [torch.empty(shape, dtype=dtype) for shape, dtype, _ in (s for s in shapes if isinstance(s, tuple))]
        needs = [s[2] for s in shapes if isinstance(s, tuple)]
        ctx.mark_non_differentiable(*(t for t, need in zip(made, needs, strict=True) if not need))
        ctx.set_materialize_grads(False)
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        """Allocate and release what the backward needs at most, then the gradients."""
        there = ctx.memory.saved_bytes + sum(g.untyped_storage().nbytes() for g in gradients if g is not None)
        _bytes(ctx.memory.backward_bytes - there)
        del ctx.kept
        made = [
            torch.empty_like(t) if need else None for t, need in zip(ctx.inputs, ctx.needs_input_grad[2:], strict=True)
        ]
        del ctx.inputs
        return None, None, *made


def detached(value: Any) -> Any:
    """The same nested inputs as leaves that require a gradient where they did."""
    return tree_map_only(torch.Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), value)
