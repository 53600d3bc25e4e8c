"""A cross-entropy taken apart: the numbers are those of the whole."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from graph_capture.decompositions import decompositions_for

SHAPES = [((6, 5), (6,)), ((5,), ()), ((2, 5, 3, 4), (2, 3, 4))]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("scores", "targets"), SHAPES)
def test_loss_and_gradient_are_those_of_the_whole_operators(
    scores: tuple[int, ...], targets: tuple[int, ...], weighted: bool, reduction: str
) -> None:
    torch.manual_seed(0)
    x, target = torch.randn(scores, requires_grad=True), torch.randint(0, 5, targets)
    if targets:
        target.view(-1)[1] = -100  # ignored
    weight = torch.rand(5) if weighted else None

    def step(x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = torch.nn.functional.cross_entropy(x, target, weight, reduction=reduction)
        return loss, torch.autograd.grad((loss * loss).sum(), x)[0]

    apart = make_fx(step, decomposition_table=dict(decompositions_for("inductor")))(x, target)
    names = {str(node.target) for node in apart.graph.nodes}
    assert not any("log_softmax" in name or "nll_loss" in name for name in names)
    for given, expected in zip(apart(x, target), step(x, target), strict=True):
        torch.testing.assert_close(given, expected)


def test_eager_kernels_are_left_whole() -> None:
    assert not decompositions_for("eager")
