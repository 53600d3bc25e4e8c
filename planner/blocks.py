"""``plan_blocks(model, budget)``: one plan for all equal blocks, for models that are wrapped block by block (FSDP2).

`fully_shard` gathers a block's parameters right before the block runs and frees them right after it: a plan over the
whole model would recompute across that border. So every block is planned by itself, and what one block may keep until
its backward follows from the budget of the whole step. One number is searched: the fraction of what a block keeps
without recomputation. It is the largest one at which the step, run on fake tensors with the planned blocks as their
memory alone, is within the budget.

    plans = plan_blocks(model, "12GiB", (ids,), shards=world_size, param_dtype=torch.bfloat16)
    plans.rewrite(model)                                # the blocks; then wrap them as always
    for block in model.blocks:
        fully_shard(block, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    fully_shard(model, mp_policy=...)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from graph_capture.formats import format_bytes
from graph_capture.graph import Compiler
from planner.budget import Budget
from planner.decide import OnChange
from planner.errors import PlanFileError, PlanMismatchError
from planner.pins import Patterns, pins_of
from planner.plan_file import Plan
from solvers.solution import Solver

LossFn = Callable[[Any], torch.Tensor]


class BlockPlans(BaseModel):
    """The plans of a model's blocks; frozen.

    **Fields:**

    - `plans`: one for all equal blocks. `plan_of_block`: for each block's name its position in `plans`.
    - `predicted_peak_bytes`: of a step of the whole model, within `budget_bytes`; the lines of `covers` are in it.
    - `kept_fraction`: what the blocks keep between forward and backward, of what they would keep without
      recomputation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    plans: tuple[Plan, ...]
    plan_of_block: dict[str, int]
    budget_bytes: int
    predicted_peak_bytes: int
    covers: tuple[tuple[str, int], ...]
    kept_fraction: float
    overhead: float

    def plan(self, block: str) -> Plan:
        """The plan of a block."""
        return self.plans[self.plan_of_block[block]]

    def rewrite(
        self, model: nn.Module, *, on_change: OnChange = "replan", compiler: Compiler | None = None
    ) -> nn.Module:
        """Rewrite every block of `model` (as :func:`planner.rewrite`), before `fully_shard`; returns the model."""
        from planner.rewrite import rewrite

        missing = [name for name in self.plan_of_block if name not in dict(model.named_modules())]
        if missing:
            raise PlanMismatchError(
                f"the plans are for another model: it has no block {missing[0]!r}. Plan this one with plan_blocks(...)."
            )
        for name in self.plan_of_block:
            rewrite(model.get_submodule(name), self.plan(name), on_change=on_change, compiler=compiler)
        return model

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plans to one JSON file."""
        Path(path).write_text(self.model_dump_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BlockPlans:
        """Read such a file, verifying every plan; raises :class:`~planner.errors.PlanFileError`."""
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except ValidationError as error:
            raise PlanFileError(f"{os.fspath(path)}: no file of block plans ({error.errors()[0]['msg']})") from error

    def __str__(self) -> str:
        rows = [
            f"budget            {format_bytes(self.budget_bytes)}",
            f"predicted peak    {format_bytes(self.predicted_peak_bytes)}",
            *(f"  covers {format_bytes(size):>32}  {label}" for label, size in self.covers if size),
            f"blocks            {len(self.plan_of_block)}, {len(self.plans)} of them different",
            f"kept              {100 * self.kept_fraction:.1f} % of what the blocks would keep",
            f"overhead          {100 * self.overhead:.2f} % of the blocks' step",
        ]
        return "\n".join(rows)


def plan_blocks(
    model: nn.Module,
    budget: int | str | Budget,
    example_inputs: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    blocks: Sequence[str] | None = None,
    loss_fn: LossFn | None = None,
    shards: int = 1,
    param_dtype: torch.dtype | None = None,
    solver: Solver | None = None,
    device: str | None = None,
    compiler: Compiler = "eager",
    extra_bytes: Mapping[str, int] | None = None,
    keep: Patterns = (),
    recompute: Patterns = (),
) -> BlockPlans:
    """Plan each block of `model` so that a step of the whole model is within `budget`; before `fully_shard`.

    **Arguments:**

    - `budget`, `example_inputs`, `example_kwargs`, `loss_fn`, `solver`, `device`, `compiler`, `extra_bytes`:
      as in :func:`planner.plan`; the inputs are one rank's.
    - `blocks`: names of the modules to plan, as in `named_modules()`. Without it those of the outermost
      `nn.ModuleList`s, or `nn.Sequential`s, whose modules are of one class.
    - `shards`: over how many ranks `fully_shard` will shard the parameters. Parameters, gradients and FSDP's own
      buffers are lines of the budget: with more than one shard the gathered parameters of the blocks at work (the
      one that runs, the next one, and the buffer they are gathered in) and the gradients that are being reduced are
      counted by a bound.
    - `param_dtype`: that of FSDP's `MixedPrecisionPolicy`: parameters and inputs of the blocks have it while they run.
    - `keep`, `recompute`: as in :func:`planner.plan`, but with the names of modules inside of a block: `"attn"` for
      `h.0.attn`, `h.1.attn` and so on. Where blocks differ, a pattern counts in those that have such a module.

    Nothing is run and no activation is allocated. Raises as :func:`planner.plan` does, and
    :class:`~planner.errors.UnsupportedModelError` if the model has no blocks that can be found.
    """
    from planner.block_search import search

    return search(
        model,
        budget,
        example_inputs,
        example_kwargs,
        names=blocks,
        loss_fn=loss_fn,
        shards=shards,
        param_dtype=param_dtype,
        solver=solver,
        device=device,
        compiler=compiler,
        extra_bytes=dict(extra_bytes or {}),
        pins=pins_of(keep, recompute),
    )
