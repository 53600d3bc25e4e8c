"""Values that must not be held across the turn: the simulator, the mending of orders, every solver, and the bound."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator

import pytest

from graph_capture.graph import Graph, GraphError, Operator, Value
from solvers import SOLVERS, Auto, SnapshotRefinement, StoreAll
from solvers.pareto import curve
from solvers.schedule import Schedule
from solvers.simulator import ScheduleError, simulate, simulate_store_all
from solvers.snapshot.engine import EnginePool, Outcome
from solvers.snapshot.reduction import reduce
from solvers.snapshot.relaxation import PERCENT, build
from solvers.snapshot.search import BOUND_MARGIN_PERCENT
from solvers.solution import SearchClass, Solver, Status
from solvers.turn import released_order
from tests.solvers.brute_force import BruteForce, budgets_of
from tests.solvers.random_graphs import EVERYTHING, Features, random_graph
from tests.solvers.test_snapshot_bound import TIGHT
from tests.solvers.test_table import TABLE

LOSS = Features(loss=True)
SEVERAL = Features(loss=True, several_outputs=0.4, in_place=0.4, random_state=0.3, gradients=0.5)
FAMILIES = (LOSS, SEVERAL, EVERYTHING)


def may_be_released(graph: Graph) -> list[int]:
    """The values that a graph accepts in `released`."""
    found: list[int] = []
    for v, value in enumerate(graph.values):
        maker = graph.operators[value.producer]
        activations = all(graph.values[w].kind == "activation" for w in maker.outputs)
        read_by_loss = any(graph.operators[i].phase == "loss" for i in graph.uses[v])
        if maker.phase == "forward" and maker.recomputable and activations and not read_by_loss:
            found.append(v)
    return found


def pinned(seed: int, n: int, features: Features) -> Graph:
    """A random training step, some of whose values must be released."""
    rng = random.Random(seed)
    graph = random_graph(seed, n, features)
    allowed = may_be_released(graph)
    return dataclasses.replace(graph, released=tuple(v for v in allowed if rng.random() < 0.5))


def chain(sizes: tuple[int, ...] = (4, 4, 4), released: tuple[int, ...] = ()) -> Graph:
    """Forward operators in a row, a loss, and a backward that reads all their values in reverse."""
    n = len(sizes)
    operators = [Operator(f"f{i}", "f", "forward", (i - 1,) if i else (), (i,), 1.0) for i in range(n)]
    values = [Value(size, i) for i, size in enumerate(sizes)]
    operators.append(Operator("loss", "loss", "loss", (), (n,), 0.0, recomputable=False))
    values.append(Value(1, n))
    for j in range(n):
        operators.append(Operator(f"b{j}", "b", "backward", (n - 1 - j, n + j), (n + 1 + j,), 1.0, recomputable=False))
        values.append(Value(1, n + 1 + j))
    return Graph(tuple(operators), tuple(values), released=released)


# --- graph and simulator ----------------------------------------------------------------------------------------------


def test_store_all_is_refused_and_a_recomputation_is_not() -> None:
    graph = chain(released=(1,))
    with pytest.raises(ScheduleError, match="value 1 is held across the turn"):
        simulate(graph, Schedule.store_all(graph))
    simulation = simulate(graph, Schedule.from_order(graph, (0, 1, 2, 3, 4, 1, 5, 6)))
    assert simulation.recomputed_seconds == 1.0
    assert simulate_store_all(graph).recomputed_seconds == 0.0


def test_without_a_loss_the_turn_is_before_the_first_execution_of_the_backward_program() -> None:
    operators = (
        Operator("a", "t", "forward", (), (0,), 1.0),
        Operator("b", "t", "forward", (0,), (1,), 1.0),
        Operator("c", "t", "backward", (0, 1), (2,), 1.0),
    )
    graph = Graph(operators, tuple(Value(4, i) for i in range(3)), released=(0,))
    with pytest.raises(ScheduleError, match="held across the turn"):
        simulate(graph, Schedule.store_all(graph))
    assert simulate(graph, Schedule.from_order(graph, (0, 1, 0, 2))).recomputed_seconds == 1.0


@pytest.mark.parametrize(
    ("released", "message"),
    [
        ((9,), "outside"),
        ((1, 0), "ascending"),
        ((1, 1), "ascending"),
        ((3,), "no forward operator"),
        ((True,), "outside"),
    ],
)
def test_what_cannot_be_released_is_refused(released: tuple[int, ...], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        chain(released=released)


def test_results_and_inputs_of_the_loss_cannot_be_released() -> None:
    graph = chain()
    values = (dataclasses.replace(graph.values[0], kind="output"), *graph.values[1:])
    with pytest.raises(GraphError, match="handed to the caller"):
        dataclasses.replace(graph, values=values, released=(0,))
    operators = list(graph.operators)
    operators[3] = dataclasses.replace(operators[3], inputs=(2,))
    with pytest.raises(GraphError, match="the loss reads it"):
        dataclasses.replace(graph, operators=tuple(operators), released=(2,))


def test_it_is_part_of_the_fingerprint_and_of_the_data() -> None:
    free, released = chain(), chain(released=(1,))
    assert free.fingerprint != released.fingerprint
    assert "released" not in free.to_dict()
    assert Graph.from_dict(free.to_dict()) == free
    assert Graph.from_dict(released.to_dict()) == released
    assert released.without_released == free


# --- mending ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_every_order_can_be_mended(seed: int) -> None:
    graph = pinned(seed, 6, FAMILIES[seed % 3])
    rng, order = random.Random(seed), list(range(len(graph)))
    for _ in range(4):  # recomputations anywhere, which may or may not be of use
        again = rng.choice([i for i, o in enumerate(graph.operators) if o.recomputable and o.phase == "forward"])
        if all(graph.values[v].kind == "activation" for v in graph.operators[again].outputs):
            order.insert(rng.randrange(order.index(again) + 1, len(order) + 1), again)
        mended = released_order(graph, order)
        simulate(graph, Schedule.from_order(graph, mended))
        assert released_order(graph, mended) == mended
        assert set(mended) == set(order)


# --- solvers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool() -> Iterator[EnginePool]:
    with EnginePool() as engines:
        yield engines


@pytest.mark.parametrize("block", range(4))
def test_the_bound_is_below_the_optimum(pool: EnginePool, block: int) -> None:
    for seed in range(8 * block, 8 * block + 8):
        rng = random.Random(seed)
        graph = pinned(seed, (4, 3, 3)[seed % 3], FAMILIES[seed % 3])
        peak = simulate_store_all(graph).peak_bytes
        n, turn = len(graph), graph.last_forward + 1
        for budget in (rng.randint(peak // 2, peak), 2 * peak):
            optimum = BruteForce(graph).overhead(budget) * PERCENT
            for instants in ({turn}, {turn, *rng.sample(range(n), 2)}, set(range(n))):
                relaxation = build(reduce(graph, peak), budget, instants)
                answer = pool.solve(relaxation.program.serialized(), TIGHT)
                where = f"seed {seed}, budget {budget}, instants {sorted(instants)}, optimum {optimum}"
                if answer.outcome is Outcome.INFEASIBLE:
                    assert math.isinf(optimum), where
                else:
                    assert answer.dual_bound - BOUND_MARGIN_PERCENT <= optimum, where


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "store-all"])
def test_no_solver_breaks_it(name: str) -> None:
    row = TABLE[name]
    for seed in (1, 3, 8):
        graph = pinned(seed, 4, FAMILIES[seed % 3])
        assert graph.released
        if not row.applies(graph):
            continue
        exact = BruteForce(graph)
        peak = simulate_store_all(graph).peak_bytes
        for budget in (peak * 9 // 10, 2 * peak):
            check(row.solver, graph, budget, exact.overhead(budget))


def check(solver: Solver, graph: Graph, budget: int, optimum: float) -> None:
    solution = solver.solve(graph, budget)
    if solution.schedule is not None:
        simulation = simulate(graph, solution.schedule)  # raises if a value is held across the turn
        assert simulation.peak_bytes == solution.predicted_peak_bytes <= budget
        if solution.search_class is not SearchClass.FREE:
            assert solution.overhead >= optimum - 1e-6
    elif solution.status is Status.INFEASIBLE:
        assert math.isinf(optimum)
    if solution.search_class is SearchClass.ORDERED or isinstance(solver, Auto):
        assert solution.lower_bound <= optimum + 1e-6


@pytest.mark.parametrize("seed", range(6))
def test_snapshot_and_auto_are_optimal_where_memory_is_plenty(seed: int) -> None:
    graph = pinned(seed, 4, LOSS)
    budget = 4 * simulate_store_all(graph).peak_bytes
    optimum = BruteForce(graph).overhead(budget)
    for solver in (SnapshotRefinement(work_limit=4, gap=0.0), Auto(work_limit=4, gap=0.0)):
        solution = solver.solve(graph, budget)
        assert solution.overhead == pytest.approx(optimum, abs=1e-6)
        assert solution.lower_bound <= optimum + 1e-9


def test_store_all_does_not_apply() -> None:
    graph = chain(released=(1,))
    solution = StoreAll().solve(graph, 10**6)
    assert solution.status is Status.NOT_APPLICABLE
    assert "1 values are to be recomputed" in solution.message
    assert StoreAll().solve(graph, 1).status is Status.INFEASIBLE


def test_auto_says_why_and_the_scope_says_what() -> None:
    graph = chain(released=(0, 1))
    solution = Auto(work_limit=3).solve(graph, 10**6)
    assert solution.overhead == pytest.approx(2 / 6)
    assert solution.status is Status.OPTIMAL
    assert "must be recomputed, whatever the budget" in solution.message
    assert "2 values across the turn" in solution.bound_scope


def test_a_curve_is_monotone() -> None:
    graph = chain((8, 8, 8, 8, 8), released=(1, 3))
    budgets = budgets_of(graph, 20, 2 * simulate_store_all(graph).peak_bytes, 5)
    points = curve(graph, budgets, Auto(work_limit=2))
    overheads = [point.solution.overhead for point in points]
    assert overheads == sorted(overheads, reverse=True)
    assert overheads[-1] == pytest.approx(2 / 10)


def test_annealing_counts_what_is_held_as_over_the_budget() -> None:
    pytest.importorskip("numba")
    from solvers.snapshot.anneal import Annealer, Cooling

    graph = chain(released=(1,))
    annealer = Annealer(graph)
    result = annealer.anneal(range(len(graph)), 10**6, seed=0, cooling=Cooling(), seconds=5.0, moves=4000)
    assert result.best is not None
    assert simulate(graph, Schedule.from_order(graph, result.best)).recomputed_seconds == 1.0
    assert annealer.polish(result.best, 10**6).count(1) == 2
