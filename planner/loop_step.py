"""One step of a loop: called with flat states, recorded, and searched for tensors that nobody named."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from planner.errors import LoopError

Leaves = list[torch.Tensor]
RandomStates = list[torch.Tensor]


@dataclass
class Recorded:
    """A step that ran with gradients: the detached state that went in, and what came out with its autograd graph."""

    inputs: Leaves
    outputs: Leaves

    def detached(self) -> Leaves:
        """The next state."""
        return [output.detach() for output in self.outputs]


def owner_of(step: Callable[..., Any]) -> nn.Module | None:
    """The module that `step` is, or is a method of."""
    owner = step if isinstance(step, nn.Module) else getattr(step, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


class LoopStep:
    """The caller's step, and all that it has to meet again when it is run again: structure, autocast, random numbers.

    **Fields:**

    - `parameters`: the tensors besides the state that gradients go to.
    - `devices`: those whose random numbers the step may use, next to the CPU's.
    """

    def __init__(self, step: Callable[[Any], Any], state: Any, parameters: Sequence[torch.Tensor]) -> None:
        self.step = step
        leaves, self.structure = pytree.tree_flatten(state)
        self.start: Leaves = leaves
        self.parameters = list(parameters)
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                raise LoopError(f"the state holds a {type(leaf).__name__}; it must be tensors, counters too")
        if not leaves:
            raise LoopError("the state holds no tensor")
        self.kinds = [(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves]
        devices = {tensor.device for tensor in (*leaves, *self.parameters)}
        self.devices = sorted((d for d in devices if d.type not in ("cpu", "meta")), key=str)
        types = {"cpu", *(d.type for d in self.devices)}
        self.autocast = [(t, torch.get_autocast_dtype(t), torch.is_autocast_enabled(t)) for t in sorted(types)]

    def flatten(self, state: Any) -> Leaves:
        """The tensors of a state; raises :class:`LoopError` unless it looks like the state at the start."""
        leaves, structure = pytree.tree_flatten(state)
        if structure != self.structure:
            raise LoopError(f"the step changed the structure of its state from {self.structure} to {structure}")
        for number, (leaf, kind) in enumerate(zip(leaves, self.kinds, strict=True)):
            found = (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else type(leaf).__name__
            if found != kind:
                raise LoopError(f"the step changed tensor {number} of its state from {_kind(kind)} to {_kind(found)}")
        return leaves

    def advance(self, leaves: Leaves, n_steps: int) -> Leaves:
        """Run forward without a record."""
        with torch.no_grad(), self.setting():
            for _ in range(n_steps):
                leaves = self._call(leaves)
        return leaves

    def record(self, leaves: Leaves, wanted: Sequence[bool] | None = None) -> Recorded:
        """Run one step with gradients. `wanted`: the tensors of the state that need one; all of floats if `None`."""
        needs = [leaf.is_floating_point() or leaf.is_complex() for leaf in leaves] if wanted is None else wanted
        with torch.enable_grad(), self.setting():
            inputs = [leaf.detach().requires_grad_(need) for leaf, need in zip(leaves, needs, strict=True)]
            return Recorded(inputs, self._call(inputs))

    def _call(self, leaves: Leaves) -> Leaves:
        versions = [leaf._version for leaf in leaves]
        result = self.flatten(self.step(pytree.tree_unflatten(leaves, self.structure)))
        if any(leaf._version != version for leaf, version in zip(leaves, versions, strict=True)):
            raise LoopError("the step changes its state in place; it must return a new one, because states are stored")
        return result

    def holds(self, condition: Callable[[Any], Any], leaves: Leaves) -> bool:
        """Whether the caller's condition holds for a state; it must neither change it nor draw random numbers."""
        versions = [leaf._version for leaf in leaves]
        random = self.random_states()
        with torch.no_grad(), self.setting():
            found = condition(pytree.tree_unflatten([leaf.detach() for leaf in leaves], self.structure))
        if any(leaf._version != version for leaf, version in zip(leaves, versions, strict=True)):
            raise LoopError("the condition changes the state in place; it must only look at it")
        if not all(torch.equal(a, b) for a, b in zip(random, self.random_states(), strict=True)):
            raise LoopError(
                "the condition draws random numbers, but it is not evaluated again when steps are: draw them in the "
                "step, and keep what the condition needs in the state"
            )
        if isinstance(found, torch.Tensor) and found.numel() == 1:
            found = found.item()
        if not isinstance(found, bool):
            raise LoopError(f"the condition returned {found!r}; it must be True or False, or a tensor of one of them")
        return found

    @contextlib.contextmanager
    def setting(self) -> Iterator[None]:
        """Autocast as it was around the loop, but without its cache: that would hand casts of one step to another."""
        with contextlib.ExitStack() as stack:
            for device_type, dtype, enabled in self.autocast:
                if enabled or torch.is_autocast_enabled(device_type):
                    stack.enter_context(torch.autocast(device_type, dtype, enabled, cache_enabled=False))
            yield

    def random_states(self) -> RandomStates:
        """The states of all generators that the step may use."""
        return [torch.get_rng_state(), *(_module(d).get_rng_state(*_argument(d)) for d in self.devices)]

    def set_random_states(self, states: RandomStates) -> None:
        """Inverse of :meth:`random_states`."""
        torch.set_rng_state(states[0])
        for device, state in zip(self.devices, states[1:], strict=True):
            _module(device).set_rng_state(state, *_argument(device))

    def check_sources(self, leaves: Leaves, wanted: Sequence[bool] | None = None) -> Recorded:
        """Record one step, and raise :class:`LoopError` if a gradient would have to go where nobody asked for it."""
        with torch.enable_grad():
            mark = torch.zeros((), requires_grad=True).clone().grad_fn
        assert mark is not None
        owner = owner_of(self.step)
        buffers = {name: (b, b._version) for name, b in owner.named_buffers()} if owner is not None else {}
        recorded = self.record(leaves, wanted)
        for name, (buffer, version) in buffers.items():
            if buffer._version != version:
                raise LoopError(
                    f"the step changes the buffer {name} of its module, which would happen again whenever "
                    "a step is run again: put the module into eval mode, or make the buffer part of the state"
                )
        known = {id(tensor) for tensor in (*recorded.inputs, *self.parameters)}
        edges = {(p.grad_fn, p.output_nr) for p in self.parameters if p.grad_fn is not None}
        pending: list[Any] = [(o.grad_fn, o.output_nr) for o in recorded.outputs if o.grad_fn is not None]
        # An output without a node that needs a gradient is itself one of the tensors that the step read.
        leaves_read = [o for o in recorded.outputs if o.requires_grad and o.grad_fn is None]
        seen: set[Any] = set()
        while pending:
            node, number = pending.pop()
            if node is None or (node, number) in edges or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                leaves_read.append(node.variable)
                continue
            if node._sequence_nr() < mark._sequence_nr():
                raise LoopError(
                    f"the step reads a tensor that was computed outside of it, by {node.name()}, and needs a gradient: "
                    "give it in parameters=[...], or compute it inside of the step"
                )
            pending.extend(node.next_functions)
        for tensor in leaves_read:
            if id(tensor) not in known:
                raise LoopError(
                    f"the step reads a tensor of {_kind((tensor.shape, tensor.dtype, tensor.device))} that needs a "
                    "gradient and was not given: add it to parameters=[...], or detach it"
                )
        return recorded


def _kind(kind: Any) -> str:
    return kind if isinstance(kind, str) else f"shape {tuple(kind[0])}, {kind[1]} on {kind[2]}"


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _argument(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # MPS has one device, and takes no argument
