"""What two DDP ranks do for `test_ddp.py`, in one pair of processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import planner.compile_backend  # noqa: F401 - registers the backend where the package is not installed
from planner import Plan, auto_checkpoint, ranks, rewrite
from solvers.chen import ChenGreedy
from tests.planner.two_ranks import error_of, stack, tokens

Prepare = Callable[[nn.Module], Any]


class _Counter(TorchDispatchMode):
    """Counts operators."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def scenario(rank: int, folder: Path) -> dict[str, Any]:
    """All results of one rank, by name."""
    made = Plan.load(folder / "plan.json")
    plain = _train(rank, lambda model: None)
    planned = _train(rank, lambda model: rewrite(model, made))
    compiled = _train(rank, lambda model: None, compiled={"plan": str(folder / "plan.json")})
    return {
        "plain": plain,
        "planned": planned,
        "compiled": compiled,
        "different plans": error_of(lambda: _different_plans(rank, folder)),
        "different compiled plans": error_of(lambda: _different_plans(rank, folder, compiled=True)),
        "missing rank": _missing_rank(rank, made),
        "automatic": _automatic(rank),
        "automatic, infeasible": _infeasible(rank),
        "wrapper": error_of(lambda: rewrite(DistributedDataParallel(stack()), made)),
    }


def _train(rank: int, prepare: Prepare, compiled: dict[str, Any] | None = None) -> dict[str, Any]:
    """Three steps, the second one of two micro-batches; gradients, and when each bucket left during the last one."""
    model = stack()
    prepare(model)
    wrapped: Any = DistributedDataParallel(model, bucket_cap_mb=0.02)
    buckets: list[tuple[int, tuple[tuple[int, ...], ...]]] = []
    counter = _Counter()

    def leave(state, bucket):  # DDP checks annotations, and those are texts here
        buckets.append((counter.count, tuple(tuple(p.shape) for p in bucket.parameters())))
        sent = dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        return sent.then(lambda future: future.value()[0])

    wrapped.register_comm_hook(None, leave)
    call = wrapped
    if compiled is not None:
        with torch._dynamo.config.patch(optimize_ddp=False):
            call = torch.compile(wrapped, backend="checkpoint_planner", options=compiled, fullgraph=False)
            call(tokens(rank))
    gradients = []
    for step in range(3):
        model.zero_grad()
        torch.manual_seed(step)
        if step == 1:
            with wrapped.no_sync():
                call(tokens(rank, 7)).backward()
        loss = call(tokens(rank, step))
        buckets.clear()
        counter.count = 0
        with counter:
            loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return {"gradients": gradients, "buckets": buckets, "operators": counter.count}


def _different_plans(rank: int, folder: Path, compiled: bool = False) -> None:
    path = folder / ("plan.json" if rank == 0 else "other.json")
    model = stack()
    if compiled:
        with torch._dynamo.config.patch(optimize_ddp=False):
            call = torch.compile(
                DistributedDataParallel(model), backend="checkpoint_planner", options={"plan": Plan.load(path)}
            )
            call(tokens(rank)).backward()
    rewrite(model, Plan.load(path))
    DistributedDataParallel(model)(tokens(rank)).backward()


def _missing_rank(rank: int, made: Plan) -> str:
    """Rank 1 has no planned model; it takes part in making the wrapper alone."""
    model = stack()
    before, ranks.TIMEOUT_SECONDS = ranks.TIMEOUT_SECONDS, 1.0
    try:
        if rank == 0:
            rewrite(model, made)
        wrapped = DistributedDataParallel(model)
        return error_of(lambda: wrapped(tokens(rank)).backward()) if rank == 0 else ""
    finally:
        ranks.TIMEOUT_SECONDS = before
        ranks._rounds[("compare", (0, 1))] += rank  # the meeting that this rank missed


def _automatic(rank: int) -> dict[str, Any]:
    """Each rank has a model with another limit; the plan is rank 0's."""
    plans: list[Plan] = []
    model = auto_checkpoint(stack(), "80%" if rank == 0 else "100%", on_plan=plans.append, solver=ChenGreedy())
    plain = copy.deepcopy(stack())
    gradients = []
    for one in (plain, model):
        wrapped = DistributedDataParallel(one)
        torch.manual_seed(0)
        wrapped(tokens(rank)).backward()
        gradients.append([p.grad.clone() for p in one.parameters() if p.grad is not None])
    equal = all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    return {"plans": [p.to_json() for p in plans], "equal": equal}


def _infeasible(rank: int) -> str:
    model = auto_checkpoint(stack(), "1%", solver=ChenGreedy())
    wrapped = DistributedDataParallel(model)
    return error_of(lambda: wrapped(tokens(rank)).backward())
