"""Bad input, for every solver of the table: graphs that are none, extreme numbers, no time, a missing back end."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from graph_capture.graph import Graph, GraphError, Operator, Phase, Value
from solvers import Checkmate, Schedule, SnapshotRefinement, Status, simulate, snapshot
from solvers.backends import WITHOUT_BACKEND, BackendError
from solvers.snapshot.anneal import Annealer
from tests.solvers.random_graphs import PLAIN, Features, random_graph, training_chain
from tests.solvers.test_table import TABLE, Row, solved


@pytest.fixture(params=TABLE, scope="module")
def row(request: pytest.FixtureRequest) -> Row:
    return TABLE[request.param]


def operator(
    name: str, inputs: tuple[int, ...], output: int, seconds: float = 1.0, phase: Phase = "forward"
) -> Operator:
    return Operator(name, "op", phase, inputs, (output,), seconds)


def peak_of(graph: Graph) -> int:
    return simulate(graph, Schedule.store_all(graph)).peak_bytes


# No solver ever meets these: there is no such graph.
NO_GRAPHS: dict[str, tuple[Callable[[], Graph], str]] = {
    "cycle": (
        lambda: Graph((operator("a", (1,), 0), operator("b", (0,), 1)), (Value(1, 0), Value(1, 1))),
        r"operator 0 \(a\): input 1 is made by no operator before it \(missing producer or cycle\)",
    ),
    "reads itself": (
        lambda: Graph((operator("a", (0,), 0),), (Value(1, 0),)),
        "made by no operator before it",
    ),
    "missing producer": (
        lambda: Graph((operator("a", (0,), 1),), (Value(1, 0), Value(1, 0))),
        "input 0 is made by no operator before it",
    ),
    "value outside": (lambda: Graph((operator("a", (7,), 0),), (Value(1, 0),)), r"outside of 0\.\.0"),
    "value of another": (
        lambda: Graph((operator("a", (), 0), operator("b", (), 1)), (Value(1, 0), Value(1, 0))),
        "value 1 names operator 0 as its producer",
    ),
    "value of nobody": (lambda: Graph((operator("a", (), 0),), (Value(1, 0), Value(1, 0))), "does not list it"),
    "made twice": (
        lambda: Graph((operator("a", (), 0), operator("b", (), 0)), (Value(1, 0),)),
        "value 0 names operator 0 as its producer",
    ),
    "negative seconds": (lambda: Graph((operator("a", (), 0, -1.0),), (Value(1, 0),)), r"seconds are -1\.0"),
    "seconds not a number": (lambda: Graph((operator("a", (), 0, math.nan),), (Value(1, 0),)), "seconds are nan"),
    "infinite seconds": (lambda: Graph((operator("a", (), 0, math.inf),), (Value(1, 0),)), "seconds are inf"),
    "negative bytes": (lambda: Graph((operator("a", (), 0),), (Value(-1, 0),)), "size_bytes is -1"),
    "bytes not an integer": (lambda: Graph((operator("a", (), 0),), (Value(1.5, 0),)), r"size_bytes is 1\.5"),  # type: ignore[arg-type]
    "backward before forward": (
        lambda: Graph((operator("a", (), 0, phase="backward"), operator("b", (), 1)), (Value(1, 0), Value(1, 1))),
        "a forward operator stands after a later phase",
    ),
    "negative resident": (lambda: Graph((), (), {"parameters": -1}), "resident memory 'parameters' is -1"),
}


@pytest.mark.parametrize("name", NO_GRAPHS)
def test_there_is_no_such_graph(name: str) -> None:
    make, message = NO_GRAPHS[name]
    with pytest.raises(GraphError, match=message):
        make()


def test_values_of_zero_bytes(row: Row) -> None:
    for seed in (24, 31):
        graph = random_graph(seed, 5, Features(zero_bytes=0.7))
        if row.applies(graph):
            for budget_bytes in (peak_of(graph), peak_of(graph) * 9 // 10):
                solved(row, graph, budget_bytes)
    chain = training_chain(5, size_bytes=0)
    assert solved(row, chain, 0).overhead == 0.0


def test_one_value_larger_than_the_budget(row: Row) -> None:
    """In the midst of a chain of small ones: no order and no recomputation avoids it."""
    chain = training_chain(6)
    values = tuple(dataclasses.replace(v, size_bytes=1000 if i == 3 else 10) for i, v in enumerate(chain.values))
    graph = dataclasses.replace(chain, values=values)
    solution = solved(row, graph, 999)
    assert solution.status is Status.INFEASIBLE
    assert solution.lower_bound == math.inf
    assert re.search("1,?030 bytes", solution.message)  # it, and what the operator that reads it reads and makes


@pytest.mark.parametrize("budget_bytes", [0, -5])
def test_no_budget_at_all(row: Row, budget_bytes: int) -> None:
    graph = training_chain(5)
    assert solved(row, graph, budget_bytes).status is Status.INFEASIBLE


def test_two_parts_without_a_connection(row: Row) -> None:
    """Two chains in one graph, the one behind the other in either phase."""
    graph = random_graph(4, 6, PLAIN)
    first, second = training_chain(3), graph
    shift = len(first.values)
    rows: list[tuple[Operator, int]] = [(o, 0) for o in first.operators] + [(o, shift) for o in second.operators]
    rows.sort(key=lambda pair: ("forward", "loss", "backward").index(pair[0].phase))
    operators = tuple(
        dataclasses.replace(
            o, name=f"p{i}", inputs=tuple(v + s for v in o.inputs), outputs=tuple(v + s for v in o.outputs)
        )
        for i, (o, s) in enumerate(rows)
    )
    producer = {v: i for i, o in enumerate(operators) for v in o.outputs}
    values = tuple(dataclasses.replace(v, producer=producer[i]) for i, v in enumerate((*first.values, *second.values)))
    parts = Graph(operators, values)
    if row.applies(parts):
        for percent in (100, 90, 70):
            solved(row, parts, peak_of(parts) * percent // 100)


def test_no_time(row: Row) -> None:
    """A limit of no seconds: what is known without a search is said, nothing is claimed, nothing hangs."""
    if not hasattr(row.solver, "time_limit_seconds"):
        pytest.skip("the solver has no time limit")
    fields = {"time_limit_seconds": 0.0} | ({"work_limit": None} if hasattr(row.solver, "work_limit") else {})
    solver = dataclasses.replace(row.solver, **fields)  # type: ignore[type-var]
    hurried = dataclasses.replace(row, solver=solver)
    graph = training_chain(8)
    assert solved(hurried, graph, peak_of(graph)).overhead == 0.0
    solution = solver.solve(graph, peak_of(graph) - 30)
    assert solution.status in (Status.UNKNOWN, Status.FEASIBLE, Status.OPTIMAL)
    assert solution.lower_bound <= 3 / 16 + 1e-6  # three layers of sixteen are the optimum
    if solution.schedule is not None:
        assert simulate(graph, solution.schedule).peak_bytes <= peak_of(graph) - 30
    else:
        assert solution.hit_limit
        assert solution.message


def test_an_engine_that_does_not_exist() -> None:
    graph = training_chain(6)
    for solver in (
        Checkmate(engine="ABACUS"),  # type: ignore[arg-type]
        SnapshotRefinement(engines=("ABACUS",), work_limit=3),
    ):
        with pytest.raises(BackendError, match=r"no engine 'ABACUS' among .*HIGHS"):
            solver.solve(graph, peak_of(graph) - 10)


MISSING = """
import sys
sys.modules[{module!r}] = None  # as if it were not installed
from solvers import solver_class
from solvers.backends import BackendError
from tests.solvers.random_graphs import training_chain
graph = training_chain(6)
try:
    solution = solver_class({name!r})().solve(graph, 60)
except BackendError as error:
    print("refused:", error)
else:
    print("solved:", solution.schedule is not None)
assert solver_class({name!r})().solve(graph, 1000).overhead == 0.0
"""


@pytest.mark.parametrize("module", ["ortools", "numba"])
@pytest.mark.parametrize("name", TABLE)
def test_a_back_end_that_is_not_there(name: str, module: str) -> None:
    """One clear error that names the package and says what to do; solvers that can do without it do not care."""
    code = MISSING.format(name=name, module=module)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("refused:"):
        assert name not in WITHOUT_BACKEND
        assert f"needs {module}, which cannot be imported" in done.stdout
        assert f"pip install {module}, or take a solver that works without it: " in done.stdout
    else:
        assert done.stdout.startswith("solved:")
    if name in ("checkmate", "moccasin", "snapshot", "auto"):
        assert done.stdout.startswith("refused:" if module == "ortools" else "solved: True")


def test_broken_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba is there, but cannot be imported."""
    monkeypatch.delitem(sys.modules, "solvers.snapshot.kernel", raising=False)
    monkeypatch.delattr(snapshot, "kernel", raising=False)
    monkeypatch.setitem(sys.modules, "numba", ModuleType("numba"))
    with pytest.raises(BackendError, match=r"needs numba, which cannot be imported .*cannot import name 'njit'"):
        Annealer(training_chain(3))
