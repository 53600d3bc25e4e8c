"""Operators taken apart: the numbers are those of the whole."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from graph_capture.decompositions import decompositions_for, multilabel_margin_loss_forward
from graph_capture.dropout_mask import dropout_apart

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


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("shape", [(8,), (5, 8)])
@pytest.mark.parametrize("targets", [[1, 2, -1, 0, 0, 0, 0, 0], [5, 1, 2, 0, 3, 7, 6, 4], [-1] * 8])
def test_margins_of_labels_that_end_early(targets: list[int], shape: tuple[int, ...], reduction: int) -> None:
    x, target = torch.randn(shape), torch.tensor(targets).expand(shape).contiguous()
    whole = torch.ops.aten.multilabel_margin_loss_forward(x, target, reduction)
    for given, expected in zip(multilabel_margin_loss_forward(x, target, reduction), whole, strict=True):
        torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("probability", [k / 100 for k in range(1, 100, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_dropout_as_mask_and_product_is_eagers(probability: float, dtype: torch.dtype, transposed: bool) -> None:
    """Numbers are drawn in the order of memory."""
    x = torch.randn(7, 5, 41).to(dtype)
    x = x.transpose(0, 2) if transposed else x
    torch.manual_seed(3)
    expected = torch.dropout(x, probability, True)
    torch.manual_seed(3)
    given, mask = dropout_apart(x, probability, True)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, expected != 0)
    torch.testing.assert_close(given, expected)


def test_dropout_that_keeps_all_or_nothing_is_left_whole() -> None:
    x = torch.ones(3)
    assert all(dropout_apart(x, p, train) is NotImplemented for p, train in ((0.5, False), (0.0, True), (1.0, True)))
