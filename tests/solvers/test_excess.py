"""Where a sequence of executions exceeds the budget."""

from __future__ import annotations

from solvers.schedule import Schedule
from solvers.simulator import simulate
from solvers.snapshot.excess import Excess, excess_of
from tests.solvers.random_graphs import training_chain


def test_a_burst_counts_for_the_operator_behind_it_and_names_its_worst_rerun() -> None:
    graph = training_chain(3)  # forward 0, 1, 2; backward 3, 4, 5
    order = [0, 1, 2, 3, 0, 1, 4, 5]
    simulation = simulate(graph, Schedule.from_order(graph, order))
    burst = simulation.timeline_bytes[4:6]
    budget = max(burst) - 1
    excess = excess_of(graph, order, simulation, budget)
    assert excess.at[4] == max(*burst, simulation.timeline_bytes[6])
    worst = burst.index(max(burst))
    assert excess.reruns == {order[4 + worst]: max(burst)}
    assert not excess_of(graph, order, simulation, simulation.peak_bytes)


def test_the_worst_positions_stand_apart() -> None:
    excess = Excess(at={1: 10, 2: 30, 3: 20, 9: 5})
    assert excess.worst(3, 1, set()) == [2, 9]
    assert excess.worst(3, 1, {2}) == [3, 1, 9]
    assert excess.worst(1, 1, set()) == [2]
    assert excess.local_maxima() == {2, 9}
