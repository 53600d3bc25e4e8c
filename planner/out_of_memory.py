"""Out of memory in spite of a plan: one message with what was predicted, what was there, and what to raise.

A plan bounds what the step itself allocates. What else is on the device (an optimizer's state that nobody declared,
another process, the allocator's fragments) is not in it, and the message tells these apart.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import fx

from graph_capture.build import module_of, source_of
from graph_capture.formats import format_bytes
from graph_capture.graph import Graph
from solvers.schedule import Schedule

Boxed = Callable[[list[Any]], Any]
_GENERATED = "<eval_with_key>"  # what fx calls the file of a program that it generated


@dataclass(frozen=True)
class Expectation:
    """What a call was planned with.

    **Fields:**

    - `peak_bytes`: includes everything that the budget covers.
    - `graph`, `schedule`: what it was predicted from, resident memory and workspace included.
    """

    peak_bytes: int
    budget_bytes: int
    graph: Graph
    schedule: Schedule


def explained(run: Boxed, program: fx.GraphModule, phase: str, expectation: Expectation | None) -> Boxed:
    """`run`, which runs `program`, with an explanation when memory runs out; nothing is looked at before."""

    def call(arguments: list[Any]) -> Any:
        try:
            return run(arguments)
        except RuntimeError as error:
            if expectation is None or not is_out_of_memory(error):
                raise
            place = _place(program, error.__traceback__)
            raise torch.OutOfMemoryError(_message(error, f"in the {phase}{place}", expectation)) from error

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocator of torch found no memory; the CPU's has no error class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _message(error: RuntimeError, where: str, expectation: Expectation) -> str:
    predicted = (
        f"out of memory in spite of the plan, {where}: predicted peak {format_bytes(expectation.peak_bytes)}, budget "
        f"{format_bytes(expectation.budget_bytes)}"
    )
    torch_says = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"{predicted}; {_actual(expectation)} (torch: {torch_says})"


def _actual(expectation: Expectation) -> str:
    if not torch.cuda.is_available():
        return (
            "the allocator of this device keeps no account, so the machine had less free memory than the budget says. "
            "Declare what lives beside the step with extra_bytes={'beside the step': ...}, or lower the budget, and "
            "plan again"
        )
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()
    actual = f"actually allocated {format_bytes(allocated)} at most, reserved {format_bytes(reserved)}. "
    beyond = allocated - expectation.peak_bytes
    if beyond > 0:
        return actual + (
            f"That is {format_bytes(beyond)} more than predicted, by tensors beside the step (an optimizer's state, "
            f"a second model, a kept output): raise extra_bytes={{'beside the step': ...}} by at least {beyond:,} and "
            "plan again"
        )
    fragments = max(0, reserved - allocated)
    return actual + (
        "The step itself is within the prediction: other processes or fragments take the rest. Raise the headroom, "
        f"extra_bytes={{'headroom': ...}}, by at least {fragments:,} (what is reserved and not allocated), lower the "
        "budget, or set PYTORCH_ALLOC_CONF=expandable_segments:True"
    )


def _place(program: fx.GraphModule, traceback: TracebackType | None) -> str:
    """The operator that the generated code was at, with its module and source line; empty if it cannot be told."""
    line = ""
    while traceback is not None:
        name = traceback.tb_frame.f_code.co_filename
        if name.startswith(_GENERATED):
            line = linecache.getline(name, traceback.tb_lineno)
        traceback = traceback.tb_next
    named = line.split("=", 1)[0].split(":", 1)[0].strip()
    node = next((n for n in program.graph.nodes if n.name == named), None)
    if node is None:
        return ""
    origin = ", ".join(part for part in (module_of(node), source_of(node)) if part)
    return f" at {node.target}{f' ({origin})' if origin else ''}"
