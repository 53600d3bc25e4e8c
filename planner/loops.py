"""Differentiable loops in little memory: binomial checkpointing (revolve) of any loop of equal steps, in plain torch.

    from planner import checkpoint_loop

    state = checkpoint_loop(step, state, 10_000, slots=30, parameters=[diffusivity])
    loss(state).backward()

For time stepping, recurrent nets, optimisation through a simulation, unrolled solvers. Plain autograd keeps what all n
steps need for their backward; here at most `slots` states are stored, and the steps between them run again. Griewank,
Walther (2000), see :mod:`solvers.binomial`: with n known and slots that hold states no schedule takes fewer forward
steps, and exactly that many are taken: 44,016 for 10,000 steps with 30 slots. With ``slots_hold="states or records"``
the schedule is that of :mod:`solvers.binomial_mixed`.

*Counting convention.* The state at the start occupies a slot (it is the caller's own tensor, and not copied). Next to
the slots there are the state in hand, and the record of one step: that of the last step is kept from the forward until
the backward, so that the last step need not run again. Every step runs with gradients once, the others without.

*Right first.* A step that is run again meets the random numbers and the autocast of its first run, and the generators
end as if nothing had run again. A gradient that would have to go to a tensor that was not given is an error, found on
the record of the last step. A parameter or a start that was changed in place before the backward is torch's error.

*Limits*: the step must be a pure function of its state and parameters: side effects (a list that is appended to, a
counter in Python) happen again whenever a step does; a buffer that the step's own module changes, as a BatchNorm's
statistics, is an error; a step that depends on its number keeps it in the state, as an integer tensor. No double
backward, no forward mode, no `vmap`. A parameter that a step uses several times gets its gradient in another order of
additions than in plain autograd, else gradients are bit-equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

from planner.errors import LoopError
from planner.loop_step import Leaves, LoopStep, RandomStates, Recorded, owner_of
from solvers.binomial import Action, Advance, Free, Record, Restore, Reverse, Store, revolve
from solvers.binomial_mixed import mixed

State = TypeVar("State")
Gradients = list[torch.Tensor | None]
SlotsHold = Literal["states", "states or records"]


def checkpoint_loop(
    step: Callable[[State], State],
    state: State,
    n_steps: int,
    *,
    slots: int,
    parameters: nn.Module | Iterable[torch.Tensor] | None = None,
    slots_hold: SlotsHold = "states",
) -> State:
    """Apply `step` to `state` `n_steps` times, differentiably, with at most `slots` states in memory.

    **Arguments:**

    - `step`: takes a state and returns the next, of the same structure, shapes and types, and not in place.
    - `state`: a tensor, or tensors in tuples, lists and dicts.
    - `slots`: how many states may be stored, the one at the start among them; more than `n_steps - 1` do not help.
    - `parameters`: the tensors besides the state that gradients go to, or a module. If `step` is a module or a method
      of one, that module's parameters are added. A tensor that is missing is an error, never a lost gradient.
    - `slots_hold`: `"states or records"` lets a slot hold what the backward of one step needs instead of a state.
      Fewer steps run again; right if such a record is not larger than a state.

    Without gradients the loop runs plainly. Raises :class:`LoopError`.
    """
    if not isinstance(n_steps, int) or n_steps < 0:
        raise LoopError(f"n_steps is {n_steps!r}; it must be an integer of 0 or more")
    if not isinstance(slots, int) or slots < 1:
        raise LoopError(f"slots is {slots!r}; it must be an integer of 1 or more: the state at the start needs one")
    if slots_hold not in ("states", "states or records"):
        raise LoopError(f"slots_hold is {slots_hold!r}; it must be 'states' or 'states or records'")
    loop = LoopStep(step, state, list(_parameters_of(step, parameters)))
    if n_steps == 0:
        return state
    if not torch.is_grad_enabled():
        for _ in range(n_steps):
            state = step(state)
            loop.flatten(state)
        return state
    if not any(tensor.requires_grad for tensor in (*loop.start, *loop.parameters)):
        leaves = loop.check_sources(loop.advance(loop.start, n_steps - 1)).detached()
    else:
        leaves = _Loop.apply(_Plan(loop, n_steps, slots, slots_hold), *loop.start, *loop.parameters)
    return pytree.tree_unflatten(list(leaves), loop.structure)  # type: ignore[arg-type]


def _parameters_of(
    step: Callable[..., Any], parameters: nn.Module | Iterable[torch.Tensor] | None
) -> Iterator[torch.Tensor]:
    """Each tensor that needs a gradient once, those of the step's own module included."""
    given = parameters.parameters() if isinstance(parameters, nn.Module) else parameters or ()
    owner = owner_of(step)
    own = owner.parameters() if owner is not None else ()
    seen: set[int] = set()
    for tensor in (*given, *own):
        if not isinstance(tensor, torch.Tensor):
            raise LoopError(f"parameters holds a {type(tensor).__name__}; it must be tensors or a module")
        if not tensor.requires_grad or id(tensor) in seen:
            continue
        if tensor._backward_hooks or (tensor.retains_grad and not tensor.is_leaf):
            raise LoopError(
                f"a parameter of shape {tuple(tensor.shape)} has a hook or retains its gradient, which would happen at "
                "every step; use register_post_accumulate_grad_hook, or pass it through torch.clone first"
            )
        seen.add(id(tensor))
        yield tensor


class _Plan:
    """What a loop is to do; a run of it can be started more than once."""

    def __init__(self, loop: LoopStep, n_steps: int, slots: int, slots_hold: SlotsHold) -> None:
        self.loop, self.n_steps, self.slots, self.slots_hold = loop, n_steps, slots, slots_hold
        self.random = loop.random_states()
        self.needs = [leaf.requires_grad for leaf in loop.start]

    def actions(self) -> Iterator[Action]:
        """The schedule."""
        return (revolve if self.slots_hold == "states" else mixed)(self.n_steps, self.slots)


class _Run:
    """One pass over the schedule: :meth:`forward` until the last step is recorded, then :meth:`backward`."""

    def __init__(self, plan: _Plan) -> None:
        self.plan, self.loop = plan, plan.loop
        self.actions = plan.actions()
        self.hand: Leaves = [leaf.detach() for leaf in plan.loop.start]
        self.stored: dict[int, tuple[Leaves, RandomStates]] = {}
        self.records: dict[int, Recorded] = {}

    def forward(self) -> Recorded:
        """Run until the last step is recorded."""
        last = self.plan.n_steps - 1
        while last not in self.records:
            self._forward_action(next(self.actions))
        self.hand = []
        return self.records[last]

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
                run = self.loop.check_sources if step == self.plan.n_steps - 1 else self.loop.record
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


class _Loop(torch.autograd.Function):
    """The whole loop as one node."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.plan, ctx.run = plan, _Run(plan)
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
        if torch.is_grad_enabled():
            raise LoopError("a checkpointed loop has no double backward: call backward without create_graph=True")
        _ = ctx.saved_tensors  # torch's own errors: freed by an earlier backward, or changed in place
        plan, run = ctx.plan, ctx.run
        ctx.run = None
        present = plan.loop.random_states()
        try:
            if run is None:  # a second backward through a retained graph: the states of the first one are gone
                plan.loop.set_random_states(plan.random)
                run = _Run(plan)
                run.forward()
            of_state, of_parameters = run.backward(list(gradients))
        finally:
            plan.loop.set_random_states(present)
        return (None, *of_state, *of_parameters)
