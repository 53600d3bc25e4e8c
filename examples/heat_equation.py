"""Differentiate a heat equation through 10,000 time steps with 30 states in memory.

    python examples/heat_equation.py [--steps 10000] [--slots 30] [--points 64]

A rod of `points` cells is heated, and its conductivity differs from cell to cell. The program differentiates the
distance of the final temperatures from a target with respect to every cell's conductivity and to the temperatures at
the start. On a run short enough for plain autograd both gradients must be those of plain autograd. Printed are the
forward steps, the states in memory at the peak, and the seconds; nothing is downloaded, and no accelerator is needed.
"""

from __future__ import annotations

import argparse
import time
import weakref
from collections.abc import Callable

import torch

from planner import checkpoint_loop
from solvers.binomial import total_steps

SHORT_STEPS = 500


class Rod:
    """An explicit Euler step of ∂u/∂t = ∂/∂x (k ∂u/∂x) with insulated ends; counts its calls and living states."""

    def __init__(self, points: int) -> None:
        position = torch.linspace(0, 1, points, dtype=torch.float64)
        self.start = torch.exp(-((position - 0.3) ** 2) / 0.01).requires_grad_()
        self.target = torch.exp(-((position - 0.6) ** 2) / 0.05)
        self.conductivity = (0.3 + 0.1 * torch.sin(6 * position[1:])).requires_grad_()  # in cells² per time step
        self.calls, self.alive, self.peak = 0, 0, 0

    def step(self, temperature: torch.Tensor) -> torch.Tensor:
        """The temperatures one time step later."""
        flow = self.conductivity * (temperature[1:] - temperature[:-1])
        after = temperature + torch.nn.functional.pad(flow, (0, 1)) - torch.nn.functional.pad(flow, (1, 0))
        self.calls += 1
        if torch.is_grad_enabled():
            return after
        array = after.numpy().copy()  # a state that says when its memory is released
        weakref.finalize(array, self._released)
        self.alive += 1
        self.peak = max(self.peak, self.alive)
        return torch.from_numpy(array)

    def _released(self) -> None:
        self.alive -= 1

    def gradients(self, run: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Gradients of the loss after `run` with respect to the conductivity and the start."""
        loss = ((run(self.start) - self.target) ** 2).sum()
        return torch.autograd.grad(loss, [self.conductivity, self.start])


def compare(points: int, slots: int) -> bool:
    """Whether a short run has the gradients of plain autograd, bit for bit."""
    rod = Rod(points)

    def plain(state: torch.Tensor) -> torch.Tensor:
        for _ in range(SHORT_STEPS):
            state = rod.step(state)
        return state

    expected = rod.gradients(plain)
    found = rod.gradients(
        lambda state: checkpoint_loop(rod.step, state, SHORT_STEPS, slots=slots, parameters=[rod.conductivity])
    )
    equal = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    print(f"{SHORT_STEPS} steps, against plain autograd: gradients {'equal bit for bit' if equal else 'DIFFER'}")
    return equal


def main() -> None:
    """Compare on a short run, then differentiate the long one."""
    parser = argparse.ArgumentParser(description="A heat equation, differentiated through many steps.")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--slots", type=int, default=30)
    parser.add_argument("--points", type=int, default=64)
    options = parser.parse_args()
    equal = compare(options.points, options.slots)
    rod = Rod(options.points)
    started = time.perf_counter()
    by_conductivity, by_start = rod.gradients(
        lambda state: checkpoint_loop(
            rod.step, state, options.steps, slots=options.slots, parameters=[rod.conductivity]
        )
    )
    seconds = time.perf_counter() - started
    optimum = total_steps(options.steps, options.slots)
    print(f"{options.steps:,} steps with {options.slots} slots:")
    print(f"  forward steps      {rod.calls:,} (the optimum: {optimum:,}; plain autograd: {options.steps:,})")
    print(f"  states at the peak {rod.peak + 1} (those in the slots, the one in hand and the one that replaces it)")
    print(f"  seconds            {seconds:.1f}")
    print(f"  gradient norms     {by_conductivity.norm():.6g} by conductivity, {by_start.norm():.6g} by start")
    if not equal or rod.calls != optimum:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
