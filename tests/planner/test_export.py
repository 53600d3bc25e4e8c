"""A plan as a policy of `torch.utils.checkpoint`: gradients, memory, what it costs, and what it refuses."""

from __future__ import annotations

import copy
import functools
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from graph_capture.build import CPU_RANDOM_STATE_BYTES
from planner import (
    NoScheduleError,
    Plan,
    PlanFileError,
    PlanMismatchError,
    RewriteError,
    SelectivePolicy,
    export_policy,
    measure_step,
    plan,
)
from planner.cli.main import ERROR, OK, main
from planner.export.blocks import blocks_of, recomputed_seconds, selective_schedule
from planner.export.fake_step import FakeStep
from planner.export.policy import SavedOccurrences
from planner.export.trace import trace_blocks
from planner.measure import loss_of
from solvers.chen import ChenGreedy
from solvers.simulator import simulate
from tests.models import MODELS, Case

FACTORY = """
from tests.planner.test_export import case

def make():
    return tuple(case("gpt2_eager"))[:3]
"""
BUDGETS = {"gpt2_eager": "80%", "returns_dict": "90%"}


def case(name: str) -> Case:
    made = MODELS[name]()
    if hasattr(made.model, "config"):
        made.model.config.use_cache = False
    return made


@functools.cache
def planned(name: str) -> tuple[Case, Plan, SelectivePolicy]:
    given = case(name)
    made = plan(given.model, BUDGETS[name], given.args, given.kwargs, loss_fn=given.loss_fn, time_limit_seconds=2)
    return given, made, export_policy(made, given.model, given.args, given.kwargs, loss_fn=given.loss_fn)


def step(model: nn.Module, given: Case) -> list[torch.Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    loss = loss_of(model(*given.args, **given.kwargs), given.loss_fn)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", BUDGETS)
def test_gradients_are_the_plain_ones_and_memory_is_as_predicted(name: str) -> None:
    given, made, policy = planned(name)
    plain, model = copy.deepcopy(given.model), copy.deepcopy(given.model)
    assert policy.apply(model) is model
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()]
    assert same(step(plain, given), step(model, given))
    assert same(step(plain, given), step(model, given))
    measured = max(
        measure_step(
            model, *given.args, loss_fn=given.loss_fn, gradient_accumulation=accumulated, **given.kwargs
        ).peak_bytes
        for accumulated in (False, True)
    )
    wrapped = sum(block.mode != "none" for block in policy.blocks)
    assert measured <= policy.predicted_peak_bytes <= policy.budget_bytes == made.budget_bytes
    # The state of the CPU's generator is counted for every wrapped block, at the peak fewer may be there.
    assert policy.predicted_peak_bytes - measured <= CPU_RANDOM_STATE_BYTES * (wrapped + 1) + 64


@pytest.mark.parametrize("name", BUDGETS)
def test_it_costs_no_less_than_the_plan_and_no_more_than_its_kin(name: str) -> None:
    _, made, policy = planned(name)
    assert policy.overhead >= made.lower_bound - 1e-9
    assert policy.plan_overhead == made.overhead
    assert policy.cost == policy.overhead - made.overhead
    if policy.kept_peak_bytes <= policy.budget_bytes:
        assert policy.overhead <= policy.kept_overhead
    text = str(policy)
    assert f"what this form costs    {100 * policy.cost:+.2f} % of the step" in text


class Counts(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.runs[str(func)] = self.runs.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


def test_exactly_what_is_not_saved_runs_again() -> None:
    given, _, policy = planned("gpt2_eager")
    plain, model = copy.deepcopy(given.model), policy.apply(copy.deepcopy(given.model))
    runs: list[dict[str, int]] = []
    for each in (plain, model):
        with Counts() as counts:
            step(each, given)
        runs.append(counts.runs)
    for name, in_a_block in (("aten.addmm.default", 4), ("aten._softmax.default", 1), ("aten.tanh.default", 1)):
        again = sum(in_a_block - len(b.save.get(name, ())) for b in policy.blocks if b.mode != "none")
        assert runs[1][name] - runs[0][name] == again


def test_the_schedule_on_the_captured_graph_agrees() -> None:
    given, made, policy = planned("gpt2_eager")
    graph = made.to_graph()
    fake = FakeStep.of(given.model, given.args, given.kwargs, given.loss_fn, "cpu")
    blocks = blocks_of(graph, trace_blocks(fake, [b.block for b in policy.blocks]))
    named = {b.name: b for b in blocks}
    decisions: dict[str, frozenset[int] | None] = {}
    for row in policy.blocks:
        saved = {(op, number) for op, numbers in row.save.items() for number in numbers}
        chosen = frozenset(i for i, c in named[row.block].savable.items() if (c.operator, c.occurrence) in saved)
        assert len(chosen) == len(saved)
        decisions[row.block] = None if row.mode == "none" else chosen
    simulation = simulate(graph, selective_schedule(graph, blocks, decisions))
    assert recomputed_seconds(graph, blocks, decisions) / graph.step_seconds == pytest.approx(policy.overhead)
    assert simulation.recomputed_seconds / graph.step_seconds <= policy.overhead + 1e-12
    assert abs(simulation.peak_bytes - policy.predicted_peak_bytes) < 0.2 * policy.predicted_peak_bytes


def test_more_budget_costs_no_more() -> None:
    given, made, _ = planned("returns_dict")
    overheads = [
        export_policy(made, given.model, given.args, given.kwargs, budget=budget).overhead
        for budget in ("85%", "95%", "150%")
    ]
    assert overheads[0] >= overheads[1] >= overheads[2] == 0.0


def test_the_context_by_hand_and_files(tmp_path: Path) -> None:
    given, _, policy = planned("gpt2_eager")
    policy.save(tmp_path / "policy.json")
    loaded = SelectivePolicy.load(tmp_path / "policy.json")
    assert loaded == policy
    model, plain = copy.deepcopy(given.model), copy.deepcopy(given.model)
    for row in loaded.blocks:
        if row.mode == "selective":
            block = model.get_submodule(row.block)
            context_fn = row.context_fn()
            assert context_fn is not None
            block.forward = functools.partial(
                checkpoint, block.forward, use_reentrant=False, context_fn=pickle.loads(pickle.dumps(context_fn))
            )
    assert any(row.mode == "selective" for row in loaded.blocks)
    assert same(step(plain, given), step(model, given))
    decisions = loaded.decisions()
    assert set(decisions) == {row.block for row in policy.blocks}
    assert all(row in ("none", "full") or set(row) == {"selective"} for row in decisions.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("overhead"), "overhead: Field required"),
        (lambda d: d.update(extra=1), "extra: Extra inputs"),
        (lambda d: d.update(schema_version="9.0"), "schema version 9.0"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, change: Any, words: str) -> None:
    data = json.loads(planned("gpt2_eager")[2].model_dump_json())
    change(data)
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanFileError, match=words):
        SelectivePolicy.load(path)


class Normed(nn.Module):
    """Blocks that no policy may touch, or only in part: statistics, a shared block, a write in place, dropout."""

    def __init__(self) -> None:
        super().__init__()
        twice, shared = (nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(2))
        in_place = nn.Sequential(nn.Linear(32, 64), nn.ReLU(inplace=True), nn.Linear(64, 32), nn.Dropout(0.5))
        norm = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32))
        self.blocks = nn.ModuleList([norm, twice, in_place, shared, shared])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        x = self.blocks[1](x)
        return F.mse_loss(x, torch.zeros_like(x))


def test_what_cannot_be_checkpointed_is_said_and_left_alone() -> None:
    torch.manual_seed(0)
    model = Normed()
    x = torch.randn(256, 32)
    made = plan(model, "100%", (x,), solver=ChenGreedy())
    fake = FakeStep.of(model, (x,), {}, None, "cpu")
    traces = trace_blocks(fake, ["blocks.0", "blocks.1", "blocks.2", "blocks.3"])
    assert "running statistics (1) would be updated twice" in traces["blocks.0"].obstacle
    assert "called 2 times" in traces["blocks.1"].obstacle
    assert traces["blocks.3"].obstacle == "it is in the model under several names (blocks.3, blocks.4)"
    calls = {(c.operator, c.occurrence): c.obstacle for c in traces["blocks.2"].calls}
    assert calls["aten.addmm.default", 0] == "its result is written to later"
    assert calls["aten.relu_.default", 0] == "it writes into a tensor"
    assert calls["aten.addmm.default", 1] == ""
    assert "random" in calls["aten.bernoulli_.float", 0] or "writes" in calls["aten.bernoulli_.float", 0]
    policy = export_policy(made, model, (x,), blocks=["blocks.0", "blocks.1", "blocks.2", "blocks.3"], budget="97%")
    assert [b.mode for b in policy.blocks].count("none") == 3
    assert any("blocks.0 is not checkpointed" in note for note in policy.notes)
    plain = copy.deepcopy(model)
    given = Case(model, (x,))
    assert same(step(plain, given), step(policy.apply(model), given))
    assert torch.equal(plain.blocks[0][1].running_mean, model.blocks[0][1].running_mean)  # type: ignore[index]


def test_a_budget_that_no_policy_meets() -> None:
    given, made, _ = planned("returns_dict")
    with pytest.raises(NoScheduleError, match="no policy of whole blocks fits") as caught:
        export_policy(made, given.model, given.args, given.kwargs, budget="30%")
    assert caught.value.smallest_known_budget_bytes is not None
    assert "use rewrite" in str(caught.value)


def test_bad_input() -> None:
    given, made, policy = planned("returns_dict")
    with pytest.raises(PlanMismatchError, match="no block 'nope'"):
        export_policy(made, given.model, given.args, given.kwargs, blocks=["nope"])
    with pytest.raises(PlanMismatchError, match="the plan was made for something else"):
        export_policy(made, nn.Linear(3, 3), given.args, given.kwargs)
    with pytest.raises(PlanMismatchError, match="it has no block 'layers"):
        policy.apply(nn.Linear(3, 3))
    with pytest.raises(PlanMismatchError, match="the policy has no block 'x'"):
        policy.block("x")
    twice = policy.apply(copy.deepcopy(given.model))
    with pytest.raises((RewriteError, PlanMismatchError)):
        policy.apply(twice)


def test_a_cache_is_the_usual_cause() -> None:
    given = MODELS["gpt2_eager"]()
    made = plan(given.model, "100%", given.args, given.kwargs, solver=ChenGreedy())
    with pytest.raises(RewriteError, match="use_cache = False"):
        export_policy(made, given.model, given.args, given.kwargs)


def test_a_policy_for_other_code_is_refused_at_the_second_call() -> None:
    block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    row = (
        planned("gpt2_eager")[2]
        .blocks[0]
        .model_copy(update={"block": "b", "mode": "selective", "save": {"aten.addmm.default": (5,)}})
    )
    context_fn = row.context_fn()
    assert context_fn is not None
    x = torch.randn(4, 8, requires_grad=True)
    checkpoint(block, x, use_reentrant=False, context_fn=context_fn)
    with pytest.raises(PlanMismatchError, match=r"saves aten\.addmm\.default number 5, and the block ran only 2"):
        checkpoint(block, x, use_reentrant=False, context_fn=context_fn)


def test_random_operators_are_never_saved() -> None:
    class Context:
        is_recompute = False

    policy = SavedOccurrences({"aten.native_dropout.default": (0,), "aten.mm.default": (1,)})
    chosen = [
        policy(Context(), operator).name
        for operator in (
            torch.ops.aten.native_dropout.default,
            torch.ops.aten.mm.default,
            torch.ops.aten.mm.default,
        )
    ]
    assert chosen == ["PREFER_RECOMPUTE", "PREFER_RECOMPUTE", "MUST_SAVE"]


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    factory = tmp_path / "gpt2_factory.py"
    factory.write_text(FACTORY)
    planned("gpt2_eager")[1].save(tmp_path / "plan.json")
    out = tmp_path / "out.json"
    arguments = ["export", str(tmp_path / "plan.json"), f"{factory}:make", "-o", str(out)]
    assert main(arguments) == OK
    assert "what this form costs" in capsys.readouterr().out
    assert SelectivePolicy.load(out).plan_fingerprint == planned("gpt2_eager")[1].fingerprint
    assert main([*arguments, "--as", "torchtitan", "--json"]) == OK
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())
    assert main([*arguments[:3], "-o", str(tmp_path / "no" / "x.json")]) == ERROR
