"""Differentiable loops in little memory: binomial checkpointing (revolve) of any loop of equal steps, in plain torch.

    from planner import checkpoint_loop

    state = checkpoint_loop(step, state, 10_000, slots=30, parameters=[diffusivity])
    loss(state).backward()

For time stepping, recurrent nets, optimisation through a simulation, unrolled solvers. Plain autograd keeps what all n
steps need for their backward; here at most `slots` states are stored, and the steps between them run again. Griewank,
Walther (2000), see :mod:`solvers.binomial`: with n known and slots that hold states no schedule takes fewer forward
steps, and exactly that many are taken: 44,016 for 10,000 steps with 30 slots. With ``slots_hold="states or records"``
the schedule is that of :mod:`solvers.binomial_mixed`: 554, 352, 237, 184 steps in all for 100 steps with 3, 5, 10, 20
slots, where states alone take 590, 416, 322, 278.

*Not known ahead.* With a `condition` in the place of `n_steps` the loop goes on while it holds, as in

    state = checkpoint_loop(step, state, condition=lambda state: state["error"] > 1e-6, slots=30)

and the states are stored by :mod:`solvers.binomial_online` (Stumm, Walther 2010; Wang, Moin, Iaccarino 2009), whose
bound is that no step runs more than once more often than if the number had been known. The gradients are the same.

*Counting convention.* Forward steps are calls of `step`, each of the n that are recorded included: for 4000 steps with
12 slots 21,620 in all, of which 17,620 are extra. The state at the start occupies a slot (it is the caller's own
tensor, and not copied). Next to the slots there are the state in hand, and the record of one step: that of the last
step is kept from the forward until the backward, so that the last step need not run again. Every step runs with
gradients once, the others without.

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
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

from planner.errors import LoopError
from planner.loop_run import CheckpointedLoop, LoopPlan, LoopRun, SlotsHold
from planner.loop_step import Leaves, LoopStep, owner_of

State = TypeVar("State")


def checkpoint_loop(
    step: Callable[[State], State],
    state: State,
    n_steps: int | None = None,
    *,
    slots: int,
    condition: Callable[[State], Any] | None = None,
    parameters: nn.Module | Iterable[torch.Tensor] | None = None,
    slots_hold: SlotsHold = "states",
) -> State:
    """Apply `step` to `state` `n_steps` times, differentiably, with at most `slots` states in memory.

    **Arguments:**

    - `step`: takes a state and returns the next, of the same structure, shapes and types, and not in place.
    - `state`: a tensor, or tensors in tuples, lists and dicts.
    - `slots`: how many states may be stored, the one at the start among them; more than `n_steps - 1` do not help.
    - `condition`: takes a state and says whether one more step is to be made, as a bool or a tensor with one. It is
      evaluated without gradient, before every step, and not again in the backward. `n_steps` is then the most steps
      to be made, or `None`.
    - `parameters`: the tensors besides the state that gradients go to, or a module. If `step` is a module or a method
      of one, that module's parameters are added. A tensor that is missing is an error, never a lost gradient.
    - `slots_hold`: `"states or records"` lets a slot hold what the backward of one step needs instead of a state.
      Fewer steps run again; right if such a record is not larger than a state. For a known number of steps.

    Without gradients the loop runs plainly. Raises :class:`LoopError`.
    """
    _check_options(n_steps, slots, condition, slots_hold)
    loop = LoopStep(step, state, list(_parameters_of(step, parameters)))

    def goes_on(leaves: Leaves, done: int) -> bool:
        return done != n_steps and (condition is None or loop.holds(condition, leaves))

    if not torch.is_grad_enabled():
        done = 0
        while goes_on(loop.flatten(state), done):
            state, done = step(state), done + 1
        return state
    if not goes_on(loop.start, 0):
        return state
    known, further = (n_steps, None) if condition is None else (None, goes_on)
    if any(tensor.requires_grad for tensor in (*loop.start, *loop.parameters)):
        leaves = CheckpointedLoop.apply(
            LoopPlan(loop, known, slots, slots_hold, further), *loop.start, *loop.parameters
        )
    else:
        leaves = LoopRun(LoopPlan(loop, known, 1, "states", further)).forward().detached()
    return pytree.tree_unflatten(list(leaves), loop.structure)  # type: ignore[arg-type]


def _check_options(n_steps: int | None, slots: int, condition: Callable[..., Any] | None, slots_hold: str) -> None:
    if n_steps is None and condition is None:
        raise LoopError("neither n_steps nor a condition is given; say how often the step is to be made")
    if n_steps is not None and (not isinstance(n_steps, int) or n_steps < 0):
        raise LoopError(f"n_steps is {n_steps!r}; it must be an integer of 0 or more")
    if not isinstance(slots, int) or slots < 1:
        raise LoopError(f"slots is {slots!r}; it must be an integer of 1 or more: the state at the start needs one")
    if slots_hold not in ("states", "states or records"):
        raise LoopError(f"slots_hold is {slots_hold!r}; it must be 'states' or 'states or records'")
    if condition is not None and slots_hold != "states":
        raise LoopError("with a condition slots hold states: leave slots_hold out, or give n_steps without a condition")


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
