"""Keep Inductor from fusing where that would need more memory than the schedule says.

A fused kernel holds what all of its parts read and make. Where the first part lets an input go, and the second one
needs a new allocation, fusing them holds both, unless what it saves (a result of the first part that nobody else reads)
is as large. Inductor's own heuristic trades memory against traffic at a fixed rate, which no budget survives.

Inductor asks :class:`torch._inductor.choices.InductorChoices` before it fuses; :class:`WithinSchedule` says no there.
On a CPU kernels that are not fused share a C++ function all the same as long as none is called between them, and the
function gets all of its memory at once; it is ended where a kernel lets something go.

Written for torch 2.11 to 2.13: what is looked at (`Scheduler`, its nodes and buffers, `CppScheduling`) is private to
Inductor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.codegen.cpp import CppScheduling
from torch._inductor.virtualized import V

VERSION = 2
"""To be raised with every change of the rule: Inductor's cache on disk holds programs that were compiled by it."""


TRIFLE_BYTES = 4096
"""What may wait until the C++ function ends that lets it go: a row of statistics, a bias."""


@contextlib.contextmanager
def within_schedule(dying_inputs: Collection[int]) -> Iterator[None]:
    """While a program is compiled, fuse only what does not raise its peak. `dying_inputs`: those it releases."""
    choices = WithinSchedule(frozenset(dying_inputs))
    # Named in the settings, the choices are a part of the key of Inductor's cache.
    named = hasattr(config, "inductor_choices_class")
    settings: dict[str, Any] = {"inductor_choices_class": lambda: choices} if named else {"fx_graph_cache": False}
    with config.patch(settings), V.set_choices_handler(choices), _functions_end_where_memory_is_let_go(choices):
        yield


@contextlib.contextmanager
def _functions_end_where_memory_is_let_go(choices: WithinSchedule) -> Iterator[None]:
    original = CppScheduling.codegen_node

    def codegen_node(self: CppScheduling, node: Any) -> None:
        original(self, node)
        if choices.program(self.scheduler).lets_go(node):
            self._set_flush_status(True)

    CppScheduling.codegen_node = codegen_node
    try:
        yield
    finally:
        CppScheduling.codegen_node = original


class WithinSchedule(InductorChoices):
    """Inductor's own choices, without fusions that raise the peak of a program.

    **Fields:**

    - `dying_inputs`: positions of the program's inputs that nobody else holds, in the order of its placeholders.
    """

    def __init__(self, dying_inputs: frozenset[int]) -> None:
        super().__init__()
        self.dying_inputs = dying_inputs
        self._program: _Program | None = None

    def uuid(self) -> str:
        """What tells programs that were compiled by other choices from these."""
        return f"checkpoint planner {VERSION}, {sorted(self.dying_inputs)}"

    def can_fuse(self, scheduler: Any, node1: Any, node2: Any, shared_data_score: int) -> bool:  # type: ignore[override]
        """Whether two nodes may share a kernel."""
        if not InductorChoices.can_fuse(scheduler, node1, node2, shared_data_score):
            return False
        return not self.program(scheduler).raises_peak(node1, node2)

    def program(self, scheduler: Any) -> _Program:
        """The program that is being compiled, as it was before anything was fused."""
        if self._program is None or self._program.scheduler is not scheduler:
            self._program = _Program(scheduler, self.dying_inputs)
        return self._program


class _Program:
    """Who reads what in a program, before anything is fused.

    **Fields:**

    - `readers`: for each buffer who reads it, with the position at which it stood then. `fixed`: the positions of
      kernels that are called, not generated.
    - `places`: where each node runs once all is fused. A fused kernel runs before what stood between its parts.
    """

    def __init__(self, scheduler: Any, dying_inputs: Collection[int]) -> None:
        self.scheduler = scheduler
        self.returned = set(V.graph.get_output_names())
        names = list(V.graph.graph_inputs)
        self.released = {names[i] for i in dying_inputs if hasattr(V.graph.graph_inputs[names[i]], "get_numel")}
        self.readers: dict[str, dict[str, int]] = {}
        self.fixed: list[int] = []
        self.places: dict[str, int] | None = None
        for node in (member for whole in scheduler.nodes for member in whole.get_nodes()):
            for dependency in node.read_writes.reads:
                self.readers.setdefault(dependency.name, {})[node.get_name()] = node.min_order
            if node.is_extern():
                self.fixed.append(node.min_order)

    def raises_peak(self, node1: Any, node2: Any) -> bool:
        """Whether a kernel of both may need more memory than the one, then the other.

        Apart they need the larger of (what dies at the first) and (what the second makes), beside what both hold;
        together the sum of the two, less what is not made at all. Where a kernel that is called runs between them, one
        of the two moves across it, and takes there what the other one did not need.
        """
        first, second = sorted((node1, node2), key=lambda node: node.min_order)
        inside = {n.get_name() for n in (*first.get_nodes(), *second.get_nodes())}
        made = first.get_buffer_names()
        saved = sum(_bytes(b) for b in made if b not in self.returned and inside.issuperset(self.readers.get(b, ())))
        let_go = {d.name for d in first.read_writes.reads} - {d.name for d in second.read_writes.reads} - set(made)
        released = sum(_bytes(name) for name in let_go if self._dies_by(name, first.max_order))
        needed = sum(_bytes(name) for name in second.get_buffer_names())
        apart = any(first.max_order < position < second.min_order for position in self.fixed)
        return (max if apart else min)(released, needed) > saved

    def lets_go(self, node: Any) -> bool:
        """Whether more than a trifle is not needed any more once a kernel has run; asked when all is fused."""
        if self.places is None:
            self.places = {m.get_name(): i for i, whole in enumerate(self.scheduler.nodes) for m in whole.get_nodes()}
        place = max(self.places[member.get_name()] for member in node.get_nodes())
        names = {dependency.name for dependency in node.read_writes.reads}
        last = {name: max(self.places[r] for r in self.readers[name] if r in self.places) for name in names}
        return sum(_bytes(name) for name in names if last[name] <= place and self._is_held_here(name)) > TRIFLE_BYTES

    def _dies_by(self, name: str, position: int) -> bool:
        """Whether nobody reads a buffer after a position, or holds it."""
        return self._is_held_here(name) and max(self.readers[name].values(), default=-1) <= position

    def _is_held_here(self, name: str) -> bool:
        """Whether nobody outside of the program holds a buffer."""
        return name in self.released or (name in self.scheduler.name_to_buf and name not in self.returned)


def _bytes(name: str) -> int:
    return int(V.graph.get_numel(name)) * V.graph.get_dtype(name).itemsize
