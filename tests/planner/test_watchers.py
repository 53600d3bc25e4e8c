"""`FlopCounterMode` and its like see what a planned model runs, from its first call on."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from planner import auto_checkpoint, plan, rewrite
from tests.models import MODELS, Case
from tests.planner.stress import RecomputeAlways


def step_flops(model: nn.Module, case: Case) -> int:
    """What one step runs."""
    torch.manual_seed(0)
    with FlopCounterMode(display=False) as counter:
        model(*case.args, **case.kwargs)["loss"].backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("road", ["rewrite", "auto_checkpoint"])
def test_flops_are_eagers_and_the_recomputed_ones(road: str) -> None:
    case = MODELS["returns_dict"]()
    plain = copy.deepcopy(case.model)
    made = plan(case.model, "1GiB", case.args, case.kwargs, solver=RecomputeAlways())
    if road == "rewrite":
        rewrite(case.model, made)
    else:
        auto_checkpoint(case.model, "1GiB", solver=RecomputeAlways())
    runs = Counter(made.to_schedule().order)
    matrices = [
        i for i, o in enumerate(made.to_graph().operators) if o.target in ("aten.addmm.default", "aten.mm.default")
    ]
    again = sum((runs[i] - 1) * made.to_graph().operators[i].flops for i in matrices)
    assert again > 0
    expected = step_flops(plain, case) + again
    assert [step_flops(case.model, case) for _ in range(2)] == [expected, expected]
    step_flops(plain, case)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), case.model.parameters(), strict=True))


def test_planning_under_a_mode_counts_nothing() -> None:
    case = MODELS["returns_dict"]()
    with FlopCounterMode(display=False) as counter:
        made = plan(case.model, "1GiB", case.args, case.kwargs, solver=RecomputeAlways())
    assert counter.get_total_flops() == 0
    assert made.fingerprint == plan(case.model, "1GiB", case.args, case.kwargs, solver=RecomputeAlways()).fingerprint
