"""A planned model beside the plain one: results bit for bit, and peaks against predictions."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from planner import NoScheduleError, Plan, measure_step, plan, rewrite
from planner.measure import loss_of
from solvers.solution import Solver
from solvers.store_all import StoreAll
from tests.models import Case

EAGER_HAS_OTHER_KERNELS = frozenset({"lstm"})
"""Models that a captured graph runs with other kernels than eager: compared with the graph without recomputation."""


@dataclass(frozen=True)
class Comparison:
    """One planned model.

    **Fields:**

    - `differences`: what is not bit-equal; empty if everything is.
    - `first_bytes`, `later_bytes`: measured peaks of a first and of a later micro-batch; `eager_bytes`: eager's peak
      of the one that the plan was made for.
    - `random_operators`, `random_recomputed`: names of the random operators, and of those that run more than once.
    """

    plan: Plan
    differences: tuple[str, ...]
    first_bytes: int
    later_bytes: int
    eager_bytes: int
    random_operators: frozenset[str]
    random_recomputed: frozenset[str]

    @property
    def problems(self) -> Iterator[str]:
        """Whatever breaks a promise of the plan."""
        yield from self.differences
        rows = (("first", self.first_bytes, self.plan.first_peak_bytes),)
        rows += (("later", self.later_bytes, self.plan.later_peak_bytes),)
        for regime, measured, predicted in rows:
            if measured > self.plan.budget_bytes:
                yield f"{regime} micro-batch: {measured:,} bytes measured, the budget is {self.plan.budget_bytes:,}"
            if not predicted * 0.99 <= measured <= predicted:
                yield f"{regime} micro-batch: {measured:,} bytes measured, {predicted:,} predicted"


def plan_or_smallest(case: Case, budget: str | int, solver: Solver) -> Plan:
    """A plan for the budget, or for the smallest one that is known to work; raises if none is known."""
    module, args, kwargs, loss_fn = case
    try:
        return plan(module, budget, args, kwargs, loss_fn=loss_fn, solver=solver)
    except NoScheduleError as error:
        if error.smallest_known_budget_bytes is None:
            raise
        return plan(module, error.smallest_known_budget_bytes, args, kwargs, loss_fn=loss_fn, solver=solver)


def compare(name: str, case: Case, made: Plan) -> Comparison:
    """Train two steps plain and planned, and measure both."""
    module, args, kwargs, loss_fn = case
    plain, planned, eager = (copy.deepcopy(module) for _ in range(3))
    if name in EAGER_HAS_OTHER_KERNELS:
        rewrite(plain, plan(plain, "1TiB", args, kwargs, loss_fn=loss_fn, solver=StoreAll()))
    rewrite(planned, made)
    differences: list[str] = []
    for number in range(2):  # the second step accumulates
        expected, given = _step(plain, case), _step(planned, case)
        if name in EAGER_HAS_OTHER_KERNELS:
            differences += _far_from_eager(given, _step(eager, case))
        differences += [f"step {number}: {d}" for d in _differences(given, expected)]
    graph = made.to_graph()
    runs = Counter(made.to_schedule().order)
    random = {i for i, o in enumerate(graph.operators) if o.random_state_bytes}
    return Comparison(
        plan=made,
        differences=tuple(differences),
        first_bytes=measure_step(planned, *args, loss_fn=loss_fn, **kwargs).peak_bytes,
        later_bytes=measure_step(planned, *args, loss_fn=loss_fn, gradient_accumulation=True, **kwargs).peak_bytes,
        eager_bytes=measure_step(
            copy.deepcopy(module), *args, loss_fn=loss_fn, gradient_accumulation=graph.gradient_accumulation, **kwargs
        ).peak_bytes,
        random_operators=frozenset(graph.operators[i].name for i in random),
        random_recomputed=frozenset(graph.operators[i].name for i in random if runs[i] > 1),
    )


def _far_from_eager(given: dict[str, Any], expected: dict[str, Any]) -> Iterator[str]:
    """Other kernels round differently, but the random numbers and everything else are the same."""
    if not torch.equal(given["random state"], expected["random state"]):
        yield "the random state is not eager's"
    for name, gradient in expected["gradients"].items():
        if not torch.allclose(given["gradients"][name], gradient, rtol=1e-4, atol=1e-7):
            yield f"the gradient of {name} is far from eager's"


def _step(module: nn.Module, case: Case) -> dict[str, Any]:
    torch.manual_seed(99)
    result = module(*case.args, **case.kwargs)
    loss_of(result, case.loss_fn).backward()
    return {
        "result": [t.detach().clone() for t in tensors_in(result)],
        "gradients": {n: p.grad for n, p in module.named_parameters()},
        "buffers": dict(module.named_buffers()),
        "random state": torch.get_rng_state(),
    }


def tensors_in(result: Any) -> list[Tensor]:
    """All tensors of a result, those in objects that are no pytrees (caches) included."""
    found: list[Tensor] = []
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) or type(leaf).__module__.startswith("transformers"):
            found += tensors_in(list(vars(leaf).values()))
    return found


def _differences(given: Any, expected: Any, path: str = "") -> Iterator[str]:
    if isinstance(expected, Tensor):
        if not (isinstance(given, Tensor) and given.dtype == expected.dtype and torch.equal(given, expected)):
            yield f"{path} differs"
    elif isinstance(expected, (dict, list)):
        keys = expected.keys() if isinstance(expected, dict) else range(len(expected))
        if len(given) != len(expected):
            yield f"{path} has {len(given)} entries, not {len(expected)}"
            return
        for key in keys:
            yield from _differences(given[key], expected[key], f"{path}[{key!r}]")
    elif given is not expected and given != expected:
        yield f"{path}: {given!r}, not {expected!r}"
