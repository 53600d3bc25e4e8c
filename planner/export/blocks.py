"""The blocks of a graph under selective checkpointing: what runs again, what a policy may save, and the schedule.

A checkpointed block runs again, from its start to the last operator that its backward needs, right before its backward
begins, whatever of it is needed; only what is saved is left out. That differs from a plan's schedule, which recomputes
each value where and when it is needed, across the borders of blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from graph_capture.graph import Graph
from planner.export.trace import NATIVE_DROPOUT, BlockTrace, Call, as_captured
from planner.pins import ASKED_FOR
from solvers.schedule import Compute, Free, Schedule, Step

Decisions = Mapping[str, frozenset[int] | None]
"""For each block the operators whose results are saved; `None` if the block is not checkpointed."""


@dataclass(frozen=True)
class Block:
    """A block in a graph.

    **Fields:** (operators are indices in the graph)

    - `members`: its forward operators. `rerun`: those that run again when nothing is saved, in order.
    - `savable`: those of them whose results a policy may save, with how it knows them.
    - `forced`: those that must be saved, because the plan was asked to keep them.
    - `start`: the backward operator before which the block runs again.
    - `obstacle`: why the block cannot be wrapped; empty if it can.
    """

    name: str
    members: frozenset[int] = frozenset()
    rerun: tuple[int, ...] = ()
    savable: Mapping[int, Call] = field(default_factory=dict[int, Call])
    forced: frozenset[int] = frozenset()
    start: int = -1
    obstacle: str = ""


def blocks_of(graph: Graph, traces: Mapping[str, BlockTrace]) -> tuple[Block, ...]:
    """The traced blocks in a captured graph, in the order of their forward."""
    members: dict[str, list[int]] = {name: [] for name in traces}
    starts: dict[str, int] = {}
    for index, operator in enumerate(graph.operators):
        name = innermost(operator.module, traces)
        if name is None:
            continue
        if operator.phase == "forward":
            members[name].append(index)
        elif operator.phase == "backward":
            starts.setdefault(name, index)
    found = [_block(graph, name, members[name], traces[name], starts.get(name, -1)) for name in traces]
    return tuple(sorted(found, key=lambda block: block.rerun[:1]))


def innermost(module: str, names: Mapping[str, object]) -> str | None:
    """The longest of `names` that a module's path begins with."""
    parts = module.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in names), None)


def _block(graph: Graph, name: str, members: Sequence[int], trace: BlockTrace, start: int) -> Block:
    if trace.obstacle:
        return Block(name, obstacle=trace.obstacle)
    matched = _matched(graph, members, trace.calls)
    last = max((index for index, position in matched.items() if position < trace.rerun), default=-1)
    needed = {graph.values[v].producer for o in graph.operators if o.phase == "backward" for v in o.inputs}
    rerun = tuple(i for i in members if i <= last or (i in needed and i not in matched))
    if not rerun or start < 0:
        return Block(name, obstacle="its backward needs nothing of what it computes")
    savable = {
        index: trace.calls[position]
        for index, position in matched.items()
        if position < trace.rerun
        and not trace.calls[position].obstacle
        and graph.operators[index].target != NATIVE_DROPOUT
        and not graph.operators[index].random_state_bytes
    }
    forced = frozenset(i for i in rerun if graph.operators[i].keep_reason.startswith(ASKED_FOR))
    released = {v for i in rerun if not stays(graph, i, frozenset(members)) for v in graph.operators[i].outputs}
    reads = (i for i, o in enumerate(graph.operators) if o.phase == "backward" and not released.isdisjoint(o.inputs))
    start = min(start, next(reads, start))
    beyond = sorted(forced - savable.keys())
    if beyond:
        obstacle = f"a policy cannot save {graph.operators[beyond[0]].name}, which was asked to be kept"
        return Block(name, obstacle=obstacle)
    return Block(name, frozenset(members), rerun, savable, forced, start)


def _matched(graph: Graph, members: Sequence[int], calls: Sequence[Call]) -> dict[int, int]:
    """Which call of the trace each operator of the graph is: the n-th of its name, where all of that name agree."""
    named: dict[str, list[int]] = {}
    for target, position in as_captured(calls):
        named.setdefault(target, []).append(position)
    of_target: dict[str, list[int]] = {}
    for index in members:
        of_target.setdefault(graph.operators[index].target, []).append(index)
    matched: dict[int, int] = {}
    for target, indices in of_target.items():
        positions = named.get(target, [])
        pairs = list(zip(indices, positions, strict=False))
        same = len(indices) == len(positions)
        if same and all(_same_shapes(graph, index, calls[position]) for index, position in pairs):
            matched.update(pairs)
    return matched


def _same_shapes(graph: Graph, index: int, call: Call) -> bool:
    """Whether what the operator makes may be what the call returned; a trace of dropout ends with its product."""
    shapes = {graph.values[v].shape for v in graph.operators[index].outputs}
    return shapes <= set(call.shapes)


def stays(graph: Graph, operator: int, members: frozenset[int]) -> bool:
    """Whether what an operator makes stays in memory though its block is checkpointed: another part of the model reads
    it, or the caller gets it."""
    made = graph.operators[operator]
    if not made.recomputable or any(graph.values[v].kind != "activation" for v in made.outputs):
        return True
    readers = (i for v in made.outputs for i in graph.uses[v])
    return any(graph.operators[i].phase != "backward" and i not in members for i in readers)


def selective_schedule(graph: Graph, blocks: Sequence[Block], decisions: Decisions) -> Schedule:
    """What torch runs under the decisions, as a schedule of the graph; every result has an allocation of its own."""
    again: dict[int, list[int]] = {}
    for block in blocks:
        saved = decisions.get(block.name)
        if saved is not None:
            again.setdefault(block.start, []).extend(reruns(graph, block, saved))
    order: list[int] = []
    for index in range(len(graph)):
        order.extend(again.get(index, ()))
        order.append(index)
    return without_reuse(Schedule.from_order(graph, order))


def reruns(graph: Graph, block: Block, saved: frozenset[int]) -> list[int]:
    """The executions that a checkpointed block adds to the schedule: of what stays there is no second copy in it."""
    return [i for i in block.rerun if i not in saved and not stays(graph, i, block.members)]


def recomputed_seconds(graph: Graph, blocks: Sequence[Block], decisions: Decisions) -> float:
    """Seconds of everything that runs again, also of what is not needed."""
    total = 0.0
    for block in blocks:
        saved = decisions.get(block.name)
        if saved is not None:
            total += sum(graph.operators[i].seconds for i in block.rerun if i not in saved)
    return total


def without_reuse(schedule: Schedule) -> Schedule:
    """The same executions where every result gets an allocation of its own."""
    steps: list[Step] = []
    for step in schedule.steps:
        if isinstance(step, Compute) and step.reuses is not None:
            steps += [Compute(step.operator), Free(step.reuses)]
        else:
            steps.append(step)
    return Schedule(tuple(steps))
