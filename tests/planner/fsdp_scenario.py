"""What two FSDP2 ranks do for `test_fsdp.py`, in one pair of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from graph_capture.allocator import AllocatorTrace
from planner import BlockPlans, plan, rewrite
from solvers.store_all import StoreAll
from tests.planner.two_ranks import Stack, error_of, stack, tokens


def scenario(rank: int, folder: Path) -> dict[str, Any]:
    """All results of one rank, by name."""
    results: dict[str, Any] = {}
    for name, policy in (("float32", None), ("bfloat16", MixedPrecisionPolicy(param_dtype=torch.bfloat16))):
        plans = BlockPlans.load(folder / f"{name}.json")
        results[name] = {
            "plain": _train(rank, policy, None),
            "planned": _train(rank, policy, plans),
            "after": _train(rank, policy, plans, after=True) if policy is None else None,
        }
    other = folder / ("float32.json" if rank == 0 else "other.json")
    results["different plans"] = error_of(lambda: _train(rank, None, BlockPlans.load(other)))
    results["whole model"] = error_of(lambda: _whole(rank))
    block: Any = fully_shard(stack().blocks[0], mesh=_mesh())
    results["sharded block"] = error_of(lambda: plan(block, "1GiB", (torch.randn(4, 16, 32, requires_grad=True),)))
    return results


def without_dropout() -> Stack:
    """In bfloat16 on a CPU eager's dropout scales by a rounded number, a captured graph's by the exact one."""
    model = stack()
    for block in model.blocks:
        block.drop = nn.Identity()
    return model


def _mesh() -> Any:
    return init_device_mesh("cpu", (2,))


def _shard(model: Any, policy: MixedPrecisionPolicy | None) -> None:
    options: Any = {} if policy is None else {"mp_policy": policy}
    for block in model.blocks:
        fully_shard(block, mesh=_mesh(), **options)
    fully_shard(model, mesh=_mesh(), **options)


def _train(
    rank: int, policy: MixedPrecisionPolicy | None, plans: BlockPlans | None, after: bool = False
) -> dict[str, Any]:
    """Three steps, the last two accumulating; which blocks were gathered at each point; the peak of the last step."""
    model = without_dropout() if policy is not None else stack()
    if plans is not None and not after:
        plans.rewrite(model, on_change="error")
    _shard(model, policy)
    if plans is not None and after:
        plans.rewrite(model, on_change="error")
    log: list[tuple[str, int, list[bool]]] = []
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, args, out, n=number: _watch(model, log, n, out))
    losses = []
    for step in range(3):
        if step < 2:
            model.zero_grad()
        torch.manual_seed(step)
        with AllocatorTrace(collect=True) as trace:
            loss = model(tokens(rank, step))
            loss.backward()
        losses.append(loss.detach())
    calls: Any = [block._compiled_call_impl for block in model.blocks]
    return {
        "losses": losses,
        "gradients": {n: _whole_tensor(p.grad).clone() for n, p in model.named_parameters()},
        "gathered": log,
        "peak": trace.peak_bytes,
        "recomputed": [sum(r.recomputed for r in call.backend.records) for call in calls if call is not None],
        "compiled": [len(call.backend.records) for call in calls if call is not None],
    }


def _watch(model: Any, log: list[tuple[str, int, list[bool]]], number: int, output: torch.Tensor) -> None:
    log.append(("forward done", number, _gathered(model)))
    output.register_hook(lambda gradient: log.append(("backward starts", number, _gathered(model))))


def _gathered(model: Any) -> list[bool]:
    return [not isinstance(block.up.weight, DTensor) for block in model.blocks]


def _whole_tensor(gradient: Any) -> torch.Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def _whole(rank: int) -> None:
    """A plan of the whole model, whose blocks are then sharded one by one."""
    model: nn.Module = stack()
    rewrite(model, plan(model, "1GiB", (tokens(rank),), solver=StoreAll()))
    _shard(model, None)
    model(tokens(rank))
