"""Memory rows inside of bursts: while an operator is recomputed.

A *burst* is what is recomputed between the first runs of two neighbours in captured order. For an operator o and a
segment i it gets the row

    between[i] + Σ bytes(v) · h[i,v]  +  need(o) · r[i,o]  ≤  budget                                 (13)

with the sum over v that are neither input nor output of o; `need(o)` is the bytes of the flexible inputs and outputs of
o and its workspace, less the largest input whose allocation an output may take over; `between[i]` is the least, over
the operators j of the segment, of what is certainly there after j has first run and before the next one does.

*Proof* that every schedule of the ordered class satisfies it: if o is recomputed in the segment, then once between the
first runs of two operators, or after the last. At that moment what is constant, the inputs and outputs of o, and what
stays through the whole segment (h) are in memory. If it is not, the row says that what stays and what is constant
fits, which holds after every run.

Where an exchange of :mod:`~solvers.snapshot.reduction` runs a consumer directly after the producer of its input, with
the input still there, more may be in memory during *that* run than in the schedule that the exchange starts from: such
consumers have no row. During any other run, an exchanged schedule holds the smaller value in the place of the larger.

What is remade in the burst itself is not counted beside o, as nothing says in which order, or how often. So the gap
need not close; the rows are worth most where a burst is wide and much stays through it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from solvers.snapshot.milp import LinearProgram
from solvers.snapshot.reduction import Reduction


def add_bursts(
    program: LinearProgram,
    reduction: Reduction,
    budget_bytes: int,
    capacity: float,
    operators: Collection[int],
    segments: Sequence[tuple[range, Mapping[int, int], Mapping[int, int]]],
) -> None:
    """Add rows (13) for `operators`, as fractions of the budget; `capacity` is their right-hand side.

    `segments`: for each its positions, operator -> column r[i,o], and value -> column h[i,v].
    """
    weight = [value.size_bytes / budget_bytes for value in reduction.graph.values]
    exchanged = set(reduction.eliminated.values())
    for positions, rerun, hold in segments:
        room = capacity - min(reduction.between_bytes[j] for j in positions) / budget_bytes
        for operator in operators:
            if operator not in rerun or operator in exchanged:
                continue
            own = {*reduction.inputs[operator], *reduction.outputs[operator]}
            need = rerun_bytes(reduction, operator) / budget_bytes
            held = [(column, weight[v]) for v, column in hold.items() if v not in own]
            if need + sum(w for _, w in held) > room:  # else it holds whatever is decided
                program.at_most([*held, (rerun[operator], need)], room)


def rerun_bytes(reduction: Reduction, operator: int) -> int:
    """need(o): bytes that certainly exist while `operator` is recomputed, beside what stays through the burst."""
    graph = reduction.graph
    own = {*reduction.inputs[operator], *reduction.outputs[operator]}
    taken = max((graph.values[source].size_bytes for source, _ in graph.operators[operator].in_place), default=0)
    return sum(graph.values[v].size_bytes for v in own) + graph.operators[operator].workspace_bytes - taken
