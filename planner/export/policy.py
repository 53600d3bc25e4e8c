"""A policy of selective checkpointing as a file: for every block whether it is checkpointed, and what is saved of it.

The file is JSON and holds names and numbers alone. An operator is named as its policy sees it: by its full name
(`aten.addmm.default`) and its occurrence, the how-manieth of that name in one call of the block, from 0.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from graph_capture.formats import format_bytes, format_fraction
from planner.errors import PlanFileError, PlanMismatchError
from planner.folding import fold_label, template_of
from planner.plan_parts import Bytes, Count, Fraction, FractionOrInfinity, Part, Producer

if TYPE_CHECKING:
    from torch import nn

POLICY_VERSION = "1.0"


class BlockPolicy(Part):
    """The decision for one block.

    **Fields:**

    - `mode`: `"none"`: not checkpointed; `"full"`: all of it runs again; `"selective"`: all but what is saved.
    - `save`: operator name to the occurrences that are saved. `saved_bytes`: what they hold until the backward.
    - `reason`: why a block is not checkpointed although its memory is wanted; empty otherwise.
    """

    block: str
    mode: Literal["none", "full", "selective"]
    save: dict[str, tuple[Count, ...]] = Field(default_factory=dict)
    saved_bytes: Bytes = 0
    recomputed_seconds: float = 0.0
    reason: str = ""

    def context_fn(self) -> Callable[[], tuple[Any, Any]] | None:
        """For `torch.utils.checkpoint.checkpoint(block, ..., use_reentrant=False, context_fn=...)`; `None` for what
        needs none (a block that runs again as a whole, or is not checkpointed)."""
        return SelectiveContexts(self.block, self.save) if self.mode == "selective" else None


class SelectivePolicy(Part):
    """The policy of a model; frozen.

    **Fields:** (fractions are of the step without recomputation, as priced)

    - `blocks`: one decision each, in the order of the forward.
    - `overhead`: of this policy. `plan_overhead`, `plan_lower_bound`: of the plan that it was made from.
    - `predicted_peak_bytes`: of a step as torch runs it, resident memory included; the worse of a first and a later
      micro-batch where the plan covers both. `plan_peak_bytes`: of the plan.
    - `kept_overhead`, `kept_peak_bytes`: of the policy that saves exactly what the plan keeps, for comparison.
    """

    schema_version: str = POLICY_VERSION
    producer: Producer = Producer()
    torch: str
    model: str
    plan_fingerprint: str
    budget_bytes: Bytes
    predicted_peak_bytes: Bytes
    overhead: Fraction
    plan_overhead: Fraction
    plan_lower_bound: FractionOrInfinity
    plan_peak_bytes: Bytes
    kept_overhead: Fraction
    kept_peak_bytes: Bytes
    blocks: tuple[BlockPolicy, ...]
    notes: tuple[str, ...] = ()

    @property
    def cost(self) -> float:
        """What this form costs: its overhead minus the plan's."""
        return self.overhead - self.plan_overhead

    def block(self, name: str) -> BlockPolicy:
        """The decision for a block; raises :class:`PlanMismatchError` if there is none."""
        found = next((block for block in self.blocks if block.block == name), None)
        if found is None:
            raise PlanMismatchError(
                f"the policy has no block {name!r}; it has {', '.join(b.block for b in self.blocks)}"
            )
        return found

    def apply(self, model: nn.Module) -> nn.Module:
        """Checkpoint the blocks of `model` in place, each by torch's own wrapper; returns the same model."""
        from planner.export.wrapping import wrap_blocks

        wrap_blocks(model, {block.block: block.context_fn() for block in self.blocks if block.mode != "none"})
        return model

    def decisions(self) -> dict[str, Any]:
        """Plain data for a trainer that wraps blocks itself, as torchtitan: `"none"`, `"full"`, or what is saved."""
        rows: dict[str, Any] = {}
        for block in self.blocks:
            save = {operator: list(numbers) for operator, numbers in block.save.items()}
            rows[block.block] = {"selective": save} if block.mode == "selective" else block.mode
        return rows

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy to a JSON file."""
        Path(path).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SelectivePolicy:
        """Read such a file; raises :class:`~planner.errors.PlanFileError` where it cannot be used."""
        try:
            policy = cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except (ValidationError, UnicodeDecodeError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": error.reason}
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise PlanFileError(f"{os.fspath(path)}: no policy ({where}: {first['msg']}); export it again") from error
        if policy.schema_version.split(".")[0] != POLICY_VERSION.split(".")[0]:
            raise PlanFileError(
                f"{os.fspath(path)}: the policy has schema version {policy.schema_version}, this program reads "
                f"{POLICY_VERSION}; export it again"
            )
        return policy

    def __str__(self) -> str:
        modes = Counter(block.mode for block in self.blocks)
        fits = "within" if self.kept_peak_bytes <= self.budget_bytes else "over"
        rows = [
            f"budget                  {format_bytes(self.budget_bytes)}",
            f"predicted peak          {format_bytes(self.predicted_peak_bytes)}",
            f"blocks                  {', '.join(f'{count} {mode}' for mode, count in sorted(modes.items()))}",
            f"overhead                {format_fraction(self.overhead)} of the step",
            f"overhead of the plan    {format_fraction(self.plan_overhead)}; its lower bound "
            f"{format_fraction(self.plan_lower_bound)}; its peak {format_bytes(self.plan_peak_bytes)}",
            f"what this form costs    {100 * self.cost:+.2f} % of the step",
            f"what the plan keeps     as a policy: overhead {format_fraction(self.kept_overhead)}, peak "
            f"{format_bytes(self.kept_peak_bytes)}, {fits} the budget",
        ]
        return "\n".join([*rows, *_block_rows(self.blocks), *(f"note: {note}" for note in self.notes)])


def _block_rows(blocks: tuple[BlockPolicy, ...]) -> list[str]:
    """One line for all blocks of one template with the same decision."""
    groups: dict[Any, list[BlockPolicy]] = {}
    for block in blocks:
        groups.setdefault((template_of(block.block), block.mode, repr(block.save), block.reason), []).append(block)
    rows: list[str] = []
    for group in groups.values():
        first = group[0]
        saves = ", ".join(f"{op.removeprefix('aten.')} {list(numbers)}" for op, numbers in first.save.items())
        reason = f" ({first.reason})" if first.reason else ""
        size = f", saves {saves}: {format_bytes(first.saved_bytes)} each" if saves else ""
        rows.append(f"  {fold_label([b.block for b in group])}: {first.mode}{reason}{size}")
    return rows


@dataclass
class SelectiveContexts:
    """`context_fn` of one block: a fresh count of operators for every call of the block.

    Raises :class:`PlanMismatchError` if the call before ran none of what it was to save: the block is another one.
    """

    block: str
    save: Mapping[str, tuple[int, ...]]
    _last: SavedOccurrences | None = field(default=None, repr=False)

    def __call__(self) -> tuple[Any, Any]:
        """The contexts of the forward and of the recomputation."""
        from torch.utils.checkpoint import create_selective_checkpoint_contexts

        if self._last is not None:
            self._last.check(self.block)
        self._last = SavedOccurrences(self.save)
        return create_selective_checkpoint_contexts(self._last)

    def __getstate__(self) -> dict[str, Any]:
        return {"block": self.block, "save": self.save, "_last": None}


class SavedOccurrences:
    """The policy function of one call of a block."""

    def __init__(self, save: Mapping[str, tuple[int, ...]]) -> None:
        self._save = save
        self._counts: dict[tuple[bool, Any], int] = {}
        self._chosen: dict[Any, frozenset[int]] = {}

    def __call__(self, context: Any, operator: Any, *args: Any, **kwargs: Any) -> Any:
        """Whether the result of `operator` is saved."""
        import torch
        from torch.utils.checkpoint import CheckpointPolicy

        # torch 2.13 asks in the forward alone, before that it also asks while it recomputes: counted apart.
        key = (bool(context.is_recompute), operator)
        number = self._counts.get(key, 0)
        self._counts[key] = number + 1
        if operator not in self._chosen:
            # What is saved does not run again, so a random operator would not advance the generator for those after it.
            random = torch.Tag.nondeterministic_seeded in operator.tags if hasattr(operator, "tags") else False
            self._chosen[operator] = frozenset(() if random else self._save.get(str(operator), ()))
        saved = number in self._chosen[operator]
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    def check(self, block: str) -> None:
        """Raise if a forward that ran had fewer operators of a name than the policy saves."""
        counts = {str(operator): count for (again, operator), count in self._counts.items() if not again}
        for name, numbers in self._save.items():
            if counts and numbers and counts.get(name, 0) <= max(numbers):
                raise PlanMismatchError(
                    f"the policy of block {block!r} saves {name} number {max(numbers)}, and the block ran only "
                    f"{counts.get(name, 0)} of them: it is for another model, another mode or another version of "
                    "torch. Export it again."
                )
