"""The heterogeneous chain: rotor, optimal persistent checkpointing of a chain whose stages differ.

Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova: *Optimal checkpointing for heterogeneous chains: how to train deep
neural networks with limited memory*, Inria RR-9302, arXiv 1911.13214 (2019); the tool is called rotor. Where revolve
(:mod:`solvers.binomial`) has equal steps and states, here every stage has its own seconds and bytes.

Stage i turns a(i) into a(i + 1); δ(i) is the gradient of a(i), and ā(i + 1) is everything that the backward of stage i
reads, a(i + 1) included and a(i) not. Four operations:

* F_all: keep a(i), make ā(i + 1);
* F_ck: keep a(i), the checkpoint, and make a(i + 1);
* F_∅: consume a(i), make a(i + 1);
* B: consume δ(i + 1), ā(i + 1) and a(i), make δ(i).

*The dynamic programme* (the paper's theorem 1). C(s, t, m): the fewest seconds from a(s) and δ(t + 1) to δ(s) within m
bytes, a(s) not counted, is the lesser of

    C1 = min over s' of  Σ_{s ≤ k < s'} u_f(k) + C(s', t, m − ω_a(s')) + C(s, s' − 1, m)     F_ck, F_∅ …, both parts
    C2 = u_f(s) + C(s + 1, t, m − ω_ā(s + 1)) + u_b(s)                                       F_all, the rest, B

*Options* (Zhao, Le Hellard, Eyraud-Dubois, Gusak, Beaumont: *Rockmate: an efficient, fast, automatic and generic tool
for re-materialization in PyTorch*, ICML 2023). Where a stage is a block with trade-offs of its own, F_all may keep less
of ā(s + 1), and B makes up for it with more seconds and bytes: C2 is then the least over the options of the stage. Each
is an (ω_ā, u_b, temporaries of B) of its own, chosen once for each stage, since each runs F_all and B once in a plan.

C1 where m ≥ m_∅(s, t): what the forward operations of stages s … t − 1 need beside δ(t + 1); C2 where m ≥ m_all(s, t):
what F_all of s needs beside δ(t + 1), and B of s beside δ(s + 1). One table answers every budget up to its size.

*Search class*: persistent: what is kept stays until the backward that reads it. *Optimal* in it, for the discretised
sizes: bytes are rounded up to units, so a plan is always within the bytes, and with a coarse unit dearer than need be.
*Limits*: for L stages and M units O(L² M) memory and O(L³ M) time, all in numpy: 100 stages and 500 units take a second
and 80 MB. Schedules that drop a checkpoint before its backward may be cheaper (the paper's section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

    Seconds = np.ndarray[Any, np.dtype[np.float64]]

Kind = Literal["all", "checkpoint", "drop", "backward"]


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of a plan: F_all, F_ck (`"checkpoint"`), F_∅ (`"drop"`) or B of a stage.

    `option`: of F_all and B, 0 for the stage's ā as a whole, else one more than the place in `Chain.options`.
    """

    kind: Kind
    stage: int
    option: int = 0


@dataclass(frozen=True, slots=True)
class Option:
    """F_all keeps `xbar`, and B then takes `btime` seconds and `btmp` besides: as the fields of :class:`Chain`."""

    xbar: int
    btime: float
    btmp: int


@dataclass(frozen=True)
class Chain:
    """A chain of L stages; sizes are bytes, or units after :meth:`discretised`.

    **Fields:**

    - `ftime`, `btime`: seconds of the forward and the backward of each stage.
    - `x`: sizes of a(0) … a(L); `xbar`: sizes of ā, aligned with `x`; the first entry is not used.
    - `ftmp`, `btmp`: what the forward and the backward of each stage need besides; the δ that B makes counts here.
    - `delta`: sizes of δ(0) … δ(L), with whatever else stays from then on (the gradients of parameters); default `x`.
    - `all_tmp`: what F_all needs besides, where that is not `ftmp`.
    - `options`: for each stage its further options, beside `xbar`, `btime` and `btmp`; none if empty.
    """

    ftime: tuple[float, ...]
    btime: tuple[float, ...]
    x: tuple[int, ...]
    xbar: tuple[int, ...]
    ftmp: tuple[int, ...]
    btmp: tuple[int, ...]
    delta: tuple[int, ...] | None = None
    all_tmp: tuple[int, ...] | None = None
    options: tuple[tuple[Option, ...], ...] = ()

    def __post_init__(self) -> None:
        stages = len(self.ftime)
        short = {"btime": self.btime, "ftmp": self.ftmp, "btmp": self.btmp, "all_tmp": self.all_tmps}
        long = {"x": self.x, "xbar": self.xbar, "delta": self.deltas}
        for names, length in ((short, stages), (long, stages + 1)):
            for name, numbers in names.items():
                if len(numbers) != length:
                    raise ValueError(f"{name} has {len(numbers)} entries; a chain of {stages} stages needs {length}")
        if self.options and len(self.options) != stages:
            raise ValueError(f"options has {len(self.options)} entries; a chain of {stages} stages needs {stages}")
        further = [number for row in self.options for o in row for number in (o.xbar, o.btime, o.btmp)]
        for name, numbers in {"ftime": self.ftime, **short, **long, "options": further}.items():
            if any(not number >= 0 for number in numbers):
                raise ValueError(f"{name} has an entry that is negative or not a number")

    def __len__(self) -> int:
        return len(self.ftime)

    @property
    def deltas(self) -> tuple[int, ...]:
        """The sizes of δ(0) … δ(L)."""
        return self.x if self.delta is None else self.delta

    @property
    def all_tmps(self) -> tuple[int, ...]:
        """What F_all of each stage needs besides."""
        return self.ftmp if self.all_tmp is None else self.all_tmp

    def options_of(self, stage: int) -> tuple[Option, ...]:
        """All options of a stage; the first one keeps ā as a whole."""
        whole = Option(self.xbar[stage + 1], self.btime[stage], self.btmp[stage])
        return (whole, *self.options[stage]) if self.options else (whole,)

    @property
    def store_all_bytes(self) -> int:
        """What is needed for F_all of every stage: from here on a larger budget is of no use."""
        kept, peak = self.x[0] if len(self) else 0, 0
        for i in range(len(self)):
            kept += self.xbar[i + 1]
            peak = max(peak, kept + self.deltas[-1] + self.all_tmps[i], kept + self.deltas[i + 1] + self.btmp[i])
        return peak

    def discretised(self, unit_bytes: int) -> Chain:
        """The same chain with every size in units, rounded up."""

        def up(sizes: Sequence[int]) -> tuple[int, ...]:
            return tuple(-(-size // unit_bytes) for size in sizes)

        sizes = {name: up(getattr(self, name)) for name in ("x", "xbar", "ftmp", "btmp")}
        optional = {name: up(found) for name in ("delta", "all_tmp") if (found := getattr(self, name)) is not None}
        options = tuple(
            tuple(Option(-(-o.xbar // unit_bytes), o.btime, -(-o.btmp // unit_bytes)) for o in row)
            for row in self.options
        )
        return replace(self, **sizes, **optional, options=options)


class ChainProgram:
    """The table C(s, t, m) of a chain for every m up to `budget`, in the units of the chain."""

    def __init__(self, chain: Chain, budget: int) -> None:
        self.chain = chain
        self.size = min(budget, chain.store_all_bytes)
        self._elapsed = [0, *accumulate(chain.ftime)]
        # m_∅ of the paper but for δ: the forward of stage s, then of each stage up to t − 1 beside what it consumes.
        steps = [chain.x[k] + chain.x[k + 1] + chain.ftmp[k] for k in range(len(chain))]
        self._drop_need = [
            list(accumulate(steps[s + 1 : -1], max, initial=chain.x[s + 1] + chain.ftmp[s])) for s in range(len(chain))
        ]
        if self.size >= 0:
            self._fill()

    def makespan(self, budget: int) -> float:
        """The fewest seconds within the budget, a(0) included; `inf` if nothing fits."""
        free = self._free(budget)
        if not len(self.chain):
            return 0.0
        return float(self.table[0, len(self.chain) - 1, free]) if free >= 0 else float("inf")

    def plan(self, budget: int) -> list[Operation] | None:
        """The operations of an optimal plan; `None` if nothing fits."""
        if self.makespan(budget) == float("inf"):
            return None
        operations: list[Operation] = []
        pending: list[Operation | tuple[int, int, int]] = []
        if len(self.chain):
            pending.append((0, len(self.chain) - 1, self._free(budget)))
        while pending:
            item = pending.pop()
            if isinstance(item, Operation):
                operations.append(item)
            else:
                pending += reversed(self._expand(*item))
        return operations

    def _free(self, budget: int) -> int:
        return min(budget, self.size) - self.chain.x[0] if len(self.chain) else 0

    def _fill(self) -> None:
        import numpy as np

        stages, chain, units = len(self.chain), self.chain, self.size + 1
        self.table: Seconds = np.full((stages, stages, units), np.inf)
        # The same, moved by ω_a(s): what is left for the part behind a checkpoint at s.
        self._behind: Seconds = np.full((stages, stages, units), np.inf)
        self._elapsed_array = np.asarray(self._elapsed, dtype=np.float64)
        for distance in range(stages):
            for first in range(stages - distance):
                last = first + distance
                cell = self.table[first, last]
                for option in chain.options_of(first):
                    np.minimum(cell, self._all_seconds(first, last, option), out=cell)
                if distance:
                    np.minimum(cell, self._checkpoint_seconds(first, last).min(axis=0), out=cell)
                shift = chain.x[first]
                if shift < units:
                    self._behind[first, last, shift:] = cell[: units - shift]

    def _checkpoint_seconds(self, first: int, last: int, least: int = 0, units: int | None = None) -> Seconds:
        """C1 for every s' = first + 1 … last (rows) and every m from `least` on (columns), `units` of them."""
        need = self._drop_need[first][last - first - 1] + self.chain.deltas[last + 1]
        columns = slice(least, None if units is None else least + units)
        seconds = self._behind[first + 1 : last + 1, last, columns] + self.table[first, first:last, columns]
        seconds += (self._elapsed_array[first + 1 : last + 1] - self._elapsed_array[first])[:, None]
        seconds[:, : max(0, need - least)] = float("inf")
        return seconds

    def _all_need(self, first: int, last: int, option: Option) -> int:
        chain = self.chain
        temporary = max(chain.deltas[last + 1] + chain.all_tmps[first], chain.deltas[first + 1] + option.btmp)
        return option.xbar + temporary

    def _all_seconds(self, first: int, last: int, option: Option) -> Seconds:
        """C2 of an option, for every m."""
        import numpy as np

        kept, need = option.xbar, self._all_need(first, last, option)
        seconds: Seconds = np.full(self.size + 1, np.inf)
        if need <= self.size:
            rest = self.table[first + 1, last, need - kept : self.size + 1 - kept] if last > first else 0.0
            seconds[need:] = self.chain.ftime[first] + option.btime + rest
        return seconds

    def _all_seconds_at(self, first: int, last: int, option: Option, free: int) -> float:
        """C2 of an option, for one m."""
        if free < self._all_need(first, last, option):
            return float("inf")
        rest = float(self.table[first + 1, last, free - option.xbar]) if last > first else 0.0
        return self.chain.ftime[first] + option.btime + rest

    def _expand(self, first: int, last: int, free: int) -> list[Operation | tuple[int, int, int]]:
        """The choice that attains C(first, last, free), in order of time."""
        options = self.chain.options_of(first)
        everything = [self._all_seconds_at(first, last, option, free) for option in options]
        chosen = everything.index(min(everything))
        start, backward = Operation("all", first, chosen), Operation("backward", first, chosen)
        if first == last:
            return [start, backward]
        parts = self._checkpoint_seconds(first, last, free, 1)[:, 0]
        if everything[chosen] <= parts.min():
            return [start, (first + 1, last, free - options[chosen].xbar), backward]
        split = first + 1 + int(parts.argmin())
        drops = [Operation("drop", k) for k in range(first + 1, split)]
        behind = (split, last, free - self.chain.x[split])
        return [Operation("checkpoint", first), *drops, behind, (first, split - 1, free)]
