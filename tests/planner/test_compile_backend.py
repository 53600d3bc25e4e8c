"""`torch.compile(backend="checkpoint_planner")`: planned, or one clear error; never left aside in silence."""

from __future__ import annotations

import dataclasses
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import planner
from planner import (
    BudgetError,
    CaptureError,
    InfeasibleBudgetError,
    InvalidPlanError,
    PinError,
    Plan,
    PlanMismatchError,
    RewriteError,
    compile_backend,
    plan,
    rewrite,
)
from planner.compile_backend import checkpoint_planner  # registers the backend where the package is not installed
from planner.compile_options import CompileOptions
from planner.measure import measure_step
from solvers.chen import ChenGreedy
from solvers.hints import Progress
from solvers.simulator import simulate
from solvers.snapshot import SnapshotRefinement
from tests.planner.two_ranks import Stack, stack, tokens

SETTINGS: dict[str, Any] = {"budget": "80%", "solver": ChenGreedy()}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class _Context:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def compiled(function: Any, fullgraph: bool = False, dynamic: bool | None = None, **options: Any) -> Any:
    return torch.compile(
        function, backend="checkpoint_planner", options=options or SETTINGS, fullgraph=fullgraph, dynamic=dynamic
    )


def step(model: nn.Module, call: Callable[..., torch.Tensor], ids: torch.Tensor) -> list[torch.Tensor]:
    """Loss and gradients of one step."""
    model.zero_grad()
    torch.manual_seed(3)
    loss = call(ids)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(given: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(given) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


def test_a_budget() -> None:
    plans: list[Plan] = []
    model, ids = stack(), tokens(0)
    call = compiled(model, **SETTINGS, on_plan=plans.append)
    assert_same(step(model, call, ids), step(model, model, ids))
    (made,) = plans
    assert made.overhead > 0
    assert made.eager_peak_source == "one eager step of the compiled graph on fake tensors"
    # The module's own plan, captured beforehand, is the same one, and so is eager's peak.
    own = plan(stack(), "80%", (ids,), solver=ChenGreedy())
    assert (made.schedule, made.program_fingerprint) == (own.schedule, own.program_fingerprint)
    assert (made.budget_bytes, made.eager_peak_bytes) == (own.budget_bytes, own.eager_peak_bytes)


def test_the_measured_peak_is_within_the_budget() -> None:
    plans: list[Plan] = []
    model = stack()
    call = compiled(model, **SETTINGS, on_plan=plans.append)
    for accumulation in (False, True):
        measured = measure_step(call, tokens(0), gradient_accumulation=accumulation)
        assert measured.peak_bytes <= plans[0].budget_bytes


def test_other_shapes_and_eval() -> None:
    model = stack()
    call = compiled(model)
    for batch in (4, 2, 3, 4):  # torch.compile makes the size symbolic at the second shape
        ids = tokens(0)[:batch]
        assert_same(step(model, call, ids), step(model, model, ids))
    model.eval()
    with torch.no_grad():
        assert torch.equal(call(tokens(0)), model(tokens(0)))
    model.train()
    assert_same(step(model, call, tokens(1)), step(model, model, tokens(1)))


def test_a_plan_and_its_file(tmp_path: Path) -> None:
    made = plan(stack(), "80%", (tokens(0),), solver=ChenGreedy())
    made.save(tmp_path / "plan.json")
    for option in (made, str(tmp_path / "plan.json"), tmp_path / "plan.json"):
        model = stack()
        assert_same(step(model, compiled(model, plan=option), tokens(0)), step(model, model, tokens(0)))


def test_a_function_around_the_model() -> None:
    model = stack()

    def twice(ids: torch.Tensor) -> torch.Tensor:
        return 2 * model(ids)

    assert_same(step(model, compiled(twice, fullgraph=True), tokens(0)), step(model, twice, tokens(0)))


def test_a_plan_of_something_else() -> None:
    made = plan(Stack(blocks=2), "90%", (tokens(0),), solver=ChenGreedy())
    call = compiled(stack(), plan=made)
    for _ in range(2):
        with pytest.raises(PlanMismatchError, match="the plan does not fit this call"):
            call(tokens(0))


def test_errors_are_raised_where_torch_suppresses_errors() -> None:
    made = plan(Stack(blocks=2), "90%", (tokens(0),), solver=ChenGreedy())
    with torch._dynamo.config.patch(suppress_errors=True), pytest.raises(PlanMismatchError):
        compiled(stack(), plan=made)(tokens(0))


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"budget": "12"}, BudgetError, "no unit"),
        ({"budget": 0.6}, BudgetError, "float without a unit"),
        ({"budget": "1%"}, InfeasibleBudgetError, "smallest budget known to work"),
        ({"budgt": "1GiB"}, RewriteError, "option 'budgt'.*The options are: budget, plan"),
        ({"budget": "1GiB", "plan": "plan.json"}, RewriteError, "and not both"),
        ({"plan": "no/such/file.json"}, RewriteError, "No such file"),
        ({"plan": 3}, RewriteError, "option 'plan'"),
        ({"budget": "1GiB", "on_change": "ignore"}, RewriteError, "option 'on_change'"),
        ({"budget": "1GiB", "costs": "seconds"}, RewriteError, "option 'costs'.*'roofline', 'measured' or 'flops'"),
        ({"budget": "1GiB", "costs": "measured", "device": "h100-80gb"}, CaptureError, "needs the device itself"),
        ({"budget": "1GiB", "device": "h100"}, RewriteError, "option 'device'.*Did you mean 'h100-80gb'"),
        ({"budget": "1GiB", "start": 3}, RewriteError, "option 'start'"),
        ({"budget": "1GiB", "start": "no/such/file.json"}, RewriteError, "option 'start'.*No such file"),
        ({"budget": "1GiB", "keep": "nothing"}, PinError, "matches no module"),
        ({"budget": "1GiB", "extra_bytes": {"headroom": "much"}}, RewriteError, "option 'extra_bytes'"),
        (
            {"plan": "plan.json", "costs": "flops", "solver": ChenGreedy()},
            RewriteError,
            "costs, solver .*with a budget",
        ),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        compiled(stack(), **options)(tokens(0))


def test_every_choice_of_plan_is_an_option() -> None:
    """But for what the compiled function brings along: the model with its inputs, and its loss."""
    own = {"model", "example_inputs", "example_kwargs", "loss_fn"}
    assert set(inspect.signature(plan).parameters) - own <= set(CompileOptions.model_fields)


def test_costs_memory_beside_the_step_and_a_start(tmp_path: Path) -> None:
    ids = tokens(0)
    first = plan(stack(), "80%", (ids,), solver=ChenGreedy())
    first.save(tmp_path / "first.json")
    plans: list[Plan] = []
    told: list[Progress] = []
    options: dict[str, Any] = {
        "budget": first.budget_bytes + 1000,
        "costs": "flops",
        "extra_bytes": {"headroom": 1000},
        "solver": SnapshotRefinement(work_limit=1),
        "start": tmp_path / "first.json",
        "progress": told.append,
    }
    compiled(stack(), on_plan=plans.append, **options)(ids).backward()
    own = plan(stack(), options.pop("budget"), (ids,), **(options | {"start": first}))
    assert plans[0].to_graph() == dataclasses.replace(own.to_graph(), name="compiled function")
    assert plans[0].settings["costs"] == "flops"
    assert dict(plans[0].budget.covers)["headroom"] == 1000
    assert plans[0].overhead <= simulate(own.to_graph(), first.to_schedule()).recomputed_seconds / own.step_seconds
    assert told
    torch._dynamo.reset()
    with pytest.raises(InvalidPlanError, match="`start` is no schedule of this training step"):
        compiled(Stack(blocks=2), **(options | {"budget": "1GiB"}))(ids)


def test_measured_costs() -> None:
    plans: list[Plan] = []
    compiled(stack(), budget="90%", costs="measured", solver=ChenGreedy(), on_plan=plans.append)(tokens(0)).backward()
    assert plans[0].settings["costs"] == "measured"
    assert plans[0].step_seconds > 0


def test_no_options_and_a_mode() -> None:
    with pytest.raises(RewriteError, match="needs options="):
        torch.compile(stack(), backend="checkpoint_planner")(tokens(0))
    with pytest.raises(RewriteError, match="mode='max-autotune' is Inductor's"):
        torch.compile(stack(), backend="checkpoint_planner", mode="max-autotune")(tokens(0))


def test_symbolic_numbers_are_refused() -> None:
    with pytest.raises(CaptureError, match="compile with dynamic=False"):
        compiled(stack(), dynamic=True)(tokens(0))


def test_a_graph_break_is_refused() -> None:
    model = stack()

    def broken(ids: torch.Tensor) -> torch.Tensor:
        first = model(ids)
        torch._dynamo.graph_break()
        return first + model(ids)

    with pytest.raises(RewriteError, match=r"breaks into several graphs at .*test_compile_backend.py:\d+ in broken"):
        compiled(broken)(tokens(0))


def test_a_function_compiled_in_pieces_is_refused() -> None:
    """A break in a `with` of the user's own leaves the function to Python; the blocks are compiled one by one."""
    model = stack()

    def outer(ids: torch.Tensor) -> torch.Tensor:
        with _Context():
            x = model.embedding(ids)
            torch._dynamo.graph_break()
            for block in model.blocks:
                x = block(x)
            return model.head(x).sum()

    with pytest.raises(RewriteError, match=r"left outer \(.*\) to Python and compiled forward \(.*\) inside of it"):
        compiled(outer)(tokens(0))


def test_a_break_without_gradients_before_it_is_no_obstacle() -> None:
    model = stack()

    def prepares(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            shifted = ids + 0
        torch._dynamo.graph_break()
        return model(shifted)

    assert_same(step(model, compiled(prepares), tokens(0)), step(model, model, tokens(0)))


def test_a_change_is_announced() -> None:
    model = stack()
    call = compiled(model)
    step(model, call, tokens(0))
    model.blocks[0].drop.eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given = step(model, call, tokens(0))
    assert_same(given, step(model, model, tokens(0)))
    assert [w.category.__name__ for w in caught] == ["PlanChangedWarning"]


# A plan that is in place, and another compile.


def test_compile_after_rewrite_is_an_error() -> None:
    model = stack()
    rewrite(model, plan(model, "80%", (tokens(0),), solver=ChenGreedy()))
    with pytest.raises(RewriteError, match=r"compile\(\) would take the plan of this Stack away"):
        model.compile()
    planner.restore(model)
    model.compile(backend="eager")
    auto = planner.auto_checkpoint(stack(), "80%")
    with pytest.raises(RewriteError, match="would take the plan"):
        auto.compile()


def test_a_planned_model_inside_of_torch_compile_runs_its_plan() -> None:
    model = stack()
    rewrite(model, plan(model, "80%", (tokens(0),), solver=ChenGreedy()))
    call: Any = model._compiled_call_impl
    around = torch.compile(lambda ids: model(ids) * 2, backend="eager")
    directly = torch.compile(model, backend="eager", fullgraph=True)
    plain = stack()
    assert_same(step(model, around, tokens(0)), step(plain, lambda ids: plain(ids) * 2, tokens(0)))
    assert call.backend.records[-1].recomputed > 0
    assert_same(step(model, directly, tokens(0)), step(plain, plain, tokens(0)))
    whole = torch.compile(lambda ids: model(ids) * 2, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="a planned model is called inside"):
        whole(tokens(0))


def test_a_planned_model_inside_of_a_planned_model_is_refused() -> None:
    model = stack()
    inner: Any = model.blocks[0]
    rewrite(inner, plan(inner, "1GiB", (torch.randn(4, 16, 32, requires_grad=True),), solver=ChenGreedy()))
    rewrite(model, plan(model, "80%", (tokens(0),), solver=ChenGreedy()))
    with pytest.raises(CaptureError, match="a planned model is called inside"):
        model(tokens(0))


def test_the_entry_point_names_the_backend() -> None:
    from importlib.metadata import EntryPoint

    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split("[project.entry-points.torch_dynamo_backends]\n")[1].split("\n\n")[0]
    name, value = (part.strip().strip('"') for part in section.split("="))
    assert EntryPoint(name, value, "torch_dynamo_backends").load() is checkpoint_planner


def test_ddp_cut_at_its_buckets_is_refused_with_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(stack(), bucket_cap_mb=1)
        call = torch.compile(wrapped, backend="checkpoint_planner", options=SETTINGS)
        wrapped.bucket_bytes_cap = 1000  # so small a model has several buckets
        monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 500)
        said = (
            "the graph was cut before it reached this backend. For DDP, whose optimizer cuts it at its buckets, set "
            "torch._dynamo.config.optimize_ddp = False: "
        )
        pieces: list[int] = []
        refuse = compile_backend._refuse_pieces

        def noted(module: torch.fx.GraphModule) -> None:
            pieces.append(len(module.graph.find_nodes(op="call_function", target=nn.functional.layer_norm)))
            refuse(module)

        monkeypatch.setattr(compile_backend, "_refuse_pieces", noted)
        with pytest.raises(RewriteError, match=re.escape(said)):
            call(tokens(0))
        assert len(pieces) > 1
        assert sum(pieces) == 3  # each piece has some of the three blocks
        torch._dynamo.reset()
        with torch._dynamo.config.patch(optimize_ddp=False):
            call(tokens(0)).backward()  # it is one graph, and planned
        assert pieces[-1] == 3
    finally:
        torch.distributed.destroy_process_group()
