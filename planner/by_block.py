"""What one does by hand, as schedules to compare with: `torch.utils.checkpoint` around blocks.

A *block* is the outermost numbered module that an operator belongs to (`h.3` of `h.3.attn.c_proj`). A checkpointed
block runs again when the backward pass first needs a value of it; what other blocks read of it stays in memory, as the
arguments of `torch.utils.checkpoint` do. The selective form also keeps what matrix products, convolutions and attention
make, as a policy of PyTorch's selective checkpointing (`create_selective_checkpoint_contexts`) commonly does.

These are schedules of our own graph, judged by our simulator, not runs of PyTorch's code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from graph_capture.graph import Graph, Operator
from solvers.schedule import Schedule

_DEAR = ("mm", "conv", "attention")
"""Parts of the names of operators whose results the selective policy keeps."""


@dataclass(frozen=True)
class ByBlock:
    """One way of wrapping blocks: its name and the schedule that it leads to."""

    label: str
    schedule: Schedule


def block_of(module: str) -> str:
    """The outermost numbered module of a path, or nothing.

    >>> block_of("transformer.h.3.attn.c_proj"), block_of("lm_head")
    ('transformer.h.3', '')
    """
    parts = module.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if place is None else ".".join(parts[: place + 1])


def by_block(graph: Graph) -> list[ByBlock]:
    """The usual ways of wrapping the blocks of a model; none if it has fewer than two."""
    blocks = list(dict.fromkeys(block_of(o.module) for o in graph.operators if o.phase == "forward"))
    blocks = [block for block in blocks if block]
    if len(blocks) < 2 or not any(o.phase == "backward" for o in graph.operators):
        return []
    every, second = set(blocks), set(blocks[::2])
    return [
        ByBlock("checkpoint every block", _schedule(graph, every, lambda operator: False)),
        ByBlock("checkpoint every 2nd block", _schedule(graph, second, lambda operator: False)),
        ByBlock("selective checkpointing", _schedule(graph, every, _is_dear)),
    ]


def _is_dear(operator: Operator) -> bool:
    return any(part in operator.target for part in _DEAR)


def _schedule(graph: Graph, blocks: set[str], keeps: Callable[[Operator], bool]) -> Schedule:
    """Every block of `blocks` runs again where the backward pass first reads what it released."""
    released = {v for v in range(len(graph.values)) if _is_released(graph, v, blocks, keeps)}
    order: list[int] = []
    again: set[str] = set()  # blocks that ran again already
    for index, operator in enumerate(graph.operators):
        if operator.phase == "backward":
            for value in operator.inputs:
                block = block_of(graph.operators[graph.values[value].producer].module)
                if value in released and block not in again:
                    again.add(block)
                    order.extend(_reruns(graph, block, released))
        order.append(index)
    return Schedule.from_order(graph, order)


def _is_released(graph: Graph, value: int, blocks: set[str], keeps: Callable[[Operator], bool]) -> bool:
    maker = graph.operators[graph.values[value].producer]
    block = block_of(maker.module)
    if maker.phase != "forward" or block not in blocks or keeps(maker) or not maker.recomputable:
        return False
    if any(graph.values[v].kind != "activation" for v in maker.outputs):
        return False  # what is handed to the caller stays
    readers = [graph.operators[i] for i in graph.uses[value]]
    return not any(o.phase != "backward" and block_of(o.module) != block for o in readers)


def _reruns(graph: Graph, block: str, released: set[int]) -> list[int]:
    """The operators of a block that must run again, in order: makers of what is read later, and what those read."""
    wanted: set[int] = set()
    for index in range(len(graph) - 1, -1, -1):
        operator = graph.operators[index]
        if operator.phase != "forward" or block_of(operator.module) != block:
            continue
        outputs = [v for v in operator.outputs if v in released]
        read = any(graph.operators[i].phase == "backward" or i in wanted for v in outputs for i in graph.uses[v])
        if read:
            wanted.add(index)
    return sorted(wanted)
