"""Operators that are run for their effect alone, in a graph without effect tokens.

``torch.linalg`` checks what its kernels report with ``aten._linalg_check_errors``, an operator without a result. From
version 2.13 on torch threads such operators on a token: one more input, and one more output, of the forward graph, and
of the backward graph where the backward has some. Here they are plain operators that nothing may drop or run twice;
their order is the captured one in every schedule.

Written for torch 2.11 to 2.13: the registry of effects is private.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import fx
from torch._higher_order_ops.effects import _get_effect, _register_effectful_op, with_effects
from torch.fx.node import has_side_effect

from graph_capture.errors import CaptureError

CHECK_ERRORS = torch.ops.aten._linalg_check_errors.default


@contextlib.contextmanager
def checks_without_tokens() -> Iterator[None]:
    """While AOTAutograd traces, the checks of linear algebra are operators like any other, which nobody removes."""
    has_side_effect(CHECK_ERRORS)
    known = _get_effect(CHECK_ERRORS)
    _register_effectful_op(CHECK_ERRORS, None)
    try:
        yield
    finally:
        _register_effectful_op(CHECK_ERRORS, known)


def is_effect(node: fx.Node) -> bool:
    """Whether a node is run for its effect alone: it stays, although nobody reads its result."""
    return node.target is CHECK_ERRORS


def refuse_tokens(graph: fx.Graph) -> None:
    """Raise :class:`CaptureError` for operators whose effects are ordered by tokens: printing, the user's own."""
    for node in graph.find_nodes(op="call_function", target=with_effects):
        raise CaptureError(
            f"the model calls {node.args[1]}, an operator with a side effect that torch orders by a token: a plan may "
            "run operators again and in another place. Call it outside of the forward."
        )
