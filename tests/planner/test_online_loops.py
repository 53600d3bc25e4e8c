"""Loops that go on while a condition holds: the same gradients, bounded repetition, and no more states than slots."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from planner import LoopError, checkpoint_loop
from solvers.binomial import repetition_number, total_steps
from tests.planner.test_loops import Cell, Counted, leaf, plain, weighted


def until(n_steps: int) -> Any:
    """A condition on a state with a counter."""
    return lambda state: state[1] < n_steps


def counted(step: Any) -> Any:
    return lambda state: (step(state[0]), state[1] + 1)


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("n_steps", [1, 2, 5, 20, 73])
def test_gradients_are_bit_equal_and_the_bound_holds(n_steps: int, slots: int) -> None:
    weight, start = leaf(4, 4), leaf(4, seed=1)
    expected = plain(lambda state: torch.tanh(weight @ state), start, n_steps)
    gradients = torch.autograd.grad(weighted(expected), [weight, start])
    runs = [0] * n_steps

    def step(state: Any) -> Any:
        runs[int(state[1])] += 1
        return torch.tanh(weight @ state[0]), state[1] + 1

    begin = (start, torch.tensor(0))
    end, number = checkpoint_loop(step, begin, slots=slots, condition=until(n_steps), parameters=[weight])
    assert int(number) == n_steps
    found = torch.autograd.grad(weighted(end), [weight, start])
    assert torch.equal(end, expected)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))
    if slots > 1:
        assert max(runs) <= repetition_number(n_steps, slots) + 2
        assert sum(runs) <= n_steps + 2 + 1.5 * (total_steps(n_steps, slots) - n_steps)
    else:
        assert sum(runs) == total_steps(n_steps, 1) + 1


def test_at_most_so_many_steps() -> None:
    start = leaf(3)
    for limit, made in ((0, 0), (4, 4), (40, 9)):
        end = checkpoint_loop(counted(torch.sin), (start, torch.tensor(0)), limit, slots=3, condition=until(9))
        assert int(end[1]) == made
        assert torch.equal(end[0], plain(torch.sin, start, made))


def test_it_may_not_begin() -> None:
    start = leaf(3)
    assert checkpoint_loop(torch.sin, start, slots=2, condition=lambda state: False) is start


def test_a_condition_on_values_is_evaluated_without_gradient() -> None:
    """Newton's method for a square root, differentiated through as many steps as it needs."""
    square, seen = torch.tensor(7.0, dtype=torch.float64, requires_grad=True), []

    def unsettled(state: torch.Tensor) -> torch.Tensor:
        seen.append((state.requires_grad, torch.is_grad_enabled()))
        return (state * state - 7).abs() > 1e-12

    start = square.detach().clone()
    root = checkpoint_loop(lambda x: (x + square / x) / 2, start, slots=2, condition=unsettled, parameters=[square])
    calls = len(seen)
    root.backward()
    assert (len(seen), set(seen)) == (calls, {(False, False)})
    assert square.grad is not None
    assert square.grad.item() == pytest.approx(0.5 / 7**0.5, abs=1e-12)


@pytest.mark.parametrize("slots", [1, 4, 30])
def test_a_module_with_dropout(slots: int) -> None:
    torch.manual_seed(0)
    cell = Cell(dropout=0.3)
    outcomes = []
    for online in (False, True):
        torch.manual_seed(1)
        start = torch.randn(3, 6)
        cell.zero_grad()
        if online:
            result, _ = checkpoint_loop(
                counted(cell), (start, torch.tensor(0)), slots=slots, condition=until(20), parameters=cell
            )
        else:
            result = plain(cell, start, 20)
        between = torch.rand(3)
        (result * between.sum()).sum().backward()
        outcomes.append([result.detach(), *(p.grad for p in cell.linear.parameters()), between, torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_no_more_states_than_slots(slots: int) -> None:
    alive = 0
    peak = 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def step(state: torch.Tensor) -> torch.Tensor:
        nonlocal alive, peak
        result = torch.sin(state)
        if not torch.is_grad_enabled():
            array = numpy.array(result.numpy())
            weakref.finalize(array, gone)
            alive += 1
            result = torch.from_numpy(array)
        peak = max(peak, alive)
        return result

    start, left = leaf(8), iter(range(60))
    end = checkpoint_loop(step, start, slots=slots, condition=lambda state: next(left, None) is not None)
    assert peak <= slots - 1 + 2
    end.sum().backward()
    del end
    gc.collect()
    assert alive == 0
    assert peak <= slots - 1 + 2
    assert torch.equal(start.grad, torch.autograd.grad(plain(torch.sin, start, 60).sum(), start)[0])  # type: ignore[arg-type]


def test_a_retained_graph_gives_the_same_again_with_the_number_known_by_then() -> None:
    start, left = leaf(50), iter(range(20))
    step = Counted(lambda state: nn.functional.dropout(torch.sin(state), 0.1))
    end = checkpoint_loop(step, start, slots=3, condition=lambda state: next(left, None) is not None).sum()
    first = torch.autograd.grad(end, start, retain_graph=True)[0]
    step.calls = 0
    second = torch.autograd.grad(end, start)[0]
    assert torch.equal(first, second)
    assert step.calls == total_steps(20, 3)


def test_without_gradients_it_is_the_plain_loop() -> None:
    begin = (leaf(3), torch.tensor(0))
    step = Counted(counted(torch.sin))
    with torch.no_grad():
        assert not checkpoint_loop(step, begin, slots=2, condition=until(9))[0].requires_grad
    assert step.calls == 9
    detached = (begin[0].detach(), begin[1])
    end = checkpoint_loop(step, detached, slots=2, condition=until(9))
    assert not end[0].requires_grad
    assert torch.equal(end[0], plain(torch.sin, detached[0], 9))
    assert step.calls == 9 + 10  # the last step is looked at for tensors that nobody gave


def test_what_was_not_given_is_an_error() -> None:
    weight, begin = leaf(3), (leaf(3, seed=1), torch.tensor(0))
    for state in (begin, (begin[0].detach(), begin[1])):
        with pytest.raises(LoopError, match="not given"):
            checkpoint_loop(counted(lambda x: weight * x), state, slots=2, condition=until(3))


@pytest.mark.parametrize(
    ("condition", "changes", "text"),
    [
        (lambda state: "yes", {}, "the condition returned 'yes'"),
        (lambda state: state > 0, {}, "the condition returned tensor"),
        (lambda state: 1, {}, "the condition returned 1; it must be True or False"),
        (lambda state: bool(torch.rand(()) < 2), {}, "the condition draws random numbers"),
        (lambda state: bool(state.add_(1).sum() < 9), {}, "the condition changes the state in place"),
        (lambda state: True, {"slots_hold": "states or records"}, "with a condition slots hold states"),
        (lambda state: True, {"n_steps": -1}, "n_steps is -1"),
    ],
)
def test_bad_conditions(condition: Any, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(LoopError, match=text):
        checkpoint_loop(torch.sin, leaf(3), slots=2, condition=condition, **changes)
