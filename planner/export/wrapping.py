"""Wraps blocks of a model in `torch.utils.checkpoint`, by torch's own wrapper, as torchtitan does.

The wrapper keeps the keys of `state_dict` and the names of the parameters. It is a module of its own around the block,
so that `type(model.layers[0])` is another one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, checkpoint_wrapper

from planner.errors import PlanMismatchError, RewriteError

ContextFn = Callable[[], tuple[Any, Any]]


def wrap_blocks(model: nn.Module, contexts: Mapping[str, ContextFn | None]) -> int:
    """Wrap the named blocks in place; `None` is full recomputation. Returns how many were wrapped."""
    modules = dict(model.named_modules())
    for name, context_fn in contexts.items():
        block = modules.get(name)
        if block is None:
            raise PlanMismatchError(f"the policy is for another model: it has no block {name!r}. Export it again.")
        if not name:
            raise RewriteError("the whole model cannot be wrapped by itself: name the blocks that are in it")
        if isinstance(block, CheckpointWrapper):
            raise RewriteError(f"the block {name!r} is checkpointed already; apply a policy to the plain model")
        parent, _, last = name.rpartition(".")
        options: dict[str, Any] = {} if context_fn is None else {"context_fn": context_fn}
        wrapped = checkpoint_wrapper(block, preserve_rng_state=True, determinism_check="default", **options)
        setattr(modules[parent], last, wrapped)
    return len(contexts)
