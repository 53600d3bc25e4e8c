"""Options of a block: how much of what its backward reads is kept, and what it costs to make the rest once more.

Rockmate (Zhao et al., ICML 2023) cuts a network into blocks, finds a few schedules of each block alone, and lets rotor
choose among them. Here a block is a stage of :mod:`solvers.chain_stages`. The options of one are found greedily: from
all that is saved, the makers of saved values are dropped one by one, the one first whose values cost the fewest seconds
more per byte that is freed, together with whatever must run again because it was dropped before. In the backward of
the block what is missing is made just before its first use, and stays until its last. Equal blocks are solved once.

A restriction, like the chain itself: nothing is bounded by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from solvers.chain_program import Option
from solvers.chain_stages import Stages


@dataclass(frozen=True)
class BlockOption:
    """One option of a stage.

    **Fields:**

    - `kept`: the values that F_all leaves in memory. `backward`: the executions of B.
    - `size`: what the program is told of it, in bytes and seconds.
    """

    kept: frozenset[int]
    backward: tuple[int, ...]
    size: Option


def block_options(stages: Stages, levels: int) -> tuple[tuple[BlockOption, ...], ...]:
    """Up to `levels` options for each stage, beside the one that keeps everything; the largest first."""
    solved: dict[tuple[object, ...], list[frozenset[int]]] = {}
    options: list[tuple[BlockOption, ...]] = []
    for stage in range(len(stages.forward)):
        if len(stages.forward[stage]) == 1:  # what it drops it would have to make at once
            options.append(())
            continue
        block = _Block(stages, stage)
        key, local = block.signature()
        if key not in solved:
            position = {v: i for i, v in enumerate(local)}
            solved[key] = [frozenset(position[v] for v in kept) for kept in _thinned(block.descent(), levels, block)]
        options.append(tuple(block.option(frozenset(local[i] for i in kept)) for kept in solved[key]))
    return tuple(options)


def _thinned(descent: Sequence[frozenset[int]], levels: int, block: _Block) -> list[frozenset[int]]:
    """Those steps of the descent that come nearest to equal parts of the bytes, the last one among them."""
    if len(descent) <= levels:
        return list(descent)
    sizes = [block.size_of(kept) for kept in descent]
    full = block.size_of(block.saved)
    chosen: set[int] = set()
    for level in range(1, levels + 1):
        aim = full - (full - sizes[-1]) * level / levels
        chosen.add(min(range(len(descent)), key=lambda i: abs(sizes[i] - aim)))
    return [descent[i] for i in sorted(chosen)]


class _Block:
    """One stage, alone."""

    def __init__(self, stages: Stages, stage: int) -> None:
        self.stages, self.graph, self.stage = stages, stages.graph, stage
        self.forward, self.backward = stages.forward[stage], stages.backward[stage]
        self.saved = stages.saved[stage]
        mine = set(self.backward)
        self.fixed = {
            v
            for v in self.saved
            if v in stages.boundary[stage] or not mine.issuperset(r for r in self.graph.uses[v] if r >= stages.turn)
        }

    def size_of(self, values: frozenset[int]) -> int:
        """Bytes."""
        return sum(self.graph.values[v].size_bytes for v in values)

    def descent(self) -> list[frozenset[int]]:
        """What is kept after each drop; ever less."""
        kept, steps = self.saved, list[frozenset[int]]()
        again: set[int] = set()  # the forward operators that B runs again
        while True:
            best: tuple[float, frozenset[int], set[int]] | None = None
            for maker in sorted({self.graph.values[v].producer for v in kept - self.fixed}):
                fewer = kept - (frozenset(self.graph.operators[maker].outputs) - self.fixed)
                freed = self.size_of(kept - fewer)
                if freed > 0:
                    more = self._more_again(maker, fewer, again)
                    rate = sum(self.graph.operators[i].seconds for i in sorted(more)) / freed
                    if best is None or rate < best[0]:
                        best = rate, fewer, more
            if best is None:
                return steps
            _, kept, more = best
            again |= more
            steps.append(kept)

    def _more_again(self, maker: int, kept: frozenset[int], again: set[int]) -> set[int]:
        """What else must run again if `maker` does: makers of the stage whose values are neither kept nor remade."""
        more: set[int] = set()
        pending = [maker]
        while pending:
            index = pending.pop()
            if index in again or index in more or index not in self.forward or not self.stages.repeatable[index]:
                continue
            more.add(index)
            pending += [self.graph.values[v].producer for v in self.graph.operators[index].inputs if v not in kept]
        return more

    def option(self, kept: frozenset[int]) -> BlockOption:
        """The executions of the backward for what is kept, and its sizes."""
        backward = self._backward(kept)
        seconds = sum(self.graph.operators[i].seconds for i in backward)
        xbar = self.size_of(kept | self.stages.boundary[self.stage])
        return BlockOption(kept, backward, Option(xbar, seconds, self._backward_peak(backward)))

    def signature(self) -> tuple[tuple[object, ...], list[int]]:
        """What two blocks must have in common to be equal, and the values in the order in which it names them."""
        local: dict[int, int] = {}
        rows: list[object] = []
        for index in (*self.forward, *self.backward):
            operator = self.graph.operators[index]
            names = [local.setdefault(v, len(local)) for v in (*operator.inputs, *operator.outputs)]
            rows.append((operator.seconds, operator.workspace_bytes, len(operator.inputs), tuple(names)))
        for v in self.saved:  # read only by the backward of an earlier stage
            local.setdefault(v, len(local))
        marks = tuple((self.graph.values[v].size_bytes, v in self.saved, v in self.fixed) for v in local)
        return (tuple(rows), marks), list(local)

    def _again(self, kept: frozenset[int]) -> tuple[int, ...]:
        """The forward operators that B runs again, in captured order."""
        return self.stages.again(self.stage, self.saved - kept, kept)

    def _backward(self, kept: frozenset[int]) -> tuple[int, ...]:
        """Each of them just before the first operator that reads, perhaps through others, what it makes."""
        pending = set(self._again(kept))
        order: list[int] = []

        def make(values: Sequence[int]) -> None:
            for v in values:
                maker = self.graph.values[v].producer
                if maker in pending and v not in kept:
                    pending.discard(maker)
                    make(self.graph.operators[maker].inputs)
                    order.append(maker)

        for index in self.backward:
            make(self.graph.operators[index].inputs)
            order.append(index)
        return tuple(order)

    def _backward_peak(self, order: Sequence[int]) -> int:
        """The most bytes of what is made in the backward, above what is there at its start."""
        graph, first = self.graph, self.stages.turn
        again = {v for i in order if i < first for v in graph.operators[i].outputs}
        last = {
            v: i
            for i, index in enumerate(order)
            for v in (*graph.operators[index].outputs, *graph.operators[index].inputs)
        }
        alive, peak = 0, 0
        for position, index in enumerate(order):
            operator = graph.operators[index]
            alive += self.size_of(frozenset(operator.outputs))
            peak = max(peak, alive + operator.workspace_bytes)
            for v in {*operator.outputs, *operator.inputs}:
                value = graph.values[v]
                ends = v in again or (
                    value.producer >= first and value.kind == "activation" and self._last_use(v) == index
                )
                if ends and last[v] == position:
                    alive -= value.size_bytes
        return peak

    def _last_use(self, v: int) -> int:
        uses = self.graph.uses[v]
        return uses[-1] if uses else self.graph.values[v].producer
