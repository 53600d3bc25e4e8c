"""The programs of a schedule compiled by Inductor: the schedule is what runs, and the numbers are eager's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config, cpp_builder
from torch._inductor.exc import InvalidCxxCompiler
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from graph_capture.errors import CaptureError
from graph_capture.pooling import release_averaged_inputs
from planner import (
    InductorPeakWarning,
    NoScheduleError,
    Plan,
    PlanMismatchError,
    RewriteError,
    export_policy,
    measure_step,
    plan,
    rewrite,
)
from planner.compile_backend import checkpoint_planner  # registers the backend where the package is not installed
from planner.inductor import _read_beyond_a_call
from planner.inductor_peak import peak_without_in_place_bytes
from solvers.auto import Auto
from solvers.chen import ChenGreedy
from solvers.solution import Solver
from solvers.store_all import StoreAll
from tests.planner.stress import RecomputeAlways
from tests.planner.two_ranks import Stack, tokens

assert checkpoint_planner


def _has_compiler() -> bool:
    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


needs_compiler = pytest.mark.skipif(not _has_compiler(), reason="Inductor needs a C++ compiler, and there is none here")


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    torch._dynamo.reset()
    with config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


def small() -> Stack:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Stack(blocks=1, width=16)


def step(model: nn.Module, call: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    loss = call(*inputs)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *gradients, torch.get_rng_state()]


def planned(model: nn.Module, budget: str, solver: Solver, *inputs: torch.Tensor) -> Plan:
    made = plan(model, budget, inputs, solver=solver)
    rewrite(model, made, compiler="inductor")
    return made


def assert_close(given: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(given) == len(expected)
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert torch.equal(given[-1], expected[-1])  # the generator


def matrix_flops(function: Callable[[], Any]) -> int:
    """FLOPs of the matrix products that run, from the profiler: Inductor's kernels are no dispatched operators."""
    total = 0
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        function()
    for event in record.events() or ():
        if event.name in ("aten::mm", "aten::addmm"):
            if event.cpu_parent is not None and event.cpu_parent.name == event.name:
                continue
            rows, columns = event.input_shapes[1:3] if event.name == "aten::addmm" else event.input_shapes[:2]
            total += 2 * rows[0] * rows[1] * columns[1]
    return total


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Programs with and without recomputation fuse differently; with several threads their sums are split otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@needs_compiler
def test_the_schedule_is_what_runs() -> None:
    ids = tokens(0)
    eager, keeping, recomputing = small(), small(), small()
    planned(keeping, "1GiB", StoreAll(), ids)
    made = planned(recomputing, "80%", ChenGreedy(), ids)
    assert made.overhead > 0.1
    expected, kept, given = step(eager, eager, ids), step(keeping, keeping, ids), step(recomputing, recomputing, ids)
    assert_close(given, expected)
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))

    graph, order = made.to_graph(), made.to_schedule().order
    again = sum(graph.operators[i].flops for i in order) - sum(o.flops for o in graph.operators)
    assert again > 0
    losses = [model(ids) for model in (keeping, recomputing)]
    without, with_recomputation = (matrix_flops(loss.backward) for loss in losses)
    assert with_recomputation - without == again

    for accumulation, predicted in ((False, made.first_peak_bytes), (True, made.later_peak_bytes)):
        measured = measure_step(recomputing, ids, gradient_accumulation=accumulation).peak_bytes
        assert measured <= predicted <= made.budget_bytes
    assert measure_step(keeping, ids).peak_bytes > made.first_peak_bytes


@needs_compiler
def test_a_plan_that_fits_by_in_place_forms_alone_is_said_so() -> None:
    """Inductor runs none of them: the warning says what the plan may need then, and nothing is said where it fits."""
    model, ids = small(), (tokens(0),)
    first = plan(model, "70%", ids, solver=Auto(work_limit=1), gradient_accumulation=False)
    without_bytes = peak_without_in_place_bytes(first)
    assert without_bytes > first.predicted_peak_bytes
    solver = Auto(work_limit=1)
    tight, wide = (
        plan(model, size_bytes, ids, solver=solver, gradient_accumulation=False, start=first)
        for size_bytes in (first.predicted_peak_bytes, without_bytes)
    )
    with pytest.warns(InductorPeakWarning, match="more than its budget"):
        rewrite(model, tight, compiler="inductor")
    rewrite(model, wide, compiler="inductor")


class Gelu(nn.Module):
    """GPT-2's own approximation of GELU, a chain of pointwise operators, between matrix products; returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            y = part(x)
            x = x + 0.5 * y * (1.0 + torch.tanh(0.8 * (y + 0.044715 * torch.pow(y, 3.0))))
        return x.square().mean()


@needs_compiler
def test_a_plan_for_inductors_kernels_bounds_their_peak() -> None:
    """What is fused is no operator of the plan; where nearly everything runs again, the numbers are still eager's."""
    torch.manual_seed(0)
    eager, x = Gelu(), torch.randn(256, 32)
    options: dict[str, Any] = {"gradient_accumulation": False, "solver": Auto(work_limit=1)}
    unfused = plan(eager, "48%", (x,), **options)
    stored = plan(eager, "1GiB", (x,), compiler="inductor", gradient_accumulation=False, solver=StoreAll())
    made = plan(eager, stored.predicted_peak_bytes * 93 // 100, (x,), compiler="inductor", **options)
    assert (made.compiler, unfused.compiler) == ("inductor", "eager")
    assert len(made.to_graph()) < len(unfused.to_graph())
    assert unfused.predicted_peak_bytes > stored.predicted_peak_bytes
    assert 0 < made.overhead < unfused.overhead
    always = plan(eager, "1GiB", (x,), compiler="inductor", solver=RecomputeAlways())
    for chosen in (made, always):
        model = copy.deepcopy(eager)
        rewrite(model, chosen)
        given, expected = (step(m, m, x) for m in (model, eager))
        assert_close(given, expected)
    model = copy.deepcopy(eager)
    rewrite(model, Plan.from_json(made.to_json()))
    measured = measure_step(model, x).peak_bytes
    # Beyond what is fused whatever the schedule Inductor may fuse more, never less.
    assert 0.75 * made.predicted_peak_bytes < measured <= made.predicted_peak_bytes + 64


class _Branches(nn.Module):
    """Halves the resolution in two branches, each normalised: the gradient of their sum is read by both."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width_in, width, 1, stride=2, bias=False), nn.BatchNorm2d(width)) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.parts[0](x) + self.parts[1](x))


class _Branched(nn.Module):
    """Small gradients, which wait for the large ones of the last layer's kind: few backward programs, each of much."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(_Branches(16, 32), _Branches(32, 64))
        self.classes = nn.Linear(64, 512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classes(self.blocks(torch.relu(self.head(x))).mean((2, 3))).square().mean()


@needs_compiler
def test_what_a_waiting_slice_hands_on_lies_in_memory() -> None:
    """Computed anew by each of its readers, it would hold what it is computed from, which is more."""
    model, x = _Branched(), torch.randn(8, 3, 32, 32)
    made = plan(model, "1GiB", (x,), compiler="inductor", gradient_accumulation=False)
    graph = made.to_graph()
    ends = {v.delivered_after for v in graph.values if v.kind == "gradient"}
    assert len(ends) < sum(v.kind == "gradient" for v in graph.values) / 2  # some wait
    rewrite(model, made)
    measured = measure_step(model, x).peak_bytes
    assert made.first_peak_bytes - 1024 <= measured <= made.first_peak_bytes


class _Pooled(nn.Module):
    """Windows that overlap, then dropout, between convolutions; most memory is used behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.more, self.again = nn.Conv2d(16, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.drop, self.out = nn.Dropout(0.3), nn.Conv2d(64, 64, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.max_pool2d(torch.relu(self.norm(self.into(x))), 3, 2, 1)
        y = self.drop(torch.relu(self.again(self.more(y))))
        return torch.relu(self.out(y)).square().mean()


@needs_compiler
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("percent", [100, 85])
def test_pooling_and_dropout_taken_apart(layout: torch.memory_format, percent: int) -> None:
    """Numbers are eager's, and the peak is the predicted one, before and after anything is recomputed."""
    torch.manual_seed(0)
    eager = _Pooled().to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(4, 3, 64, 64).to(memory_format=layout)
    options: dict[str, Any] = {"compiler": "inductor", "gradient_accumulation": False}
    kept = plan(eager, "1GiB", (x,), solver=StoreAll(), **options)
    made = plan(eager, kept.predicted_peak_bytes * percent // 100, (x,), solver=Auto(work_limit=1), **options)
    assert (made.overhead > 0) == (percent < 100)
    model = copy.deepcopy(eager)
    rewrite(model, made)
    assert_close(step(model, model, x), step(eager, eager, x))
    measured = measure_step(model, x).peak_bytes
    assert made.first_peak_bytes - 1024 <= measured <= made.first_peak_bytes


class _PooledTwice(nn.Module):
    """Little besides a ReLU and its pooling, both of which run again where the pooling's gradient is made."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(F.max_pool2d(torch.relu(self.norm(self.into(x))), 2)).square().mean()


@needs_compiler
def test_what_a_pooling_makes_again_lies_in_memory() -> None:
    """Computed anew by the kernel that reads it, it would hold the pooling's input beside the gradient of that."""
    torch.manual_seed(0)
    model, x = _PooledTwice(), torch.randn(2, 3, 112, 112)
    made = plan(model, "1GiB", (x,), compiler="inductor", gradient_accumulation=False, solver=RecomputeAlways())
    (pool,) = [i for i, o in enumerate(made.to_graph().operators) if "max_pool_with_offsets" in o.target]
    assert made.to_schedule().order.count(pool) > 1
    rewrite(model, made)
    assert measure_step(model, x).peak_bytes <= made.first_peak_bytes


def test_a_plan_for_inductors_kernels_runs_on_no_others() -> None:
    model, inputs = small(), (tokens(0),)
    made = plan(model, "1GiB", inputs, solver=StoreAll(), compiler="inductor")
    with pytest.raises(PlanMismatchError, match="made for Inductor's kernels and is to run with compiler='eager'"):
        rewrite(model, made, compiler="eager")
    with pytest.raises(PlanMismatchError, match="export a plan that was made without compiler"):
        export_policy(made, model, inputs)
    call = torch.compile(model, backend="checkpoint_planner", options={"plan": made, "compiler": "eager"})
    with pytest.raises(PlanMismatchError, match="made for Inductor's kernels"):
        call(*inputs)
    with pytest.raises(CaptureError, match="compiler is 'xla'"):
        plan(model, "1GiB", inputs, compiler="xla")  # type: ignore[arg-type]


@needs_compiler
@pytest.mark.parametrize("kernels", ["eager", "inductor"])
def test_random_operators_batch_norm_and_in_place_operators_run_again(kernels: Literal["eager", "inductor"]) -> None:
    """Nearly every operator runs several times; statistics change once and dropout draws eager's numbers."""
    torch.manual_seed(0)
    parts = (
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(64, 1),
    )
    eager, image = nn.Sequential(*parts), torch.randn(2, 3, 6, 6)
    model = copy.deepcopy(eager)
    made = plan(model, "1GiB", (image,), loss_fn=torch.sum, solver=RecomputeAlways(), compiler=kernels)
    rewrite(model, made, compiler="inductor")
    random = [i for i, o in enumerate(made.to_graph().operators) if o.random_state_bytes]
    assert any(made.to_schedule().order.count(i) > 1 for i in random)
    for _ in range(2):
        given, expected = (step(m, lambda x, m=m: m(x).sum(), image) for m in (model, eager))
        assert_close(given, expected)
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer)


@needs_compiler
def test_the_backend_of_torch_compile_takes_it_as_an_option() -> None:
    model, ids = small(), tokens(0)
    options = {"budget": "80%", "solver": ChenGreedy(), "compiler": "inductor"}
    call = torch.compile(model, backend="checkpoint_planner", options=options)
    assert_close(step(model, call, ids), step(model, model, ids))
    model.eval()
    with torch.no_grad():
        assert torch.equal(call(ids), model(ids))


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    model = small()
    made = plan(model, "80%", (tokens(0),), solver=ChenGreedy())
    with pytest.raises(RewriteError, match="needs a C\\+\\+ compiler"):
        rewrite(model, made, compiler="inductor")
    assert model._compiled_call_impl is None


def test_an_unknown_compiler() -> None:
    model = small()
    made = plan(model, "80%", (tokens(0),), solver=ChenGreedy())
    with pytest.raises(ValueError, match="'eager' or 'inductor', not 'xla'"):
        rewrite(model, made, compiler="xla")  # type: ignore[arg-type]


class _MarginLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        targets = torch.tensor([[1, 2, -1, 0, 0, 0, 0, 0]] * 4)
        return F.multilabel_margin_loss(self.first(x), targets)


@needs_compiler
def test_a_loss_whose_decomposition_is_mistaken() -> None:
    """Torch takes `multilabel_margin_loss` apart into something else."""
    model, x = _MarginLoss(), torch.randn(4, 8)
    expected = model(x).item()
    rewrite(model, plan(model, "1TiB", (x,), compiler="inductor"))
    assert model(x).item() == pytest.approx(expected, rel=1e-5)


class Pooled(nn.Module):
    """Convolutions, activations and poolings, the kinds of which are said."""

    def __init__(self, activation: Callable[[], nn.Module], pooling: Callable[[], nn.Module]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 16), (16, 32)):
            conv = nn.Conv2d(before, after, 3, padding=1)
            layers += [conv, nn.BatchNorm2d(after), activation(), pooling()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(32, 8, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


@needs_compiler
@pytest.mark.parametrize(
    ("activation", "pooling"),
    [(nn.GELU, lambda: nn.AvgPool2d(2)), (nn.LeakyReLU, lambda: nn.MaxPool2d(3, 2, 1)), (nn.Hardswish, nn.Identity)],
    ids=["average", "leaky, overlapping", "hardswish"],
)
@pytest.mark.parametrize("percent", [100, 88])
def test_the_prediction_bounds_the_peak_of_poolings_and_activations(
    activation: Callable[[], nn.Module], pooling: Callable[[], nn.Module], percent: int
) -> None:
    """What is read for its shape alone is let go, and nothing is put off until a kernel was called in between."""
    torch.manual_seed(0)
    model, x = Pooled(activation, pooling), torch.randn(8, 3, 32, 32)
    options: dict[str, Any] = {"solver": Auto(work_limit=2), "compiler": "inductor"}
    stored = plan(model, "1GiB", (x,), **options)
    made = stored
    if percent < 100:
        try:
            made = plan(model, stored.predicted_peak_bytes * percent // 100, (x,), **options)
        except NoScheduleError:
            pytest.skip("nothing fits that budget")
    rewrite(model, made, compiler="inductor")
    assert measure_step(model, x).peak_bytes <= made.first_peak_bytes


def test_what_is_read_behind_a_called_kernel_lies_in_memory() -> None:
    """Computed anew by a later reader, it would hold what it is made of until then."""

    def program(x: Tensor, weight: Tensor) -> Tensor:
        early, late = x.tanh(), x.exp()
        product = x @ weight
        return early * product + (late * 2).sum() * 0

    traced = make_fx(program, tracing_mode="fake")(torch.ones(64, 64), torch.ones(64, 64))
    assert {node.name for node in _read_beyond_a_call(traced.graph)} == {"tanh", "exp"}


@pytest.mark.parametrize(("kernel", "stride", "released"), [(2, 2, True), (5, 1, True), (7, 7, True), (7, 1, False)])
def test_an_average_over_many_windows_keeps_its_input(kernel: int, stride: int, released: bool) -> None:
    """There torch's own kernel is called, and zeros in the place of the input would be made for it."""
    side = (14 - kernel) // stride + 1

    def program(gradient: Tensor, x: Tensor) -> Tensor:
        return torch.ops.aten.avg_pool2d_backward(gradient, x, [kernel], [stride], [0], False, True, None)

    traced = make_fx(program, tracing_mode="fake")(torch.ones(1, 2, side, side), torch.ones(1, 2, 14, 14))
    release_averaged_inputs(traced.graph)
    x = traced.graph.find_nodes(op="placeholder")[1]
    assert (not x.users) == released
