"""Train with DistributedDataParallel within a memory budget, every rank with the same plan.

    torchrun --standalone --nproc-per-node 2 examples/train_ddp.py

The first rank makes the plan and saves it; every rank loads that file and rewrites its model before it is wrapped. At
the first step the ranks compare their plans. Gradients are handed over one by one during the backward, so that DDP
sends its buckets as early as in eager. `--check` trains the plain model, too, and compares.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from small_gpt import SmallGPT, batch
from torch.nn.parallel import DistributedDataParallel

from planner import Plan, plan, rewrite


def make_model(layers: int) -> SmallGPT:
    """The same weights on every rank."""
    torch.manual_seed(0)
    return SmallGPT(layers)


def shared_plan(rank: int, budget: str, layers: int) -> Plan:
    """Made by the first rank, read from one file by all."""
    path = Path(tempfile.gettempdir()) / f"plan_{os.environ['MASTER_PORT']}.json"
    if rank == 0:
        model = make_model(layers)
        buckets = sum(p.numel() * p.element_size() for p in model.parameters())
        plan(model, budget, (batch(0, 0),), extra_bytes={"DDP's buckets": buckets}).save(path)
    dist.barrier()
    made = Plan.load(path)
    dist.barrier()
    if rank == 0:
        path.unlink()
    return made


def train(model: SmallGPT, rank: int, steps: int) -> list[torch.Tensor]:
    """The losses of some steps, and the parameters after them."""
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
    losses = []
    torch.manual_seed(rank)
    for step in range(steps):
        loss = wrapped(batch(rank, step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [*losses, *(p.detach() for p in model.parameters())]


def run(options: argparse.Namespace) -> None:
    """Plan and train on this rank, and compare with plain DDP if asked to."""
    rank = dist.get_rank()
    made = shared_plan(rank, options.budget, options.layers)
    result = train(rewrite(make_model(options.layers), made), rank, options.steps)  # type: ignore[arg-type]
    if rank == 0:
        print(made)
        print("losses", " ".join(f"{loss:.4f}" for loss in result[: options.steps]))
    if options.check:
        plain = train(make_model(options.layers), rank, options.steps)
        equal = torch.tensor(all(torch.equal(a, b) for a, b in zip(result, plain, strict=True)), dtype=torch.int32)
        dist.all_reduce(equal, dist.ReduceOp.MIN)
        if rank == 0:
            print("equal to plain DDP on every rank", bool(equal))


def main() -> None:
    """Read the options and bring the process group up and down around :func:`run`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--budget", default="60%", help="of what eager needs, or bytes such as 2GiB")
    parser.add_argument("--check", action="store_true", help="compare with plain DDP, bit for bit")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    run(options)
    gc.collect()  # modules that are garbage would hold the process group beyond its end, and gloo aborts at exit
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
