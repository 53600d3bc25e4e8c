"""Ranks of a distributed run: every one of them runs the same plan, and that is checked before the first step.

The ranks meet at the store of the default process group, not in a collective: a rank that never comes (it has no plan,
or died) is then an error on all the others after a time limit, and not a hang, nor a collective that pairs with one of
DDP's own. Each rank does a handful of operations on the store, whatever the number of ranks.
"""

from __future__ import annotations

import datetime
import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from planner.errors import PlanMismatchError, RewriteError

TIMEOUT_SECONDS = 600.0
"""How long a rank waits for the others at its first step; loading and starting may take others longer."""

_rounds: Counter[tuple[str, tuple[int, ...]]] = Counter()
"""How often this process has met the others of a group: the ranks number their meetings in the same order."""


def data_parallel_ranks(model: nn.Module | None) -> tuple[int, ...]:
    """The ranks that run `model` with this one: its DDP wrapper's, whose forward is running, or those that it is fully
    sharded over. Empty outside of a distributed run."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ()
    wrapper = nn.parallel.DistributedDataParallel._get_active_ddp_module()
    if wrapper is not None:
        return tuple(torch.distributed.get_process_group_ranks(wrapper.process_group))
    if model is not None and is_fully_sharded(model):
        groups = model._get_fsdp_state()._fsdp_param_groups if hasattr(model, "_get_fsdp_state") else []  # type: ignore[operator]
        meshes = [group.mesh_info.mesh for group in groups]
        return tuple(sorted({int(rank) for mesh in meshes for rank in mesh.mesh.flatten().tolist()}))
    return ()


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` (FSDP2) was applied to the module itself."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


def refuse_wrapper(model: nn.Module) -> None:
    """Raise :class:`~planner.errors.RewriteError` for DDP and FSDP's first form, which wrap what is to be planned."""
    wrappers = [nn.parallel.DistributedDataParallel] if torch.distributed.is_available() else []
    fsdp = sys.modules.get("torch.distributed.fsdp")
    wrappers += [fsdp.FullyShardedDataParallel] if fsdp is not None else []
    if isinstance(model, tuple(wrappers)):
        name = type(model).__name__
        how = (
            f"plan the module inside of it ({name}(...).module), then wrap it"
            if name == "DistributedDataParallel"
            else "use fully_shard (FSDP2) instead, on blocks that were planned before (planner.plan_blocks)"
        )
        raise RewriteError(f"{name} is a wrapper with communication of its own, which no plan can hold: {how}.")


def compare_plans(ranks: Sequence[int], plan: str, description: str) -> None:
    """Return once every rank has said its plan, all of them the same.

    **Arguments:**

    - `ranks`: of all processes that must agree, this one's among them.
    - `plan`: text that is equal for equal plans. `description`: how a message names this rank's plan.

    Raises :class:`~planner.errors.PlanMismatchError` on every rank if two differ, and
    :class:`~planner.errors.RewriteError` if a rank does not come within `TIMEOUT_SECONDS`.
    """
    meeting = _Meeting("compare", ranks)
    digest = hashlib.sha256(plan.encode()).hexdigest()[:16]
    mine = f"{digest} (rank {torch.distributed.get_rank()}: {description})"
    first = meeting.store.compare_set(meeting.key("plan"), "", mine).decode()
    if first.split(" ", 1)[0] != digest:
        meeting.store.set(meeting.key("another"), mine)
    meeting.gather("Rewrite the model with the same plan on every rank, before the first step.")
    if meeting.store.check([meeting.key("another")]):
        other = meeting.store.get(meeting.key("another")).decode()
        raise PlanMismatchError(
            f"the ranks have different plans: {first} and {other}. Make one plan, save it, and load that file on every "
            "rank: rewrite(model, Plan.load(path))."
        )


def from_first_rank(ranks: Sequence[int], make: Callable[[], str]) -> str:
    """What `make` returns on the first of `ranks`, on every rank; if it raises there, every rank raises.

    The other ranks wait `TIMEOUT_SECONDS` at most beyond the first one's own time limit for planning.
    """
    meeting = _Meeting("from_first", ranks)
    if torch.distributed.get_rank() == ranks[0]:
        try:
            text = make()
        except Exception as error:
            meeting.store.set(meeting.key("error"), f"{type(error).__name__}: {error}")
            meeting.store.set(meeting.key("made"), "")
            raise
        meeting.store.set(meeting.key("made"), text)
        return text
    meeting.wait(meeting.key("made"), f"rank {ranks[0]} has made no plan")
    if meeting.store.check([meeting.key("error")]):
        message = meeting.store.get(meeting.key("error")).decode()
        raise RewriteError(f"rank {ranks[0]}, which plans for every rank, has no plan: {message}")
    return meeting.store.get(meeting.key("made")).decode()


class _Meeting:
    """One meeting of some ranks at the store."""

    def __init__(self, purpose: str, ranks: Sequence[int]) -> None:
        self.ranks = tuple(ranks)
        self.store: Any = torch.distributed.distributed_c10d._get_default_store()
        group = hashlib.sha256(repr(self.ranks).encode()).hexdigest()[:12]
        self._prefix = f"checkpoint_planner/{purpose}/{group}/{_rounds[purpose, self.ranks]}"
        _rounds[purpose, self.ranks] += 1

    def key(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def gather(self, advice: str) -> None:
        """Wait until every rank has come here."""
        if self.store.add(self.key("arrived"), 1) == len(self.ranks):
            self.store.set(self.key("complete"), "1")
        self.wait(self.key("complete"), f"not all of the ranks {_spans(self.ranks)} run a planned model. {advice}")

    def wait(self, key: str, otherwise: str) -> None:
        """Wait for a key; raise with `otherwise` after `TIMEOUT_SECONDS`."""
        try:
            self.store.wait([key], datetime.timedelta(seconds=TIMEOUT_SECONDS))
        except (torch.distributed.DistStoreError, RuntimeError) as error:
            raise RewriteError(f"after {TIMEOUT_SECONDS:.0f} s, {otherwise}") from error


def _spans(ranks: Sequence[int]) -> str:
    consecutive = list(ranks) == list(range(ranks[0], ranks[0] + len(ranks))) and len(ranks) > 2
    return f"{ranks[0]}-{ranks[-1]}" if consecutive else ", ".join(map(str, ranks))
