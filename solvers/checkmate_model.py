"""Checkmate's mixed-integer program on values, with the byte accounting of the simulator.

Stage t ends with the first execution of operator t (frontier-advancing stages, every operator a stage). In it run, in
captured order, any operators before t that run again, then t itself. Binary columns, as in the paper:

    R[t,i] = 1   operator i < t runs again in stage t                            (R[t,t] = 1 is a constant)
    S[t,v] = 1   value v is in memory when stage t begins                        (the producer of v is before t)

    minimise  Σ seconds(i) · R[t,i]
    (1b)  R[t,i] ≤ S[t,v] + R[t,producer(v)]         v an input of i
    (1c)  S[t+1,v] ≤ S[t,v] + R[t,producer(v)]
          S[t,v] + R[t,producer(v)] ≤ 1              the simulator refuses to make a value that is still there;
                                                     no loss, because all readers of v come after its producer

The paper's FREE[t,v,k] = R[t,k] · (1 − S[t+1,v]) · Π (1 − R[t,j]), over the readers j > k of v, is linearised there by
counting hazards. Here the complement of the product is a column of its own,

    N[t,v,k] = 1   some reader j ≥ k of v runs in stage t, or v is in memory in stage t + 1,

a running maximum: N[t,v,k] ≥ R[t,k] and N[t,v,k] ≥ N[t,v,next reader], N ≥ S[t+1,v] at the end. The same integer
points, continuous columns, and a relaxation that is at least as tight as the counted hazards. The paper's recurrence
for U[t,k], the bytes in memory while operator k runs in stage t, becomes: v counts S[t,v] before its producer,
S[t,v] + R[t,producer] at it, and N[t,v,next reader] after it.

Beyond the paper, all of it *exact* with respect to :mod:`solvers.simulator`: operators with several outputs; workspace
(on R[t,k]); the state of random operators, from the first run to the last replay; gradients and outputs that stay;
both regimes of micro-batches, delivery copies, gradients read after their delivery; nothing recomputed inside of the
loss; in-place reuse, a column x ≤ R[t,k], x ≤ 1 − N[t,source,next reader], which also asks that the source was made in
the same program. One case is a *restriction*: of an operator with several in-place pairs only the first is used
(:attr:`StagedModel.restricted`); the schedule is legal all the same, the optimum then speaks of that.
"""

from __future__ import annotations

from functools import cached_property

from graph_capture.graph import Graph
from solvers.checkmate_memory import MemoryRows
from solvers.snapshot.milp import LinearProgram
from solvers.structure import repeatable

Terms = list[tuple[int, float]]


class StagedModel:
    """The program for one graph and budget; :attr:`program` is complete after construction.

    **Fields:**

    - `program`: the columns and rows; bytes are scaled to thousandths of the budget, seconds to the step.
    - `recompute`: column of R[t,i] by (t, i).
    - `hopeless`: a description of what exceeds the budget whatever is recomputed; `None` if nothing does.
    """

    def __init__(self, graph: Graph, budget_bytes: float) -> None:
        self.graph = graph
        self.program = LinearProgram()
        self.one = self.program.add_column(integer=False)
        self.program.lower[self.one] = 1.0
        self.recompute: dict[tuple[int, int], int] = {}
        self.keep: dict[tuple[int, int], int] = {}
        self._add_columns()
        for stage in range(len(graph)):
            self._add_flow(stage)
        memory = MemoryRows(self, budget_bytes)
        self.hopeless = memory.hopeless

    @property
    def restricted(self) -> bool:
        """Whether the program searches less than the staged class."""
        return any(len(operator.in_place) > 1 for operator in self.graph.operators)

    @cached_property
    def dynamic(self) -> list[int]:
        """The values whose time in memory is to be decided."""
        return [v for v, value in enumerate(self.graph.values) if value.kind == "activation"]

    @cached_property
    def _repeatable(self) -> list[bool]:
        return [repeatable(self.graph, i) for i in range(len(self.graph))]

    def order(self, columns: dict[int, float]) -> list[int]:
        """The executions of an integer point."""
        chosen = {key for key, column in self.recompute.items() if columns.get(column, 0.0) > 0.5}
        return [i for t in range(len(self.graph)) for i in range(t + 1) if i == t or (t, i) in chosen]

    def run(self, stage: int, operator: int) -> int | None:
        """The column of R; `None` where it is zero."""
        return self.one if stage == operator else self.recompute.get((stage, operator))

    def present(self, stage: int, value: int) -> Terms:
        """S[t,v] + R[t,producer(v)]."""
        columns = (self.keep.get((stage, value)), self.run(stage, self.graph.values[value].producer))
        return [(column, 1.0) for column in columns if column is not None]

    def _add_columns(self) -> None:
        graph, step_seconds = self.graph, self.graph.step_seconds or 1.0
        again = [repeatable(graph, i) for i in range(len(graph))]
        for stage, last in enumerate(graph.operators):
            if last.phase != "loss":
                for i in range(stage):
                    if again[i]:
                        cost = graph.operators[i].seconds / step_seconds
                        self.recompute[stage, i] = self.program.add_column(cost)
        for value in self.dynamic:
            readers = graph.uses[value]
            last_stage = len(graph) - 1 if any(again[r] for r in readers) else max(readers, default=-1)
            for stage in range(graph.values[value].producer + 1, last_stage + 1):
                self.keep[stage, value] = self.program.add_column()

    def _add_flow(self, stage: int) -> None:
        """(1b), (1c), and that nothing is made while it is still there."""
        graph, program = self.graph, self.program
        for i in range(stage + 1):
            run = self.run(stage, i)
            for value in graph.operators[i].inputs if run is not None else ():
                if run is not None and graph.values[value].kind == "activation":
                    program.at_least([*self.present(stage, value), (run, -1.0)], 0.0)
        for value in self.dynamic:
            present = self.present(stage, value)
            if len(present) == 2:
                program.at_most(present, 1.0)
            following = self.keep.get((stage + 1, value))
            if following is not None and graph.values[value].producer < stage:
                program.at_least([*present, (following, -1.0)], 0.0)
