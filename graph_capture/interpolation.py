"""Interpolation as eager runs it: one kernel forward, one backward.

While a graph is captured, torch takes `upsample_*` (``F.interpolate``, ``nn.Upsample``) apart into index arithmetic and
gathers of all corners (``torch._decomp.decompositions``), for a compiler that fuses them again. As separate kernels
they round otherwise than eager's, and need several times its memory and time.

Written for torch 2.11 to 2.13: `py_kernels` of an operator is private.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
OPERATORS = tuple(getattr(getattr(aten, mode), overload) for mode in MODES for overload in ("default", "vec"))


@contextlib.contextmanager
def interpolation_of(compiler: Compiler) -> Iterator[None]:
    """While AOTAutograd traces for eager kernels, interpolation stays whole."""
    if compiler != "eager":
        yield
        return
    taken = [(op, key, op.py_kernels.pop(key)) for op in OPERATORS for key in KEYS if key in op.py_kernels]
    _forget_dispatch()
    try:
        yield
    finally:
        for op, key, kernel in taken:
            op.py_kernels[key] = kernel
        _forget_dispatch()


def _forget_dispatch() -> None:
    for op in OPERATORS:
        op._dispatch_cache.clear()
