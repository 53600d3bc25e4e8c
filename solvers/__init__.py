"""Solvers: a graph and a budget in bytes in, a schedule and a lower bound out.

``import solvers`` is light: a solver's module, and with it OR-Tools or compiled code, is imported when the solver is
first named. One algorithm is one module; :mod:`solvers.registry` lists them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from solvers.hints import Hints, Progress
from solvers.registry import SOLVERS, SolverEntry, UnknownSolverError, solver_class
from solvers.schedule import Compute, Free, Schedule
from solvers.simulator import ScheduleError, Simulation, simulate
from solvers.solution import SearchClass, Solution, Solver, Status, memory_floor

if TYPE_CHECKING:
    from solvers.auto import Auto
    from solvers.checkmate import Checkmate
    from solvers.checkmate_rounding import CheckmateRounding
    from solvers.chen import ChenGreedy, ChenSqrt
    from solvers.heterogeneous_chain import HeterogeneousChain
    from solvers.local_search import LocalSearch
    from solvers.moccasin import Moccasin
    from solvers.reordered import Reordered
    from solvers.revolve import Revolve
    from solvers.snapshot import SnapshotRefinement
    from solvers.staged import Staged
    from solvers.store_all import StoreAll

__all__ = [
    "SOLVERS",
    "Auto",
    "Checkmate",
    "CheckmateRounding",
    "ChenGreedy",
    "ChenSqrt",
    "Compute",
    "Free",
    "HeterogeneousChain",
    "Hints",
    "LocalSearch",
    "Moccasin",
    "Progress",
    "Reordered",
    "Revolve",
    "Schedule",
    "ScheduleError",
    "SearchClass",
    "Simulation",
    "SnapshotRefinement",
    "Solution",
    "Solver",
    "SolverEntry",
    "Staged",
    "Status",
    "StoreAll",
    "UnknownSolverError",
    "memory_floor",
    "simulate",
    "solver_class",
]

_LATE = {entry.attribute: entry.module for entry in SOLVERS.values()}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
