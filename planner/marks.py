"""Programs that tell a listener which execution of the schedule comes next, while somebody listens.

The program with the marks is the plain one with a call before the first node of each execution. It is generated in
the same way and so frees every value at the same place. It is made when it is first needed; while nobody listens the
plain program runs.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from planner.emit import EXECUTION
from planner.slices import boxed

Boxed = Callable[[list[Any]], Any]


class Listener(abc.ABC):
    """Follows one call of a planned program, from its forward to the end of its backward."""

    @abc.abstractmethod
    def runs(self, execution: int) -> None:
        """The execution at this position of the schedule's order comes next."""

    @abc.abstractmethod
    def forward_ended(self, results: Sequence[Any]) -> None:
        """The forward program has returned `results`."""

    @abc.abstractmethod
    def backward_starts(self) -> None:
        """Autograd has reached the call's outputs."""


# One for the process: autograd runs the backward of a GPU in a thread of its own.
_listener: Listener | None = None


def listen(listener: Listener | None) -> None:
    """From now on `listener`, or nobody, is told what runs."""
    global _listener
    _listener = listener


def mark(execution: int) -> None:
    """Called by the programs with marks."""
    if _listener is not None:
        _listener.runs(execution)


def markable(run: Boxed, program: fx.GraphModule) -> Boxed:
    """`run`, which runs `program`; the program with marks in its place while somebody listens."""
    marked: list[Boxed] = []

    def call(arguments: list[Any]) -> Any:
        if _listener is None:
            return run(arguments)
        if not marked:
            marked.append(boxed(with_marks(program)))
        return marked[0](arguments)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def with_marks(program: fx.GraphModule) -> fx.GraphModule:
    """A copy of an emitted program, or of a slice of one, with a call of :func:`mark` at each execution."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(program.graph, copies))
    for node, copied in copies.items():
        if EXECUTION in node.meta:
            with graph.inserting_before(copied):
                graph.call_function(mark, (node.meta[EXECUTION],))
    return fx.GraphModule(program, graph, f"{type(program).__name__}Marked")
