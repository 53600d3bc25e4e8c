"""What losses, normalisations, dropout and max pooling consist of, for a compiler that fuses the parts.

As one operator a logarithmic softmax writes a tensor as large as its input, and its backward reads and writes some
more. Taken apart, all that lies in memory is a maximum and a sum for each row: the rest is pointwise, and computed in
passing by whatever reads it. Inductor's own decompositions do that, but for the gradient of the negative
log-likelihood: it scatters into zeros, and only a pass that merges what a schedule runs twice makes a comparison of it.
Here it is one from the start.

Batch normalisation, taken apart, makes its result pointwise from its input and two numbers for each channel: where the
result is wanted again, its reductions do not run again, nor does the update of the running statistics. Dropout leaves
a mask (:mod:`~graph_capture.dropout_mask`), max pooling offsets of one byte (:mod:`~graph_capture.pooling`).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._decomp import get_decompositions

from graph_capture.dropout_mask import dropout_apart
from graph_capture.graph import Compiler

aten = torch.ops.aten
MEAN, SUM = 1, 2
"""Reductions, as torch's kernels number them; 0 is none."""


@functools.cache
def decompositions_for(compiler: Compiler) -> Mapping[Any, Callable[..., Any]]:
    """The operators that are taken apart while the joint graph is traced; none for eager kernels."""
    if compiler == "eager":
        return {}
    losses = [aten._log_softmax, aten._log_softmax_backward_data, aten.nll_loss_forward, aten.nll_loss2d_forward]
    norms = [aten._native_batch_norm_legit_functional, aten.native_batch_norm_backward]
    ours: dict[Any, Callable[..., Any]] = dict.fromkeys(
        (aten.nll_loss_backward.default, aten.nll_loss2d_backward.default), nll_loss_backward
    )
    ours[aten.native_dropout.default] = dropout_apart
    pool = aten.max_pool2d_with_indices.default
    ours[pool] = _inductors_own()[pool]
    return {**get_decompositions([*losses, *norms]), **ours}


def _inductors_own() -> Mapping[Any, Callable[..., Any]]:
    """Imported where they are wanted: Inductor brings no small part of torch with it."""
    importlib.import_module("torch._inductor.lowering")  # that of max pooling looks into it
    from torch._inductor.decomposition import decompositions

    return decompositions


def nll_loss_backward(
    grad_output: torch.Tensor,
    self: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: int,
    ignore_index: int,
    total_weight: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the negative log-likelihood: minus the outer gradient at each target, 0 elsewhere.

    `self`: log-probabilities of shape (classes,), (batch, classes) or (batch, classes, height, width); `target`: of the
    same shape without the classes; (1,) where there is no batch.
    """
    class_dim = 0 if self.dim() < 2 else 1
    along_classes = [-1 if d == class_dim else 1 for d in range(self.dim())]
    if reduction == MEAN:
        grad_output = grad_output / total_weight
    if self.dim() == 1 and target.dim() > 0:
        target = target[0]
    target = target.unsqueeze(class_dim)
    if self.dim() > grad_output.dim() > 0:
        grad_output = grad_output.unsqueeze(class_dim)
    if weight is not None:
        grad_output = grad_output * weight.reshape(along_classes)
    grad_output = torch.where(target != ignore_index, grad_output, 0)
    classes = torch.arange(self.shape[class_dim], device=self.device).reshape(along_classes)
    # With an ignored target a class number that is out of range meets none: the outer gradient is 0 there anyway.
    hit = torch.where(classes == target, -1.0, 0.0).to(self.dtype)
    return hit * grad_output


def multilabel_margin_loss_forward(
    self: torch.Tensor, target: torch.Tensor, reduction: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and which classes are targets; targets end at the first -1. Torch's own goes on after it, with class 0.

    `self`: of shape (classes,) or (batch, classes); `target`: of the same shape.
    """
    scores, targets = torch.atleast_2d(self), torch.atleast_2d(target)
    classes = torch.arange(scores.shape[1], device=self.device)
    end = torch.where(targets == -1, classes, scores.shape[1]).amin(-1, keepdim=True)
    given = classes < end
    of_target = scores.gather(1, torch.where(given, targets, 0))
    hit = (torch.where(given, targets, -1).unsqueeze(-1) == classes).any(1)
    margins = (1.0 - of_target.unsqueeze(-1) + scores.unsqueeze(1)).clamp_min(0) / scores.shape[1]
    loss = torch.where(given.unsqueeze(-1) & ~hit.unsqueeze(1), margins, 0).sum((1, 2))
    if reduction == MEAN:
        loss = loss.mean()
    elif reduction == SUM:
        loss = loss.sum()
    return loss if reduction or self.dim() == 2 else loss[0], hit.to(self.dtype).reshape(target.shape)
