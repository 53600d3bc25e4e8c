"""Operators that torch takes apart while a graph is captured, and that run whole here, as in eager.

- `upsample_*` (``F.interpolate``, ``nn.Upsample``) becomes index arithmetic and gathers of all corners, for a compiler
  that fuses them again. As separate kernels they round otherwise than eager's, and may need more memory.
- `multi_margin_loss` rounds otherwise; and of targets that end early, with a -1, `multilabel_margin_loss` becomes
  another number altogether. That one is whole for every compiler; Inductor takes apart
  :func:`~graph_capture.decompositions.multilabel_margin_loss_forward`.

Written for torch 2.11 to 2.13 (``torch._decomp.decompositions``): `py_kernels` of an operator is private.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._C import DispatchKey

from graph_capture.graph import Compiler

aten = torch.ops.aten
KEYS = (DispatchKey.Autograd, DispatchKey.CompositeImplicitAutograd)
MODES = (
    *(f"upsample_nearest{d}d" for d in (1, 2, 3)),
    *(f"_upsample_nearest_exact{d}d" for d in (1, 2, 3)),
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"),
)
UPSAMPLING = tuple(getattr(getattr(aten, mode), overload) for mode in MODES for overload in ("default", "vec"))
MISTAKEN = (aten.multilabel_margin_loss_forward.default,)
"""Operators whose decomposition computes something else."""
WHOLE_IN_EAGER = (*UPSAMPLING, *MISTAKEN, aten.multi_margin_loss.default)


@contextlib.contextmanager
def whole_operators(compiler: Compiler) -> Iterator[None]:
    """While AOTAutograd traces for the kernels of `compiler`, what they run whole is not taken apart."""
    operators = WHOLE_IN_EAGER if compiler == "eager" else MISTAKEN
    taken = [(op, key, op.py_kernels.pop(key)) for op in operators for key in KEYS if key in op.py_kernels]
    _forget_dispatch(operators)
    try:
        yield
    finally:
        for op, key, kernel in taken:
            op.py_kernels[key] = kernel
        _forget_dispatch(operators)


def _forget_dispatch(operators: Sequence[Any]) -> None:
    for op in operators:
        op._dispatch_cache.clear()
