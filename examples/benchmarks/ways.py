"""Ways to run a training step, for side-by-side tables: eager, checkpointed blocks, PyTorch's partitioner.

Each way makes a callable model out of a copy of the plain one, and says what it recomputes: by counting the operators
that really run (eager's ways), or those of the forward and backward graphs that PyTorch's partitioner cut out of the
joint graph (its own ways). FLOPs are exact where a formula is registered (:mod:`graph_capture.flops`); seconds are
those of the roofline, the same for all ways, with Inductor those of what is left of operators in fused kernels.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config as inductor_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from graph_capture.costs import CostModel, Roofline
from graph_capture.devices import DEVICES
from graph_capture.dynamo import dynamo_settings, traceable
from graph_capture.fusion import find_fusion
from graph_capture.huggingface import as_in_eager
from graph_capture.joint import drop_unused_statistics, storage_key, tensors_of
from graph_capture.measured import Measured

RATIOS = (0.1, 0.25, 0.5, 0.75)
"""The values of `activation_memory_budget` that are looked at."""


@dataclass(frozen=True)
class Work:
    """FLOPs and seconds of the cost model of some executions; seconds measured on this CPU, 0 where nothing was."""

    flops: int = 0
    seconds: float = 0.0
    measured_seconds: float = 0.0

    def __add__(self, other: Work) -> Work:
        measured = self.measured_seconds + other.measured_seconds
        return Work(self.flops + other.flops, self.seconds + other.seconds, measured)

    def __sub__(self, other: Work) -> Work:
        measured = self.measured_seconds - other.measured_seconds
        return Work(self.flops - other.flops, self.seconds - other.seconds, measured)


def cost() -> CostModel:
    """The roofline that all ways are priced with, the one that plans for this CPU use."""
    return Roofline(DEVICES["cpu"])


def makes_something(node: fx.Node) -> bool:
    """Views cost nothing: an operator counts if it writes, or returns a storage that is none of its inputs'."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    given = {storage_key(t) for n in node.all_input_nodes for t in tensors_of(n)}
    made = [storage_key(t) for t in tensors_of(node)]
    return node.target._schema.is_mutable or any(key not in given for key in made)


def work_of(graph: fx.Graph, measured: CostModel | None = None) -> Work:
    """All operators of a graph, once each; each timed alone as well, if there is a model that does so."""
    model = cost()
    total = Work()
    for node in graph.nodes:
        if node.op == "call_function" and makes_something(node):
            price = model.price(node)
            total += Work(price.flops, price.seconds, measured.price(node).seconds if measured else 0.0)
    return total


def fused_work_of_recomputed(forward: fx.Graph, backward: fx.Graph) -> Work:
    """What a backward graph runs again of a forward graph, in Inductor's kernels: by the traffic that fusion leaves."""
    model, first = cost(), {node.name for node in forward.nodes if node.op == "call_function"}
    calls = [node for node in backward.nodes if node.op == "call_function"]
    fusion = find_fusion([], calls)
    total = Work()
    for node in calls:
        if node.name not in first or node in fusion.inlined or not makes_something(node):
            continue
        known = node in fusion.generated
        price = model.price_of_kernel(*fusion.traffic_of(node)) if known else model.price(node)
        total += Work(price.flops, price.seconds)
    return total


class Counter(TorchDispatchMode):
    """Adds up the work of the operators that run, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.total = Work()
        self._model = cost()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and price it as a node of a graph of its own."""
        kwargs = kwargs or {}
        graph = fx.Graph()

        def placeholder(tensor: torch.Tensor) -> fx.Node:
            node = graph.placeholder("value")
            node.meta["val"] = tensor
            return node

        node = graph.call_function(func, *tree_map_only(torch.Tensor, placeholder, (args, kwargs)))
        node.meta["val"] = func(*args, **kwargs)
        if makes_something(node):
            price = self._model.price(node)
            self.total += Work(price.flops, price.seconds)
        return node.meta["val"]


@dataclass
class Partitions:
    """What PyTorch's partitioner recomputed, found out while it works; `calls` grows if anything is compiled again.

    With `measured`, operators are timed one by one, too. With `fused`, seconds are those of fused kernels.
    """

    recomputed: Work = Work()
    calls: int = 0
    measured: CostModel | None = None
    fused: bool = False

    def __call__(self, joint: fx.GraphModule, inputs: Any, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Partition a joint graph and count both halves against it."""
        self.calls += 1
        drop_unused_statistics(joint.graph)  # without this, PyTorch's own way fails on batch normalisation
        joint.graph.eliminate_dead_code()
        whole = work_of(joint.graph, self.measured)
        forward, backward = min_cut_rematerialization_partition(joint, inputs, **options)
        if self.fused:
            self.recomputed += fused_work_of_recomputed(forward.graph, backward.graph)
            return forward, backward
        self.recomputed += work_of(forward.graph, self.measured) + work_of(backward.graph, self.measured) - whole
        return forward, backward


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The outermost numbered modules that are made of several: what one wraps by hand."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if name.rsplit(".", 1)[-1].isdigit() and not inside and len(list(module.children())) > 1:
            found.append((name, module))
    return [module for _, module in found]


def checkpointed(model: nn.Module, every: int) -> nn.Module:
    """`torch.utils.checkpoint`, non-reentrant, around every `every`-th block; the first one included."""
    for block in blocks_of(model)[::every]:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return model


@contextlib.contextmanager
def partition_settings(ratio: float) -> Iterator[None]:
    """PyTorch's memory budget, and no cache that would skip the partitioner; that of compiled kernels stays."""
    with (
        functorch_config.patch(activation_memory_budget=ratio, enable_autograd_cache=False),
        inductor_config.patch(compile_threads=1),
        torch._dynamo.config.patch(recompile_limit=64),
    ):
        yield


def partitioned(model: nn.Module, ratio: float, run: Callable[[nn.Module], Any]) -> Partitions:
    """Compile in place with PyTorch's partitioner and eager kernels; `run` makes one step."""
    found = Partitions(measured=Measured(DEVICES["cpu"]))
    backend = aot_autograd(
        fw_compiler=boxed_nop, bw_compiler=boxed_nop, partition_fn=found, keep_inference_input_mutations=True
    )
    with partition_settings(ratio), dynamo_settings():
        _compile(model, backend)
        run(model)
    return found


def with_inductor(model: nn.Module, ratio: float, run: Callable[[nn.Module], Any]) -> Partitions:
    """Compile in place with Inductor, which partitions before it fuses."""
    found = Partitions(fused=True)
    place = "torch._inductor.compile_fx.min_cut_rematerialization_partition"
    with partition_settings(ratio), dynamo_settings(), mock.patch(place, found):
        _compile(model, "inductor")
        run(model)
    return found


def _compile(model: nn.Module, backend: Any) -> None:
    """As `model.compile`, on a code object of its own: models that share one look through each other's guards."""
    compiled = torch.compile(traceable(model._call_impl), backend=backend, dynamic=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        with as_in_eager():  # no attention mask that eager would not build, as with ours
            return compiled(args, kwargs)

    model._compiled_call_impl = call  # type: ignore[assignment]
