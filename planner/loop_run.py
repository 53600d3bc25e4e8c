"""Runs a loop under a schedule of binomial checkpointing, as one node of autograd's graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

from planner.errors import LoopError
from planner.loop_step import Leaves, LoopStep, RandomStates, Recorded
from solvers.binomial import Action, Advance, Free, Record, Restore, Reverse, Store, revolve
from solvers.binomial_mixed import mixed
from solvers.binomial_online import OnlineCheckpoints

Gradients = list[torch.Tensor | None]
SlotsHold = Literal["states", "states or records"]


class LoopPlan:
    """What a loop is to do; a run of it can be started more than once.

    **Fields:**

    - `n_steps`: `None` as long as nobody knows; the first run finds out.
    - `goes_on`: whether a further step is due after so many, from the state that they led to; for an unknown `n_steps`.
    """

    def __init__(
        self,
        loop: LoopStep,
        n_steps: int | None,
        slots: int,
        slots_hold: SlotsHold = "states",
        goes_on: Callable[[Leaves, int], bool] | None = None,
    ) -> None:
        self.loop, self.n_steps, self.slots, self.slots_hold, self.goes_on = loop, n_steps, slots, slots_hold, goes_on
        self.random = loop.random_states()
        self.needs = [leaf.requires_grad for leaf in loop.start]


class LoopRun:
    """One pass over the schedule: :meth:`forward` until the last step is recorded, then :meth:`backward`."""

    def __init__(self, plan: LoopPlan) -> None:
        self.plan, self.loop = plan, plan.loop
        self.actions = self._schedule()
        self.hand: Leaves = [leaf.detach() for leaf in plan.loop.start]
        self.stored: dict[int, tuple[Leaves, RandomStates]] = {}
        self.records: dict[int, Recorded] = {}

    def forward(self) -> Recorded:
        """Run until the last step is recorded."""
        while self.plan.n_steps is None or self.plan.n_steps - 1 not in self.records:
            self._forward_action(next(self.actions))
        self.hand = []
        return self.records[self.plan.n_steps - 1]

    def backward(self, gradients: Gradients) -> tuple[Gradients, Gradients]:
        """The gradients of the state at the start and of the parameters."""
        totals: Gradients = [None] * len(self.loop.parameters)
        for action in self.actions:
            if not isinstance(action, Reverse):
                self._forward_action(action)
                continue
            self.hand = []
            gradients = self._reverse(self.records.pop(action.step), gradients, totals)
        return gradients, totals

    def _schedule(self) -> Iterator[Action]:
        """The actions, one by one as they are carried out."""
        if self.plan.n_steps is None:
            return self._online()
        return (revolve if self.plan.slots_hold == "states" else mixed)(self.plan.n_steps, self.plan.slots)

    def _online(self) -> Iterator[Action]:
        """Run until there is nothing more to do; then go back to before the last step, which is still in hand."""
        checkpoints = OnlineCheckpoints(self.plan.slots)
        goes_on = self.plan.goes_on
        assert goes_on is not None
        n_steps = 0
        before, random = self.hand, self.loop.random_states()
        while n_steps == 0 or goes_on(self.hand, n_steps):
            before, random = self.hand, self.loop.random_states()
            yield from checkpoints.arrive()
            yield Advance(n_steps, n_steps + 1)
            n_steps += 1
        self.hand = before
        self.loop.set_random_states(random)
        del before
        self.plan.n_steps = n_steps
        yield from checkpoints.reverse(last_in_hand=True)

    def _forward_action(self, action: Action) -> None:
        match action:
            case Advance(start, stop):
                self.hand = self.loop.advance(self.hand, stop - start)
            case Store(step):
                self.stored[step] = (self.hand, self.loop.random_states())
            case Restore(step):
                self.hand, random = self.stored[step]
                self.loop.set_random_states(random)
            case Free(step):
                del self.stored[step]
            case Record(step):
                run = self.loop.check_sources if self.plan.n_steps == step + 1 else self.loop.record
                recorded = self.records[step] = run(self.hand, self.plan.needs if step == 0 else None)
                self.hand = recorded.detached()
            case Reverse():
                raise AssertionError("a reversal is no forward action")

    def _reverse(self, recorded: Recorded, gradients: Gradients, totals: Gradients) -> Gradients:
        """The gradients of the state before a step; those of the parameters are added to `totals`."""
        pairs = [(o, g) for o, g in zip(recorded.outputs, gradients, strict=True) if g is not None and o.requires_grad]
        targets = [tensor for tensor in recorded.inputs if tensor.requires_grad]
        if not pairs:
            return [None] * len(recorded.inputs)
        outputs, tangents = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, [*targets, *self.loop.parameters], tangents, allow_unused=True)
        for number, gradient in enumerate(found[len(targets) :]):
            if gradient is not None:
                total = totals[number]
                totals[number] = gradient if total is None else total + gradient
        of_state = iter(found)
        return [next(of_state) if tensor.requires_grad else None for tensor in recorded.inputs]


class CheckpointedLoop(torch.autograd.Function):
    """The whole loop as one node."""

    @staticmethod
    def forward(ctx: Any, plan: LoopPlan, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run until the last step is recorded; the run waits for the backward."""
        ctx.plan, ctx.run = plan, LoopRun(plan)
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        recorded = ctx.run.forward()
        outputs = tuple(recorded.detached())
        ctx.mark_non_differentiable(
            *(out for out, with_graph in zip(outputs, recorded.outputs, strict=True) if not with_graph.requires_grad)
        )
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Go on with the run; a second time through a retained graph, with another one."""
        if torch.is_grad_enabled():
            raise LoopError("a checkpointed loop has no double backward: call backward without create_graph=True")
        _ = ctx.saved_tensors  # torch's own errors: freed by an earlier backward, or changed in place
        plan, run = ctx.plan, ctx.run
        ctx.run = None
        present = plan.loop.random_states()
        try:
            if run is None:  # a second backward through a retained graph: the states of the first one are gone
                plan.loop.set_random_states(plan.random)
                run = LoopRun(plan)
                run.forward()
            of_state, of_parameters = run.backward(list(gradients))
        finally:
            plan.loop.set_random_states(present)
        return (None, *of_state, *of_parameters)
