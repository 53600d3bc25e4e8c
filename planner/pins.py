"""Pins: modules that the user wants kept, or recomputed, whatever the solver would decide.

A pattern is a module's path as in `named_modules`, or a glob (:func:`fnmatch.fnmatchcase`; `*` matches dots, too):
`"transformer.h.*.attn"`. It speaks of everything that the modules which it matches compute, their submodules included.
Where several patterns speak of an operator, the one whose module is the innermost decides, so that
`recompute=["h.*"], keep=["h.*.attn"]` does what it says; at one module a name beats a glob (`recompute=["h.*"],
keep=["h.3"]`), and what contradicts itself after that is an error.

* **keep**: every forward operator of the module runs once, and what it makes is held until its last use.
* **recompute**: nothing that the module computes is held across the turn from forward to backward. Two things are
  exempt. What the module *hands out* (a value that a forward operator outside of it reads) may be held or not, as the
  solver finds best, like the input of a block under `torch.utils.checkpoint`. And what cannot be computed twice is
  held because it must be; the report lists it with the reason. Random operators are no such thing: they run again with
  the random state of their first run.

A pin becomes part of the graph (`recomputable` of operators, `released` values), which every solver, the simulator and
the plan file's verification obey.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from graph_capture.graph import Graph, Operator
from planner.errors import PinError
from planner.plan_parts import Part

Kind = Literal["keep", "recompute"]
Patterns = str | Sequence[str]
"""One pattern, or several."""


class Pins(Part):
    """What was asked for; empty by default."""

    keep: tuple[str, ...] = ()
    recompute: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.keep or self.recompute)

    def patterns(self) -> Iterator[tuple[Kind, str]]:
        """All of them, each with what it asks for."""
        for pattern in self.keep:
            yield "keep", pattern
        for pattern in self.recompute:
            yield "recompute", pattern


NO_PINS = Pins()

ASKED_FOR = "asked for: keep"
"""Begins the reason of an operator that is kept because of a pin."""


def pins_of(keep: Patterns, recompute: Patterns) -> Pins:
    """Read what a caller gave; raises :class:`~planner.errors.PinError` if it is neither a text nor a list of texts."""
    return Pins(keep=_texts("keep", keep), recompute=_texts("recompute", recompute))


def _texts(name: str, given: Any) -> tuple[str, ...]:
    listed: Any = (given,) if isinstance(given, str) else given
    if not isinstance(listed, (list, tuple)) or not all(isinstance(p, str) for p in listed):
        raise PinError(f"{name}={given!r}: write a module's name or pattern, or a list of them: {name}=['h.*.attn']")
    return tuple(dict.fromkeys(listed))


@dataclass(frozen=True)
class Decision:
    """What the pins say of one module: `place` is the module that `pattern` names."""

    kind: Kind
    pattern: str
    place: str


def pinned(graph: Graph, pins: Pins, *, strict: bool = True, unless: str = "") -> Graph:
    """The graph with its pins; the same graph if there are none.

    **Arguments:**

    - `strict`: whether a pattern that matches no module is an error; where a plan is made again for another mode of the
      model, a module may have nothing to compute. `unless`: as of :func:`check_matches`.

    Raises :class:`~planner.errors.PinError`.
    """
    if not pins:
        return graph
    graph = unpinned(graph)
    decisions = decisions_of(graph, pins)
    if strict:
        check_matches([graph], pins, unless=unless)
    operators = tuple(
        dataclasses.replace(o, recomputable=False, keep_reason=f"{ASKED_FOR} {d.pattern!r}")
        if o.recomputable and d is not None and d.kind == "keep"
        else o
        for o, d in zip(graph.operators, decisions, strict=True)
    )
    graph = dataclasses.replace(graph, operators=operators)
    released = tuple(v for v in range(len(graph.values)) if _is_released(graph, decisions, v))
    return dataclasses.replace(graph, released=released)


def unpinned(graph: Graph) -> Graph:
    """The graph without the pins that :func:`pinned` gave it."""
    graph = graph.without_released
    if not is_pinned(graph):
        return graph
    freed = (
        dataclasses.replace(o, recomputable=True, keep_reason="") if o.keep_reason.startswith(ASKED_FOR) else o
        for o in graph.operators
    )
    return dataclasses.replace(graph, operators=tuple(freed))


def is_pinned(graph: Graph) -> bool:
    """Whether a graph has pins."""
    return bool(graph.released) or any(o.keep_reason.startswith(ASKED_FOR) for o in graph.operators)


def decisions_of(graph: Graph, pins: Pins) -> list[Decision | None]:
    """For each operator what the pins say of it; nothing is said of the loss and the backward phase."""
    by_module: dict[str, Decision | None] = {}
    found: list[Decision | None] = []
    for operator in graph.operators:
        if operator.phase != "forward":
            found.append(None)
            continue
        if operator.module not in by_module:
            by_module[operator.module] = _decide(operator.module, pins)
        found.append(by_module[operator.module])
    return found


def place_of(pattern: str, module: str) -> str | None:
    """The outermost module around `module`, or itself, that a pattern matches.

    >>> place_of("h.*", "h.3.attn.c_proj"), place_of("*.attn", "h.3.attn.c_proj"), place_of("wte", "h.3")
    ('h.3', 'h.3.attn', None)
    """
    return next((path for path in _around(module) if fnmatchcase(path, pattern)), None)


def inside(module: str, place: str) -> bool:
    """Whether a module is `place` or inside of it."""
    return not place or module == place or module.startswith(f"{place}.")


def _around(module: str) -> Iterator[str]:
    """The paths from the root, whose path is empty, to the module itself."""
    yield ""
    parts = module.split(".") if module else []
    yield from (".".join(parts[: i + 1]) for i in range(len(parts)))


def _decide(module: str, pins: Pins) -> Decision | None:
    named = [Decision(k, p, place) for k, p in pins.patterns() if (place := place_of(p, module)) is not None]
    if not named:
        return None
    first = max((len(d.place), d.pattern == d.place) for d in named)
    innermost = [d for d in named if (len(d.place), d.pattern == d.place) == first]
    other = next((d for d in innermost if d.kind != innermost[0].kind), None)
    if other is not None:
        raise PinError(
            f"module {other.place!r} is to be kept by keep={innermost[0].pattern!r} and recomputed by "
            f"recompute={other.pattern!r}: leave one of them out, or name a module inside of it"
        )
    return innermost[0]


def matching(graph: Graph, pins: Pins) -> Pins:
    """The pins without those patterns that match no module of `graph`."""
    modules = _modules(graph)
    found = {pattern for _, pattern in pins.patterns() if _matches(pattern, modules)}
    return Pins(
        keep=tuple(p for p in pins.keep if p in found), recompute=tuple(p for p in pins.recompute if p in found)
    )


def check_matches(graphs: Iterable[Graph], pins: Pins, *, whose: str = "", unless: str = "") -> None:
    """Raise :class:`~planner.errors.PinError` for a pattern that matches no module in any of the graphs.

    **Arguments:**

    - `whose`: whose modules they are, for the message, where that is not the whole model. `unless`: why a module that
      does compute something may not be among them.
    """
    modules = {module for graph in graphs for module in _modules(graph)}
    names = sorted({path for module in modules for path in _around(module)} - {""})
    for kind, pattern in pins.patterns():
        if _matches(pattern, modules):
            continue
        last = pattern.replace("*", "").strip(".").rpartition(".")[2]
        near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.5)
        near = near or [name for name in names if last and last.lower() in name.lower()][:5] or names[:5]
        raise PinError(
            f"{kind}={pattern!r} matches no module{whose} that computes anything in the forward pass"
            f"{f' ({unless})' if unless else ''}; near it: {', '.join(near) or 'nothing, there are no submodules'}"
        )


def _modules(graph: Graph) -> set[str]:
    return {o.module for o in graph.operators if o.phase == "forward"}


def _matches(pattern: str, modules: Iterable[str]) -> bool:
    return any(place_of(pattern, module) is not None for module in modules)


def _is_released(graph: Graph, decisions: Sequence[Decision | None], value: int) -> bool:
    """Whether a value belongs to a module that is recomputed, is not handed out, and can be made again."""
    decision = decisions[graph.values[value].producer]
    if decision is None or decision.kind != "recompute" or not graph.values[value].size_bytes:
        return False
    if not can_be_released(graph, graph.operators[graph.values[value].producer]):
        return False
    return not is_handed_out(graph, value, decision.place)


def can_be_released(graph: Graph, maker: Operator) -> bool:
    """Whether an operator may run again in the backward program."""
    return maker.recomputable and all(graph.values[v].kind == "activation" for v in maker.outputs)


def is_handed_out(graph: Graph, value: int, place: str) -> bool:
    """Whether anything outside of a module reads a value of it before the backward phase."""
    readers = (graph.operators[i] for i in graph.uses[value])
    return any(o.phase == "loss" or (o.phase == "forward" and not inside(o.module, place)) for o in readers)
