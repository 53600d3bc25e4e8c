"""Cut a backward program into slices that hand their gradients over as soon as they are made.

Values that pass from one slice to a later one lie in numbered slots of a dictionary that belongs to one call; the last
slice that needs a slot takes it out, so that nothing lives longer than the schedule says.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.graph import _BoxedCodeGen

from graph_capture.fusible import is_view
from graph_capture.joint import tensors_of
from planner.emit import Programs

State = dict[int, Any]
DIES = "dies_in_slice"
"""Key in the `meta` of a placeholder: whether its slice is the last one to read it, and nobody else holds it."""
STORED = "stored"
"""Key in the `meta` of a node: what it makes is to lie in memory, also for readers in the same slice."""
ABSENT = -1
"""Slot of the primals whose gradients are not handed over, because no tangent arrived that they depend on."""


@dataclass(frozen=True)
class Slice:
    """A piece of the backward program.

    **Fields:**

    - `function`: takes the slots' contents boxed in one list; returns the gradients, then what the slots get.
    - `reads`: slots to read, each with whether it is taken out. `writes`: slots to fill.
    - `primals`: whose gradients it returns, in this order.
    """

    function: Callable[[list[Any]], Any]
    reads: tuple[tuple[int, bool], ...]
    writes: tuple[int, ...]
    primals: tuple[int, ...]

    def run(self, state: State) -> tuple[Any, ...]:
        """Run on one call's state; returns the gradients of `primals`."""
        arguments = [state.pop(slot) if last else state[slot] for slot, last in self.reads]
        results = self.function(arguments)
        gradients = results[: len(self.primals)]
        state.update(zip(self.writes, results[len(self.primals) :], strict=True))
        absent = state.get(ABSENT)
        if absent:
            return tuple(None if p in absent else g for p, g in zip(self.primals, gradients, strict=True))
        return gradients

    def run_into(self, state: State, results: list[Any]) -> None:
        """Run, and put each gradient at the place of its primal in `results`."""
        for primal, gradient in zip(self.primals, self.run(state), strict=True):
            results[primal] = gradient


def boxed(module: fx.GraphModule) -> Callable[[list[Any]], Any]:
    """Compile an fx graph to plain Python that takes its inputs in one list and releases each after its last use."""
    module.graph.set_codegen(_BoxedCodeGen())
    module.recompile()
    forward = module.forward

    def run(arguments: list[Any]) -> Any:
        return forward(arguments)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


CompileModule = Callable[[fx.GraphModule], Callable[[list[Any]], Any]]


def cut(programs: Programs, compile_module: CompileModule = boxed) -> tuple[Slice, ...]:
    """The slices of a backward program. The inputs of the program lie in slots 0, 1, ... when the first one starts.

    `compile_module` makes a function of one slice, whose outputs are flat: its gradients, then what it keeps.
    """
    module = programs.backward
    nodes = list(module.graph.nodes)
    slot = {node: index for index, node in enumerate(nodes)}
    placeholders = [n for n in nodes if n.op == "placeholder"]
    body = [n for n in nodes if n.op not in ("placeholder", "output")]
    gradients = nodes[-1].args[0]
    piece_of = _piece_of_each(body, programs.slice_ends)
    last_piece: dict[fx.Node, int] = {}
    for node in body:
        for argument in node.all_input_nodes:
            last_piece[argument] = piece_of[node]
    for piece, primals in enumerate(programs.slice_gradients):
        for primal in primals:
            if isinstance(gradients[primal], fx.Node):
                last_piece[gradients[primal]] = max(last_piece.get(gradients[primal], -1), piece)
    made_in = dict.fromkeys(placeholders, -1) | piece_of
    for node in _crossing(body, programs.borders):
        node.meta = {**node.meta, STORED: True}
    slices = []
    start = 0
    for piece, (end, primals) in enumerate(zip(programs.slice_ends, programs.slice_gradients, strict=True)):
        stop = len(body) if piece == len(programs.slice_ends) - 1 else end
        members = body[start:stop]
        start = stop
        results = [gradients[p] for p in primals]
        slices.append(_slice(module, members, results, primals, piece, slot, last_piece, made_in, compile_module))
    return tuple(slices)


def _crossing(body: list[fx.Node], borders: Sequence[int]) -> Iterator[fx.Node]:
    """The makers of what is read beyond the next border: between two slices it would lie in memory."""
    part = {node: bisect.bisect_right(borders, position) for position, node in enumerate(body)}
    for node in body:
        if any(part.get(user, part[node]) != part[node] for user in node.users):
            maker = node
            while is_view(maker) and maker.target is not operator.getitem and maker.all_input_nodes[0] in part:
                maker = maker.all_input_nodes[0]
            if len(tensors_of(maker)) == 1:
                yield maker


def _handed_on(positions: Sequence[int | None]) -> Callable[[list[Any]], tuple[Any, ...]]:
    """The function of a slice that computes nothing: what an earlier one made, by position among its inputs."""

    def run(arguments: list[Any]) -> tuple[Any, ...]:
        results = tuple(None if p is None else arguments[p] for p in positions)
        arguments.clear()
        return results

    return run


def _piece_of_each(body: list[fx.Node], ends: tuple[int, ...]) -> dict[fx.Node, int]:
    pieces: dict[fx.Node, int] = {}
    piece = 0
    for position, node in enumerate(body):
        while piece < len(ends) - 1 and position >= ends[piece]:
            piece += 1
        pieces[node] = piece
    return pieces


def _slice(
    module: fx.GraphModule,
    members: list[fx.Node],
    results: list[Any],
    primals: tuple[int, ...],
    piece: int,
    slot: dict[fx.Node, int],
    last_piece: dict[fx.Node, int],
    made_in: dict[fx.Node, int],
    compile_module: CompileModule,
) -> Slice:
    graph = fx.Graph()
    inside = set(members)
    needed: dict[fx.Node, None] = {}
    for node in members:
        needed.update(dict.fromkeys(a for a in node.all_input_nodes if a not in inside))
    needed.update(dict.fromkeys(r for r in results if isinstance(r, fx.Node) and r not in inside))
    copies = {node: graph.placeholder(node.name) for node in needed}
    for node, placeholder in copies.items():
        held_by_caller = node.name.startswith("primals")
        placeholder.meta = {**node.meta, DIES: last_piece[node] <= piece and not held_by_caller}
    for node in members:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    kept = [n for n in members if last_piece.get(n, -1) > piece]
    reads = tuple((slot[n], last_piece[n] <= piece) for n in needed)
    if not members:
        place = {node: i for i, node in enumerate(needed)}
        return Slice(_handed_on([place.get(r) for r in results]), reads, (), primals)
    returned = tuple(copies[r] if isinstance(r, fx.Node) else r for r in results)
    graph.output((*returned, *(copies[n] for n in kept)))
    function = compile_module(fx.GraphModule(module, graph, f"PlannedBackward{piece}"))
    assert all(made_in[n] < piece for n in needed), "a slice reads what a later one makes"
    return Slice(function, reads, tuple(slot[n] for n in kept), primals)
