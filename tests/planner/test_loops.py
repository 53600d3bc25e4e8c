"""Checkpointed loops: the gradients of plain autograd, the optimal number of steps, no more states than slots."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from planner import LoopError, checkpoint_loop
from solvers.binomial import total_steps
from solvers.binomial_mixed import mixed_total_steps

Step = Callable[[Any], Any]


def plain(step: Step, state: Any, n_steps: int) -> Any:
    for _ in range(n_steps):
        state = step(state)
    return state


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def weighted(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor * torch.arange(1.0, tensor.numel() + 1, dtype=tensor.dtype).view_as(tensor)).sum()


class Counted:
    """Counts the calls of a step."""

    def __init__(self, step: Step) -> None:
        self.step, self.calls = step, 0

    def __call__(self, state: Any) -> Any:
        self.calls += 1
        return self.step(state)


@pytest.mark.parametrize("slots_hold", ["states", "states or records"])
@pytest.mark.parametrize(("n_steps", "slots"), [(1, 1), (2, 1), (7, 1), (7, 3), (10, 20), (40, 3), (100, 5), (100, 20)])
def test_gradients_are_bit_equal_and_steps_are_optimal(n_steps: int, slots: int, slots_hold: Any) -> None:
    weight, start = leaf(4, 4), leaf(4, seed=1)
    step = Counted(lambda state: torch.tanh(weight @ state))
    expected = plain(step, start, n_steps)
    gradients = torch.autograd.grad(weighted(expected), [weight, start])
    step.calls = 0
    result = checkpoint_loop(step, start, n_steps, slots=slots, parameters=[weight], slots_hold=slots_hold)
    found = torch.autograd.grad(weighted(result), [weight, start])
    optimum = total_steps if slots_hold == "states" else mixed_total_steps
    assert step.calls == optimum(n_steps, slots)
    assert torch.equal(result, expected)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))


@pytest.mark.parametrize(
    ("slots", "by_states", "by_either"), [(3, 590, 554), (5, 416, 352), (10, 322, 237), (20, 278, 184)]
)
def test_golden_numbers_of_calls_for_100_steps(slots: int, by_states: int, by_either: int) -> None:
    for slots_hold, calls in (("states", by_states), ("states or records", by_either)):
        step = Counted(torch.sin)
        checkpoint_loop(step, leaf(2), 100, slots=slots, slots_hold=slots_hold).sum().backward()  # type: ignore[arg-type]
        assert step.calls == calls


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_no_more_states_than_slots(slots: int) -> None:
    """States lie in arrays whose end is noticed: the slots but the start's, the state in hand, and the one before."""
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

    start = leaf(8)
    checkpoint_loop(step, start, 60, slots=slots).sum().backward()
    gc.collect()
    assert alive == 0
    assert peak <= slots - 1 + 2
    assert torch.equal(start.grad, torch.autograd.grad(plain(torch.sin, start, 60).sum(), start)[0])  # type: ignore[arg-type]


def test_one_node_holds_everything_until_the_backward() -> None:
    start = leaf(8)
    result = checkpoint_loop(torch.sin, start, 30, slots=3)
    reference = weakref.ref(result.grad_fn.run)  # type: ignore[union-attr]
    del result
    assert reference() is None, "dropping the result must release the states at once, without the garbage collector"


class Cell(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(6, 6), nn.Dropout(dropout)
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.dropout(torch.tanh(self.linear(state))) * self.frozen

    def half(self, state: torch.Tensor) -> torch.Tensor:
        return self(state) * 0.5


@pytest.mark.parametrize("method", [False, True])
@pytest.mark.parametrize("slots", [1, 4, 30])
def test_a_module_with_dropout(slots: int, method: bool) -> None:
    torch.manual_seed(0)
    cell = Cell(dropout=0.3)
    step = cell.half if method else cell
    outcomes = []
    by_states = functools.partial(checkpoint_loop, slots=slots)
    for run in (plain, by_states, functools.partial(by_states, slots_hold="states or records")):
        torch.manual_seed(1)
        start = torch.randn(3, 6)  # needs no gradient: those of the parameters must come all the same
        cell.zero_grad()
        result = run(step, start, 20)
        between = torch.rand(3)  # the caller's own random numbers, before and after the backward
        (result * between.sum()).sum().backward()
        gradients = [p.grad for p in cell.linear.parameters()]
        assert all(g is not None for g in gradients)
        outcomes.append([result.detach(), *gradients, between, torch.rand(3)])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*outcomes, strict=True))


def test_the_state_is_a_tree_with_integers() -> None:
    weight = leaf(3)

    def step(state: dict[str, Any]) -> dict[str, Any]:
        position, (speed, number) = state["position"], state["rest"]
        speed = speed - 0.1 * weight * position * torch.cos(number.double())
        return {"position": position + 0.1 * speed, "rest": (speed, number + 1)}

    start = {"position": leaf(3, seed=1), "rest": (leaf(3, seed=2), torch.tensor(0))}
    inputs = [weight, start["position"], start["rest"][0]]
    outcomes = []
    for run in (plain, lambda *a: checkpoint_loop(*a, slots=4, parameters=[weight])):
        end = run(step, start, 50)
        assert int(end["rest"][1]) == 50
        assert not end["rest"][1].requires_grad
        outcomes.append(torch.autograd.grad(weighted(end["position"]), inputs))  # the speed's tangent is missing
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)  # speed is used twice: another order of sums


def test_a_parameter_that_is_computed_and_one_that_is_unused() -> None:
    logarithm, start, unused = leaf(3), leaf(3, seed=1), leaf(2)
    rate = torch.exp(logarithm)
    outcomes = []
    for run in (plain, lambda *a: checkpoint_loop(*a, slots=3, parameters=[rate, unused])):
        end = run(lambda state: torch.sin(rate * state), start, 25)
        outcomes.append(torch.autograd.grad(weighted(end), [logarithm, start], retain_graph=True))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_autocast_is_met_again() -> None:
    torch.manual_seed(0)
    cell, start = Cell(), torch.randn(3, 6)
    outcomes = []
    for run in (plain, lambda *a: checkpoint_loop(*a, slots=2)):
        cell.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            end = run(Float(cell), start, 9)
        end.sum().backward()
        outcomes.append([end.detach(), cell.linear.weight.grad])
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    torch.testing.assert_close(outcomes[0][1], outcomes[1][1], rtol=2e-2, atol=1e-2)  # plain adds up in bfloat16


class Float(nn.Module):
    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.cell.half(state).float()


def test_loops_nest() -> None:
    weight, start = leaf(3), leaf(3, seed=1)

    def inner(state: torch.Tensor) -> torch.Tensor:
        return torch.sin(weight * state)

    def outer(state: torch.Tensor) -> torch.Tensor:
        return checkpoint_loop(inner, state, 5, slots=2, parameters=[weight])

    result = checkpoint_loop(outer, start, 6, slots=2, parameters=[weight])
    expected = plain(inner, start, 30)
    ours, theirs = (torch.autograd.grad(weighted(end), [weight, start]) for end in (result, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-300)  # sums of five steps first


def test_without_gradients_it_is_the_plain_loop() -> None:
    start = leaf(3)
    step = Counted(torch.sin)
    with torch.no_grad():
        assert not checkpoint_loop(step, start, 20, slots=2).requires_grad
    with torch.inference_mode():
        checkpoint_loop(step, start, 20, slots=2)
    result = checkpoint_loop(step, start.detach(), 20, slots=2)
    assert not result.requires_grad
    assert step.calls == 60
    assert torch.equal(result, plain(torch.sin, start.detach(), 20))


def test_no_steps_and_an_identity() -> None:
    start = leaf(3)
    assert checkpoint_loop(torch.sin, start, 0, slots=1) is start
    checkpoint_loop(lambda state: state, start, 5, slots=2).sum().backward()
    assert torch.equal(start.grad, torch.ones_like(start))  # type: ignore[arg-type]


def test_a_retained_graph_gives_the_same_again() -> None:
    torch.manual_seed(0)
    start = leaf(50)
    step = Counted(lambda state: nn.functional.dropout(torch.sin(state), 0.1))
    end = checkpoint_loop(step, start, 20, slots=3).sum()
    first, second = (torch.autograd.grad(end, start, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert step.calls == 2 * total_steps(20, 3)
    end.backward()
    with pytest.raises(RuntimeError, match="second time"):
        end.backward()


def test_gradients_by_finite_differences() -> None:
    weight = leaf(3)
    function = lambda state, w: checkpoint_loop(lambda x: torch.sin(w * x), state, 7, slots=2, parameters=[w])  # noqa: E731
    assert torch.autograd.gradcheck(function, (leaf(3, seed=1), weight))


def test_a_change_in_place_before_the_backward_is_an_error() -> None:
    weight, start = leaf(3), leaf(3, seed=1)
    end = checkpoint_loop(lambda state: weight * state, start, 9, slots=2, parameters=[weight])
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        end.sum().backward()


def test_what_was_not_given_is_an_error_and_no_lost_gradient() -> None:
    weight, start = leaf(3), leaf(3, seed=1)
    for state in (start, start.detach()):
        for n_steps in (1, 5):
            with pytest.raises(LoopError, match=r"tensor of shape \(3,\), torch.float64 on cpu .* not given"):
                checkpoint_loop(lambda x: weight * x, state, n_steps, slots=2)
            product = weight * 2
            with pytest.raises(LoopError, match="computed outside of it, by MulBackward0"):
                checkpoint_loop(lambda x, p=product: p * x, state, n_steps, slots=2, parameters=[weight])
    with pytest.raises(LoopError, match="not given"):
        checkpoint_loop(lambda x: weight, start, 3, slots=2)
    with pytest.raises(LoopError, match="not given"):
        checkpoint_loop(lambda x: x + start, start, 3, slots=2)  # the start is the state, and here something else too


def test_double_backward_is_refused() -> None:
    start = leaf(3)
    end = checkpoint_loop(torch.sin, start, 9, slots=2).sum()
    with pytest.raises(LoopError, match="no double backward"):
        torch.autograd.grad(end, start, create_graph=True)


@pytest.mark.parametrize(
    ("step", "state", "changes", "text"),
    [
        (torch.sin, leaf(3), {"slots": 0}, "slots is 0"),
        (torch.sin, leaf(3), {"slots": 2.5}, "slots is 2.5"),
        (torch.sin, leaf(3), {"n_steps": -1}, "n_steps is -1"),
        (torch.sin, leaf(3), {"n_steps": 2.0}, "n_steps is 2.0"),
        (torch.sin, leaf(3), {"slots_hold": "tapes"}, "slots_hold is 'tapes'"),
        (torch.sin, leaf(3), {"n_steps": None}, "neither n_steps nor a condition"),
        (torch.sin, leaf(3), {"parameters": [1.0]}, "parameters holds a float"),
        (torch.sin, {"x": leaf(3), "n": 3}, {}, "the state holds a int"),
        (torch.sin, (), {}, "the state holds no tensor"),
        (lambda x: (x, x), leaf(3), {}, "changed the structure of its state"),
        (lambda x: x.sum(), leaf(3), {}, r"changed tensor 0 of its state from shape \(3,\), torch.float64 on cpu"),
        (lambda x: x.float(), leaf(3), {}, r"to shape \(3,\), torch.float32"),
        (lambda x: None, leaf(3), {}, "changed"),
        (lambda x: x.mul_(2), leaf(3), {}, "changes its state in place"),
    ],
)
def test_bad_input(step: Step, state: Any, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(LoopError, match=text):
        checkpoint_loop(step, state, **{"n_steps": 5, "slots": 2, **changes})


def test_a_hook_on_a_parameter_is_refused() -> None:
    weight, start = leaf(3), leaf(3, seed=1)
    handle = weight.register_hook(lambda gradient: gradient * 2)
    with pytest.raises(LoopError, match="has a hook"):
        checkpoint_loop(lambda x: weight * x, start, 5, slots=2, parameters=[weight])
    handle.remove()
    checkpoint_loop(lambda x: weight * x, start, 5, slots=2, parameters=[weight])


def test_a_buffer_that_changes_is_refused() -> None:
    norm = nn.BatchNorm1d(6)
    with pytest.raises(LoopError, match="changes the buffer num_batches_tracked"):
        checkpoint_loop(norm, torch.randn(3, 6), 5, slots=2)
    assert checkpoint_loop(norm.eval(), torch.randn(3, 6), 5, slots=2).requires_grad
