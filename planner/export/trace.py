"""Which operators a block runs in eager PyTorch, as a policy of selective checkpointing sees them.

A policy is asked once for every operator that the dispatcher runs below autograd, in order, views and in-place
operators included. It can tell them apart by name and by how many of that name ran before, within one call of the
block: (operator, occurrence). This is that list, with what must be known before the result of one may be saved:

- torch saves what an operator returns, a tuple as a whole, and puts it in the place of running the operator again;
- an operator that writes into a tensor cannot be left out, and what is written to later cannot be saved (torch raises);
- a random operator that is left out does not advance the generator, so that those after it would draw other numbers
  than they did: random operators are never saved here;
- `detach` and questions for a size are not shown to a policy;
- recomputation stops as soon as the last tensor that autograd saved is there again.

Written for torch 2.11 to 2.13, whose `torch.utils.checkpoint` says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import SAC_IGNORED_OPS  # pyright: ignore[reportAttributeAccessIssue]

from planner.export.fake_step import FakeStep
from planner.export.wrapping import wrap_blocks

NATIVE_DROPOUT = "aten.native_dropout.default"
_DROPOUT = ("aten.empty_like.default", "aten.bernoulli_.float", "aten.div_.Scalar", "aten.mul.Tensor")
"""What `F.dropout` runs on the CPU; a captured graph has `native_dropout` in its place."""


@dataclass(frozen=True)
class Call:
    """One operator of a block.

    **Fields:**

    - `operator`, `occurrence`: how a policy knows it. `shapes`: of the tensors that it returns.
    - `obstacle`: why its result cannot be saved; empty if it can.
    """

    operator: str
    occurrence: int
    shapes: tuple[tuple[int, ...], ...]
    obstacle: str = ""


@dataclass(frozen=True)
class BlockTrace:
    """What one block runs.

    **Fields:**

    - `calls`: in the forward. `rerun`: how many of them run again when nothing is saved.
    - `obstacle`: why the block cannot be wrapped; empty if it can.
    """

    calls: tuple[Call, ...]
    rerun: int
    obstacle: str = ""


def trace_blocks(step: FakeStep, blocks: Sequence[str]) -> dict[str, BlockTrace]:
    """Run one step on fake tensors with every block checkpointed that can be, and note what runs."""
    obstacles = {name: obstacle_of(step.model.get_submodule(name)) for name in blocks}
    for name in blocks:
        block = step.model.get_submodule(name)
        names = [n for n, m in step.model.named_modules(remove_duplicate=False) if m is block]
        if len(names) > 1:
            obstacles[name] = f"it is in the model under several names ({', '.join(names)})"
    recordings: dict[str, list[_Recording]] = {name: [] for name in blocks}

    def contexts(name: str) -> tuple[TorchDispatchMode, TorchDispatchMode]:
        recording = _Recording()
        recordings[name].append(recording)
        return _Forward(recording), _Again(recording)

    free = [name for name in blocks if not obstacles[name]]
    step.run(lambda twin: wrap_blocks(twin, {name: lambda name=name: contexts(name) for name in free}))
    return {name: _trace(obstacles[name], recordings[name]) for name in blocks}


def obstacle_of(block: nn.Module) -> str:
    """Why a block must not be wrapped whatever it runs: torch's checkpointing updates statistics twice."""
    for name, module in block.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats and module.training:
            return f"its running statistics ({name or 'its own'}) would be updated twice in every step"
    return ""


@dataclass
class _Recording:
    """One call of one block: names, shapes and results in the forward, and how many operators ran again."""

    names: list[str] = field(default_factory=list)
    results: list[list[torch.Tensor]] = field(default_factory=list)
    versions: list[list[int]] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)
    writes: str = ""
    again: int = 0


class _Forward(TorchDispatchMode):
    def __init__(self, recording: _Recording) -> None:
        super().__init__()
        self.recording = recording
        self.made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and take note of it."""
        arguments = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        result = func(*args, **(kwargs or {}))
        if func in SAC_IGNORED_OPS:
            return result
        tensors = [_alias(t) for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        keys = {t.untyped_storage()._cdata for t in arguments}
        record = self.recording
        obstacle = ""
        if func._schema.is_mutable:
            obstacle = "it writes into a tensor"
            if arguments and arguments[0].untyped_storage()._cdata not in self.made:
                record.writes = str(func)
        elif torch.Tag.nondeterministic_seeded in func.tags:
            obstacle = "it may draw random numbers"
        elif not tensors or all(t.untyped_storage()._cdata in keys for t in tensors):
            obstacle = "it makes a view"
        self.made.update(t.untyped_storage()._cdata for t in tensors)
        record.names.append(str(func))
        record.results.append(tensors)
        record.versions.append([t._version for t in tensors])
        record.obstacles.append(obstacle)
        return result


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its history, sharing its version: below autograd that must be asked for, as torch does."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


class _Again(TorchDispatchMode):
    def __init__(self, recording: _Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and count it."""
        if func not in SAC_IGNORED_OPS:
            self.recording.again += 1
        return func(*args, **(kwargs or {}))


def _trace(obstacle: str, recordings: Sequence[_Recording]) -> BlockTrace:
    if obstacle:
        return BlockTrace((), 0, obstacle)
    if len(recordings) != 1:
        return BlockTrace((), 0, f"it is called {len(recordings)} times in a step")
    (recording,) = recordings
    if recording.writes:
        return BlockTrace((), 0, f"it writes into a buffer or an input ({recording.writes}), and would do so twice")
    counts: Counter[str] = Counter()
    calls: list[Call] = []
    for number, name in enumerate(recording.names):
        tensors = recording.results[number]
        obstacle = recording.obstacles[number]
        changed = [t._version for t in tensors] != recording.versions[number]
        if not obstacle and changed:
            obstacle = "its result is written to later"
        shapes = tuple(tuple(int(s) for s in t.shape) for t in tensors)
        calls.append(Call(name, counts[name], shapes, obstacle))
        counts[name] += 1
    return BlockTrace(tuple(calls), recording.again)


def as_captured(calls: Sequence[Call]) -> list[tuple[str, int]]:
    """Names as in a captured graph with positions in `calls`: what makes up a dropout is one operator there."""
    named: list[tuple[str, int]] = []
    position = 0
    while position < len(calls):
        window = calls[position : position + len(_DROPOUT)]
        if tuple(c.operator for c in window) == _DROPOUT:
            position += len(_DROPOUT)
            named.append((NATIVE_DROPOUT, position - 1))
        else:
            named.append((calls[position].operator, position))
            position += 1
    return named
