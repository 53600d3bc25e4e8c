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
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from graph_capture.flops import flops_of
from graph_capture.fusible import bytes_read, consumers, is_generated, is_view
from graph_capture.joint import is_mutation, tensors_of
from graph_capture.pooling import makes_offsets, release_averaged_inputs
from planner.inductor_fusion import TRIFLE_BYTES, within_schedule
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
    context = tracing(TracingContext(fake_mode))
    with _settings(), _disable_current_modes(), context, V.set_fake_mode(fake_mode):
        _store(module.graph)
        traced = _decomposed(module, inputs, fake_mode)
        result = next(iter(traced.graph.find_nodes(op="output")))
        result.meta["user_visible_output_idxs"] = [
            i for i, output in enumerate(result.args[0]) if isinstance(output, fx.Node)
        ]
        release_averaged_inputs(traced.graph)
        unread = _drop_unread(traced)
        read = [i for i in range(len(inputs)) if i not in unread]
        dying = [place for place, i in enumerate(read) if placeholders[i].meta.get(DIES, False)]
        with within_schedule(dying):
            compiled = compile_fx_inner(traced, [inputs[i] for i in read], is_backward=backward, layout_opt=False)
    return _called_directly(compiled, unread)


def _drop_unread(traced: fx.GraphModule) -> list[int]:
    """Take out the inputs that nothing reads, and return their positions: a compiled function holds them to its end.

    There are some only here: what an operator reads of a tensor may be its shape alone, as a pooling's backward does.
    """
    placeholders = traced.graph.find_nodes(op="placeholder")
    unread = [i for i, node in enumerate(placeholders) if not node.users]
    for i in unread:
        traced.graph.erase_node(placeholders[i])
    traced.recompile()
    return unread


def _called_directly(compiled: Any, unread: Sequence[int] = ()) -> Boxed:
    """The function of a compiled graph without what is done around each call, for a step has a dozen programs.

    The first call ends what compilation began (caches of tuning, metrics); a profiler is told the name of a graph. The
    rest is needless, and costs more than its few instructions, as the tensors of a step displace them from the caches.
    Arguments at the positions `unread` are let go first.
    """
    first = True

    def run(arguments: list[Any]) -> tuple[Any, ...]:
        nonlocal first
        for position in reversed(unread):
            del arguments[position]
        if first or torch.autograd.profiler._is_profiler_enabled:
            first = False
            return tuple(compiled(arguments))
        return tuple((getattr(compiled, "current_callable", None) or compiled)(arguments))

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _store(graph: fx.Graph) -> None:
    """Put what is to lie in memory there: Inductor would compute it anew in each kernel that reads it.

    So it would what a max pooling makes, and hold the pooling's input for that.
    """
    beyond = _read_beyond_a_call(graph)
    for node in list(graph.nodes):
        stays = node.meta.get(STORED, False) or any(map(makes_offsets, node.all_input_nodes))
        if stays or node in beyond or _is_taken_for_called(node):
            with graph.inserting_after(node):
                stored = graph.call_function(force_stride_order, (node, node.meta["val"].stride()))
            stored.meta = {"val": node.meta["val"]}
            node.replace_all_uses_with(stored, delete_user_cb=lambda user, kept=stored: user is not kept)


def _is_taken_for_called(node: fx.Node) -> bool:
    """Whether the schedule takes a node for a kernel that is called, and Inductor may generate one for it."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or is_view(node) or is_mutation(node) or flops_of(node):
        return False
    made = tensors_of(node)
    return not is_generated(node) and len(made) == 1 and bytes_read(made[0]) > TRIFLE_BYTES


def _read_beyond_a_call(graph: fx.Graph) -> set[fx.Node]:
    """What generated kernels make and what is read behind a called kernel that stands behind them.

    By then the schedule has let go of what they read.
    """
    calls = 0  # kernels called before a node
    before: dict[fx.Node, int] = {}
    for node in graph.nodes:
        before[node] = calls
        if node.op == "call_function" and not (is_generated(node) or is_view(node) or node.target is operator.getitem):
            calls += 1
    generated = (n for n in graph.nodes if n.op == "call_function" and is_generated(n) and not is_view(n))
    large = (n for n in generated if len(made := tensors_of(n)) == 1 and bytes_read(made[0]) > TRIFLE_BYTES)
    return {n for n in large if any(r.op != "output" and before[r] > before[n] for r in consumers(n))}


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
