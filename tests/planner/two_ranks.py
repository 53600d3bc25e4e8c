"""Runs a function in two processes that are joined by gloo on this machine, and brings back what each returned."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

Scenario = Callable[[int, Path], dict[str, Any]]


def in_two_ranks(scenario: Scenario, folder: Path) -> list[dict[str, Any]]:
    """`scenario(rank, folder)` of both ranks, in the order of the ranks; raises what either raised."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_run, args=(scenario, folder, port), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def _run(rank: int, scenario: Scenario, folder: Path, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        torch.save(scenario(rank, folder), folder / f"rank{rank}.pt")
        gc.collect()  # garbage that holds the process group beyond its end lets gloo abort at exit
        dist.barrier()
    finally:
        dist.destroy_process_group()


def error_of(function: Callable[[], Any]) -> str:
    """Class and message of what a call raises; empty if it raises nothing."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Block(nn.Module):
    """A residual block with dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(0.1)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.norm(x)))))


class Stack(nn.Module):
    """Equal blocks between an embedding and a head; returns its loss."""

    def __init__(self, blocks: int = 3, width: int = 32) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(64, width), nn.Linear(width, 64)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def stack() -> Stack:
    """The same model in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Stack()


def tokens(rank: int, step: int = 0) -> torch.Tensor:
    """The inputs of one rank, other ones at every step."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randint(0, 64, (4, 16), generator=generator)
