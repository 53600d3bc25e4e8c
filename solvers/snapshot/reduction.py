"""What can be said about a graph before any optimisation: constants per position, and columns nobody needs.

The bound of snapshot refinement is a relaxation, so everything here may only *lower* memory or cost, never raise it:

- an operator is *repeatable* if it may run twice, makes activations only (an output or gradient stays in memory, and
  a second run would have to free it) and does not belong to the loss, which the caller runs;
- outputs, gradients, resident memory, and values of operators that run once and are needed by nothing repeatable
  later, have the same life in every schedule of the ordered class: they are bytes per position (`static_bytes`);
- *tiny* values are taken to be always there, and weigh nothing except where they certainly exist (as input or output
  of the operator at hand);
- every other value is *flexible*: something must be decided about it.

Two exchanges make values superfluous. Let v have one consumer c, repeatable and with one flexible output w no larger
than v. (1) An instance of v that was made before c first ran is never worth keeping after c: keep w instead, from
the first run of c on. (`superseded`) (2) If moreover every other input of c is always at hand (tiny, or static, or
not repeatable), then c may run directly after *any* run of v's producer, so v need not be in memory at any later
instant at all. (`eliminated`) The second exchange may overfill memory while c is recomputed; the relaxation has no row
there (:mod:`~solvers.snapshot.bursts`). Where c has a second input that has to be recomputed, (2) is wrong, and only
(1) is used. Both mean to keep w in the place of v, so neither is used where w must not be held across the turn and v
may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graph_capture.graph import Graph

TINY_FRACTION = 1e-4
"""Values below this fraction of the store-all peak are not decided upon."""


@dataclass(frozen=True)
class Reduction:
    """The graph as the relaxation sees it; positions are operator indices, `len(graph)` is the end of the step.

    **Fields:**

    - `repeatable`: for each operator whether running it a second time is legal and can be of use.
    - `inputs`, `outputs`: flexible inputs and outputs of each operator.
    - `last_use`: last operator that reads the value (its producer if none does).
    - `last_want`: last position at which the value can be of use, directly or to recompute something.
    - `static_bytes`: bytes that exist at position j in every schedule, without flexible values, in the worse regime.
    - `between_bytes`: the same after position j has run, and before the next one does.
    - `in_place_bytes`: for each position, (source value, bytes) pairs that might be taken over.
    - `superseded`, `eliminated`: value -> its one consumer; the two exchanges of the module docstring.
    """

    graph: Graph
    repeatable: tuple[bool, ...]
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    last_use: tuple[int, ...]
    last_want: tuple[int, ...]
    static_bytes: tuple[int, ...]
    between_bytes: tuple[int, ...]
    in_place_bytes: tuple[tuple[tuple[int, int], ...], ...]
    superseded: dict[int, int]
    eliminated: dict[int, int]

    @property
    def released(self) -> frozenset[int]:
        """Values that are not in memory while operator :attr:`turn` first runs, in every schedule."""
        return frozenset(self.graph.released)

    @property
    def turn(self) -> int:
        """The first operator of the loss; -1 where there is none: a recomputation may then stand before any other."""
        turn = self.graph.last_forward + 1
        return turn if turn < len(self.graph) and self.graph.operators[turn].phase == "loss" else -1

    @property
    def flexible(self) -> list[int]:
        """All flexible values in the order of their producers."""
        return [v for outputs in self.outputs for v in outputs]

    def floor_bytes(self, position: int) -> int:
        """Bytes that operator `position` needs by itself, in every schedule of the ordered class."""
        values = self.graph.values
        need = sum(values[v].size_bytes for v in (*self.inputs[position], *self.outputs[position]))
        taken = max((size for _, size in self.in_place_bytes[position]), default=0)
        return self.static_bytes[position] + need - taken


def can_repeat(graph: Graph) -> list[bool]:
    """For each operator whether the simulator would accept a second run of it."""
    return [
        o.recomputable
        and o.phase != "loss"
        and bool(o.outputs)
        and all(graph.values[v].kind == "activation" for v in o.outputs)
        for o in graph.operators
    ]


def reduce(graph: Graph, store_all_peak_bytes: int, tiny_fraction: float = TINY_FRACTION) -> Reduction:
    """Classify the values of `graph` and add up what is constant."""
    n, values = len(graph), graph.values
    legal = can_repeat(graph)
    threshold = tiny_fraction * store_all_peak_bytes
    last_use = [max(uses, default=values[v].producer) for v, uses in enumerate(graph.uses)]
    released = set(graph.released)  # also tiny ones: what must be recomputed has its price in the bound
    movable = [
        value.kind == "activation" and value.size_bytes > 0 and (value.size_bytes >= threshold or v in released)
        for v, value in enumerate(values)
    ]
    repeatable = [legal[o] and any(movable[v] for v in graph.operators[o].outputs) for o in range(n)]
    last_want = _last_wants(graph, repeatable, movable, last_use)
    # a value that is made once and is wanted by direct uses only has the same life in every schedule
    flexible = [movable[v] and (legal[values[v].producer] or last_want[v] > last_use[v]) for v in range(len(values))]
    inputs = tuple(tuple(v for v in o.inputs if flexible[v]) for o in graph.operators)
    outputs = tuple(tuple(v for v in o.outputs if flexible[v]) for o in graph.operators)
    superseded, eliminated = _exchanges(graph, repeatable, flexible, inputs, outputs)
    static, between = _static_bytes(graph, flexible, legal, last_use)
    return Reduction(
        graph=graph,
        repeatable=tuple(repeatable),
        inputs=inputs,
        outputs=outputs,
        last_use=tuple(last_use),
        last_want=tuple(last_want),
        static_bytes=static,
        between_bytes=between,
        in_place_bytes=tuple(_in_place(graph, o, flexible, legal, last_use) for o in range(n)),
        superseded=superseded,
        eliminated=eliminated,
    )


def _last_wants(graph: Graph, repeatable: list[bool], movable: list[bool], last_use: list[int]) -> list[int]:
    last_want = [0] * len(graph.values)
    for index in range(len(graph) - 1, -1, -1):
        for value in graph.operators[index].outputs:
            last = last_use[value]
            for user in graph.uses[value]:
                if repeatable[user]:
                    last = max(last, max(last_want[w] for w in graph.operators[user].outputs if movable[w]))
            last_want[value] = len(graph) if graph.values[value].kind != "activation" else last
    return last_want


def _exchanges(
    graph: Graph,
    repeatable: list[bool],
    flexible: list[bool],
    inputs: Sequence[tuple[int, ...]],
    outputs: Sequence[tuple[int, ...]],
) -> tuple[dict[int, int], dict[int, int]]:
    superseded: dict[int, int] = {}
    eliminated: dict[int, int] = {}
    released = set(graph.released)
    for value, users in enumerate(graph.uses):
        if not flexible[value] or len(users) != 1:
            continue
        (consumer,) = users
        if not repeatable[consumer] or len(outputs[consumer]) != 1:
            continue
        if graph.values[outputs[consumer][0]].size_bytes > graph.values[value].size_bytes:
            continue
        if outputs[consumer][0] in released and value not in released:
            continue
        superseded[value] = consumer
        if all(v == value or not repeatable[graph.values[v].producer] for v in inputs[consumer]):
            eliminated[value] = consumer
    return superseded, eliminated


def _static_bytes(
    graph: Graph, flexible: list[bool], legal: list[bool], last_use: list[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Constant bytes at each position and after it, in the worse of the regimes that the graph asks for."""
    n, values = len(graph), graph.values
    born, dead = [0] * n, [0] * n
    for v, value in enumerate(values):
        if value.kind == "activation" and not flexible[v] and not legal[value.producer]:
            born[value.producer] += value.size_bytes
            dead[last_use[v]] += value.size_bytes
    constant = constant_bytes(graph, rereads=False)
    static, between, running = [0] * n, [0] * n, 0
    for j, operator in enumerate(graph.operators):
        running += born[j]
        # tiny values of repeatable operators certainly exist only where they are read or made
        here = sum(
            values[v].size_bytes
            for v in (*operator.inputs, *operator.outputs)
            if values[v].kind == "activation" and not flexible[v] and legal[values[v].producer]
        )
        static[j] = running + here + constant.while_running[j]
        running -= dead[j]
        between[j] = running + constant.afterwards[j]
    return tuple(static), tuple(between)


@dataclass(frozen=True)
class ConstantBytes:
    """Bytes of everything that is no activation, per operator j: resident memory, outputs, gradients and their copies.

    **Fields:**

    - `while_running`: at the run of j, its workspace and the deliveries that follow it included, in the worse regime.
    - `afterwards`: after the run of j and its deliveries, in the worse regime.
    """

    while_running: tuple[int, ...]
    afterwards: tuple[int, ...]


def constant_bytes(graph: Graph, rereads: bool) -> ConstantBytes:
    """Replay what no recomputation changes, in the regimes that the graph asks for.

    A delivered gradient that is read again later is not released. With `rereads`, any gradient that a repeatable
    operator reads counts as read again (right for a schedule that repeats it); without, only what every schedule
    reads again counts, which is what a bound needs.
    """
    regimes = [_constant_bytes(graph, rereads, later=False)]
    if graph.gradient_accumulation:
        regimes.append(_constant_bytes(graph, rereads, later=True))
    return ConstantBytes(
        while_running=tuple(max(rows) for rows in zip(*(r[0] for r in regimes), strict=True)),
        afterwards=tuple(max(rows) for rows in zip(*(r[1] for r in regimes), strict=True)),
    )


def _constant_bytes(graph: Graph, rereads: bool, later: bool) -> tuple[list[int], list[int]]:
    values, repeatable = graph.values, can_repeat(graph)
    deliveries: dict[int, list[int]] = {}
    for v, value in enumerate(values):
        if value.delivered_after is not None:
            deliveries.setdefault(value.delivered_after, []).append(v)
    live = graph.resident_total_bytes + (graph.accumulated_gradient_bytes if later else 0)
    running: list[int] = []
    afterwards: list[int] = []
    for j, operator in enumerate(graph.operators):
        live += sum(values[v].size_bytes for v in operator.outputs if values[v].kind != "activation")
        instant = live + operator.workspace_bytes
        for v in deliveries.get(j, ()):
            copy = 0 if later else values[v].delivery_copy_bytes
            live += copy
            instant = max(instant, live)
            read_again = any(u > j or (rereads and repeatable[u]) for u in graph.uses[v])
            if (copy or later) and not read_again:
                live -= values[v].size_bytes
        running.append(instant)
        afterwards.append(live)
    return running, afterwards


def _in_place(
    graph: Graph, index: int, flexible: list[bool], legal: list[bool], last_use: list[int]
) -> tuple[tuple[int, int], ...]:
    """Inputs whose allocation an output may take over: activations that can be gone once the operator has run."""
    return tuple(
        (source, graph.values[source].size_bytes)
        for source, _ in graph.operators[index].in_place
        if graph.values[source].kind == "activation"
        and (legal[graph.values[source].producer] or last_use[source] <= index)
    )
