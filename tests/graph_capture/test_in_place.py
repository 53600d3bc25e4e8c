"""Which operators may work in the allocation of an input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from graph_capture.in_place import in_place_forms
from tests.graph_capture.test_joint import joint_of

aten = torch.ops.aten


def forms_of(function: Callable[..., Any], target: Any) -> list[tuple[str, bool]]:
    """The forms of the first operator of that kind in the forward of `function(module, x)`."""
    node = joint_of(function).module.graph.find_nodes(op="call_function", target=target)[0]
    assert isinstance(node, fx.Node)
    return [(str(form.overload), form.swapped) for form in in_place_forms(node)]


def made(m: Any, x: Tensor) -> Tensor:
    """A tensor that the graph makes, of the shape of x."""
    return x * m.weight


@pytest.mark.parametrize(
    ("function", "target", "expected"),
    [
        (lambda m, x: F.relu(made(m, x)).sum(), aten.relu.default, [("aten.relu_.default", False)]),
        (lambda m, x: torch.sigmoid(made(m, x)).sum(), aten.sigmoid.default, [("aten.sigmoid_.default", False)]),
        # either operand of a sum may give its allocation
        (
            lambda m, x: (made(m, x) + made(m, x).exp()).sum(),
            aten.add.Tensor,
            [("aten.add_.Tensor", False), ("aten.add_.Tensor", True)],
        ),
        # but of a difference only the first
        (lambda m, x: (made(m, x) - made(m, x).exp()).sum(), aten.sub.Tensor, [("aten.sub_.Tensor", False)]),
        # an input of the step belongs to the caller
        (lambda m, x: (F.relu(x) * m.weight).sum(), aten.relu.default, []),
        (lambda m, x: (x + made(m, x)).sum(), aten.add.Tensor, [("aten.add_.Tensor", True)]),
        # both operands are one tensor
        (lambda m, x: (lambda y: (y * y).sum())(made(m, x).exp()), aten.mul.Tensor, []),
        # complex factors keep their order: the product's rounding depends on it
        (
            lambda m, x: (lambda z: torch.view_as_real(z.exp() * z.sin()).sum())(torch.complex(x, x + m.weight)),
            aten.mul.Tensor,
            [("aten.mul_.Tensor", False)],
        ),
        # a part of a storage cannot take the whole place
        (lambda m, x: F.relu(made(m, x)[:2]).sum(), aten.relu.default, []),
        # the result is larger than the operand
        (lambda m, x: (made(m, x)[0].exp() + made(m, x)).sum(), aten.add.Tensor, [("aten.add_.Tensor", True)]),
        # random operators draw into memory of their own
        (lambda m, x: F.dropout(made(m, x), 0.5).sum(), aten.native_dropout.default, []),
        # no pointwise operator
        (lambda m, x: (made(m, x).t() @ x).sum(), aten.mm.default, []),
    ],
)
def test_forms(function: Callable[..., Any], target: Any, expected: list[tuple[str, bool]]) -> None:
    found = forms_of(function, target)
    if target is aten.mul.Tensor:  # the first product is x * weight, whose operands are inputs
        node = joint_of(function).module.graph.find_nodes(op="call_function", target=target)[1]
        found = [(str(f.overload), f.swapped) for f in in_place_forms(node)]
    assert found == expected


def test_another_dtype_does_not_fit() -> None:
    assert forms_of(lambda m, x: (made(m, x) > 0).double().mul(m.weight).sum(), aten.gt.Scalar) == []


def test_results_of_uncertain_layout_are_left_alone() -> None:
    """Batch normalisation of a transposed tensor has other strides than recorded: in place, they would be inherited."""

    def function(m: Any, x: Tensor) -> Tensor:
        y = m.norm((x[..., None] * m.weight[..., None]).expand(4, 6, 3).transpose(0, 2).contiguous().transpose(0, 2))
        return F.relu(y).square().sum()

    assert forms_of(function, aten.relu.default) == []


@pytest.mark.parametrize("overload", [aten.relu_.default, aten.add_.Tensor, aten.mul_.Tensor, aten.silu_.default])
def test_in_place_kernels_compute_the_same_bits(overload: Any) -> None:
    functional = getattr(getattr(aten, overload._schema.name.split("::")[1][:-1]), overload._overloadname)
    x, y = torch.randn(1000), torch.randn(1000)
    rest = (y,) if len(overload._schema.arguments) > 1 else ()
    assert torch.equal(overload(x.clone(), *rest), functional(x, *rest))
