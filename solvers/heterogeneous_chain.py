"""Rotor on real graphs: the optimum of the heterogeneous chain that the blocks of a network form.

Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova (2019); :mod:`solvers.chain_program` has the paper's dynamic programme
and the reference, :mod:`solvers.chain_stages` makes a chain of a joint graph and a schedule of a plan.

The programme's memory is that of a chain, in units; the simulator's is that of the graph, in bytes. So the budget of
the programme is a mere parameter here: one table holds the optimal plans for all of them, and the simulator picks the
cheapest that fits. A second table, with units of the budget, looks more closely around it: sizes are rounded up to
units, and where the budget is a fifth of the store-all peak, units of that peak are five times coarser than need be.
Every plan is tried in two forms: as it is, and with the outputs of a stage held until its backward where the paper
makes them once more.

*Options* (:mod:`solvers.block_options`, as Rockmate has them): a stage may keep a part of what its backward reads, and
make the rest within its backward. The plans of the programme without options are judged as well, in the same way, so
that options never make a solution worse.

*Search class*: persistent chain, with recomputation inside of stages if they have options. *Bound*: none (0): the
programme is exact for its chain, which is a restriction. *Limits*: a skip that passes several stages (the encoder of a
U-Net) is kept throughout. A graph without a cut or a backward phase is refused by ``applies_to``.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from graph_capture.graph import Graph
from solvers.block_options import BlockOption, block_options
from solvers.chain_cuts import Chain as Cuts
from solvers.chain_cuts import chain_of, no_chain_reason
from solvers.chain_program import Chain, ChainProgram, Operation
from solvers.chain_stages import Stages, stage_cuts
from solvers.hints import NO_HINTS, Hints
from solvers.schedule import Schedule
from solvers.solution import SearchClass, Solution, Solver
from solvers.verdict import Verdict, judge, judge_best

NARROWEST, WIDEST = 0.75, 1.25
"""Budgets of the programme that the second table is asked for, as multiples of the budget."""

NEAREST = 6
"""How many plans :meth:`HeterogeneousChain.orders_nearest` gives on either side of the budget."""


@dataclass(frozen=True)
class HeterogeneousChain(Solver):
    """The optimal persistent plans of the chain of stages, judged by the simulator.

    **Fields:**

    - `units`: into how many units the memory of the store-all step is divided, and then the budget.
    - `max_stages`: a longer chain is made coarser; table and time grow with its square and cube.
    - `options`: how many options a stage has beside the paper's own, which keeps all that its backward reads.
    """

    units: int = 500
    max_stages: int = 128
    options: int = 6
    name: ClassVar[str] = "heterogeneous-chain"

    def __post_init__(self) -> None:
        for field in ("units", "max_stages"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1")
        if self.options < 0:
            raise ValueError(f"options is {self.options}; it must not be negative")

    def applies_to(self, graph: Graph) -> str | None:
        """The reason why the graph is no chain, if it is none."""
        return no_chain_reason(graph)

    def solve(self, graph: Graph, budget_bytes: int, hints: Hints = NO_HINTS) -> Solution:
        """The cheapest of the judged plans that fits the budget."""
        verdict = Verdict.start(self, graph, budget_bytes, SearchClass.PERSISTENT_CHAIN)
        reason = self.applies_to(graph)
        if reason is not None:
            return verdict.not_applicable(reason)
        store_all = judge(graph, Schedule.store_all(graph))
        cuts = chain_of(graph)
        if store_all.peak_bytes <= budget_bytes or verdict.below_floor or cuts is None:
            return verdict.conclude([store_all])
        orders = list(self.orders(graph, budget_bytes))
        trace = (f"{len(orders)} optimal plans of {min(len(cuts), self.max_stages)} stages",)
        return verdict.conclude([store_all, *judge_best(graph, orders, budget_bytes)], trace=trace)

    def orders(self, graph: Graph, budget_bytes: int) -> Iterator[tuple[int, ...]]:
        """The executions of every optimal plan, in each form, once each; nothing where the graph is no chain.

        The plans for about `budget_bytes` come first, with finer units; then those of every budget.
        """
        cuts = chain_of(graph)
        if cuts is None:
            return
        stages, variants = self._variants(graph, cuts)
        seen: set[tuple[int, ...]] = set()
        for plans_of in (partial(_plans_around, budget_bytes=budget_bytes), _plans):
            for variant, available in variants:
                plans = list(plans_of(variant, self.units))
                for hold in (False, True):
                    for plan in plans:
                        order = tuple(stages.order(plan, hold_outputs=hold, options=available))
                        if order not in seen:
                            seen.add(order)
                            yield order

    def orders_nearest(self, graph: Graph, budget_bytes: int) -> Iterator[tuple[int, ...]]:
        """The executions of the plans whose peaks, by the simulator, are nearest to the budget; from both sides.

        They are found by bisection: a larger budget of the programme gives a plan with a larger peak, but for details.
        So one table of fine units costs few simulations, where :meth:`orders` makes every plan.
        """
        cuts = chain_of(graph)
        if cuts is None:
            return
        stages, variants = self._variants(graph, cuts)
        chain, options = variants[-1]
        program = _program_around(chain, self.units, budget_bytes)
        for hold in (False, True):

            def order(budget: int, hold: bool = hold) -> tuple[int, ...] | None:
                plan = program.plan(budget)
                return None if plan is None else tuple(stages.order(plan, hold_outputs=hold, options=options))

            def fits(budget: int) -> bool:
                found = order(budget)
                return found is None or judge(graph, Schedule.from_order(graph, found)).peak_bytes <= budget_bytes

            budgets = range(math.floor(NARROWEST * self.units), program.size + 1)
            least = bisect.bisect_left(budgets, True, key=lambda budget: not fits(budget))
            for budget in budgets[max(0, least - NEAREST) : least + NEAREST]:
                found = order(budget)
                if found is not None:
                    yield found

    def _variants(
        self, graph: Graph, cuts: Cuts
    ) -> tuple[Stages, list[tuple[Chain, tuple[tuple[BlockOption, ...], ...]]]]:
        """The stages, and their chain without options and, where a stage has any, with them."""
        stages = Stages.of(graph, stage_cuts(graph, cuts, self.max_stages), cuts.long_lived)
        chain, options = stages.chain(), block_options(stages, self.options)
        variants: list[tuple[Chain, tuple[tuple[BlockOption, ...], ...]]] = [(chain, ())]
        if any(options):
            sizes = tuple(tuple(option.size for option in row) for row in options)
            variants.append((replace(chain, options=sizes), options))
        return stages, variants


def _plans(chain: Chain, units: int) -> Iterator[list[Operation]]:
    """The optimal plan of every budget of the programme, of the smallest need first."""
    chain = chain.discretised(max(1, -(-chain.store_all_bytes // units)))
    program = ChainProgram(chain, chain.store_all_bytes)
    return _distinct(program, range(program.size + 1))


def _plans_around(chain: Chain, units: int, budget_bytes: int) -> Iterator[list[Operation]]:
    """The optimal plans for about `budget_bytes`, of the smallest need first."""
    program = _program_around(chain, units, budget_bytes)
    return _distinct(program, range(math.floor(NARROWEST * units), program.size + 1))


def _program_around(chain: Chain, units: int, budget_bytes: int) -> ChainProgram:
    return ChainProgram(chain.discretised(max(1, -(-budget_bytes // units))), math.ceil(WIDEST * units))


def _distinct(program: ChainProgram, budgets: range) -> Iterator[list[Operation]]:
    seconds = math.inf
    for budget in budgets:
        found = program.makespan(budget)
        plan = program.plan(budget) if found < seconds or budget == program.size else None
        if plan is not None:
            seconds = found
            yield plan
