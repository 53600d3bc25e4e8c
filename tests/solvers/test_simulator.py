"""The judge: every refusal, and peaks that were computed by hand."""

from __future__ import annotations

import pytest

from graph_capture.graph import Graph, Operator, Value
from solvers.schedule import Compute, Free, Schedule, Step
from solvers.simulator import ScheduleError, simulate
from tests.solvers.brute_force import BruteForce
from tests.solvers.random_graphs import EVERYTHING, Builder, random_graph, training_chain


def loss_graph() -> Graph:
    """Two forward operators (10, 20 bytes), a loss of two operators, one backward operator that reads all."""
    builder = Builder()
    a = builder.add("forward", [], [10], 1.0)
    b = builder.add("forward", a, [20], 2.0)
    c = builder.add("loss", b, [1], 1.0)
    d = builder.add("loss", c, [1], 1.0)
    builder.add("backward", [*d, *a, *b], [5], 4.0)
    return builder.graph(resident_bytes={"parameters": 100})


def run(graph: Graph, *steps: Step) -> None:
    simulate(graph, Schedule(steps))


def test_peak_by_hand() -> None:
    # 10 | 10+20 | 30+1 | 31+1 (c dies) | 30+1+5
    simulation = simulate(loss_graph(), Schedule.store_all(loss_graph()))
    assert simulation.timeline_bytes == (110, 130, 131, 132, 136)
    assert (simulation.peak_bytes, simulation.peak_position, simulation.regime) == (136, 4, "first")
    assert (simulation.seconds, simulation.recomputed_seconds) == (9.0, 0.0)


def test_recomputation_by_hand() -> None:
    # a dies with b, is made again behind the loss: 10 | 30 | 21 | 22 | 21+10 | 31+5
    simulation = simulate(loss_graph(), Schedule.from_order(loss_graph(), [0, 1, 2, 3, 0, 4]))
    assert simulation.timeline_bytes == (110, 130, 121, 122, 131, 136)
    assert (simulation.seconds, simulation.recomputed_seconds) == (10.0, 1.0)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([Compute(7)], "computes operator 7; the graph has 5"),
        ([Compute(-1)], "computes operator -1"),
        ([Compute(1)], "its input value 0 is not in memory"),
        ([Compute(0), Compute(0)], "its output value 0 is still in memory"),
        ([Compute(0), Compute(1, 0)], "cannot work in the allocation of value 0"),
        ([Free(0)], "frees value 0, which is not in memory"),
        ([Compute(0), Free(0), Free(0)], "frees value 0, which is not in memory"),
        ([Compute(0), Compute(1)], "operator 2 .* never runs"),
        ([Compute(0), Compute(1), Compute(2), Free(2), Compute(2)], "nothing can be recomputed inside of the loss"),
        ([Compute(0), Compute(1), Compute(2), Free(0), Compute(0), Compute(3)], "interrupts the caller's loss"),
        ([Compute(0), Compute(1), Free(0), Compute(0), Compute(2)], "interrupts the caller's loss"),
    ],
)
def test_refusals(steps: list[Step], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        run(loss_graph(), *steps)


def test_loss_before_the_forward_phase_is_complete() -> None:
    builder = Builder()
    builder.add("forward", [], [1], 1.0)
    builder.add("forward", [], [1], 1.0)
    builder.add("loss", [0], [1], 1.0)
    with pytest.raises(ScheduleError, match="before the forward phase is complete"):
        run(builder.graph(), Compute(0), Compute(2), Compute(1))


def test_must_not_run_twice() -> None:
    builder = Builder()
    builder.add("forward", [], [1], 1.0, recomputable=False, keep_reason="changes a buffer")
    with pytest.raises(ScheduleError, match=r"must not run twice \(changes a buffer"):
        run(builder.graph(), Compute(0), Free(0), Compute(0))


def test_several_outputs_are_all_made_again() -> None:
    builder = Builder()
    a = builder.add("forward", [], [3, 4], 1.0)
    builder.add("backward", a[:1], [1], 1.0)
    builder.add("backward", a[1:], [1], 1.0)
    with pytest.raises(ScheduleError, match="output value 1 is still in memory"):
        run(builder.graph(), Compute(0), Compute(1), Free(0), Compute(0))


def in_place_graph(phase_of_source: str = "forward") -> Graph:
    builder = Builder()
    a = builder.add("forward", [], [8], 1.0)
    if phase_of_source == "forward":
        builder.add("forward", a, [8], 1.0, in_place=((0, 1),))
    else:
        builder.add("backward", a, [8], 1.0, in_place=((0, 1),))
    return builder.graph()


def test_in_place_takes_the_allocation_over() -> None:
    graph = in_place_graph()
    assert Schedule.store_all(graph).steps == (Compute(0), Compute(1, 0), Free(1))
    assert simulate(graph, Schedule.store_all(graph)).timeline_bytes == (8, 8)
    assert simulate(graph, Schedule((Compute(0), Compute(1)))).timeline_bytes == (8, 16)


def test_in_place_over_the_border_of_programs() -> None:
    graph = in_place_graph("backward")
    assert simulate(graph, Schedule.store_all(graph)).peak_bytes == 16
    with pytest.raises(ScheduleError, match="belongs to the caller or to another program"):
        run(graph, Compute(0), Compute(1, 0))
    # made again in the backward program, it may be taken over
    assert simulate(graph, Schedule((Compute(0), Free(0), Compute(0), Compute(1, 0)))).peak_bytes == 8


def test_in_place_in_what_the_caller_holds() -> None:
    values = (Value(8, 0, "output"), Value(8, 1))
    operators = (
        Operator("a", "t", "forward", (), (0,), 1.0),
        Operator("b", "t", "forward", (0,), (1,), 1.0, in_place=((0, 1),)),
    )
    graph = Graph(operators, values)
    assert simulate(graph, Schedule.store_all(graph)).peak_bytes == 16
    with pytest.raises(ScheduleError, match="belongs to the caller"):
        run(graph, Compute(0), Compute(1, 0))


def test_workspace_and_random_state() -> None:
    builder = Builder()
    a = builder.add("forward", [], [10], 1.0, random_state_bytes=3)
    builder.add("forward", a, [2], 1.0, workspace_bytes=50)
    builder.add("backward", [*a, 1], [1], 1.0)
    graph = builder.graph()
    assert simulate(graph, Schedule.store_all(graph)).timeline_bytes == (10, 62, 13)
    # run twice: the state (3) is there from the first run on; while it is replayed the present one is put aside (3);
    # then both are gone
    again = Schedule.from_order(graph, [0, 1, 0, 2])
    assert simulate(graph, again).timeline_bytes == (13, 65, 18, 13)


def gradient_graph(copy_bytes: int = 0, reader: bool = False) -> Graph:
    """Forward 4 bytes, backward with a gradient of 6 bytes, and one more backward operator of 5."""
    operators = (
        Operator("f", "t", "forward", (), (0,), 1.0),
        Operator("b", "t", "backward", (0,), (1, 2), 1.0),
        Operator("c", "t", "backward", (2, 1) if reader else (2,), (3,), 1.0),
    )
    values = (Value(4, 0), Value(6, 1, "gradient", 1, copy_bytes), Value(1, 1), Value(5, 2))
    return Graph(operators, values, {"parameters": 10}, accumulated_gradient_bytes=6, gradient_accumulation=True)


def test_both_regimes() -> None:
    simulation = simulate(gradient_graph(), Schedule.store_all(gradient_graph()))
    # first: 10+4 | +6+1 = 21 | 10+6+1+5 = 22; later: 16+4 | 20+7 = 27 | the gradient is gone: 16+1+5 = 22
    assert (simulation.first_peak_bytes, simulation.later_peak_bytes) == (22, 27)
    assert (simulation.peak_bytes, simulation.regime) == (27, "later")
    assert simulation.timeline_bytes == (20, 27, 22)


def test_delivery_copy() -> None:
    # first: while b's gradient is delivered, 21 + 6; then the original is gone: 10+6+1+5 = 22
    simulation = simulate(gradient_graph(copy_bytes=6), Schedule.store_all(gradient_graph()))
    assert simulation.first_peak_bytes == 27


def test_gradient_read_after_its_delivery_stays() -> None:
    schedule = Schedule.store_all(gradient_graph())
    assert simulate(gradient_graph(reader=True), schedule).later_peak_bytes == 28  # 16 + 6 + 1 + 5
    assert simulate(gradient_graph(6, reader=True), schedule).first_peak_bytes == 28  # 10 + 6 + 6 + 1 + 5


def test_gradient_read_by_a_recomputation_stays() -> None:
    operators = (
        Operator("b", "t", "backward", (), (0,), 1.0),
        Operator("c", "t", "backward", (0,), (1,), 1.0),
        Operator("d", "t", "backward", (1,), (2,), 1.0),
        Operator("e", "t", "backward", (1, 2), (3,), 1.0),
    )
    values = (Value(100, 0, "gradient", 1), Value(1, 1), Value(1, 2), Value(1, 3))
    graph = Graph(operators, values, accumulated_gradient_bytes=100, gradient_accumulation=True)
    once = simulate(graph, Schedule.store_all(graph))
    assert once.timeline_bytes == (200, 201, 102, 103)
    again = simulate(graph, Schedule.from_order(graph, [0, 1, 2, 1, 3]))
    assert again.timeline_bytes == (200, 201, 202, 202, 203)


def test_gradients_and_outputs_cannot_be_freed() -> None:
    graph = gradient_graph()
    with pytest.raises(ScheduleError, match="frees value 1, a gradient"):
        run(graph, Compute(0), Compute(1), Free(1))


def test_gradient_due_before_it_is_made() -> None:
    operators = (
        Operator("a", "t", "backward", (), (0,), 1.0),
        Operator("b", "t", "backward", (), (1,), 1.0),
    )
    graph = Graph(operators, (Value(1, 0, "gradient", 1), Value(1, 1)))
    with pytest.raises(ScheduleError, match="gradient value 0 is due"):
        run(graph, Compute(1), Compute(0))


def test_empty_schedule() -> None:
    graph = Graph((), (), {"parameters": 5})
    simulation = simulate(graph, Schedule(()))
    assert (simulation.peak_bytes, simulation.timeline_bytes, simulation.peak_position) == (5, (), 0)


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_exhaustive_search(seed: int, staged: bool) -> None:
    """Two independent accounts of memory: the optimum of one is replayed by the other, byte for byte within budget."""
    graph = random_graph(seed, 4, EVERYTHING)
    peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
    for percent in (75, 90):
        budget_bytes = peak_bytes * percent // 100
        seconds, schedule = BruteForce(graph, staged).optimum(budget_bytes)
        if schedule is not None:
            simulation = simulate(graph, schedule)
            assert simulation.peak_bytes <= budget_bytes
            assert simulation.recomputed_seconds == seconds
            assert simulate(graph, Schedule.from_order(graph, schedule.order)).peak_bytes <= budget_bytes


def test_chain_needs_what_it_needs() -> None:
    # A chain of n equal layers of 10 bytes: all activations, and the gradients on both sides of the first backward.
    graph = training_chain(10)
    assert simulate(graph, Schedule.store_all(graph)).peak_bytes == 120 - 10
