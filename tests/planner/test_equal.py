"""The rewritten model trains as the plain one does, bit for bit, within the budget that its plan predicts.

A small selection for every day; `examples/benchmarks/correctness_grid.py` runs every model at every budget with every
solver.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from planner import NoScheduleError
from solvers.auto import Auto
from solvers.chen import ChenGreedy, ChenSqrt
from solvers.revolve import Revolve
from solvers.solution import Solver
from solvers.store_all import StoreAll
from tests.models import MODELS, Case, features
from tests.planner.compare import Comparison, compare, plan_or_smallest
from tests.planner.stress import RecomputeAlways

SOLVERS: dict[str, Solver] = {
    "auto": Auto(time_limit_seconds=60.0, work_limit=3),
    "chen-greedy": ChenGreedy(),
    "chen-sqrt": ChenSqrt(),
    "revolve": Revolve(),
    "store-all": StoreAll(),
    "always": RecomputeAlways(),
}
CASES = [
    ("gpt2_eager", "50%", "auto"),
    ("gpt2_sdpa", "60%", "chen-greedy"),
    ("llama", "60%", "chen-greedy"),
    ("gpt2_eager", "45%", "revolve"),
    ("bert", "1TiB", "always"),
    ("t5", "50%", "auto"),
    ("vit", "1TiB", "always"),
    ("whisper", "1TiB", "always"),
    ("mixtral", "60%", "chen-greedy"),
    ("resnet", "50%", "auto"),
    ("resnet", "1TiB", "always"),
    ("densenet", "60%", "auto"),
    ("lstm", "60%", "chen-greedy"),
    ("returns_tuple", "1TiB", "always"),
    ("returns_dataclass", "1TiB", "store-all"),
    ("names_input", "50%", "chen-sqrt"),
]
_done: dict[tuple[str, str, str], Comparison] = {}


@pytest.mark.parametrize(("name", "budget", "solver"), CASES)
def test_equal_within_the_budget(name: str, budget: str, solver: str) -> None:
    case = MODELS[name]()
    try:
        made = plan_or_smallest(case, budget, SOLVERS[solver])
    except NoScheduleError as error:
        pytest.fail(str(error))
    comparison = compare(name, case, made)
    assert list(comparison.problems) == []
    _done[name, budget, solver] = comparison


def test_equal_with_two_threads() -> None:
    """All other tests run with one (`tests/conftest.py`); here tensors are large enough to be split."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers = (nn.Linear(32, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 8))
        case = Case(nn.Sequential(*layers), (features(4096),), loss_fn=lambda y: y.square().mean())
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        comparison = compare("layers", case, plan_or_smallest(case, "1TiB", SOLVERS["always"]))
    finally:
        torch.set_num_threads(before)
    assert list(comparison.problems) == []
    assert comparison.random_recomputed


def test_many_random_operators_were_recomputed() -> None:
    """Dropout is recomputed often enough in this selection for its equality to mean something."""
    if len(_done) < len(CASES):
        pytest.skip("needs the whole selection")
    there = {(name, o) for (name, *_), c in _done.items() for o in c.random_operators}
    recomputed = {(name, o) for (name, *_), c in _done.items() for o in c.random_recomputed}
    assert len(there) > 20
    assert 3 * len(recomputed) >= len(there)
