"""Compile the programs of a schedule with Inductor, so that what it decides is what runs.

The forward program and every slice of the backward are compiled each by itself. Inductor fuses inside of a program and
cannot look across: what the schedule frees between two slices is freed, what a slice recomputes is recomputed there.
Inside of a program its own scheduler may not reorder for memory (the schedule has done so), nor change layouts (those
of the saved tensors are known to the other programs), nor fuse where that needs more memory than the schedule says
(:mod:`planner.inductor_fusion`).

Random operators are left whole and draw eager's numbers; one that runs again is wrapped in torch's own operators for
that, which carry the generator's state. In-place forms are left to Inductor, which reuses the buffers that die.

Written for torch 2.11 to 2.13: ``compile_fx_inner`` and its keywords are private to Inductor.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.inductor_prims import force_stride_order
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes

from graph_capture.decompositions import multilabel_margin_loss_forward
from graph_capture.pooling import makes_offsets
from planner.inductor_fusion import within_schedule
from planner.slices import DIES, STORED

Boxed = Callable[[list[Any]], Any]

SETTINGS: Mapping[str, Any] = {
    "fallback_random": True,  # eager's numbers, in eager's order
    "reorder_for_peak_memory": False,  # the schedule is the order
    "layout_optimization": False,  # saved tensors have the layouts that the other programs expect
    "pattern_matcher": False,  # patterns would merge what the schedule runs twice
}


def compile_program(module: fx.GraphModule, *, backward: bool = False) -> Boxed:
    """Compile one program, whose outputs are flat, to a function that takes its inputs boxed in one list.

    Its placeholders carry fake tensors as `meta["val"]`; those that nobody else holds say so (`meta[DIES]`).
    """
    placeholders = module.graph.find_nodes(op="placeholder")
    inputs = [node.meta["val"] for node in placeholders]
    outputs = next(iter(module.graph.find_nodes(op="output"))).args[0]
    if not any(isinstance(output, fx.Node) for output in outputs):
        return _constant(tuple(outputs))
    fake_mode = next((i.fake_mode for i in inputs if isinstance(i, FakeTensor)), None)
    assert fake_mode is not None, "a program without a tensor computes nothing"
    dying = [i for i, node in enumerate(placeholders) if node.meta.get(DIES, False)]
    context = tracing(TracingContext(fake_mode))
    with _settings(), within_schedule(dying), _disable_current_modes(), context, V.set_fake_mode(fake_mode):
        _store(module.graph)
        traced = _decomposed(module, inputs, fake_mode)
        result = next(iter(traced.graph.find_nodes(op="output")))
        result.meta["user_visible_output_idxs"] = [
            i for i, output in enumerate(result.args[0]) if isinstance(output, fx.Node)
        ]
        return _called_directly(compile_fx_inner(traced, inputs, is_backward=backward, layout_opt=False))


def _called_directly(compiled: Any) -> Boxed:
    """The function of a compiled graph without what is done around each call, for a step has a dozen programs.

    The first call ends what compilation began (caches of tuning, metrics); a profiler is told the name of a graph. The
    rest is needless, and costs more than its few instructions, as the tensors of a step displace them from the caches.
    """
    first = True

    def run(arguments: list[Any]) -> tuple[Any, ...]:
        nonlocal first
        if first or torch.autograd.profiler._is_profiler_enabled:
            first = False
            return tuple(compiled(arguments))
        return tuple(compiled.current_callable(arguments))

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _store(graph: fx.Graph) -> None:
    """Put what is to lie in memory there: Inductor would compute it anew in each kernel that reads it.

    So it would what a max pooling makes, and hold the pooling's input for that.
    """
    for node in list(graph.nodes):
        if node.meta.get(STORED, False) or any(map(makes_offsets, node.all_input_nodes)):
            with graph.inserting_after(node):
                stored = graph.call_function(force_stride_order, (node, node.meta["val"].stride()))
            stored.meta = {"val": node.meta["val"]}
            node.replace_all_uses_with(stored, delete_user_cb=lambda user, kept=stored: user is not kept)


def _constant(outputs: tuple[Any, ...]) -> Boxed:
    def run(arguments: list[Any]) -> tuple[Any, ...]:
        arguments.clear()
        return outputs

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    known = {name: value for name, value in SETTINGS.items() if hasattr(config, name)}
    with config.patch(known):
        yield


def _decomposed(module: fx.GraphModule, inputs: list[Any], fake_mode: FakeTensorMode) -> fx.GraphModule:
    """The program in the operators that Inductor has kernels for, each in the place of the one that it comes from."""
    interpreter = fx.Interpreter(module)

    def flat(*arguments: Any) -> Any:
        return interpreter.run(*arguments)

    with fake_mode, torch.no_grad():
        return make_fx(flat, decomposition_table=_decompositions(), tracing_mode="real")(*inputs)


@functools.cache
def _decompositions() -> dict[Any, Any]:
    """Inductor's own, without those of random operators, which draw other numbers, and a mistaken one put right."""
    table = dict(select_decomp_table())
    for overload in list(table):
        if isinstance(overload, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in overload.tags:
            del table[overload]
    table[torch.ops.aten.multilabel_margin_loss_forward.default] = multilabel_margin_loss_forward
    return table
