"""Recurrent networks as they train in eager, where torch's decomposition of them goes wrong.

While a graph is captured, `LSTM`, `GRU` and `RNN` are decomposed into one step after another. In torch 2.11 to 2.13
(``torch._decomp.decompositions._rnn_helper``)

- the layer's number is compared the wrong way round, which sets the dropout probability between layers to zero: a
  captured network would train without dropout, in silence;
- an `LSTM` whose input needs no gradient becomes oneDNN's layer in inference mode, although its weights need one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._decomp import decompositions

_one_stack = decompositions._rnn_helper


def layer_by_layer(
    input: torch.Tensor,
    hidden: Sequence[Any],
    params: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    layer_fn: Callable[..., Any],
) -> tuple[torch.Tensor, list[Any]]:
    """In the place of `_rnn_helper`: each layer by the original, with dropout between them as in eager."""
    if layer_fn is decompositions.mkldnn_one_layer_lstm:
        layer_fn = decompositions.one_layer_lstm
    output = input.transpose(0, 1) if batch_first else input
    directions = 2 if bidirectional else 1
    final: list[Any] = []
    for layer in range(num_layers):
        own = slice(layer * directions, (layer + 1) * directions)
        output, last = _one_stack(
            output, hidden[own], params[own], has_biases, 1, 0.0, train, bidirectional, False, layer_fn
        )
        final.extend(last)
        if dropout and train and layer < num_layers - 1:
            output = torch.dropout(output, dropout, train=True)
    return (output.transpose(0, 1) if batch_first else output), final


@contextlib.contextmanager
def trained_recurrent_layers() -> Iterator[None]:
    """Within this context recurrent layers are decomposed for training, with their dropout."""
    before = decompositions._rnn_helper
    decompositions._rnn_helper = layer_by_layer
    try:
        yield
    finally:
        decompositions._rnn_helper = before
