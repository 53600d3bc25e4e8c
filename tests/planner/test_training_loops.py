"""Whole training loops: the curve of a planned model is the plain model's, bit for bit."""

from __future__ import annotations

import copy
import io
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planner import RewriteError, plan, restore, rewrite
from tests.planner.stress import RecomputeAlways

pytestmark = pytest.mark.filterwarnings("ignore::planner.decide.PlanChangedWarning")


class Net(nn.Module):
    """Dropout in every layer; returns its loss."""

    def __init__(self, layers: int = 4, width: int = 16, normalised: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(layers)])
        self.norm, self.dropout = nn.BatchNorm1d(width) if normalised else nn.Identity(), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + self.dropout(torch.tanh(layer(self.norm(x))))
        return x.square().mean()


def pair(**options: Any) -> tuple[Net, Net]:
    """The same model plain and planned, with everything recomputed that can be."""
    torch.manual_seed(0)
    plain = Net(**options)
    planned = copy.deepcopy(plain)
    made = plan(planned, "1GiB", (batch(0),), solver=RecomputeAlways())
    graph, runs = made.to_graph(), Counter(made.to_schedule().order)
    drawn = [i for i, o in enumerate(graph.operators) if o.random_state_bytes]
    assert len(drawn) == len(plain.layers)
    assert 3 * sum(runs[i] > 1 for i in drawn) >= len(drawn)
    return plain, rewrite(planned, made)  # type: ignore[return-value]


def batch(step: int, rows: int = 8) -> Tensor:
    """Inputs of one step."""
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(step))


def same(plain: nn.Module, planned: nn.Module) -> bool:
    """Parameters and buffers are equal, bit for bit."""
    mine, theirs = plain.state_dict(), planned.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_fifty_steps_with_dropout() -> None:
    plain, planned = pair()
    curves = []
    for model in (plain, planned):
        torch.manual_seed(5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        curve = []
        for step in range(50):
            optimizer.zero_grad()
            loss = model(batch(step))
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0] == curves[1]
    assert len(set(curves[0])) == 50
    assert same(plain, planned)


def test_epochs_with_accumulation_clipping_evaluation_and_a_smaller_last_batch() -> None:
    plain, planned = pair()
    logs = []
    for model in (plain, planned):
        torch.manual_seed(5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        log = []
        for epoch in range(2):
            model.train()
            for step, rows in enumerate((8, 8, 8, 3)):
                loss = model(batch(10 * epoch + step, rows)) / 2
                loss.backward()
                if step % 2:
                    log.append(nn.utils.clip_grad_norm_(model.parameters(), 0.01))
                    optimizer.step()
                    optimizer.zero_grad()
                log.append(loss.detach())
            model.eval()
            with torch.no_grad():
                log += [model(batch(100, rows)) for rows in (8, 5)]
        logs.append(log)
    assert all(torch.equal(a, b) for a, b in zip(*logs, strict=True))
    assert same(plain, planned)


def test_autocast_with_a_gradient_scaler() -> None:
    plain, planned = pair()
    scales = []
    for model in (plain, planned):
        torch.manual_seed(5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for step in range(5):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(batch(step))
            if step == 3:
                loss = loss * float("inf")  # a step that the scaler skips
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        scales.append(scaler.get_scale())
    assert scales[0] == scales[1] == 2.0**10
    assert same(plain, planned)


class LowRank(nn.Module):
    """A frozen layer with a trainable adapter of rank 2 beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_adapters_on_a_frozen_model() -> None:
    torch.manual_seed(0)
    plain = Net()
    plain.requires_grad_(False)
    for index in (1, 3):
        plain.layers[index] = LowRank(plain.layers[index])  # type: ignore[arg-type]
    planned = copy.deepcopy(plain)
    rewrite(planned, plan(planned, "1GiB", (batch(0),), solver=RecomputeAlways()))
    for model in (plain, planned):
        torch.manual_seed(5)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(3):
            model(batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same(plain, planned)
    assert all(p.grad is None for p in planned.parameters() if not p.requires_grad)


def test_checkpoints_go_into_the_plain_model_and_back() -> None:
    plain, planned = pair()
    whole = io.BytesIO()
    optimizers = {model: torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (plain, planned)}
    for one, other in ((planned, plain), (plain, planned)):  # an epoch, then its state goes into the other model
        for step in range(2):
            optimizers[one].zero_grad()
            one(batch(step)).backward()
            optimizers[one].step()
        other.load_state_dict(one.state_dict())
        optimizers[other].load_state_dict(optimizers[one].state_dict())
        assert same(plain, planned)
    torch.save(planned, whole)
    whole.seek(0)
    loaded = torch.load(whole, weights_only=False)
    for model in (plain, planned, loaded):
        model.zero_grad()
        torch.manual_seed(6)
        model(batch(7)).backward()
    for a, b, c in zip(plain.parameters(), planned.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
        assert torch.equal(a.grad, c.grad)


@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp"])
def test_function_transforms_are_refused(transform: str) -> None:
    plain, planned = pair(normalised=False)  # batch statistics cannot be updated under a transform

    def run(model: nn.Module) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        values = {n: p.detach() for n, p in model.named_parameters()}

        def loss(weights: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, weights, (batch(0),))

        if transform == "grad":
            return tuple(torch.func.grad(loss)(values).values())
        if transform == "vjp":
            result, pull = torch.func.vjp(loss, values)
            return tuple(pull(torch.ones_like(result))[0].values())
        return torch.func.jvp(loss, (values,), ({n: torch.ones_like(v) for n, v in values.items()},))

    expected = run(plain)
    with pytest.raises(RewriteError, match=r"torch\.func"):
        run(planned)
    given = run(restore(planned))
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


def test_double_backward_is_refused_before_the_step() -> None:
    _, planned = pair()
    gradient = None
    with pytest.raises(RewriteError, match="double backward"):
        (gradient,) = torch.autograd.grad(planned(batch(0)), [planned.layers[0].weight], create_graph=True)
    assert gradient is None
