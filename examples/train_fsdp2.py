"""Train with FSDP2 (`fully_shard`) within a memory budget, one plan for all equal blocks.

    torchrun --standalone --nproc-per-node 2 examples/train_fsdp2.py --bf16

Every block is planned by itself, within a budget of one rank's whole step, and rewritten before it is sharded: its
parameters are gathered while it runs, forward and backward, recomputation included. Planning is deterministic here, and
the ranks compare their plans at the first step. `--check` trains the plain model, too, and compares.
"""

from __future__ import annotations

import argparse
import gc

import torch
import torch.distributed as dist
from small_gpt import SmallGPT, batch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from planner import BlockPlans, plan_blocks
from solvers import Auto


def make_model(layers: int, dropout: float) -> SmallGPT:
    """The same weights on every rank."""
    torch.manual_seed(0)
    return SmallGPT(layers, dropout=dropout)


def shard(model: SmallGPT, dtype: torch.dtype | None) -> None:
    """FSDP2 as usual: the blocks, then what is left."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def train(model: SmallGPT, dtype: torch.dtype | None, rank: int, steps: int) -> list[torch.Tensor]:
    """The losses of some steps, and this rank's shards of the parameters after them."""
    shard(model, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    torch.manual_seed(rank)
    for step in range(steps):
        loss = model(batch(rank, step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [*losses, *(p.detach().to_local() for p in model.parameters())]  # type: ignore[operator]


def plans_for(options: argparse.Namespace, dropout: float, dtype: torch.dtype | None) -> BlockPlans:
    """The same on every rank: the solver stops after an amount of work, not after a time."""
    solver = Auto(time_limit_seconds=600.0, work_limit=3)
    shards = dist.get_world_size()
    return plan_blocks(
        make_model(options.layers, dropout),
        options.budget,
        (batch(0, 0),),
        shards=shards,
        param_dtype=dtype,
        solver=solver,
    )


def run(options: argparse.Namespace) -> None:
    """Plan and train on this rank, and compare with plain FSDP2 if asked to."""
    rank = dist.get_rank()
    dtype = torch.bfloat16 if options.bf16 else None
    # On a CPU, eager's dropout in bfloat16 scales by a rounded number, a captured graph's by the exact one.
    dropout = 0.0 if options.bf16 else 0.1
    plans = plans_for(options, dropout, dtype)
    planned = make_model(options.layers, dropout)
    plans.rewrite(planned)
    result = train(planned, dtype, rank, options.steps)
    if rank == 0:
        print(plans)
        print("losses", " ".join(f"{loss:.4f}" for loss in result[: options.steps]))
    if options.check:
        plain = train(make_model(options.layers, dropout), dtype, rank, options.steps)
        equal = torch.tensor(all(torch.equal(a, b) for a, b in zip(result, plain, strict=True)), dtype=torch.int32)
        dist.all_reduce(equal, dist.ReduceOp.MIN)
        if rank == 0:
            print("equal to plain FSDP2 on every rank", bool(equal))


def main() -> None:
    """Read the options and bring the process group up and down around :func:`run`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--budget", default="75%", help="of what the step needs without a plan, or bytes such as 2GiB")
    parser.add_argument("--bf16", action="store_true", help="mixed precision by FSDP's policy")
    parser.add_argument("--check", action="store_true", help="compare with plain FSDP2, bit for bit")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    run(options)
    gc.collect()  # modules that are garbage would hold the process group beyond its end, and gloo aborts at exit
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
