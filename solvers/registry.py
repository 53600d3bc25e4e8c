"""The solvers by name, for a command line and for reports; a solver is imported only when it is asked for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

from solvers.solution import SearchClass, Solver


class UnknownSolverError(ValueError):
    """No solver has that name; the message lists those that there are."""


@dataclass(frozen=True)
class SolverEntry:
    """One solver of this package.

    **Fields:**

    - `name`: what a user types; `module`, `attribute`: where the class is.
    - `description`: one line. `search_class`: the class of schedules that it searches.
    """

    name: str
    module: str
    attribute: str
    description: str
    search_class: SearchClass

    def load(self) -> type[Solver]:
        """The solver's class; imports its module."""
        return cast(type[Solver], getattr(importlib.import_module(self.module), self.attribute))


_ENTRIES = (
    SolverEntry(
        "auto",
        "solvers.auto",
        "Auto",
        "chooses: store-all where it fits, else snapshot refinement with Chen's segments as a safety net",
        SearchClass.MIXED,
    ),
    SolverEntry(
        "snapshot",
        "solvers.snapshot",
        "SnapshotRefinement",
        "near-optimal with a lower bound, for graphs of thousands of operators",
        SearchClass.ORDERED,
    ),
    SolverEntry(
        "checkmate",
        "solvers.checkmate",
        "Checkmate",
        "Jain et al. 2020: a mixed-integer program, optimal in its class, up to about 360 operators",
        SearchClass.STAGED,
    ),
    SolverEntry(
        "checkmate-rounding",
        "solvers.checkmate_rounding",
        "CheckmateRounding",
        "Jain et al. 2020: the linear relaxation of that program, rounded in two phases; not optimal",
        SearchClass.STAGED,
    ),
    SolverEntry(
        "staged",
        "solvers.staged",
        "Staged",
        "that program with stages of many operators: hundreds of operators, no bound unless every operator is a stage",
        SearchClass.STAGED,
    ),
    SolverEntry(
        "moccasin",
        "solvers.moccasin",
        "Moccasin",
        "Bartan et al. 2023: constraint programming with retention intervals, up to about 200 operators",
        SearchClass.INTERVALS,
    ),
    SolverEntry(
        "chen-greedy",
        "solvers.chen",
        "ChenGreedy",
        "Chen et al. 2016: segments by bytes, the threshold searched for the budget; within a second, no bound",
        SearchClass.PERSISTENT_CHAIN,
    ),
    SolverEntry(
        "chen-sqrt",
        "solvers.chen",
        "ChenSqrt",
        "Chen et al. 2016: sqrt(N) equal segments; one plan, whatever the budget",
        SearchClass.PERSISTENT_CHAIN,
    ),
    SolverEntry(
        "revolve",
        "solvers.revolve",
        "Revolve",
        "Griewank and Walther 2000: binomial checkpointing of a chain of steps; budgets far below sqrt(N), no bound",
        SearchClass.ORDERED,
    ),
    SolverEntry(
        "heterogeneous-chain",
        "solvers.heterogeneous_chain",
        "HeterogeneousChain",
        "Beaumont et al. 2019 (rotor): the optimal persistent plan of a chain of unequal blocks; seconds, no bound",
        SearchClass.PERSISTENT_CHAIN,
    ),
    SolverEntry(
        "local-search",
        "solvers.local_search",
        "LocalSearch",
        "Imanishi et al. 2023 (FastSA): annealing on sequences in any order; a polisher, no bound",
        SearchClass.FREE,
    ),
    SolverEntry(
        "reordered",
        "solvers.reordered",
        "Reordered",
        "a better order of first executions, then another solver on it, then local search; the bound is order-free",
        SearchClass.FREE,
    ),
    SolverEntry(
        "store-all",
        "solvers.store_all",
        "StoreAll",
        "no recomputation: the step as PyTorch runs it",
        SearchClass.STORE_ALL,
    ),
)

SOLVERS: Mapping[str, SolverEntry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
"""All solvers by name."""


def solver_class(name: str) -> type[Solver]:
    """The class of the solver called `name`; raises :class:`UnknownSolverError`."""
    entry = SOLVERS.get(name.strip().lower().replace("_", "-"))
    if entry is None:
        close = difflib.get_close_matches(name, SOLVERS, n=1)
        hint = f": did you mean {close[0]!r}?" if close else "."
        raise UnknownSolverError(f"there is no solver {name!r}{hint} Known solvers: {', '.join(SOLVERS)}")
    return entry.load()
