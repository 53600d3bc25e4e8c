"""Hand gradients back one by one: a chain of small autograd nodes over one shared backward program.

A compiled backward is one autograd node, which returns every gradient at its end. Gradient accumulation then holds a
second copy of all gradients, DDP loses its overlap, and optimizers in the backward find nothing to free. Here each
slice of the backward is an autograd node of its own. The nodes are threaded on a zero-dimensional *token*, so that
autograd runs them in order: AOTAutograd's node runs slice 0, every later node runs its slice and returns its gradients
at once.

What later slices need travels with the token's gradient, as an attribute of that tensor: it finds its way along the
edges of the autograd graph. So several calls may be in flight (two losses, two micro-batches before a backward), a
backward may run twice (`retain_graph`), and what a backward that ends early leaves behind is released with the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from planner.errors import RewriteError
from planner.slices import Slice, State

_STATE = "_planned_state"


def token_gradient(state: State) -> torch.Tensor:
    """The token's gradient that carries the state of one backward to the next slice."""
    gradient = torch.zeros((), dtype=torch.float64)
    setattr(gradient, _STATE, state)
    return gradient


class SliceNode(torch.autograd.Function):
    """Autograd node of one slice: takes the token and the tensors whose gradients the slice makes; gives the token."""

    @staticmethod
    def forward(ctx: Any, piece: Slice, token: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Only the edges matter: nothing is computed."""
        ctx.piece = piece
        ctx.set_materialize_grads(False)
        return token.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run the slice on the state that the slice before it left, and pass the state on."""
        (gradient,) = grad_outputs
        state = getattr(gradient, _STATE, None)
        if state is None:
            raise RewriteError(
                "a slice of a planned backward got no state from the slice before it: something replaced the token's "
                "gradient between them. Tensor hooks on the internal edges of a planned model are not supported."
            )
        # The program holds every cast that autocast made; a backward called inside of autocast must not add any.
        with torch._C._DisableAutocast():
            gradients = ctx.piece.run(state)
        return (None, gradient, *gradients)


class UnplannedOutput(torch.autograd.Function):
    """An output that the plan's loss does not come from: it requires a gradient, as in eager, but must not get one."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, position: int, output: torch.Tensor) -> torch.Tensor:
        """The output itself; `anchor` only makes it require a gradient."""
        ctx.position = position
        ctx.set_materialize_grads(False)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        """A gradient that arrives here would be lost: refuse."""
        if grad_outputs[0] is not None:
            raise RewriteError(
                f"a gradient reached output {ctx.position} of the planned model, but the plan was made for a loss "
                "that does not come from this output. Plan again with loss_fn=..., so that the plan knows your loss."
            )
        return None, None, None


def start_call(
    slices: Sequence[Slice],
    arguments: Sequence[Any],
    later: Sequence[tuple[int, tuple[int, ...]]],
    late: frozenset[int],
) -> list[Any]:
    """Thread the token chain and return the arguments of AOTAutograd's callable: the token, then `arguments`.

    `later` lists (slice number, positions in `arguments` whose gradients it makes) for every slice but the first;
    `late` is the set of all those positions. They enter detached, since their gradients come through the chain.
    """
    token = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for number, positions in later:
        token = SliceNode.apply(slices[number], token, *[arguments[p] for p in positions])  # type: ignore[assignment]
    return [token, *(a.detach() if i in late else a for i, a in enumerate(arguments))]
