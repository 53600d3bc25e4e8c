"""Pins: what `keep` and `recompute` mean, who obeys them, what the plan says of them, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from graph_capture.graph import Graph
from planner import (
    InfeasibleBudgetError,
    InvalidPlanError,
    PinError,
    Plan,
    PlanFileError,
    RewriteError,
    auto_checkpoint,
    minimum_budget,
    pareto,
    plan,
    rewrite,
)
from planner.cli.main import OK, main
from planner.compile_options import read_options
from planner.pins import Pins, pinned, place_of
from planner.report import report_on
from planner.report.lifetimes import alive_after_forward
from solvers import ChenGreedy, SnapshotRefinement
from solvers.schedule import Schedule
from tests.models import MODELS
from tests.planner.compare import compare
from tests.planner.plans import chain, make_plan

SOLVER = SnapshotRefinement(work_limit=2, gap=1e-2)
FAST = SnapshotRefinement(work_limit=1)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.attn = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.2), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class Fading(nn.Module):
    """Multiplies by a buffer that every step changes: its new content cannot be computed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scale.mul_(0.9)
        return x * self.scale


class Net(nn.Module):
    def __init__(self, layers: int = 3, width: int = 8) -> None:
        super().__init__()
        self.h = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.h:
            x = block(x)
        return x.square().mean()


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net()


INPUT = torch.linspace(-1, 1, 32 * 8).reshape(32, 8)


@pytest.fixture(scope="module")
def both(net: Net) -> Plan:
    """A plan that keeps and recomputes, with plenty of memory."""
    return plan(net, "400%", (INPUT,), keep="h.*.attn", recompute=["h.*"], solver=SOLVER)


def own(graph: Graph, part: str) -> list[int]:
    """The forward operators of the modules whose path has a part."""
    return [i for i, o in enumerate(graph.operators) if o.phase == "forward" and part in o.module.split(".")]


# --- what they mean ---------------------------------------------------------------------------------------------------


def test_the_plan_obeys(both: Plan) -> None:
    graph, schedule = both.to_graph(), both.to_schedule()
    runs = Counter(schedule.order)
    assert own(graph, "attn")
    assert all(runs[i] == 1 for i in own(graph, "attn"))
    held = alive_after_forward(graph, schedule)
    for index in own(graph, "mlp"):
        assert held.isdisjoint(set(graph.operators[index].outputs) & set(graph.released))
    tanh = [v for i in own(graph, "attn") if "tanh" in graph.operators[i].target for v in graph.operators[i].outputs]
    assert len(tanh) == 3
    assert held.issuperset(tanh)


def test_random_operators_run_again_and_gradients_are_those_of_the_plain_model(net: Net, both: Plan) -> None:
    again = {i for i, count in Counter(both.to_schedule().order).items() if count > 1}
    assert any(both.to_graph().operators[i].random_state_bytes for i in again)
    plain, planned = copy.deepcopy(net), rewrite(copy.deepcopy(net), both, on_change="error")
    for model in (plain, planned):
        torch.manual_seed(3)
        model(INPUT).backward()
    for a, b in zip(plain.parameters(), planned.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    for a, b in zip(plain.buffers(), planned.buffers(), strict=True):
        assert torch.equal(a, b)


def test_what_a_module_hands_out_is_not_released(both: Plan) -> None:
    graph = both.to_graph()
    for value in graph.released:
        module = graph.operators[graph.values[value].producer].module
        place = place_of("h.*", module)
        assert place is not None
        readers = [graph.operators[i] for i in graph.uses[value] if graph.operators[i].phase == "forward"]
        assert all(o.module.startswith(place) for o in readers)


def test_what_cannot_run_twice_is_held_and_listed() -> None:
    model = Net(1)
    model.h[0].norm = Fading()
    made = plan(model, "400%", (INPUT,), recompute="h.0", solver=SOLVER)
    report = report_on(made)
    text = str(made)
    for row in report.forced:
        assert row.text in text
    assert any("returned to the caller" in row.reason for row in report.forced)
    stuck = report.pins[0].held_all_the_same
    held = alive_after_forward(made.to_graph(), made.to_schedule())
    makers = {made.to_graph().values[v].producer for v in held}
    expected = [o.name for i, o in enumerate(made.to_graph().operators) if i in makers and not o.recomputable]
    assert [entry.split(",")[0] for entry in stuck] == expected
    assert any("reads a buffer that the step changes" in entry for entry in stuck)


def test_the_innermost_module_decides_and_a_name_beats_a_glob() -> None:
    graph = chain()
    pins = Pins(keep=("layers.3",), recompute=("layers.*",))
    result = pinned(graph, pins)
    assert [o.recomputable for o in result.operators[:6]] == [True, True, True, False, True, True]
    assert pinned(result, pins) == result
    assert place_of("layers.*", "layers.3.a") == "layers.3"
    with pytest.raises(PinError, match=r"'layers.3' is to be kept by keep='layers.3' and recomputed by"):
        pinned(graph, Pins(keep=("layers.3",), recompute=("layers.3",)))


def test_unknown_names_list_the_near_ones() -> None:
    with pytest.raises(PinError, match=r"keep='layer.3' matches no module.*near it: layers.3"):
        pinned(chain(), Pins(keep=("layer.3",)))
    with pytest.raises(PinError, match="write a module's name or pattern"):
        plan(Net(), "50%", (INPUT,), keep=3)  # type: ignore[arg-type]
    assert pinned(chain(), Pins(keep=("nothing",)), strict=False).fingerprint == chain().fingerprint


# --- who obeys --------------------------------------------------------------------------------------------------------


def test_a_budget_that_the_pins_forbid_says_so(net: Net) -> None:
    smallest = minimum_budget(net, (INPUT,), keep="h.*", time_limit_seconds=4.0)
    free = minimum_budget(net, (INPUT,), time_limit_seconds=4.0)
    assert free.peak_bytes < smallest.peak_bytes
    with pytest.raises(InfeasibleBudgetError, match="pinned by keep= and recompute= count"):
        plan(net, free.floor_bytes - 1, (INPUT,), keep="h.*", solver=SOLVER)


def test_another_solver_obeys_too(net: Net) -> None:
    made = plan(net, "400%", (INPUT,), recompute=["h.*.mlp"], solver=ChenGreedy())
    assert alive_after_forward(made.to_graph(), made.to_schedule()).isdisjoint(made.to_graph().released)


def test_a_curve_obeys(net: Net) -> None:
    curve = pareto(net, ["95%", "400%"], (INPUT,), recompute=["h.*.mlp"], solver=SOLVER)
    made = curve.plan(len(curve.points) - 1)
    assert made.pins.recompute == ("h.*.mlp",)
    assert made.overhead > 0


def test_auto_checkpoint_and_a_larger_batch_obey() -> None:
    torch.manual_seed(0)
    plans: list[Plan] = []
    model = auto_checkpoint(Net(2), "400%", on_plan=plans.append, recompute=["h.*.mlp"], solver=SOLVER)
    model(INPUT).backward()
    assert plans[0].pins == Pins(recompute=("h.*.mlp",))
    assert plans[0].to_graph().released
    with torch.no_grad():
        model(INPUT[:16])
    model(INPUT[:16]).backward()  # the same decisions at another shape


def test_torch_compile_obeys() -> None:
    torch._dynamo.reset()
    import planner.compile_backend  # noqa: F401  # makes the name known

    plans: list[Plan] = []
    options = {"budget": "400%", "recompute": ["h.*.mlp"], "on_plan": plans.append, "solver": SOLVER}
    torch.compile(Net(2), backend="checkpoint_planner", options=options)(INPUT).backward()  # type: ignore[arg-type]
    assert plans[0].to_graph().released
    with pytest.raises(RewriteError, match="a plan has its own pins"):
        read_options({"plan": plans[0], "keep": ["h.0"]}, None)


# --- plan files -------------------------------------------------------------------------------------------------------


def test_they_are_in_the_file_and_are_verified(both: Plan, tmp_path: Path) -> None:
    both.save(tmp_path / "p.json")
    loaded = Plan.load(tmp_path / "p.json")
    assert loaded == both
    assert loaded.pins == Pins(keep=("h.*.attn",), recompute=("h.*",))
    for pins in (Pins(), Pins(keep=("h.*.attn",)), Pins(keep=("h.*",)), Pins(recompute=("h.*",))):
        with pytest.raises(InvalidPlanError, match="not pinned as its keep and recompute say"):
            both.model_copy(update={"pins": pins})


def test_a_schedule_that_breaks_them_is_refused(both: Plan) -> None:
    graph = both.to_graph()
    with pytest.raises(InvalidPlanError, match="held across the turn"):
        both.model_copy(update={"schedule": Schedule.store_all(graph)})
    attn = own(graph, "attn")[0]
    order = [*both.to_schedule().order]
    order.insert(len(order) - 1, attn)
    with pytest.raises(InvalidPlanError, match="must not run twice"):
        both.model_copy(update={"schedule": Schedule.from_order(graph, order)})


def test_older_plan_files_load(tmp_path: Path) -> None:
    from planner.plan_file import _checksum

    fields = json.loads(make_plan().to_json())
    del fields["pins"], fields["checksum"]
    fields["schema_version"] = "1.0"
    assert "released" not in fields["graph"]
    fields["checksum"] = _checksum(fields)
    (tmp_path / "old.json").write_text(json.dumps(fields))
    assert Plan.load(tmp_path / "old.json").pins == Pins()
    fields["graph"]["released"] = [3]
    fields["checksum"] = _checksum(fields)
    with pytest.raises(PlanFileError):
        Plan.from_json(json.dumps(fields))


# --- reports and the command line -------------------------------------------------------------------------------------


def test_the_report_says_what_was_asked_for(both: Plan) -> None:
    report = report_on(both)
    keep, recompute = report.pins
    assert (keep.kind, keep.modules, recompute.modules) == ("keep", ("h.{0-2}.attn",), ("h.{0-2}",))
    assert keep.size_bytes > 0
    graph = both.to_graph()
    assert 0 < recompute.size_bytes <= sum(graph.values[v].size_bytes for v in graph.released)
    assert any(row.reason == "asked for: keep 'h.*.attn'" for row in report.forced)
    text = str(both)
    assert all(row.text in text for row in (*report.pins, *report.forced))
    json.dumps(dataclasses.asdict(report))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pins_factory.py").write_text(
        "import torch\nfrom tests.planner.test_pins import Net, INPUT\n\ndef make():\n    return Net(2), (INPUT,)\n"
    )
    target, out = f"{tmp_path}/pins_factory.py:make", f"{tmp_path}/p.json"
    arguments = ["plan", target, "--budget", "400%", "--keep", "h.0", "--recompute", "h.*.mlp", "--costs", "flops"]
    assert main([*arguments, "-o", out, "--json"]) == OK
    data = json.loads(capsys.readouterr().out)
    assert data["pins"] == {"keep": ["h.0"], "recompute": ["h.*.mlp"]}
    assert data["settings"]["costs"] == "flops"
    assert main(["show", out, "--json"]) == OK
    assert json.loads(capsys.readouterr().out)["report"]["pins"][0]["pattern"] == "h.0"
    assert main(["pareto", out, "--keep", "h.0"]) != OK
    assert "pins and prices are settled" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gpt2_sdpa", "resnet"])
def test_models_of_which_everything_is_recomputed_train_as_before(name: str) -> None:
    case = MODELS[name]()
    made = plan(
        case.model, "1TiB", case.args, case.kwargs, loss_fn=case.loss_fn, recompute="*", solver=FAST
    )  # fmt: skip
    compared = compare(name, case, made)
    assert not list(compared.problems)
    assert compared.random_recomputed == compared.random_operators
    assert made.overhead > 0.25


def test_the_page_says_what_was_asked_for(both: Plan) -> None:
    pytest.importorskip("jinja2")
    from planner.page.plan_page import plan_page

    page = plan_page(both)
    assert "h.*.attn: h.{0-2}.attn" in page
    assert "must be kept" in page


def test_a_module_that_inductor_computes_in_passing_has_nothing_to_pin() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 1))
    inputs = (torch.ones(4, 8),)
    assert plan(model, "1GiB", inputs, loss_fn=torch.sum, keep="1", solver=ChenGreedy())
    with pytest.raises(PinError, match=r"one that Inductor computes in passing has nothing to pin\); near it: 0"):
        plan(model, "1GiB", inputs, loss_fn=torch.sum, keep="1", solver=ChenGreedy(), compiler="inductor")
