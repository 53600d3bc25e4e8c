"""Hand gradients back one by one: a chain of small autograd nodes over one shared backward program.

A compiled backward is one autograd node, which returns every gradient at its end. Gradient accumulation then holds a
second copy of all gradients, DDP loses its overlap, and optimizers in the backward find nothing to free. Here each
slice of the backward is an autograd node of its own. The nodes are threaded on a zero-dimensional *token*, so that
autograd runs them in order: AOTAutograd's node runs slice 0 and leaves the rest of the state in the *call record*;
every later node runs its slice on that state and returns its gradients at once.

The token's content is the number of the call: several calls may be in flight (two losses, two micro-batches before a
backward), and each finds its own record through it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from planner.errors import RewriteError
from planner.slices import Slice, State


class Call:
    """State of one call of the rewritten model between its forward and the end of its backward."""

    def __init__(self, slices: Sequence[Slice]) -> None:
        self.slices = slices
        self.state: State | None = None
        self.number = next(_numbers)
        _calls[self.number] = self


_numbers = itertools.count()
_calls: weakref.WeakValueDictionary[int, Call] = weakref.WeakValueDictionary()


def call_of(token: torch.Tensor) -> Call:
    """The record of the call that a saved token belongs to."""
    number = int(token.item())
    call = _calls.get(number)
    if call is None:
        raise RewriteError("the backward of a planned model runs after its call record is gone; please report this")
    return call


class SliceNode(torch.autograd.Function):
    """Autograd node of one slice: takes the token and the tensors whose gradients the slice makes; gives the token."""

    @staticmethod
    def forward(ctx: Any, call: Call, number: int, token: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Only the edges matter: nothing is computed."""
        ctx.call, ctx.number = call, number
        ctx.set_materialize_grads(False)
        return token.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, token_gradient: Any) -> tuple[Any, ...]:
        """Run the slice on the call's state."""
        call = ctx.call
        if call.state is None:
            raise RewriteError(
                "a slice of a planned backward runs before the slices that it depends on: gradients were asked for "
                "twice without retain_graph=True, or through a part of the graph alone"
            )
        gradients = call.slices[ctx.number].run(call.state)
        if ctx.number == len(call.slices) - 1:
            call.state = None
        return (None, None, None, *gradients)


class UnplannedOutput(torch.autograd.Function):
    """An output that the plan's loss does not come from: it requires a gradient, as in eager, but must not get one."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, position: int, output: torch.Tensor) -> torch.Tensor:
        """The output itself; `anchor` only makes it require a gradient."""
        ctx.position = position
        ctx.set_materialize_grads(False)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> tuple[Any, ...]:
        """A gradient that arrives here would be lost: refuse."""
        if gradient is not None:
            raise RewriteError(
                f"a gradient reached output {ctx.position} of the planned model, but the plan was made for a loss that "
                "does not come from this output. Plan again with loss_fn=..., so that the plan knows the loss that you use."
            )
        return None, None, None


def start_call(
    call: Call, arguments: Sequence[Any], later: Sequence[tuple[int, tuple[int, ...]]], late: frozenset[int]
) -> list[Any]:
    """Thread the token chain and return the arguments of AOTAutograd's callable: the token, then `arguments`.

    `later` lists (slice number, positions in `arguments` whose gradients it makes) for every slice but the first;
    `late` is the set of all those positions. They enter detached, since their gradients come through the chain.
    """
    token = torch.tensor(float(call.number), dtype=torch.float64, requires_grad=True)
    for number, positions in later:
        token = SliceNode.apply(call, number, token, *[arguments[p] for p in positions])  # type: ignore[assignment]
    return [token, *(a.detach() if i in late else a for i, a in enumerate(arguments))]
