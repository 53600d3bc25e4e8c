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

import threading
from collections.abc import Sequence
from typing import Any

import torch

from planner.errors import RewriteError
from planner.marks import Listener, listen
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
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        """Run the slice on the state that the slice before it left, and pass the state on."""
        (gradient,) = grad_outputs
        state = getattr(gradient, _STATE, None)
        if state is None:
            raise RewriteError(
                "a slice of a planned backward got no state from the slice before it: something replaced the token's "
                "gradient between them. Tensor hooks on the internal edges of a planned model are not supported."
            )
        if torch.is_grad_enabled():  # checked here: torch's once_differentiable costs as much as a small slice
            raise RewriteError("a planned model does not support double backward (create_graph=True)")
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


class OutputWatch:
    """Looks at what arrives at a planned call's outputs, right before its backward starts.

    - A loss output may get no gradient (one of two losses, trained alone). AOTAutograd fills in zeros; eager leaves the
      gradients that depend on nothing else at `None`, and an optimizer treats the two differently.
    - A *hidden* output is one that the loss does not come from, or that another output is computed from inside of the
      model. In eager the loss's gradient passes through it; here a gradient retained on it would be missing.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = numbers
        self.listener: Listener | None = None
        self.hidden: tuple[tuple[int, Any], ...] = ()

    @classmethod
    def on(cls, results: Sequence[Any], planned: Sequence[int], numbers: Sequence[int]) -> OutputWatch:
        """Watch the backward of a call that has just returned `results`.

        `planned` are the positions of the loss outputs; `numbers` for each tangent which output of the call's autograd
        node it is the gradient of.
        """
        node = results[planned[0]].grad_fn
        same = all(results[p].grad_fn is node for p in planned)
        watch = cls(numbers if same else [])
        node.register_prehook(watch.starts)
        return watch

    def starts(self, gradients: Sequence[Any]) -> None:
        """Called by autograd with what arrived at the outputs."""
        if torch.is_grad_enabled():
            raise RewriteError(
                "a planned model has no double backward: gradients were asked for with create_graph=True. Call "
                "planner.restore(model) for steps that differentiate twice."
            )
        for position, reference in self.hidden:
            output = reference()
            if output is not None and (output.retains_grad or _foreign_hooks(output)):
                raise RewriteError(
                    f"output {position} of the planned model has a hook or retains its gradient, but the gradient of "
                    "the loss passes inside of the planned backward, where neither would see it. Call "
                    "planner.restore(model) for such steps."
                )
        _arrival.missing = tuple(i for i, number in enumerate(self.numbers) if gradients[number] is None)
        if self.listener is None:
            listen(None)
        else:
            self.listener.backward_starts()


_arrival = threading.local()


def missing_outputs() -> tuple[int, ...]:
    """Which tangents of the backward that is just starting did not arrive."""
    missing, _arrival.missing = getattr(_arrival, "missing", ()), ()
    return missing


def _foreign_hooks(output: torch.Tensor) -> bool:
    """Whether a tensor has hooks of a user; FSDP puts its own on every output, and needs only one of them to fire."""
    hooks = (output._backward_hooks or {}).values()
    return any(not str(getattr(hook, "__module__", "")).startswith("torch.distributed") for hook in hooks)


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
